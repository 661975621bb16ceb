"""What quantisation to FP8 and the FP8 linear layer must move and multiply."""

from __future__ import annotations

from nemokernels._cost import Cost
from nemokernels.ops.gated_rms_norm import cost as gated_cost
from nemokernels.ops.rms_norm import cost as rms_norm_cost


def quantize(elements: int, itemsize: int, transpose: bool = False) -> Cost:
    """x read, the codes written once, or twice with the transpose."""
    return Cost(elements * (itemsize + (2 if transpose else 1)))


def rms_norm(
    rows: int, width: int, itemsize: int, residual: bool = False, transpose: bool = False
) -> Cost:
    """What the norm moves, and the codes of its result written once, or twice."""
    return _emitting(
        rms_norm_cost.forward(rows, width, itemsize, residual), rows * width, transpose
    )


def gated_rms_norm(rows: int, width: int, itemsize: int, transpose: bool = False) -> Cost:
    """What the norm moves, and the codes of its result written once, or twice."""
    return _emitting(gated_cost.forward(rows, width, itemsize), rows * width, transpose)


def _emitting(norm: Cost, elements: int, transpose: bool) -> Cost:
    return Cost(norm.bytes + elements * (2 if transpose else 1))


def update(columns: int, length: int) -> Cost:
    """Delayed scaling: every history read and written, in float32."""
    return Cost(8 * columns * length)


def linear(M: int, K: int, N: int, itemsize: int) -> Cost:
    """(M, K) times (N, K)^T: x and weight read in their own dtype, y written."""
    return Cost((M * K + N * K + M * N) * itemsize, 2 * M * K * N, "float8_e4m3fn")


def linear_backward(M: int, K: int, N: int, itemsize: int) -> Cost:
    """The 8-bit x and weight and dy read; dx and dweight written."""
    moved = (M * N + M * K + N * K) * itemsize + M * K + N * K
    return Cost(moved, 4 * M * K * N, "float8_e4m3fn")


def linear_both(M: int, K: int, N: int, itemsize: int) -> Cost:
    """x, weight and dy read, y, dx and dweight written; three products."""
    return Cost(2 * (M * K + N * K + M * N) * itemsize, 6 * M * K * N, "float8_e4m3fn")
