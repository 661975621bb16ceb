"""Registration of attention and attention_with_cache with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.attention import ref

FAMILY = family("attention")


def _example(device: torch.device, dtype: torch.dtype):
    q = torch.randn(1, 11, 4, 8, device=device, dtype=dtype)
    k = torch.randn(1, 11, 2, 8, device=device, dtype=dtype)
    bounds = torch.tensor([0, 4, 4, 11], dtype=torch.int32, device=device)
    return q, k, torch.randn_like(k), bounds, 8**-0.5


def _example_backward(device: torch.device, dtype: torch.dtype):
    q, k, v, bounds, scale = _example(device, dtype)
    out, lse = ref.forward(q, k, v, bounds, scale)
    return torch.randn_like(out), q, k, v, out, lse, bounds, scale


def _example_cache(device: torch.device, dtype: torch.dtype):
    q = torch.randn(3, 2, 4, 8, device=device, dtype=dtype)
    k = torch.randn(3, 2, 2, 8, device=device, dtype=dtype)
    cache = torch.randn(4, 9, 2, 8, device=device, dtype=dtype)
    lengths = torch.tensor([5, 0, 7], dtype=torch.int32, device=device)
    slots = torch.tensor([3, -1, 0], dtype=torch.int32, device=device)
    return q, k, torch.randn_like(k), cache, torch.randn_like(cache), lengths, slots, 8**-0.5


def _fake(q, k, v, cu_seqlens, scale):
    rows, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((rows, heads, length), dtype=acc_dtype(q))


attention_backward = register(
    FAMILY,
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? cu_seqlens, float scale) -> (Tensor, Tensor, Tensor)",
    reference=ref.backward,
    fake=lambda dout, q, k, v, *rest: tuple(t.new_empty(t.shape) for t in (q, k, v)),
    example=_example_backward,
)


def _setup(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, dout, _dlse):
    return *attention_backward(dout, *ctx.saved_tensors, ctx.scale), None, None


attention = register(
    FAMILY,
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float scale) -> (Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    setup_context=_setup,
    backward=_backward,
)

attention_with_cache = register(
    FAMILY,
    "attention_with_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor lengths, Tensor slots, float scale) -> Tensor",
    reference=ref.with_cache,
    fake=lambda q, *rest: q.new_empty(q.shape),
    example=_example_cache,
)
