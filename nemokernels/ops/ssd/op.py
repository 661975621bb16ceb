"""Registration of the Mamba-2 chunk scan with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.ssd import ref

FAMILY = family("ssd")

_OPTIONS = "int chunk_size, bool dt_softplus, float dt_min, float dt_max, ScalarType? state_dtype"
_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens"
)


def _example(device: torch.device, dtype: torch.dtype):
    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device=device, dtype=dtype)

    wide = acc_dtype(dtype)
    bounds = torch.tensor([0, 9, 9, 10, 21], dtype=torch.int32, device=device)
    return (
        randn(1, 23, 4, 8),
        randn(1, 23, 4),
        -randn(4, dtype=wide).exp(),
        randn(1, 23, 2, 16),
        randn(1, 23, 2, 16),
        randn(4, dtype=wide),
        randn(1, 23, 4, 8),
        randn(4, dtype=wide),
        randn(4, 4, 8, 16),
        None,
        bounds,
        8,
        True,
        0.0,
        float("inf"),
        None,
    )


def _example_backward(device: torch.device, dtype: torch.dtype):
    args = _example(device, dtype)
    out, final, ungated = ref.forward(*args)
    return torch.randn_like(out), torch.randn_like(final), *args[:11], ungated, *args[11:]


def _fake(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, *options):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty(rows, *x.shape[2:], B.shape[3], dtype=acc_dtype(x))
    return x.new_empty(x.shape), final, x.new_empty(0 if z is None else x.shape)


def _fake_backward(dout, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, *rest):
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


ssd_chunk_scan_backward = register(
    FAMILY,
    f"ssd_chunk_scan_backward(Tensor dout, Tensor dfinal, {_INPUTS}, Tensor ungated, {_OPTIONS}) "
    f"-> ({', '.join(['Tensor'] * 9)})",
    reference=ref.backward,
    fake=_fake_backward,
    example=_example_backward,
)


def _setup(ctx, inputs, output):
    _, _, ungated = output
    ctx.mark_non_differentiable(ungated)
    ctx.options = inputs[11:]
    ctx.save_for_backward(*inputs[:11], ungated)


def _backward(ctx, dout, dfinal, _dungated):
    saved = ctx.saved_tensors
    grads = ssd_chunk_scan_backward(dout, dfinal, *saved, *ctx.options)
    grads = tuple(None if t is None else grad for t, grad in zip(saved, grads))
    return *grads, None, None, *[None] * len(ctx.options)


ssd_chunk_scan = register(
    FAMILY,
    f"ssd_chunk_scan({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    setup_context=_setup,
    backward=_backward,
)
