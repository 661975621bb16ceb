"""The released models: configurations, exact sizes, and what about them is not public."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from nemokernels.models.families import Config, parse_config

__all__ = ["Precision", "Variant", "find_config", "find_variant", "list_variants"]


@dataclass(frozen=True)
class Precision:
    """Which layers of a checkpoint are quantised.

    Attributes:
        rules: (pattern, algorithm) pairs; the algorithm is BF16, FP8, NVFP4 or W4A16_NVFP4. The
            first pattern that matches a linear layer's name decides; without a match it is BF16.
        kv: the key-value cache's: bf16 or fp8.
        ssm: the SSM states': fp16, or None for what the configuration says.
        assumed: what here is not public but assumed, or None.
    """

    rules: tuple[tuple[str, str], ...]
    kv: str
    ssm: str | None = None
    assumed: str | None = None


@dataclass(frozen=True)
class Variant:
    """One released model.

    Attributes:
        name: the name as its makers write it.
        family: the series it belongs to.
        hub_id: its Hugging Face repository, or None.
        other_hub_ids: repositories of models with the same tensors: another stage of training, a
            longer context, or quantised.
        published: the rounded number of parameters that its makers state, or None.
        active: how many of them are active per token, as stated, or None if all are.
        parameters, tensors: exact counts of what its checkpoint stores, or None if not known.
        config: its configuration, or None; then either ``arguments`` names the fields that are not
            public and must be given, or ``reason`` says why there is none.
        fields: what is known of its config.json.
        part: the part that ``config`` describes, if that is not the whole model.
        precisions: "fp8" or "nvfp4" -> how its quantised checkpoint is quantised, if at least part
            of that is known.
        unknown: what about it is not public.
    """

    name: str
    family: str
    hub_id: str | None
    published: str | None = None
    active: str | None = None
    parameters: int | None = None
    tensors: int | None = None
    config: Config | None = None
    fields: Mapping[str, object] = field(default_factory=dict, hash=False)
    arguments: tuple[str, ...] = ()
    reason: str | None = None
    part: str | None = None
    precisions: Mapping[str, Precision] = field(default_factory=dict, hash=False)
    unknown: tuple[str, ...] = ()
    other_hub_ids: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        """Why there is no configuration, in a few words."""
        return f"needs {', '.join(self.arguments)}" if self.arguments else self.reason

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` is its name, one of its hub ids, or the part of one after the slash.

        Case does not matter, and a space may be written as a hyphen.
        """
        ids = [hub_id for hub_id in (self.hub_id, *self.other_hub_ids) if hub_id]
        known = (self.name, *ids, *(hub_id.rpartition("/")[2] for hub_id in ids))
        return _plain(name) in map(_plain, known)


@functools.cache
def _table() -> tuple[Variant, ...]:
    text = (resources.files("nemokernels.models") / "variants.json").read_text()
    return tuple(map(_variant, json.loads(text)))


def _variant(entry: dict[str, object]) -> Variant:
    listed = ("arguments", "unknown", "other_hub_ids")
    lists = {name: tuple(entry.get(name, ())) for name in listed}
    known = entry.get("config", {})
    config = parse_config(known) if known and not lists["arguments"] else None
    precisions = {
        name: Precision(**{**fields, "rules": tuple(map(tuple, fields["rules"]))})
        for name, fields in entry.get("precisions", {}).items()
    }
    made = {"config": config, "fields": known, "precisions": precisions}
    return Variant(**{**entry, **lists, **made})


def list_variants() -> list[Variant]:
    """All released models of the Nemotron series and its predecessors, family by family."""
    return list(_table())


def find_variant(name: str) -> Variant:
    """The variant of this name, hub id, or part of a hub id after the slash.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    for variant in _table():
        if variant.answers_to(name):
            return variant
    names = [variant.name for variant in _table()]
    near = [known for known in names if name and _plain(name) in _plain(known)]
    near = near or difflib.get_close_matches(name, names, n=5)
    meant = f"did you mean {', '.join(near)}? " if near else ""
    raise ValueError(f"no variant {name!r}; {meant}`nemokernels models` lists them all")


def find_config(name_or_config: str | Config, **arguments: object) -> Config:
    """The configuration of a variant (:func:`find_variant`); a configuration is returned unchanged.

    Args:
        arguments: fields of its config.json that are not public, see ``Variant.arguments``.

    Raises:
        TypeError: neither a name nor a configuration.
        ValueError: there is no such variant, it has no configuration, or the arguments are not
            those it needs.
        ConfigError: an argument is not as it must be.
    """
    if isinstance(name_or_config, Config) and not arguments:
        return name_or_config
    if not isinstance(name_or_config, str):
        expected = "a variant's name" if arguments else "a variant's name or a configuration"
        raise TypeError(f"`name_or_config` must be {expected}, got {type(name_or_config).__name__}")
    variant = find_variant(name_or_config)
    if variant.reason is not None:
        raise ValueError(f"{variant.name} cannot be built: {variant.reason}")
    if unwanted := sorted(set(arguments) - set(variant.arguments)):
        raise ValueError(f"{variant.name} takes no argument {', '.join(unwanted)}")
    if absent := [name for name in variant.arguments if name not in arguments]:
        raise ValueError(f"{variant.name} needs {', '.join(absent)}, which are not public")
    if variant.config is not None:
        return variant.config
    return parse_config({**variant.fields, **arguments})


def _plain(name: str) -> str:
    return name.casefold().replace(" ", "-")
