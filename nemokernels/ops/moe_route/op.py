"""Registration of moe_route with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.moe_route import ref

FAMILY = family("moe_route")


def _example(device: torch.device, dtype: torch.dtype):
    logits = torch.randn(7, 12, device=device, dtype=dtype)
    bias = 0.1 * torch.randn(12, device=device, dtype=acc_dtype(dtype))
    return logits, bias, 3, 3, 2, True, 2.5


def _example_backward(device: torch.device, dtype: torch.dtype):
    args = _example(device, dtype)
    weights, experts, *_ = ref.forward(*args)
    return torch.randn_like(weights), args[0], experts, *args[5:]


def _fake(logits, correction_bias, top_k, n_group, topk_group, norm_topk_prob, scale):
    tokens, experts = logits.shape
    integers = lambda *shape: logits.new_empty(shape, dtype=torch.int32)  # noqa: E731
    return (
        logits.new_empty((tokens, top_k), dtype=acc_dtype(logits)),
        integers(tokens, top_k),
        integers(experts),
        integers(experts),
        integers(tokens * top_k),
    )


moe_route_backward = register(
    FAMILY,
    "moe_route_backward(Tensor dweights, Tensor logits, Tensor experts, bool norm_topk_prob, "
    "float scale) -> Tensor",
    reference=ref.backward,
    fake=lambda dweights, logits, experts, norm, scale: logits.new_empty(logits.shape),
    example=_example_backward,
)


def _setup(ctx, inputs, output):
    logits, _, _, _, _, ctx.norm_topk_prob, ctx.scale = inputs
    _, experts, counts, offsets, order = output
    ctx.mark_non_differentiable(experts, counts, offsets, order)
    ctx.save_for_backward(logits, experts)


def _backward(ctx, dweights, *_):
    dlogits = moe_route_backward(dweights, *ctx.saved_tensors, ctx.norm_topk_prob, ctx.scale)
    return dlogits, None, None, None, None, None, None


moe_route = register(
    FAMILY,
    "moe_route(Tensor logits, Tensor? correction_bias, int top_k, int n_group, int topk_group, "
    "bool norm_topk_prob, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    setup_context=_setup,
    backward=_backward,
)
