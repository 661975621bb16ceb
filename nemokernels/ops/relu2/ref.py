"""Squared ReLU in plain torch: the specification and the CPU leg."""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype


def forward(x: torch.Tensor) -> torch.Tensor:
    """y = max(x, 0)**2, squared in the accumulation dtype."""
    return x.to(acc_dtype(x)).relu().square().to(x.dtype)


def backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dx = 2 * max(x, 0) * dy."""
    acc = acc_dtype(x)
    return (2.0 * x.to(acc).relu() * dy.to(acc)).to(x.dtype)
