"""Products of two NVFP4 operands (W4A4), behind ``nvfp4_linear`` and ``moe_experts``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.nvfp4 import SwizzledNVFP4, check_kind
from nemokernels.ops.nvfp4.ref import swizzled_shape
from nemokernels.ops.nvfp4_gemm import op

__all__ = ["NVFP4Experts"]


class NVFP4Experts(NamedTuple):
    """One matrix (N, K) per expert in NVFP4, and the static scale of what it multiplies.

    ``NVFP4Experts(*swizzle_nvfp4(weights), input_scale)`` makes it from a checkpoint's parts.

    Attributes:
        codes, scales, global_scale: as in :class:`SwizzledNVFP4`; (E, N, K/2), (E, N', K'/16) and
            (E).
        input_scale: float32, amax / 2688 of what is quantised: the ``input_scale`` of a ModelOpt
            checkpoint. Of ``up``: that of x, one element. Of ``down``: (E), of the hidden layers.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    input_scale: torch.Tensor


def linear(where: str, x: SwizzledNVFP4, weight: object) -> torch.Tensor:
    """``nvfp4_linear`` of x in NVFP4."""
    check_kind(where, "weight", weight, SwizzledNVFP4)
    _check_parts(where, "x", x, 2, x.codes)
    _check_parts(where, "weight", weight, 2, x.codes)
    check(where, x.codes.shape[1] == weight.codes.shape[1],
          "`x` has {} features, `weight` {}", 2 * x.codes.shape[1],
          2 * weight.codes.shape[1])  # fmt: skip
    for name, operand in (("x", x), ("weight", weight)):
        check(where, operand.global_scale.numel() == 1,
              "`{}.global_scale` has shape {}, expected one element", name,
              tuple(operand.global_scale.shape))  # fmt: skip
    alpha = x.global_scale.reshape(()) * weight.global_scale.reshape(())
    return op.product(x.codes, _bytes(x), weight.codes, _bytes(weight), alpha)


def experts(x: torch.Tensor, up: NVFP4Experts, down: NVFP4Experts, *route: torch.Tensor):
    """``moe_experts`` in NVFP4, all checked; route is (weights, offsets, order)."""
    return op.experts(
        x, up.input_scale, up.codes, _bytes(up), up.global_scale,
        down.input_scale, down.codes, _bytes(down), down.global_scale, *route,
    )  # fmt: skip


def check_experts(where: str, x: torch.Tensor, up: NVFP4Experts, down: object) -> None:
    """Raise unless ``up`` and ``down`` are the matrices of experts that take rows of ``x``."""
    check_kind(where, "down", down, NVFP4Experts)
    check_tensor(where, "x", x, dtypes=FLOATS)
    check(where, not (x.requires_grad and torch.is_grad_enabled()),
          "`x` requires a gradient; experts in NVFP4 have none")  # fmt: skip
    for name, matrix in (("up", up), ("down", down)):
        _check_parts(where, name, matrix, 3, x)
        _check_scale(where, f"{name}.input_scale", matrix.input_scale, x.device)
    count, width, half = up.codes.shape
    check(where, 2 * half == x.shape[1], "`up` has {} columns, expected the {} of `x`", 2 * half,
          x.shape[1])  # fmt: skip
    check(where, width % 16 == 0, "`up` has {} rows, expected a multiple of 16", width)
    check_tensor(where, "down.codes", down.codes, shape=(count, x.shape[1], width // 2))
    check(where, up.input_scale.numel() == 1,
          "`up.input_scale` has shape {}, expected one element",
          tuple(up.input_scale.shape))  # fmt: skip
    for name, scale in (("up.global_scale", up.global_scale),
                        ("down.global_scale", down.global_scale),
                        ("down.input_scale", down.input_scale)):  # fmt: skip
        check(where, scale.shape == (count,), "`{}` has shape {}, expected one per expert, ({},)",
              name, tuple(scale.shape), count)  # fmt: skip


def _check_parts(where: str, name: str, value: tuple, axes: int, like: torch.Tensor) -> None:
    codes, scales, scale_2 = value[:3]
    check_tensor(where, f"{name}.codes", codes, shape=(None,) * axes, dtypes=(torch.uint8,),
                 dims="(R, K/2)" if axes == 2 else "(E, R, K/2)", device=like.device)  # fmt: skip
    check(where, codes.shape[-1] % 8 == 0,
          "`{}.codes` has shape {}, expected a last axis of K/2, K a multiple of 16", name,
          tuple(codes.shape))  # fmt: skip
    blocks = (*codes.shape[:-1], codes.shape[-1] // 8)
    check_tensor(where, f"{name}.scales", scales, shape=swizzled_shape(blocks),
                 dims="(..., R', K'/16), swizzled,", dtypes=(torch.float8_e4m3fn,),
                 device=like.device)  # fmt: skip
    _check_scale(where, f"{name}.global_scale", scale_2, like.device)


def _check_scale(where: str, name: str, scale: object, device: torch.device) -> None:
    check_tensor(where, name, scale, dtypes=(torch.float32,), device=device)
    check(where, not scale.requires_grad, "`{}` requires a gradient; it has none", name)


def _bytes(operand: SwizzledNVFP4 | NVFP4Experts) -> torch.Tensor:
    return operand.scales.view(torch.uint8)
