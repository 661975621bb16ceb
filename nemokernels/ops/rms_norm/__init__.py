"""RMSNorm, with the residual addition that precedes it in every pre-norm block."""

from __future__ import annotations

import torch

from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels._registry import acc_dtype
from nemokernels.ops.rms_norm import op

__all__ = ["rms_norm", "rms_norm_fn"]


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


def rms_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: None = None,
    residual: torch.Tensor | None = None,
    x1: None = None,
    weight1: None = None,
    bias1: None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`rms_norm` under the name and with the arguments of mamba_ssm.

    Args:
        x, weight, residual, eps: as in :func:`rms_norm`, eps 1e-6 by default.
        prenorm: also return the sum s of x and residual, the residual stream of the next block.
        residual_in_fp32: the stream that begins here, where there is no residual yet, is float32
            (float64 for float64 x). A residual that is given keeps its dtype.
        bias, x1, weight1, bias1, dropout_p, rowscale, return_dropout_mask: these are here for the
            order of the arguments; only their defaults are supported.

    Returns:
        y (..., D) in x's dtype; with ``prenorm`` ``(y, s)``, s in the residual's dtype.

    Raises:
        TypeError, ValueError: as :func:`rms_norm`, or an argument that is not supported is given.

    Source: drop-in for ``mamba_ssm.ops.triton.layer_norm.rms_norm_fn``, which normalises s before
    it is rounded to the residual's dtype, and has no default for ``bias``.
    """
    fn = "rms_norm_fn"
    unsupported = dict(bias=bias, x1=x1, weight1=weight1, bias1=bias1, rowscale=rowscale)
    for name, value in unsupported.items():
        check(fn, value is None, "`{}` is not supported, expected None", name)
    check(fn, dropout_p == 0, "`dropout_p` is not supported, expected 0, got {}", dropout_p)
    check(fn, not return_dropout_mask, "`return_dropout_mask` is not supported, expected False")
    check_arguments(fn, x, weight, residual, eps)
    if residual is None:
        y, total = op.rms_norm(x, weight, eps)[0], x.to(acc_dtype(x)) if residual_in_fp32 else x
    else:
        y, total, _ = op.add_rms_norm(x, residual, weight, eps)
    return (y, total) if prenorm else y


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
