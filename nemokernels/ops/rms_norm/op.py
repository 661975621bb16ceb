"""Registration of rms_norm and add_rms_norm with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.rms_norm import ref

FAMILY = family("rms_norm")


def _example(device: torch.device, dtype: torch.dtype):
    x = torch.randn(3, 5, 48, device=device, dtype=dtype)
    return x, torch.randn(48, device=device, dtype=dtype), 1e-5


def _example_backward(device: torch.device, dtype: torch.dtype):
    x, weight, eps = _example(device, dtype)
    return torch.randn_like(x), x, weight, ref.forward(x, weight, eps)[1]


def _example_add(device: torch.device, dtype: torch.dtype):
    x, weight, eps = _example(device, dtype)
    return x, torch.randn_like(x), weight, eps


def _example_add_backward(device: torch.device, dtype: torch.dtype):
    x, residual, weight, eps = _example_add(device, dtype)
    _, total, rstd = ref.add_forward(x, residual, weight, eps)
    return torch.randn_like(x), torch.randn_like(total), total, weight, rstd, x.dtype


def _rstd_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=acc_dtype(x))


rms_norm_backward = register(
    FAMILY,
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    reference=ref.backward,
    fake=lambda dy, x, weight, rstd: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    example=_example_backward,
)


def _setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, dy, _drstd):
    dx, dweight = rms_norm_backward(dy, *ctx.saved_tensors)
    return dx, dweight, None


rms_norm = register(
    FAMILY,
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=ref.forward,
    fake=lambda x, weight, eps: (x.new_empty(x.shape), _rstd_like(x)),
    example=_example,
    setup_context=_setup,
    backward=_backward,
)

add_rms_norm_backward = register(
    FAMILY,
    "add_rms_norm_backward(Tensor dy, Tensor dtotal, Tensor total, Tensor weight, Tensor rstd, "
    "ScalarType x_dtype) -> (Tensor, Tensor, Tensor)",
    reference=ref.add_backward,
    fake=lambda dy, dtotal, total, weight, rstd, x_dtype: (
        total.new_empty(total.shape, dtype=x_dtype),
        total.new_empty(total.shape),
        weight.new_empty(weight.shape),
    ),
    example=_example_add_backward,
)


def _setup_add(ctx, inputs, output):
    x, _, weight, _ = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(total, weight, rstd)


def _backward_add(ctx, dy, dtotal, _drstd):
    dx, dresidual, dweight = add_rms_norm_backward(dy, dtotal, *ctx.saved_tensors, ctx.x_dtype)
    return dx, dresidual, dweight, None


add_rms_norm = register(
    FAMILY,
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    reference=ref.add_forward,
    fake=lambda x, residual, weight, eps: (
        x.new_empty(x.shape),
        residual.new_empty(residual.shape),
        _rstd_like(residual),
    ),
    example=_example_add,
    setup_context=_setup_add,
    backward=_backward_add,
)
