"""Registration of the FP8 operators with torch.library.

Where an operator takes 8-bit codes, or saves them for its backward, they travel as uint8: torch has
no comparison and no sum for float8, which opcheck and autograd's own utilities need.
"""

from __future__ import annotations

import math

import torch

from nemokernels._registry import family, register
from nemokernels.ops.fp8 import ref

FAMILY = family("fp8")


def _scalar_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((), dtype=torch.float32)


def _example_quantize(device: torch.device, dtype: torch.dtype):
    x = torch.randn(3, 5, 48, device=device, dtype=dtype)
    return x, torch.tensor([40.0], device=device), ref.E4M3


def _example_dequantize(device: torch.device, dtype: torch.dtype):
    q = torch.randn(5, 48, device=device).to(ref.E5M2)
    return q.view(torch.uint8), torch.tensor([0.025], device=device), ref.E5M2, dtype


def _example_update(device: torch.device, dtype: torch.dtype):
    history = torch.rand(4, 6, device=device)
    history[:, 1] = 0
    reduced = torch.rand(6, device=device)
    reduced[:2] = 0
    return torch.rand(6, device=device), history, reduced, ref.E4M3, 1.0, False


def _example_linear(device: torch.device, dtype: torch.dtype):
    x = torch.randn(2, 5, 48, device=device, dtype=dtype)
    weight = torch.randn(32, 48, device=device, dtype=dtype)
    bias = torch.randn(32, device=device, dtype=dtype)
    scale = torch.tensor([100.0], device=device)
    return x, weight, bias, scale, None, scale, None, ref.E5M2, True, True


def _example_linear_backward(device: torch.device, dtype: torch.dtype):
    args = _example_linear(device, dtype)
    y, _, inverse, x8_t, w8_t = ref.linear(*args)
    return torch.randn_like(y), inverse, x8_t, w8_t, None, ref.E5M2, dtype, dtype, dtype


quantize = register(
    FAMILY,
    "quantize_fp8(Tensor x, Tensor scale, ScalarType dtype) -> (Tensor, Tensor)",
    reference=ref.quantize,
    fake=lambda x, scale, dtype: (x.new_empty(x.shape, dtype=dtype), _scalar_like(x)),
    example=_example_quantize,
)

quantize_transpose = register(
    FAMILY,
    "quantize_fp8_transpose(Tensor x, Tensor scale, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    reference=ref.quantize_transpose,
    fake=lambda x, scale, dtype: (
        x.new_empty(x.shape, dtype=dtype),
        _scalar_like(x),
        x.new_empty((x.shape[-1], x.shape[:-1].numel()), dtype=dtype),
    ),
    example=_example_quantize,
)

dequantize = register(
    FAMILY,
    "dequantize_fp8(Tensor codes, Tensor scale_inv, ScalarType format, ScalarType dtype) -> Tensor",
    reference=ref.dequantize,
    fake=lambda codes, scale_inv, format, dtype: codes.new_empty(codes.shape, dtype=dtype),
    example=_example_dequantize,
)

current_scale = register(
    FAMILY,
    "fp8_current_scale(Tensor x, ScalarType dtype) -> Tensor",
    reference=ref.current_scale,
    fake=lambda x, dtype: _scalar_like(x),
    example=lambda device, dtype: (torch.randn(5, 48, device=device, dtype=dtype), ref.E4M3),
)

delayed_scaling_update = register(
    FAMILY,
    "delayed_scaling_update(Tensor(a!) scale, Tensor(b!) amax_history, Tensor? amax, "
    "ScalarType dtype, float margin, bool most_recent) -> ()",
    reference=ref.delayed_scaling_update,
    fake=lambda *args: None,
    example=_example_update,
)


def _fake_backward(dy, inverse, x8_t, w8_t, dy_scale, grad_dtype, x_dtype, w_dtype, bias_dtype):
    empty = dy.new_empty((0,))
    outputs = dy.shape[-1]
    dx = dw = db = None
    if x_dtype is not None:
        dx = dy.new_empty((*dy.shape[:-1], w8_t.shape[0]), dtype=x_dtype)
    if w_dtype is not None:
        dw = dy.new_empty((outputs, x8_t.shape[0]), dtype=w_dtype)
    if bias_dtype is not None:
        db = dy.new_empty((outputs,), dtype=bias_dtype)
    grads = (torch.empty_like(empty) if g is None else g for g in (dx, dw, db))
    return (*grads, _scalar_like(dy))


linear_backward = register(
    FAMILY,
    "fp8_linear_backward(Tensor dy, Tensor inverse, Tensor x8_t, Tensor w8_t, Tensor? dy_scale, "
    "ScalarType grad_dtype, ScalarType? x_dtype, ScalarType? w_dtype, ScalarType? bias_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=ref.linear_backward,
    fake=_fake_backward,
    example=_example_linear_backward,
)


def record_amax(slot: torch.Tensor | None, amax: torch.Tensor) -> None:
    """slot = max(slot, amax) in place; None is no slot."""
    if slot is not None:
        with torch.no_grad():
            slot.copy_(torch.maximum(slot, amax.detach().reshape(slot.shape)))


def _setup(ctx, inputs, output):
    x, weight, bias, _, _, dy_scale, dy_amax, grad_dtype, need_dx, need_dw = inputs
    _, amaxes, inverse, x8_t, w8_t = output
    ctx.mark_non_differentiable(amaxes, inverse, x8_t, w8_t)
    ctx.save_for_backward(inverse, x8_t, w8_t)
    # Not through save_for_backward, which forbids later writes: the scale is meant to be read as it
    # is when the backward runs, and the slot is written by every backward.
    ctx.dy_scale, ctx.dy_amax = dy_scale, dy_amax
    ctx.grad_dtype, ctx.kept = grad_dtype, (need_dx, need_dw)
    ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)


def _backward(ctx, dy, *_):
    wanted = ctx.needs_input_grad[:3]
    for name, want, kept in zip(("x", "weight"), wanted, ctx.kept):
        if want and not kept:
            raise RuntimeError(f"fp8_linear: `{name}` needs a gradient that need_d* switched off")
    dtypes = [dtype if want else None for dtype, want in zip(ctx.dtypes, wanted)]
    grads = linear_backward(dy, *ctx.saved_tensors, ctx.dy_scale, ctx.grad_dtype, *dtypes)
    record_amax(ctx.dy_amax, grads[3])
    return *(g if want else None for g, want in zip(grads, wanted)), *[None] * 7


def _fake_linear(
    x, weight, bias, x_scale, w_scale, dy_scale, dy_amax, grad_dtype, need_dx, need_dw
):
    rows, (n, k) = math.prod(x.shape[:-1]), weight.shape
    return (
        x.new_empty((*x.shape[:-1], n)),
        x.new_empty((2,), dtype=torch.float32),
        x.new_empty((2,), dtype=torch.float32),
        x.new_empty((k, rows) if need_dw else (0, 0), dtype=torch.uint8),
        x.new_empty((k, n) if need_dx else (0, 0), dtype=torch.uint8),
    )


linear = register(
    FAMILY,
    "fp8_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? x_scale, Tensor? w_scale, "
    "Tensor? dy_scale, Tensor? dy_amax, ScalarType grad_dtype, bool need_dx, bool need_dw) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=ref.linear,
    fake=_fake_linear,
    example=_example_linear,
    setup_context=_setup,
    backward=_backward,
)
