"""What the convolution must move: its few multiply-adds per byte never bound it."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(B: int, T: int, D: int, itemsize: int) -> Cost:
    """x read, y written."""
    return Cost(2 * B * T * D * itemsize)


def backward(B: int, T: int, D: int, itemsize: int) -> Cost:
    """x and dy read, dx written."""
    return Cost(3 * B * T * D * itemsize)


def update(B: int, T: int, D: int, L: int, itemsize: int) -> Cost:
    """x and the states of L entries read; y and the states written."""
    return Cost(2 * B * D * (T + L) * itemsize)
