"""The released models of the family: their configurations and exact sizes."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

from nemokernels.models.config import NemotronHConfig

__all__ = ["Variant", "find_config", "list_variants"]


@dataclass(frozen=True)
class Variant:
    """One released model. ``parameters`` and ``tensors`` count what its checkpoint stores."""

    name: str
    config: NemotronHConfig
    parameters: int
    tensors: int


@functools.cache
def _table() -> dict[str, Variant]:
    text = (resources.files("nemokernels.models") / "variants.json").read_text()
    return {
        entry["name"]: Variant(
            entry["name"],
            NemotronHConfig.from_dict(entry["config"]),
            entry["parameters"],
            entry["tensors"],
        )
        for entry in json.loads(text)
    }


def list_variants() -> list[Variant]:
    """Every model that :func:`nemokernels.models.build` knows by name, its Hugging Face id."""
    return list(_table().values())


def find_config(name_or_config: str | NemotronHConfig) -> NemotronHConfig:
    """The configuration of a variant, by its full name or the part after the slash.

    Raises:
        TypeError: neither a name nor a configuration.
        ValueError: no variant has this name; the message lists them.
    """
    if isinstance(name_or_config, NemotronHConfig):
        return name_or_config
    if not isinstance(name_or_config, str):
        raise TypeError(
            "`name_or_config` must be a variant's name or a NemotronHConfig, got "
            f"{type(name_or_config).__name__}"
        )
    for name, variant in _table().items():
        if name_or_config in (name, name.rpartition("/")[2]):
            return variant.config
    raise ValueError(f"no variant {name_or_config!r}; there are {', '.join(_table())}")
