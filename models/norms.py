"""The norms of the models, each with the residual addition before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nemokernels import rms_norm
from nemokernels._registry import acc_dtype

__all__ = ["LayerNorm", "LayerNorm1P", "RMSNorm", "normed_sum"]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, **kwargs):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, **kwargs))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        return rms_norm(x, self.weight, residual=residual, eps=self.eps)


class LayerNorm(nn.Module):
    """``(x - mean) / std * w + b``, in float32 (float64 for float64 input), one cast at the end."""

    offset = 0.0  # what is added to the stored weight

    def __init__(self, size: int, eps: float, **kwargs):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, **kwargs))
        self.bias = nn.Parameter(torch.empty(size, **kwargs))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        total = x if residual is None else (x + residual).to(residual.dtype)
        wide, size = acc_dtype(x), self.weight.shape
        weight, bias = self.offset + self.weight.to(wide), self.bias.to(wide)
        y = F.layer_norm(total.to(wide), size, weight, bias, self.eps).to(x.dtype)
        return y if residual is None else (y, total)


class LayerNorm1P(LayerNorm):
    """LayerNorm whose weight is stored minus one; in 16 bits, 1 + w would lose most of w."""

    offset = 1.0


def normed_sum(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None):
    """The normed sum of x and the residual stream (None at its beginning), and that sum."""
    return (norm(x), x) if residual is None else norm(x, residual)
