"""Registration of gated_rms_norm with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.gated_rms_norm import ref

FAMILY = family("gated_rms_norm")


def _example(device: torch.device, dtype: torch.dtype):
    x = torch.randn(3, 5, 48, device=device, dtype=dtype)
    z = torch.randn(3, 5, 96, device=device, dtype=dtype)[..., 48:]
    weight = torch.randn(48, device=device, dtype=dtype)
    return x, weight, torch.randn_like(weight), z, 1e-5, 16, False


def _example_backward(device: torch.device, dtype: torch.dtype):
    *tensors, eps, group_size, norm_before_gate = _example(device, dtype)
    rstd = ref.forward(*tensors, eps, group_size, norm_before_gate)[1]
    dy = torch.randn_like(tensors[0])
    return dy, *tensors, rstd, group_size, norm_before_gate


def _fake(x, weight, bias, z, eps, group_size, norm_before_gate):
    groups = x.shape[-1] // group_size
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], groups), dtype=acc_dtype(x))


def _fake_backward(dy, x, weight, bias, z, rstd, group_size, norm_before_gate):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if z is None else z.new_empty(z.shape),
    )


gated_rms_norm_backward = register(
    FAMILY,
    "gated_rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? z, "
    "Tensor rstd, int group_size, bool norm_before_gate) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=ref.backward,
    fake=_fake_backward,
    example=_example_backward,
)


def _setup(ctx, inputs, output):
    x, weight, bias, z, _, group_size, norm_before_gate = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, z, output[1])
    ctx.options = group_size, norm_before_gate


def _backward(ctx, dy, _drstd):
    _, _, bias, z, _ = saved = ctx.saved_tensors
    dx, dweight, dbias, dz = gated_rms_norm_backward(dy, *saved, *ctx.options)
    return dx, dweight, None if bias is None else dbias, None if z is None else dz, None, None, None


gated_rms_norm = register(
    FAMILY,
    "gated_rms_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? z, float eps, int group_size, "
    "bool norm_before_gate) -> (Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    setup_context=_setup,
    backward=_backward,
)
