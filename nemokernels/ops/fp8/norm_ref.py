"""Norms that also emit their result in FP8, in plain torch: the specification and the CPU leg.

y is what the norm alone computes; the codes are those of y as it is stored, in its dtype.
"""

from __future__ import annotations

import torch

from nemokernels.ops.fp8 import ref
from nemokernels.ops.gated_rms_norm import ref as gated
from nemokernels.ops.rms_norm import ref as plain


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    transpose: bool,
):
    """y, the sum with the residual (empty without one), rstd; then as ``_codes``."""
    if residual is None:
        (y, rstd), total = plain.forward(x, weight, eps), x.new_empty(0)
    else:
        y, total, rstd = plain.add_forward(x, residual, weight, eps)
    return y, total, rstd, *_codes(y, scale, dtype, transpose)


def gated_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    dtype: torch.dtype,
    transpose: bool,
):
    """y and rstd; then as ``_codes``."""
    y, rstd = gated.forward(x, weight, bias, z, eps, group_size, norm_before_gate)
    return y, rstd, *_codes(y, scale, dtype, transpose)


def _codes(y: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, transpose: bool):
    """Codes of y as bytes, the same transposed (empty if not asked for), 1 / scale, amax of y."""
    amax = torch.zeros((), dtype=torch.float32, device=y.device)
    q, q_t, inverse = ref.quantize(y, scale, amax, dtype, False, True, transpose)
    return q.view(torch.uint8), q_t.view(torch.uint8), inverse, amax
