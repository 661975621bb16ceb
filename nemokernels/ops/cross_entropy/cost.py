"""What the linear cross-entropy must move and multiply. T tokens, width D, V classes."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(T: int, D: int, V: int, itemsize: int, unit: str) -> Cost:
    """Hidden states and weight read; the logits never leave the chip."""
    return Cost((T * D + V * D) * itemsize + 16 * T, 2 * T * D * V, unit)


def backward(T: int, D: int, V: int, itemsize: int, unit: str) -> Cost:
    """Hidden states and weight read, their gradients written. The logits were not kept: three
    products."""
    return Cost(2 * (T * D + V * D) * itemsize + 16 * T, 6 * T * D * V, unit)


def both(T: int, D: int, V: int, itemsize: int, unit: str) -> Cost:
    """Forward and backward in one pass need the logits once: three products."""
    return backward(T, D, V, itemsize, unit)
