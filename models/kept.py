"""Layers that keep the quantised weights of a checkpoint in memory, for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from nemokernels import (
    NVFP4,
    FP8Experts,
    Route,
    TiledNVFP4,
    dequantize_nvfp4,
    moe_experts,
    nvfp4_linear,
    tile_nvfp4,
    untile_nvfp4,
)
from nemokernels.models import names
from nemokernels.models.linear import Linear, each_row
from nemokernels.models.mixers import Wide

FORMATS = {"FP8": "FP8", "NVFP4": "NVFP4", "W4A16_NVFP4": "NVFP4"}


class Held(Wide):
    """Quantised weights as buffers, which follow the module to a device but never to a dtype.

    float8 is held as bytes: a cast of the model would widen it.
    """

    def __init__(self, **weights: NamedTuple):
        super().__init__()
        self.forms = {name: type(weight) for name, weight in weights.items()}
        for name, weight in weights.items():
            for field, part in weight._asdict().items():
                if not isinstance(part, torch.Tensor):
                    setattr(self, f"{name}_{field}", part)
                    continue
                eight = part.dtype == torch.float8_e4m3fn
                self.register_buffer(f"{name}_{field}", part.view(torch.uint8) if eight else part)

    def held(self, name: str) -> NamedTuple:
        form = self.forms[name]
        parts = {field: getattr(self, f"{name}_{field}") for field in form._fields}
        if form is FP8Experts:
            parts["values"] = parts["values"].view(torch.float8_e4m3fn)
        return form(**parts)


class NVFP4Linear(Held):
    """A linear layer whose weight stays in NVFP4; see :func:`nemokernels.nvfp4_linear`."""

    def __init__(self, weight: TiledNVFP4, dtype: torch.dtype):
        super().__init__(tiled=weight)
        self.dtype = dtype

    def forward(
        self, x: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The layer of x, or of ``act(x)``."""
        x, tiled = x if act is None else act(x), self.held("tiled")
        return each_row(lambda rows: nvfp4_linear(rows, tiled), x)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight, made anew at every access."""
        return dequantize_nvfp4(*untile_nvfp4(self.held("tiled")), dtype=self.dtype)


class KeptExperts(Held):
    """Routed experts whose matrices stay in NVFP4 or FP8; see :func:`nemokernels.moe_experts`."""

    @property
    def up_proj(self) -> TiledNVFP4 | FP8Experts:
        return self.held("up")

    @property
    def down_proj(self) -> TiledNVFP4 | FP8Experts:
        return self.held("down")

    def forward(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        return moe_experts(x, self.up_proj, self.down_proj, route)


def keep(
    model: nn.Module, sources: Iterable, read: Callable, device: torch.device, dtype: torch.dtype
) -> set[str]:
    """Put the layers that can stay quantised in their places in ``model``.

    Linear layers in NVFP4, and routed experts all of whose matrices are in NVFP4, or all in FP8
    with static activation scales. ``read(source, leaf)`` is a tensor of the source's layer, None
    where the file has none. Returns the parameters that are no longer there.
    """
    groups: dict[str, list] = {}
    for source in sources:
        groups.setdefault(source.target, []).append(source)
    gone = set()
    for target, group in groups.items():
        path, _, leaf = target.rpartition(".")
        if leaf == "weight" and FORMATS.get(group[0].algorithm) == "NVFP4":
            layer = model.get_submodule(path)
            if isinstance(layer, Linear) and layer.bias is None:
                tiled = _move(_tiled(group[0], read), device)
                model.set_submodule(path, NVFP4Linear(tiled, dtype))
                gone.add(target)
        if names.is_stack(target) and leaf == "up_proj":
            pair = {"up": group, "down": groups[f"{path}.down_proj"]}
            make = _maker(pair, read)
            if make is not None:
                stacks = {name: make(name, group, device) for name, group in pair.items()}
                model.set_submodule(path, KeptExperts(**stacks))
                gone |= {target, f"{path}.down_proj"}
    return gone


def _maker(pair: dict[str, list], read: Callable) -> Callable | None:
    """What stacks the experts of both projections; None if they have to be dequantised."""
    formats = {FORMATS.get(source.algorithm) for group in pair.values() for source in group}
    if formats == {"NVFP4"}:
        return lambda name, group, device: _stacked(
            (_tiled(source, read) for source in group), len(group), device
        )
    if formats != {"FP8"}:
        return None
    scales = {name: [read(source, "input_scale") for source in group]
              for name, group in pair.items()}  # fmt: skip
    if not all(s is not None and s > 0 for found in scales.values() for s in found):
        return None

    def make(name: str, group: list, device: torch.device) -> FP8Experts:
        # x is quantised once for all experts, by the scale under which none of them saturates.
        found = torch.stack(scales[name])
        every = (FP8Experts(read(s, "weight"), read(s, "weight_scale"), found) for s in group)
        stack = _stacked(every, len(group), device)
        return stack._replace(input_scale=(found.amax() if name == "up" else found).to(device))

    return make


def _tiled(source, read: Callable) -> TiledNVFP4:
    parts = [read(source, leaf) for leaf in ("weight", "weight_scale", "weight_scale_2")]
    try:
        return tile_nvfp4(NVFP4(*parts))
    except ValueError as error:
        raise ValueError(f"{source.module}: {error}") from None


def _stacked(weights: Iterable[NamedTuple], count: int, device: torch.device) -> NamedTuple:
    """One weight after the other copied into stacks, so that memory stays at about one model."""
    stack = None
    for index, weight in enumerate(weights):
        if stack is None:
            stack = weight._replace(**{
                name: torch.empty((count, *part.shape), dtype=part.dtype, device=device)
                for name, part in weight._asdict().items() if isinstance(part, torch.Tensor)
            })  # fmt: skip
        for into, part in zip(stack, weight):
            if isinstance(part, torch.Tensor):
                into[index].copy_(part)
    return stack


def _move(weight: NamedTuple, device: torch.device) -> NamedTuple:
    return type(weight)(*(p.to(device) if isinstance(p, torch.Tensor) else p for p in weight))
