"""Registration of relu2 with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import family, register
from nemokernels.ops.relu2 import ref

FAMILY = family("relu2")


def _example(device: torch.device, dtype: torch.dtype):
    return (torch.randn(3, 5, 17, device=device, dtype=dtype),)


def _example_backward(device: torch.device, dtype: torch.dtype):
    x = torch.randn(3, 5, 17, device=device, dtype=dtype)
    return torch.randn_like(x), x


relu2_backward = register(
    FAMILY,
    "relu2_backward(Tensor dy, Tensor x) -> Tensor",
    reference=ref.backward,
    fake=lambda dy, x: x.new_empty(x.shape),
    example=_example_backward,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, dy):
    return relu2_backward(dy, *ctx.saved_tensors)


relu2 = register(
    FAMILY,
    "relu2(Tensor x) -> Tensor",
    reference=ref.forward,
    fake=lambda x: x.new_empty(x.shape),
    example=_example,
    setup_context=_setup,
    backward=_backward,
)
