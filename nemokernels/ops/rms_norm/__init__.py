"""RMSNorm, with the residual addition that precedes it in every pre-norm block."""

from __future__ import annotations

import torch

from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.rms_norm import op

__all__ = ["rms_norm"]


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square normalisation over the last axis, optionally of ``x + residual``.

    ``y = s / sqrt(mean(s**2) + eps) * weight`` with ``s = x``, or ``s = x + residual`` rounded to
    the residual's dtype. Statistics, normalisation and the product with the weight are in float32
    (float64 for float64 input); one cast at the end. Under autocast nothing is cast further.

    Args:
        x: (..., D), float32, bfloat16, float16 or float64, any strides.
        weight: (D), any of these dtypes.
        residual: (..., D), the residual stream. It may be wider than x.
        eps: added to the mean square; not negative.

    Returns:
        y (..., D) in x's dtype; with a residual ``(y, s)``, s in the residual's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; the cast order is
    that of transformers 5.23 NemotronHRMSNorm.
    """
    check_arguments("rms_norm", x, weight, residual, eps)
    if residual is None:
        return op.rms_norm(x, weight, eps)[0]
    y, total, _ = op.add_rms_norm(x, residual, weight, eps)
    return y, total


def check_arguments(
    where: str, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> None:
    """Raise as :func:`rms_norm` does, in the name of the function ``where``."""
    check_tensor(where, "x", x, dtypes=FLOATS)
    check(where, x.dim() >= 1, "`x` needs at least one axis, got a scalar")
    check_tensor(where, "weight", weight, shape=(x.shape[-1],), dims="(D,)", dtypes=FLOATS,
                 device=x.device)  # fmt: skip
    check(where, eps >= 0, "`eps` must not be negative, got {}", eps)
    if residual is not None:
        check_tensor(where, "residual", residual, shape=x.shape, dims="the shape of x",
                     dtypes=FLOATS, device=x.device)  # fmt: skip
