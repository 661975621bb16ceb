"""What products of two NVFP4 operands must move and multiply."""

from __future__ import annotations

from nemokernels._cost import Cost
from nemokernels.ops.moe_experts import cost as moe
from nemokernels.ops.nvfp4.cost import BYTES

UNIT = "float4_e2m1fn_x2"  # of the products; torch's name of a byte of two codes


def linear(M: int, K: int, N: int) -> Cost:
    """Both operands read in 4.5 bits, y written in bfloat16."""
    return Cost((M * K + N * K) * BYTES + M * N * 2, 2 * M * K * N, UNIT)


def experts(T: int, X: int, F: int, k: int, touched: float) -> Cost:
    """As in moe_experts of bfloat16 tokens, with weights of 4.5 bits and products in NVFP4."""
    return moe.forward(T, X, F, k, touched, 2, UNIT, weight_itemsize=BYTES)
