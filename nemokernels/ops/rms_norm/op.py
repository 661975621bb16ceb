"""Registration of rms_norm and add_rms_norm with torch.library."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from nemokernels import _backends, _triton, _tuned
from nemokernels._registry import acc_dtype, family, register
from nemokernels._triton import RowConfig
from nemokernels.ops.rms_norm import ref

FAMILY = family("rms_norm", {"triton": _triton.reason})

# Elements of a row that one program keeps in registers, and per thread. Not measured.
WIDEST = {"forward": 16384, "backward": 8192}
PER_THREAD = {"forward": 32, "backward": 16}


def plan(
    rows: int,
    width: int,
    backward: bool,
    unsupported: str,
    backends: tuple[str, ...],
    processors: int,
) -> RowConfig:
    """The configuration for ``rows`` rows of ``width``; ``unsupported`` says what bars Triton.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return RowConfig("reference", reason=unsupported)
    way = "backward" if backward else "forward"
    block = _triton.next_power_of_2(width)
    if block > WIDEST[way]:
        return RowConfig("triton", 8 if backward else 1, 4096, 2 * processors, 8, 1)
    together = max(2048 // block, 1)
    num_warps = min(max(together * block // (32 * PER_THREAD[way]), 1), 16)
    programs = min(_triton.cdiv(max(rows, 1), together), processors * max(16 // num_warps, 1))
    return RowConfig("triton", together, block, programs, num_warps, 2)


def _plan(x: torch.Tensor, *others: torch.Tensor, backward: bool = False) -> RowConfig:
    config = plan(
        math.prod(x.shape[:-1]), x.shape[-1], backward, _triton.unsupported(x, *others),
        _backends.usable(FAMILY.name, x.device), _triton.processors(x.device),
    )  # fmt: skip
    # Not by the number of rows: a row has the same bits alone and among others.
    return _tuned.tuned(FAMILY.name, x.device, (x.shape[-1], x.dtype, backward), config)


def candidates(config: RowConfig, backward: bool) -> Iterator[RowConfig]:
    """What may be faster than ``config`` on some card: other warps, stages and rows at a time."""
    for num_warps in (1, 2, 4, 8, 16):
        yield replace(config, num_warps=num_warps)
    for rows in (1, 2, 4, 8):
        yield replace(config, rows=rows)
    for num_stages in (1, 2, 3, 4):
        yield replace(config, num_stages=num_stages)


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
    return torch.randn_like(x), torch.randn_like(total), total, weight, rstd, None


def _rstd_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=acc_dtype(x))


rms_norm_backward = register(
    FAMILY,
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    reference=ref.backward,
    fake=lambda dy, x, weight, rstd: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    example=_example_backward,
    plan=lambda dy, x, weight, rstd: _plan(x, dy, weight, rstd, backward=True),
    kernel="rms_norm.kernel:backward",
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
    plan=lambda x, weight, eps: _plan(x, weight),
    kernel="rms_norm.kernel:forward",
    setup_context=_setup,
    backward=_backward,
)

add_rms_norm_backward = register(
    FAMILY,
    "add_rms_norm_backward(Tensor dy, Tensor dtotal, Tensor total, Tensor weight, Tensor rstd, "
    "ScalarType? x_dtype) -> (Tensor, Tensor, Tensor)",
    reference=ref.add_backward,
    fake=lambda dy, dtotal, total, weight, rstd, x_dtype: (
        total.new_empty(0 if x_dtype is None else total.shape, dtype=x_dtype),
        total.new_empty(total.shape),
        weight.new_empty(weight.shape),
    ),
    example=_example_add_backward,
    plan=lambda dy, dtotal, total, weight, rstd, x_dtype: _plan(
        total, dy, dtotal, weight, rstd, backward=True
    ),
    kernel="rms_norm.kernel:add_backward",
)


def _setup_add(ctx, inputs, output):
    x, _, weight, _ = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.x_dtype = None if x.dtype == total.dtype else x.dtype
    ctx.save_for_backward(total, weight, rstd)


def _backward_add(ctx, dy, dtotal, _drstd):
    dx, dresidual, dweight = add_rms_norm_backward(dy, dtotal, *ctx.saved_tensors, ctx.x_dtype)
    return dresidual if ctx.x_dtype is None else dx, dresidual, dweight, None


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
    plan=lambda x, residual, weight, eps: _plan(x, residual, weight),
    kernel="rms_norm.kernel:add_forward",
    setup_context=_setup_add,
    backward=_backward_add,
)
