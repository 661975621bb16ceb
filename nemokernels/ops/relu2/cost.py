"""What squared ReLU must move."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(elements: int, itemsize: int) -> Cost:
    """x read, y written."""
    return Cost(2 * elements * itemsize)


def backward(elements: int, itemsize: int) -> Cost:
    """dy and x read, dx written."""
    return Cost(3 * elements * itemsize)
