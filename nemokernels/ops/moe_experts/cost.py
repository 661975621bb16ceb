"""What the routed experts must move and multiply. T tokens of width X, k slots each, experts of
width F, of which ``touched`` have tokens. The hidden rows stay on the chip in the forward."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(
    T: int, X: int, F: int, k: int, touched: float, itemsize: int, unit: str,
    weight_itemsize: float | None = None,
) -> Cost:  # fmt: skip
    """x and the matrices of touched experts read (quantised ones: give their bytes per weight),
    y written."""
    per_weight = itemsize if weight_itemsize is None else weight_itemsize
    moved = 2 * T * X * itemsize + 2 * touched * X * F * per_weight + 12 * T * k
    return Cost(moved, 4 * T * k * X * F, unit)


def backward(T: int, X: int, F: int, k: int, touched: float, itemsize: int, unit: str) -> Cost:
    """x, dy, hidden and the matrices read; dx and the matrices' gradients written."""
    moved = (3 * T * X + T * k * F + 4 * touched * X * F) * itemsize + 16 * T * k
    return Cost(moved, 8 * T * k * X * F, unit)


def both(T: int, X: int, F: int, k: int, touched: float, itemsize: int, unit: str) -> Cost:
    """A forward, which also writes hidden for its backward, and that backward."""
    sizes = T, X, F, k, touched, itemsize, unit
    ahead, back = forward(*sizes), backward(*sizes)
    return Cost(ahead.bytes + T * k * F * itemsize + back.bytes, ahead.flops + back.flops, unit)
