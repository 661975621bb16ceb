"""What products with NVFP4 weights and unquantised activations must move and multiply."""

from __future__ import annotations

from nemokernels._cost import Cost
from nemokernels.ops.moe_experts import cost as moe
from nemokernels.ops.nvfp4.cost import BYTES


def linear(M: int, K: int, N: int, itemsize: int, unit: str) -> Cost:
    """x and the 4-bit (N, K) weight read, y written; the products are in x's dtype."""
    return Cost((M * K + M * N) * itemsize + N * K * BYTES, 2 * M * K * N, unit)


def experts(T: int, X: int, F: int, k: int, touched: float, itemsize: int, unit: str) -> Cost:
    """As in moe_experts, with weights of 4.5 bits."""
    return moe.forward(T, X, F, k, touched, itemsize, unit, weight_itemsize=BYTES)
