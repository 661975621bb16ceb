"""Registration of relu2 with torch.library."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemokernels import _backends, _triton
from nemokernels._registry import family, register
from nemokernels.ops.relu2 import ref

FAMILY = family("relu2", {"triton": _triton.reason})


@dataclass(frozen=True)
class Config:
    """Which backend runs, elements per program and warps; why not Triton if it does not."""

    backend: str
    block: int = 0
    num_warps: int = 0
    reason: str = ""


def plan(elements: int, unsupported: str, backends: tuple[str, ...]) -> Config:
    """The configuration for so many elements; ``unsupported`` says what bars Triton.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported)
    # 16 bytes per load of two-byte elements, two loads per thread. Not measured.
    return Config("triton", 2048, 4) if elements >= 1 << 20 else Config("triton", 256, 1)


def _plan(*tensors: torch.Tensor) -> Config:
    backends = _backends.usable(FAMILY.name, tensors[0].device)
    return plan(tensors[0].numel(), _triton.unsupported(*tensors), backends)


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
    plan=lambda dy, x: _plan(x, dy),
    kernel="relu2.kernel:backward",
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
    plan=_plan,
    kernel="relu2.kernel:forward",
    setup_context=_setup,
    backward=_backward,
)
