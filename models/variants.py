"""The released models: their configurations and exact sizes."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

from nemokernels.models.families import Config, parse_config

__all__ = ["Variant", "find_config", "list_variants"]


@dataclass(frozen=True)
class Variant:
    """One released model. ``parameters`` and ``tensors`` count what its checkpoint stores."""

    name: str
    config: Config
    parameters: int
    tensors: int


@functools.cache
def _table() -> dict[str, Variant]:
    text = (resources.files("nemokernels.models") / "variants.json").read_text()
    return {
        entry["name"]: Variant(
            entry["name"],
            parse_config(entry["config"]),
            entry["parameters"],
            entry["tensors"],
        )
        for entry in json.loads(text)
    }


def list_variants() -> list[Variant]:
    """Every model :func:`nemokernels.models.build` knows; named by its Hugging Face id if any."""
    return list(_table().values())


def find_config(name_or_config: str | Config) -> Config:
    """The configuration of a variant, by its full name or the part after the slash.

    Raises:
        TypeError: neither a name nor a configuration.
        ValueError: no variant has this name; the message lists them.
    """
    if isinstance(name_or_config, Config):
        return name_or_config
    if not isinstance(name_or_config, str):
        raise TypeError(
            "`name_or_config` must be a variant's name or a configuration, got "
            f"{type(name_or_config).__name__}"
        )
    for name, variant in _table().items():
        if name_or_config in (name, name.rpartition("/")[2]):
            return variant.config
    raise ValueError(f"no variant {name_or_config!r}; there are {', '.join(_table())}")
