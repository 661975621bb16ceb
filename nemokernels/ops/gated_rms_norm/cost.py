"""What the gated norm must move."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(rows: int, width: int, itemsize: int) -> Cost:
    """x and z read, y written."""
    return Cost(3 * rows * width * itemsize)


def backward(rows: int, width: int, itemsize: int) -> Cost:
    """dy, x and z read, dx and dz written."""
    return Cost(5 * rows * width * itemsize)
