"""The norms of the models, each with the residual addition before it.

A norm is told its ``readers``: the linear layers that read its result, if nothing else does. Where
all of them take it in FP8, the kernel of the norm quantises it on the way, once for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nemokernels import Fp8Normed, rms_norm, rms_norm_fp8
from nemokernels._registry import acc_dtype
from nemokernels.models.linear import Linear

__all__ = ["LayerNorm", "LayerNorm1P", "RMSNorm", "emission", "normed_sum"]

Readers = Sequence[Linear]


def emission(readers: Readers, x: torch.Tensor) -> dict[str, object] | None:
    """Scale and ``transpose`` for a norm of x that emits FP8; None: it does not.

    Layers that read one tensor have one scale: they have seen the same maxima from the start. Under
    autocast they quantise what the cast has made of the norm's result, which the norm cannot.
    """
    scales = [layer.input_scale() if isinstance(layer, Linear) else None for layer in readers]
    values = not scales or any(scale is None for scale in scales)
    if values or torch.is_autocast_enabled(x.device.type):
        return None
    wgrad = torch.is_grad_enabled() and any(layer.weight.requires_grad for layer in readers)
    return {"scale": scales[0], "transpose": wgrad}


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, **kwargs):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, **kwargs))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None, readers: Readers = ()):
        emits = emission(readers, x)
        if emits is None:
            return rms_norm(x, self.weight, residual=residual, eps=self.eps)
        normed = rms_norm_fp8(x, self.weight, residual=residual, eps=self.eps, **emits)
        return normed if residual is None else (normed, normed.total)


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


def normed_sum(
    norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None, readers: Readers = ()
) -> tuple[torch.Tensor | Fp8Normed, torch.Tensor]:
    """The normed sum of x and the residual stream (None at its beginning), and that sum."""
    more = {"readers": readers} if isinstance(norm, RMSNorm) else {}  # no LayerNorm emits FP8
    return (norm(x, **more), x) if residual is None else norm(x, residual, **more)
