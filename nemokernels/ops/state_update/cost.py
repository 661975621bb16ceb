"""What a decode step of the recurrence must move; it multiplies no matrices."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(B: int, H: int, P: int, G: int, N: int, state_itemsize: int, itemsize: int) -> Cost:
    """The states of B sequences read and written; x, z, dt, B and C read; y written."""
    return Cost(2 * B * H * P * N * state_itemsize + B * (3 * H * P + 2 * G * N + H) * itemsize)
