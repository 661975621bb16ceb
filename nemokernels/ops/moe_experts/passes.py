"""The rows that leave the experts, one per slot, a block of their columns at a time.

A token's result is a sum over its slots in their order, so their rows must wait for each other, and
all of them, (T * k, X), would be k copies of x. Every element of the result is a sum of its own:
cutting the columns into passes changes none of its bits. Activations in NVFP4 enter the experts by
pieces of the rows, within the same bound (nvfp4_gemm/ref.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemokernels._triton import cdiv

# Not measured. A pass reads the hidden rows again, which takes as long as multiplying them by 261
# columns (bfloat16 at 783 TFLOP/s, 3 TB/s): blocks of 512 columns spend half of the products' time
# on it, narrower ones soon all of it. This much holds 512 columns of the 16384 * 22 rows of
# Nemotron 3 Super, which makes two passes for it and for Nano; smaller problems take one.
SLOT_BYTES = 384 << 20


def at_once(count: int, each: int, unit: int, most: int) -> int:
    """How many of ``count`` columns, or rows, a pass takes, a multiple of ``unit``.

    One of them takes ``each`` bytes. As few passes as ``most`` bytes allow, all but the last of
    them equally large; ``unit`` are the least that is held.
    """
    fit = max(most // max(each * unit, 1), 1)
    units = max(cdiv(count, unit), 1)
    return cdiv(units, cdiv(units, fit)) * unit


def in_passes(
    rows: torch.Tensor,
    out: torch.Tensor,
    multiply: Callable[[torch.Tensor, int], object],
    add: Callable[[torch.Tensor, torch.Tensor], object],
) -> torch.Tensor:
    """Fill out (T, X) with the memory of rows (R, columns) alone. Returns ``out``.

    ``multiply(rows, first)`` writes the columns from ``first`` on into rows (R, at most columns),
    ``add(rows, out)`` sums the slots' rows into the same columns of out.
    """
    slots, columns = rows.shape
    for first in range(0, out.shape[1], columns):
        here = min(columns, out.shape[1] - first)
        part = rows.view(-1)[: slots * here].view(slots, here)
        multiply(part, first)
        add(part, out[:, first : first + here])
    return out
