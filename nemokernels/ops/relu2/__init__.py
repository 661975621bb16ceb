"""Squared ReLU, the activation of Nemotron's dense and expert MLPs."""

from __future__ import annotations

import torch

from nemokernels._checks import FLOATS, check_tensor
from nemokernels.ops.relu2 import op

__all__ = ["relu2"]


def relu2(x: torch.Tensor) -> torch.Tensor:
    """Squared ReLU, elementwise: ``y = max(x, 0)**2``, with gradient ``2 * max(x, 0) * dy``.

    Computed in float32 (float64 for float64 input) with one cast at the end, forward and backward.
    NaN stays NaN; float16 overflows to infinity above 256. Under autocast nothing is cast.

    Args:
        x: any shape and strides, float32, bfloat16, float16 or float64.

    Returns:
        y, contiguous, in x's shape and dtype.

    Raises:
        TypeError: x is not a tensor of one of these dtypes.

    Source: So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021.
    """
    check_tensor("relu2", "x", x, dtypes=FLOATS)
    return op.relu2(x)
