"""Autocast for operators that are, at heart, matrix products."""

from __future__ import annotations

import torch


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as ``torch.matmul`` would take them under autocast.

    Outside an autocast region, and for float64 and integers, they come back unchanged.
    """
    kind = tensors[0].device.type
    # Meta has no autocast and asking raises; torch 2.11 cannot compile `is_autocast_available`.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
