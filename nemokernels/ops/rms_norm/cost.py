"""What RMSNorm must move, alone and with the residual addition before it."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(rows: int, width: int, itemsize: int, residual: bool = False) -> Cost:
    """x read, y written; with a residual that is read and the sum written too."""
    return Cost((4 if residual else 2) * rows * width * itemsize)


def backward(rows: int, width: int, itemsize: int, residual: bool = False) -> Cost:
    """dy and x (or the sum) read, dx written; with a residual the sum's own gradient read too."""
    return Cost((4 if residual else 3) * rows * width * itemsize)
