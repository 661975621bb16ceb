"""Sigmoid, SiLU and softplus of the references.

They are spelt out because torch's own versions round the scalar tail of a vector differently from
its body, so that a token's bits would depend on its place in the batch; ``exp`` and ``log1p`` do
not. They are meant for code with an explicit backward: autograd through them gives NaN where exp
overflows.
"""

from __future__ import annotations

import torch

SOFTPLUS_THRESHOLD = 20.0  # above it softplus is the identity, as in mamba_ssm's kernels


def sigmoid(v: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-v))."""
    return 1 / (1 + torch.exp(-v))


def silu(v: torch.Tensor) -> torch.Tensor:
    """v / (1 + exp(-v))."""
    return v / (1 + torch.exp(-v))


def softplus(v: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(v)); above the threshold, v itself."""
    return torch.where(v > SOFTPLUS_THRESHOLD, v, v.exp().log1p())
