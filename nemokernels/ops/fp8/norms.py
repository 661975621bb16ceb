"""Norms that emit their result in FP8 beside it, for the linear layer that follows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemokernels.ops.fp8 import norm_op
from nemokernels.ops.fp8.checks import Fp8Codes, check_scale, format_dtype
from nemokernels.ops.gated_rms_norm import check_arguments as check_gated
from nemokernels.ops.rms_norm import check_arguments


class Fp8Normed(NamedTuple):
    """What a norm has emitted.

    ``y`` carries the gradient. ``total`` is the sum with the residual, None without one. ``codes``
    are those of y, for ``fp8_linear(y, weight, x_codes=...)``. ``amax`` () float32 is max |y|, NaN
    left out, for the history of delayed scaling.
    """

    y: torch.Tensor
    total: torch.Tensor | None
    codes: Fp8Codes
    amax: torch.Tensor


def rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    format: str = "e4m3",
    transpose: bool = False,
) -> Fp8Normed:
    """:func:`nemokernels.rms_norm` that emits its y in FP8 as well, in one kernel.

    The codes are, bit for bit, those of :func:`nemokernels.quantize_fp8` of y. Differentiable in x,
    weight and residual through y and the sum; the codes have no gradient.

    Args:
        x, weight, residual, eps: as ``rms_norm`` takes them.
        scale: one float32 element, what y is multiplied by before it is rounded.
        format: "e4m3" or "e5m2".
        transpose: also emit the codes transposed, (D, product of the leading sizes).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    where = "rms_norm_fp8"
    check_arguments(where, x, weight, residual, eps)
    check_scale(where, "scale", scale, x.device)
    y, total, _, q, q_t, inverse, amax = norm_op.rms_norm_fp8(
        x, residual, weight, scale, eps, format_dtype(where, "format", format), transpose
    )
    return Fp8Normed(y, None if residual is None else total, Fp8Codes(q, q_t, inverse), amax)


def gated_rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    format: str = "e4m3",
    transpose: bool = False,
) -> Fp8Normed:
    """:func:`nemokernels.rmsnorm_fn` that emits its y in FP8 as well, in one kernel.

    The codes are, bit for bit, those of :func:`nemokernels.quantize_fp8` of y. Differentiable in x,
    weight, bias and z through y; the codes have no gradient.

    Args:
        x, weight, bias, z, eps, group_size, norm_before_gate: as ``rmsnorm_fn`` takes them.
        scale, format, transpose: as :func:`rms_norm_fp8` takes them.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    where = "gated_rms_norm_fp8"
    group = check_gated(where, x, weight, bias, z, eps, group_size)
    check_scale(where, "scale", scale, x.device)
    y, _, q, q_t, inverse, amax = norm_op.gated_rms_norm_fp8(
        x, weight, bias, z, scale, eps, group, norm_before_gate,
        format_dtype(where, "format", format), transpose,
    )  # fmt: skip
    return Fp8Normed(y, None, Fp8Codes(q, q_t, inverse), amax)
