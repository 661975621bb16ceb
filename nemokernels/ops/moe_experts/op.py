"""Registration of moe_experts with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.moe_experts import ref

FAMILY = family("moe_experts")


def _example(device: torch.device, dtype: torch.dtype):
    """6 tokens, 2 slots; experts 1 and 3 of four have no rows."""
    randn = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    weights = torch.rand(6, 2, device=device, dtype=acc_dtype(dtype))
    offsets = torch.tensor([5, 5, 12, 12], device=device, dtype=torch.int32)
    order = torch.tensor([0, 3, 5, 6, 10, 1, 2, 4, 7, 8, 9, 11], device=device, dtype=torch.int32)
    return randn(6, 10), randn(4, 7, 10) / 3, randn(4, 10, 7) / 3, weights, offsets, order


def _example_backward(device: torch.device, dtype: torch.dtype):
    args = _example(device, dtype)
    return torch.randn_like(args[0]), *args, ref.forward(*args)[1]


def _fake(x, up, down, weights, offsets, order):
    return x.new_empty(x.shape), x.new_empty((order.shape[0], up.shape[1]))


def _fake_backward(dy, x, up, down, weights, offsets, order, hidden):
    return tuple(t.new_empty(t.shape) for t in (x, up, down, weights))


moe_experts_backward = register(
    FAMILY,
    "moe_experts_backward(Tensor dy, Tensor x, Tensor up, Tensor down, Tensor weights, "
    "Tensor offsets, Tensor order, Tensor hidden) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=ref.backward,
    fake=_fake_backward,
    example=_example_backward,
)


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, dy, _dhidden):
    return *moe_experts_backward(dy, *ctx.saved_tensors), None, None


moe_experts = register(
    FAMILY,
    "moe_experts(Tensor x, Tensor up, Tensor down, Tensor weights, Tensor offsets, Tensor order) "
    "-> (Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    setup_context=_setup,
    backward=_backward,
)
