"""Sizes that differ between layers: the ``block_configs`` of a Nemotron-H configuration.

There is one entry per layer, ``{"block_type": "moe", "n_routed_experts": 256, ...}``; its fields
replace those of the whole configuration for this layer. ``mtp_block_configs`` does the same for the
MTP block. Such a configuration has the ``model_type`` ``nemotron_h_puzzle``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from nemokernels.models.fields import ConfigError, check_object, show

__all__ = ["BLOCKS", "MTP_BLOCKS", "block_types", "check_blocks", "layer_configs"]

BLOCKS, MTP_BLOCKS = "block_configs", "mtp_block_configs"
# The fields that an entry may replace. None of them changes the state that a layer keeps.
PER_LAYER = (
    "intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
)


def block_types(name: str, blocks: object) -> list[object]:
    """The ``block_type`` of every entry of the list ``name``.

    Raises:
        ConfigError: it is not a list of objects with that field.
    """
    if not isinstance(blocks, (list, tuple)):
        raise ConfigError(f"`{name}` must be a list, got {show(blocks)}")
    for index, entry in enumerate(blocks):
        check_object(entry, f"{name}[{index}]")
        if "block_type" not in entry:
            raise ConfigError(f"`{name}[{index}].block_type` is missing")
    return [entry["block_type"] for entry in blocks]


def check_blocks(config) -> None:
    """Raise unless every list of blocks has one entry per layer."""
    for name, pattern in ((BLOCKS, config.pattern), (MTP_BLOCKS, config.mtp_pattern)):
        blocks = getattr(config, name)
        if blocks is not None and len(blocks) != len(pattern):
            raise ConfigError(f"`{name}` has {len(blocks)} entries for {len(pattern)} layers")
    if config.block_configs is None and config.mtp_block_configs is not None:
        raise ConfigError(f"`{MTP_BLOCKS}` needs `{BLOCKS}`")


def layer_configs(config) -> tuple:
    """One configuration per layer of trunk and MTP block; without entries it is ``config`` itself.

    Raises:
        ConfigError: an entry replaces a field that it may not, or a layer's sizes do not fit
            together.
    """
    return (
        *_configs(config, BLOCKS, config.pattern),
        *_configs(config, MTP_BLOCKS, config.mtp_pattern),
    )


def _configs(config, name: str, letters: str) -> Iterable:
    blocks = getattr(config, name)
    if blocks is None:
        return [config] * len(letters)
    return [
        _replaced(config, f"{name}[{index}]", entry, letter)
        for index, (entry, letter) in enumerate(zip(blocks, letters, strict=True))
    ]


def _replaced(config, where: str, entry: Mapping[str, object], letter: str):
    own = {spec.name for spec in dataclasses.fields(config)} - {"extra", BLOCKS, MTP_BLOCKS}
    common = {**config.extra, **{name: getattr(config, name) for name in own}}
    new = {}
    for name, value in entry.items():
        if name in PER_LAYER:
            new[name] = value if value is not None else getattr(config, name)
        elif name == "block_type" or value is None or value is False:
            pass  # the pattern has its letter; or an option that is off
        elif name not in common or value != common[name]:
            raise ConfigError(
                f"`{where}.{name}` is {show(value)}; a layer may only have its own "
                f"{', '.join(PER_LAYER)}"
            )
    try:
        return dataclasses.replace(
            config, hybrid_override_pattern=letter, num_nextn_predict_layers=0,
            mtp_hybrid_override_pattern="", block_configs=None, mtp_block_configs=None, **new,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"`{where}`: {error}") from None
