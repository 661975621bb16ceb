"""Layers that keep the quantised weights of a checkpoint in memory, for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from nemokernels import (
    NVFP4,
    FP8Experts,
    NVFP4Experts,
    Route,
    SwizzledNVFP4,
    TiledNVFP4,
    _backends,
    dequantize_nvfp4,
    moe_experts,
    nvfp4_linear,
    quantize_nvfp4,
    swizzle_nvfp4,
    tile_nvfp4,
    unswizzle_scales,
    untile_nvfp4,
)
from nemokernels.models import names
from nemokernels.models.linear import Linear, each_row
from nemokernels.models.mixers import Wide
from nemokernels.models.quantization import nvfp4_of

FORMATS = {"FP8": "FP8", "NVFP4": "NVFP4", "W4A16_NVFP4": "NVFP4"}
LARGEST = 6 * 448  # of E2M1 and of a block scale: an amax is this many static scales
K_UNIT, N_UNIT = 32, 8  # of the sizes that nvfp4_linear multiplies on a GPU


class Kept(NamedTuple):
    """Parameters that are no longer in the model, and those of them whose layers run in W4A4."""

    gone: set[str]
    w4a4: set[str]


class Held(Wide):
    """Quantised weights as buffers, which follow the module to a device but never to a dtype.

    float8 is held as bytes: a cast of the model would widen it.
    """

    def __init__(self, **weights: NamedTuple):
        super().__init__()
        self.forms = {name: type(weight) for name, weight in weights.items()}
        self.eights = set()  # buffers that hold float8
        for name, weight in weights.items():
            for field, part in weight._asdict().items():
                if not isinstance(part, torch.Tensor):
                    setattr(self, f"{name}_{field}", part)
                    continue
                if part.dtype == torch.float8_e4m3fn:
                    self.eights.add(f"{name}_{field}")
                    part = part.view(torch.uint8)
                self.register_buffer(f"{name}_{field}", part)

    def held(self, name: str) -> NamedTuple:
        form = self.forms[name]
        parts = {field: getattr(self, f"{name}_{field}") for field in form._fields}
        for field in form._fields:
            if f"{name}_{field}" in self.eights:
                parts[field] = parts[field].view(torch.float8_e4m3fn)
        return form(**parts)


class HeldLinear(Held):
    """A linear layer whose weight stays in NVFP4; see :func:`nemokernels.nvfp4_linear`."""

    def forward(
        self, x: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The layer of x, or of ``act(x)``."""
        return each_row(self.product, x if act is None else act(x))

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight, made anew at every access."""
        return dequantize_nvfp4(*self.stored(), dtype=self.dtype)


class NVFP4Linear(HeldLinear):
    """With unquantised activations (W4A16)."""

    def __init__(self, weight: TiledNVFP4, dtype: torch.dtype):
        super().__init__(tiled=weight)
        self.dtype = dtype

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return nvfp4_linear(x, self.held("tiled"))

    def stored(self) -> NVFP4:
        return untile_nvfp4(self.held("tiled"))


class W4A4Linear(HeldLinear):
    """With activations in NVFP4 too, quantised by the checkpoint's static scale (W4A4).

    Results are rounded to bfloat16, whatever the dtype of the model.
    """

    def __init__(self, weight: SwizzledNVFP4, amax: torch.Tensor, dtype: torch.dtype):
        super().__init__(swizzled=weight)
        self.register_buffer("amax", amax)  # of the activations
        self.dtype = dtype

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rows = quantize_nvfp4(x.reshape(-1, x.shape[-1]), amax=self.amax, swizzled=True)
        y = nvfp4_linear(rows, self.held("swizzled"))
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def stored(self) -> NVFP4:
        codes, scales, scale_2 = self.held("swizzled")
        blocks = unswizzle_scales(scales, rows=codes.shape[0], columns=codes.shape[1] // 8)
        return NVFP4(codes, blocks, scale_2)


class KeptExperts(Held):
    """Routed experts whose matrices stay in NVFP4 or FP8; see :func:`nemokernels.moe_experts`."""

    @property
    def up_proj(self) -> TiledNVFP4 | FP8Experts | NVFP4Experts:
        return self.held("up")

    @property
    def down_proj(self) -> TiledNVFP4 | FP8Experts | NVFP4Experts:
        return self.held("down")

    def forward(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        return moe_experts(x, self.up_proj, self.down_proj, route)


def check_activations(
    where: str, activations: str | None, keep_quantized: bool, device: torch.device
) -> None:
    """Raise unless a model on ``device`` can run its NVFP4 layers so; see from_pretrained.

    Raises:
        ValueError: ``activations`` is neither None nor "nvfp4", or the weights are not kept.
        RuntimeError: the device is a GPU that does not multiply NVFP4 operands, with the reason.
    """
    if activations not in (None, "nvfp4"):
        raise ValueError(f"{where}: `activations` is {activations!r}, expected None or 'nvfp4'")
    if activations is None:
        return
    if not keep_quantized:
        raise ValueError(f"{where}: `activations` is 'nvfp4', which needs keep_quantized=True")
    if device.type == "cuda" and "csrc" not in _backends.usable("nvfp4_gemm", device):
        rejected = _backends.backends(device)["nvfp4_gemm"]["rejected"]
        why = rejected.get("csrc", "another backend is in force")
        raise RuntimeError(
            f"{where}: `activations` is 'nvfp4', which {device} does not multiply: {why}"
        )


def keep(
    model: nn.Module, sources: Iterable, read: Callable, device: torch.device, dtype: torch.dtype,
    activations: str | None = None,
) -> Kept:  # fmt: skip
    """Put the layers that can stay quantised in their places in ``model``.

    Linear layers in NVFP4, and routed experts all of whose matrices are in NVFP4, or all in FP8
    with static activation scales. With ``activations`` "nvfp4", those in NVFP4 that have activation
    scales, and sizes that the products take, run in W4A4. ``read(source, leaf)`` is a tensor of the
    source's layer, None where the file has none.

    Raises:
        ValueError: a weight is not one, or ``activations`` are asked for and no layer can.
    """
    groups: dict[str, list] = {}
    for source in sources:
        groups.setdefault(source.target, []).append(source)
    gone, w4a4, four = set(), set(), activations == "nvfp4"
    for target, group in groups.items():
        path, _, leaf = target.rpartition(".")
        if leaf == "weight" and FORMATS.get(group[0].algorithm) == "NVFP4":
            layer = model.get_submodule(path)
            if isinstance(layer, Linear) and layer.bias is None:
                if four and _takes_w4a4({"": group}, read):
                    weight = _move(_weight(group[0], read, swizzle_nvfp4), device)
                    amax = (LARGEST * read(group[0], "input_scale")).to(device)
                    model.set_submodule(path, W4A4Linear(weight, amax, dtype))
                    w4a4.add(target)
                else:
                    tiled = _move(_weight(group[0], read, tile_nvfp4), device)
                    model.set_submodule(path, NVFP4Linear(tiled, dtype))
                gone.add(target)
        if names.is_stack(target) and leaf == "up_proj":
            pair = {"up": group, "down": groups[f"{path}.down_proj"]}
            make = _maker(pair, read, four)
            if make is not None:
                stacks = {name: make(name, group, device) for name, group in pair.items()}
                model.set_submodule(path, KeptExperts(**stacks))
                both = {target, f"{path}.down_proj"}
                gone |= both
                w4a4 |= both if isinstance(stacks["up"], NVFP4Experts) else set()
    if four and not w4a4:
        raise ValueError("`activations` is 'nvfp4', but no layer in NVFP4 has an activation scale")
    return Kept(gone, w4a4)


def _maker(pair: dict[str, list], read: Callable, four: bool) -> Callable | None:
    """What stacks the experts of both projections; None if they have to be dequantised."""
    formats = {FORMATS.get(source.algorithm) for group in pair.values() for source in group}
    if formats == {"NVFP4"} and not (four and _takes_w4a4(pair, read)):
        return lambda name, group, device: _stacked(
            (_weight(source, read, tile_nvfp4) for source in group), len(group), device
        )
    if formats not in ({"FP8"}, {"NVFP4"}) or not _has_scales(pair, read):
        return None

    def make(name: str, group: list, device: torch.device) -> FP8Experts | NVFP4Experts:
        scales = torch.stack([read(source, "input_scale") for source in group])
        if formats == {"FP8"}:
            every = (FP8Experts(read(s, "weight"), read(s, "weight_scale"), scales) for s in group)
        else:
            every = (NVFP4Experts(*_weight(s, read, swizzle_nvfp4), scales) for s in group)
        stack = _stacked(every, len(group), device)
        # x is quantised once for all experts, by the scale under which none of them saturates.
        return stack._replace(input_scale=(scales.amax() if name == "up" else scales).to(device))

    return make


def _has_scales(groups: dict[str, list], read: Callable) -> bool:
    """Whether all these layers have a static activation scale that something can be divided by."""
    found = [read(source, "input_scale") for group in groups.values() for source in group]
    return all(scale is not None and scale > 0 for scale in found)


def _takes_w4a4(groups: dict[str, list], read: Callable) -> bool:
    """Whether these NVFP4 layers can multiply activations in NVFP4."""
    if not _has_scales(groups, read):
        return False
    shapes = (read(group[0], "weight").shape for group in groups.values())
    return all(2 * half % K_UNIT == 0 == rows % N_UNIT for rows, half in shapes)


def _weight(source, read: Callable, arrange: Callable) -> NamedTuple:
    return arrange(nvfp4_of(source.module, lambda leaf: read(source, leaf)))


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
