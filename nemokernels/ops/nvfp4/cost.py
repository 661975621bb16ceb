"""What quantisation to NVFP4 must move.

A code is half a byte, and 16 of them share one byte of scale.
"""

from __future__ import annotations

from nemokernels._cost import Cost

BYTES = 0.5 + 1 / 16  # per element


def quantize(elements: int, itemsize: int, copies: int = 1) -> Cost:
    """x read once, its maximum given; codes and scales written, twice for a transposed copy."""
    return Cost(elements * (itemsize + copies * BYTES))
