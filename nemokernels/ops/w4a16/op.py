"""Registration of the W4A16 operators with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.nvfp4.ref import quantize_weight
from nemokernels.ops.w4a16 import ref

FAMILY = family("w4a16")


def _example_weight(device: torch.device, rows: int, columns: int):
    codes, scales, scale_2 = quantize_weight(torch.randn(rows, columns, device=device) / 7, None)
    return *ref.tile(codes, scales), scale_2


def _example_linear(device: torch.device, dtype: torch.dtype):
    x = torch.randn(2, 5, 48, device=device, dtype=dtype)
    return x, *_example_weight(device, 40, 48), 40


def _example_linear_backward(device: torch.device, dtype: torch.dtype):
    dy = torch.randn(2, 5, 40, device=device, dtype=dtype)
    return dy, *_example_weight(device, 40, 48), 48


def _example_experts(device: torch.device, dtype: torch.dtype):
    """6 tokens, 2 slots; experts 1 and 3 of four have no rows."""
    up, down = ([_example_weight(device, *s) for _ in range(4)] for s in ((80, 48), (48, 80)))
    weights = torch.rand(6, 2, device=device, dtype=acc_dtype(dtype))
    offsets = torch.tensor([5, 5, 12, 12], device=device, dtype=torch.int32)
    order = torch.tensor([0, 3, 5, 6, 10, 1, 2, 4, 7, 8, 9, 11], device=device, dtype=torch.int32)
    x = torch.randn(6, 48, device=device, dtype=dtype)
    stacked = [torch.stack(parts) for parts in (*zip(*up), *zip(*down))]
    return x, *stacked, 80, weights, offsets, order


linear_backward = register(
    FAMILY,
    "nvfp4_linear_backward(Tensor dy, Tensor codes, Tensor scales, Tensor global_scale, "
    "SymInt columns) -> Tensor",
    reference=ref.linear_backward,
    fake=lambda dy, codes, scales, global_scale, columns: dy.new_empty((*dy.shape[:-1], columns)),
    example=_example_linear_backward,
)


def _setup(ctx, inputs, output):
    x, *weight, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.columns = x.shape[-1]


def _backward(ctx, dy):
    return linear_backward(dy, *ctx.saved_tensors, ctx.columns), None, None, None, None


linear = register(
    FAMILY,
    "nvfp4_linear(Tensor x, Tensor codes, Tensor scales, Tensor global_scale, SymInt rows) "
    "-> Tensor",
    reference=ref.linear,
    fake=lambda x, codes, scales, global_scale, rows: x.new_empty((*x.shape[:-1], rows)),
    example=_example_linear,
    setup_context=_setup,
    backward=_backward,
)

experts = register(
    FAMILY,
    "nvfp4_experts(Tensor x, Tensor up_codes, Tensor up_scales, Tensor up_global_scale, "
    "Tensor down_codes, Tensor down_scales, Tensor down_global_scale, SymInt width, "
    "Tensor weights, Tensor offsets, Tensor order) -> Tensor",
    reference=ref.experts,
    fake=lambda x, *_: x.new_empty(x.shape),
    example=_example_experts,
)
