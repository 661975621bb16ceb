"""The calls into csrc/nvfp4_gemm. Callers have checked shapes and dtypes."""

from __future__ import annotations

import torch

from nemokernels import _ext

_product = _ext.define(
    "nvfp4_product(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor alpha, "
    "Tensor(a!) out) -> ()"
)
_grouped = _ext.define(
    "nvfp4_grouped_product(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor alpha, "
    "Tensor offsets, bool squared_relu, int first, Tensor(a!) out) -> ()"
)


def product(a: torch.Tensor, a_scales, b: torch.Tensor, b_scales, alpha) -> torch.Tensor:
    """alpha * a @ b^T (M, N) in bfloat16."""
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=torch.bfloat16)
    _product(a, a_scales, b, b_scales, alpha, out)
    return out


def grouped_product(
    a: torch.Tensor, a_scales, b: torch.Tensor, b_scales, alpha, offsets, squared_relu: bool,
    first: int = 0, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """ref.grouped_product in bfloat16; rows that no expert has are not written."""
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.bfloat16)
    _grouped(a, a_scales, b, b_scales, alpha, offsets, squared_relu, first, out)
    return out
