"""What quantisation to NVFP4 and the W4A16 linear layer must move and multiply.

A code is half a byte, and 16 of them share one byte of scale.
"""

from __future__ import annotations

from nemokernels._cost import Cost

BYTES = 0.5 + 1 / 16  # per element


def quantize(elements: int, itemsize: int, copies: int = 1) -> Cost:
    """x read once, its maximum given; codes and scales written, twice for a transposed copy."""
    return Cost(elements * (itemsize + copies * BYTES))


def linear(M: int, K: int, N: int, itemsize: int, unit: str) -> Cost:
    """x and the 4-bit (N, K) weight read, y written; the products are in x's dtype."""
    return Cost((M * K + M * N) * itemsize + N * K * BYTES, 2 * M * K * N, unit)
