"""Cut a smaller Nemotron-H model out of a larger one: which part of every tensor stays.

Elastic checkpoints sort their components by importance, so that a nested model keeps the first
components along every axis. The axes are:

* ``hidden_size``: the first channels of the residual stream.
* ``mamba_num_heads``: the first heads of every group. The heads of a group are neighbours and share
  B and C, so every group loses equally many.
* ``mamba_head_dim``: the first channels of every Mamba head.
* ``num_attention_heads``: the first query heads of every key-value head; keys and values stay.
* ``intermediate_size``, ``moe_intermediate_size``, ``moe_shared_expert_intermediate_size``: the
  first neurons of an MLP, of every expert, of the shared expert.
* ``n_routed_experts``: the first experts.
* ``moe_latent_size``: the first channels between the latent projections.
* ``layers``: the layers that stay; the residual stream bypasses the others.

State size, groups and key-value heads are fixed. A norm averages over the channels that stay, as in
training. Sources: Taghibakhshi et al., "Minitron-SSM", 2025, and "Nemotron Elastic", 2025.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from nemokernels.models.config import WORDS, NemotronHConfig
from nemokernels.models.fields import ConfigError, check_object, check_type, show
from nemokernels.models.reward_config import RewardConfig

__all__ = ["Cut", "Slicing", "take"]

Ranges = tuple[tuple[int, int], ...]  # half-open, ascending

# Axis -> the kinds of layers that have it.
_ALIKE = {"hidden_size": "M*-E", "mamba_num_heads": "M", "mamba_head_dim": "M",
          "num_attention_heads": "*", "moe_latent_size": "E"}  # fmt: skip
_BY_LAYER = {"intermediate_size": "-", "n_routed_experts": "E", "moe_intermediate_size": "E",
             "moe_shared_expert_intermediate_size": "E"}  # fmt: skip
AXES = {**_ALIKE, **_BY_LAYER}
_LAYER = re.compile(r"(?P<part>backbone|mtp)\.layers\.(?P<index>\d+)\.(?P<leaf>.+)")
_EXPERT = re.compile(r"experts\.(?P<index>\d+)\.(?P<leaf>(?:up|down)_proj)\.weight")


class Cut(NamedTuple):
    """What becomes of a tensor: its new name, and the ranges that stay in every dimension."""

    name: str
    kept: tuple[Ranges, ...]


def take(tensor: torch.Tensor, kept: tuple[Ranges, ...]) -> torch.Tensor:
    """The part of ``tensor`` inside the ranges, given for every dimension."""
    for dim, ranges in enumerate(kept):
        if ranges != _first(tensor.shape[dim]):
            parts = [tensor.narrow(dim, start, stop - start) for start, stop in ranges]
            tensor = torch.cat(parts, dim)
    return tensor


def length(ranges: Ranges) -> int:
    """How many positions the ranges cover."""
    return sum(stop - start for start, stop in ranges)


class Slicing:
    """Which part of every tensor of a model belongs to a nested one.

    Args:
        parent: the configuration of the whole model.
        widths: axis -> width. For an axis on which layers may differ, the width may also be an
            object that maps indices of the parent's layers to widths (the MTP block's layers follow
            the trunk's). ``layers`` is a list of indices. What is not named stays as it is.

    Attributes:
        child: the nested model's configuration.
        layers: indices of the parent's layers that stay, the MTP block's included.

    Raises:
        ConfigError: an unknown axis, one that the parent does not have, a width above the parent's
            or off a group's boundary, or sizes that no model can have.
    """

    def __init__(self, parent: NemotronHConfig, widths: Mapping[str, object]):
        if type(parent) is not NemotronHConfig:
            kind = "a reward model" if isinstance(parent, RewardConfig) else parent.model_type
            raise ConfigError(f"only nemotron_h can be sliced, not {kind}")
        check_object(widths, "widths")
        self.parent, self._letters = parent, parent.pattern + parent.mtp_pattern
        widths = dict(widths)
        trunk = _trunk(parent, widths.pop("layers", None))
        self.layers = [*trunk, *range(len(parent.pattern), len(self._letters))]
        for axis in widths:
            if axis not in AXES:
                raise ConfigError(f"`{axis}` is no axis, expected one of {', '.join(AXES)}, layers")
            if not any(self._letters[index] in AXES[axis] for index in self.layers):
                raise ConfigError(f"`{axis}`: no layer has it")
        alike = {axis: widths[axis] for axis in _ALIKE if axis in widths}
        for axis, width in alike.items():
            _check_width(axis, width, getattr(parent, axis))
        _check_groups(parent, widths)
        own = {axis: self._by_layer(axis, widths.get(axis, {})) for axis in _BY_LAYER}
        self.child = self._config(alike, own)

    def cut(self, name: str) -> Cut | None:
        """What becomes of the parent's tensor ``name``, or None if nothing of it stays.

        ``name`` is that of a published checkpoint, or of a stack of experts in memory.
        """
        hidden, match = _first(self.child.hidden_size), _LAYER.fullmatch(name)
        if match is None:
            rows = () if name == "backbone.norm_f.weight" else (_first(self.parent.vocab_size),)
            return Cut(name, (*rows, hidden))
        part, number, leaf = match["part"], int(match["index"]), match["leaf"]
        old = number if part == "backbone" else len(self.parent.pattern) + number
        if old not in self.layers:
            return None
        new = self.layers.index(old)
        if leaf.startswith("mixer."):
            before, after = self.parent.layers[old], self.child.layers[new]
            kept = _mixer(before, after, self._letters[old], leaf.removeprefix("mixer."))
        elif leaf == "eh_proj.weight":
            kept = (hidden, hidden + _shift(hidden, self.parent.hidden_size))
        else:  # a norm
            kept = (hidden,)
        number = new if part == "backbone" else number
        return None if kept is None else Cut(f"{part}.layers.{number}.{leaf}", kept)

    def _by_layer(self, axis: str, widths: object) -> dict[int, int]:
        """Width of every layer that stays and has this axis."""
        layers = [index for index in self.layers if self._letters[index] in _BY_LAYER[axis]]
        if not isinstance(widths, Mapping):
            widths = dict.fromkeys(layers, widths)
        numbers = {str(index): index for index in layers}
        for key in widths:
            if str(key) not in numbers:
                raise ConfigError(f"`{axis}`: {show(key)} is no layer that stays and has it")
        own = {index: getattr(self.parent.layers[index], axis) for index in layers}
        for key, width in widths.items():
            index = numbers[str(key)]
            _check_width(f"{axis} of layer {index}", width, own[index])
            own[index] = width
        return own

    def _config(self, alike: dict[str, int], own: dict[str, dict[int, int]]) -> NemotronHConfig:
        parent, trunk = self.parent, len(self.layers) - len(self.parent.mtp_pattern)
        own = {**own, "num_experts_per_tok": {
            index: parent.layers[index].num_experts_per_tok
            for index in self.layers if self._letters[index] == "E"
        }}  # fmt: skip
        common, blocks = dict(alike), [self._block(index, own) for index in self.layers]
        for axis, sizes in own.items():
            if len(set(sizes.values())) == 1:
                common[axis] = next(iter(sizes.values()))
        if all(axis in common or not own[axis] for axis in own):
            blocks = None
        named = {"model_type", "architectures"}  # they follow from the rest
        return dataclasses.replace(
            parent,
            **common,
            hybrid_override_pattern="".join(self._letters[i] for i in self.layers[:trunk]),
            block_configs=blocks and tuple(blocks[:trunk]),
            mtp_block_configs=(blocks and tuple(blocks[trunk:])) or None,
            extra={name: value for name, value in parent.extra.items() if name not in named},
        )

    def _block(self, index: int, own: dict[str, dict[int, int]]) -> dict[str, object]:
        sizes = {axis: of_layer[index] for axis, of_layer in own.items() if index in of_layer}
        return {"block_type": WORDS[self._letters[index]], **sizes}


def _mixer(
    old: NemotronHConfig, new: NemotronHConfig, letter: str, leaf: str
) -> tuple[Ranges, ...] | None:
    """The ranges of a mixer's tensor that stay, from the layer's sizes before and after."""
    hidden = _first(new.hidden_size)
    if letter == "*":
        group = old.num_attention_heads // old.num_key_value_heads
        keep = new.num_attention_heads // new.num_key_value_heads
        queries = _units(_groups(old.num_key_value_heads, group, keep), old.head_dim, old.head_dim)
        keys = _first(old.num_key_value_heads * old.head_dim)
        weights = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden),
                   "o": (hidden, queries)}  # fmt: skip
        return weights[leaf.removesuffix("_proj.weight")]
    if letter == "M":
        return _mamba(old, new)[leaf]
    if letter == "-":
        return _mlp(hidden, new.intermediate_size, leaf)
    experts, latent = _first(new.n_routed_experts), hidden
    if new.moe_latent_size is not None:
        latent = _first(new.moe_latent_size)
    if match := _EXPERT.fullmatch(leaf):
        stays = int(match["index"]) < new.n_routed_experts
        wanted = f"{match['leaf']}.weight"
        return _mlp(latent, new.moe_intermediate_size, wanted) if stays else None
    if leaf.startswith("shared_experts."):
        width = new.moe_shared_expert_intermediate_size
        return _mlp(hidden, width, leaf.removeprefix("shared_experts."))
    inner = _first(new.moe_intermediate_size)
    return {
        "gate.weight": (experts, hidden),
        "gate.e_score_correction_bias": (experts,),
        "experts.up_proj": (experts, inner, latent),
        "experts.down_proj": (experts, latent, inner),
        "fc1_latent_proj.weight": (latent, hidden),
        "fc2_latent_proj.weight": (hidden, latent),
    }[leaf]


def _mlp(width: Ranges, inner: int, leaf: str) -> tuple[Ranges, ...]:
    return {"up_proj.weight": (_first(inner), width), "down_proj.weight": (width, _first(inner))}[
        leaf
    ]


def _mamba(old: NemotronHConfig, new: NemotronHConfig) -> dict[str, tuple[Ranges, ...]]:
    hidden, inner, shared = _first(new.hidden_size), old.d_inner, old.conv_dim - old.d_inner
    heads = _groups(
        old.n_groups, old.mamba_num_heads // old.n_groups, new.mamba_num_heads // new.n_groups
    )
    x = _units(heads, old.mamba_head_dim, new.mamba_head_dim)
    channels = x + ((inner, inner + shared),)  # x, then B and C, which stay whole
    rows = x + _shift(channels, inner) + _shift(heads, 2 * inner + shared)  # z, x, B, C, dt
    return {
        "in_proj.weight": (rows, hidden),
        "conv1d.weight": (channels, _first(1), _first(old.conv_kernel)),
        "conv1d.bias": (channels,),
        **dict.fromkeys(("A_log", "D", "dt_bias"), (heads,)),
        "norm.weight": (x,),
        "out_proj.weight": (hidden, x),
    }


def _first(size: int) -> Ranges:
    return ((0, size),)


def _shift(ranges: Ranges, by: int) -> Ranges:
    return tuple((start + by, stop + by) for start, stop in ranges)


def _groups(groups: int, size: int, keep: int) -> Ranges:
    """The first ``keep`` of every ``size``, ``groups`` times."""
    if keep == size:
        return _first(groups * size)
    return tuple((group * size, group * size + keep) for group in range(groups))


def _units(ranges: Ranges, size: int, keep: int) -> Ranges:
    """Inside ranges of units of ``size`` positions, the first ``keep`` positions of every unit."""
    if keep == size:
        return tuple((start * size, stop * size) for start, stop in ranges)
    units = [unit for start, stop in ranges for unit in range(start, stop)]
    return tuple((unit * size, unit * size + keep) for unit in units)


def _trunk(parent: NemotronHConfig, layers: object) -> list[int]:
    """Indices of the trunk's layers that stay."""
    count = len(parent.pattern)
    if layers is None:
        return list(range(count))
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ConfigError(f"`layers` must be a list of layer numbers, got {show(layers)}")
    before = -1
    for index in layers:
        good = isinstance(index, int) and not isinstance(index, bool)
        if not good or not before < index < count:
            raise ConfigError(f"`layers` must ascend within 0 to {count - 1}, got {show(index)}")
        before = index
    return list(layers)


def _check_width(where: str, width: object, parent: int | None) -> None:
    if parent is None:
        raise ConfigError(f"`{where}`: the model has none")
    check_type(where, width, "int")
    if width > parent:
        raise ConfigError(f"`{where}` is {width}, wider than the parent's {parent}")


def _check_groups(parent: NemotronHConfig, widths: Mapping[str, object]) -> None:
    for axis, groups in (("mamba_num_heads", "n_groups"),
                         ("num_attention_heads", "num_key_value_heads")):  # fmt: skip
        if axis in widths and widths[axis] % getattr(parent, groups):
            raise ConfigError(f"`{axis}` is {widths[axis]}, off the boundaries of the "
                              f"{getattr(parent, groups)} groups")  # fmt: skip
    if "n_routed_experts" in widths and parent.n_group > 1:
        raise ConfigError(f"`n_routed_experts`: experts in {parent.n_group} groups have no prefix")
