"""Registration of linear_cross_entropy with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.cross_entropy import ref

FAMILY = family("cross_entropy")


def _example(device: torch.device, dtype: torch.dtype):
    hidden = torch.randn(7, 24, device=device, dtype=dtype)
    weight = torch.randn(33, 24, device=device, dtype=dtype)
    targets = torch.tensor([0, 32, -100, 5, 5, -100, 17], device=device)
    return hidden, weight, targets, -100, 0.1, 1e-3


def _example_backward(device: torch.device, dtype: torch.dtype):
    args = _example(device, dtype)
    hidden, weight, targets, *options = args
    loss, lse = ref.forward(*args)
    return torch.randn_like(loss), hidden, weight, targets, lse, *options


linear_cross_entropy_backward = register(
    FAMILY,
    "linear_cross_entropy_backward(Tensor dloss, Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor lse, int ignore_index, float label_smoothing, float z_loss) -> (Tensor, Tensor)",
    reference=ref.backward,
    fake=lambda dloss, hidden, weight, *rest: (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
    ),
    example=_example_backward,
)


def _fake(hidden, weight, targets, ignore_index, label_smoothing, z_loss):
    rows = hidden.shape[:1]
    return tuple(hidden.new_empty(rows, dtype=acc_dtype(hidden)) for _ in ("loss", "lse"))


def _setup(ctx, inputs, output):
    hidden, weight, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, targets, output[1])


def _backward(ctx, dloss, _dlse):
    dhidden, dweight = linear_cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options)
    return dhidden, dweight, None, None, None, None


linear_cross_entropy = register(
    FAMILY,
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, "
    "float label_smoothing, float z_loss) -> (Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    setup_context=_setup,
    backward=_backward,
)
