"""Expert matrices in FP8: the container, its checks, the call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.fp8 import quantize_fp8
from nemokernels.ops.moe_experts import op

E4M3 = torch.float8_e4m3fn


class FP8Experts(NamedTuple):
    """One matrix per expert in E4M3, and the static scale of what it multiplies.

    Attributes:
        values: (E, N, K) float8_e4m3fn; the matrix is ``values * scale``.
        scale: float32, (E,) or, one per row, (E, N).
        input_scale: float32. Of ``up``: that of x, one element, or (T,) where x is in FP8 already.
            Of ``down``: (E,), that of each expert's hidden layer. What is quantised is divided by
            it: the ``input_scale`` of a ModelOpt checkpoint.
    """

    values: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor


def check_experts(where: str, x: torch.Tensor, up: FP8Experts, down: object) -> None:
    """Raise unless ``up`` and ``down`` are the matrices of experts that take rows of ``x``."""
    check(where, not (x.requires_grad and torch.is_grad_enabled()),
          "`x` requires a gradient; experts in FP8 have none")  # fmt: skip
    check_tensor(where, "up.values", up.values, shape=(None, None, x.shape[1]), dims="(E, F, X)",
                 dtypes=(E4M3,), device=x.device)  # fmt: skip
    if not isinstance(down, FP8Experts):
        raise TypeError(f"{where}: `down` must be FP8Experts like `up`, got {type(down).__name__}")
    experts, width = up.values.shape[:2]
    check_tensor(where, "down.values", down.values, shape=(experts, x.shape[1], width),
                 dims="(E, X, F)", dtypes=(E4M3,), device=x.device)  # fmt: skip
    real = dict(dtypes=(torch.float32,), device=x.device)
    for name, matrix in (("up", up), ("down", down)):
        check_tensor(where, f"{name}.scale", matrix.scale, **real)
        check(where, matrix.scale.shape in (matrix.values.shape[:1], matrix.values.shape[:2]),
              "`{}.scale` has shape {}, expected one per expert or per row, {} or {}", name,
              *(tuple(s) for s in (matrix.scale.shape, matrix.values.shape[:1],
                                   matrix.values.shape[:2])))  # fmt: skip
        for part in ("scale", "input_scale"):
            value = getattr(matrix, part)
            check(where, not getattr(value, "requires_grad", False),
                  "`{}.{}` requires a gradient; it has none", name, part)  # fmt: skip
    check_tensor(where, "up.input_scale", up.input_scale, **real)
    per_token = x.dtype == E4M3 and up.input_scale.shape == x.shape[:1]
    check(where, up.input_scale.numel() == 1 or per_token,
          "`up.input_scale` has shape {}, expected one element (or one per token of an FP8 `x`)",
          tuple(up.input_scale.shape))  # fmt: skip
    check_tensor(where, "down.input_scale", down.input_scale, shape=(experts,), dims="(E,)",
                 **real)  # fmt: skip


def experts(x: torch.Tensor, up: FP8Experts, down: FP8Experts, *route: torch.Tensor):
    """``moe_experts`` in FP8, all checked; route is (weights, offsets, order)."""
    dtype = x.dtype if x.dtype in FLOATS else torch.bfloat16
    if x.dtype != E4M3:
        x = quantize_fp8(x, up.input_scale.reciprocal())[0]
    byte = torch.uint8  # as which float8 travels between operators
    return op.moe_experts_fp8(
        x.view(byte), up.input_scale, up.values.view(byte), up.scale, down.input_scale,
        down.values.view(byte), down.scale, *route, dtype,
    )  # fmt: skip
