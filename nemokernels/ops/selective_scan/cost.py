"""What the Mamba-1 scan must move; it multiplies no matrices. D channels, G groups, state N."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(B: int, T: int, D: int, G: int, N: int, itemsize: int) -> Cost:
    """u, delta, z, B and C read; out and the float32 last state written."""
    return Cost(B * T * (4 * D + 2 * G * N) * itemsize + 4 * B * D * N)


def backward(B: int, T: int, D: int, G: int, N: int, itemsize: int) -> Cost:
    """dout, u, delta, z, B and C read; du, ddelta, dz, dB and dC written."""
    return Cost(B * T * (7 * D + 4 * G * N) * itemsize)
