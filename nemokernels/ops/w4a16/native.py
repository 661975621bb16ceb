"""The call into csrc/w4a16. Callers have allocated the output and checked shapes and dtypes."""

from __future__ import annotations

import torch

from nemokernels import _ext

PARTS = ("plain", "up", "slots")  # w4a16::Part in csrc/w4a16/w4a16.h
ROWS = (8, 16, 32)  # of x per block
WIDE = 256  # on sm_90 alone, and for multiples of 8 columns of the result

_product = _ext.define(
    "w4a16_product(Tensor x, Tensor codes, Tensor scales, Tensor global_scale, Tensor? order, "
    "Tensor? offsets, Tensor? tile_expert, Tensor? tile_row, int top_k, int part, int rows, "
    "int first, bool early, Tensor(a!) out) -> ()"
)


def product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor,
    order: torch.Tensor | None, offsets: torch.Tensor | None, expert: torch.Tensor | None,
    row: torch.Tensor | None, top_k: int, part: str, rows: int, out: torch.Tensor, first: int = 0,
    early: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = part(x_r @ w_e^T) for bfloat16 or float16 x with rows aligned to 16 bytes.

    out (R, N) has the columns from ``first``, a multiple of 16, on.
    ``part``: "plain" has one weight and as many rows of x as of out; "up" takes the row of x of a
    row's token and squares what is positive; "slots" puts a row where its slot is. ``expert`` and
    ``row`` are the table of tiles of ``rows`` rows, one of ROWS or WIDE. ``early``, of ROWS[0]:
    begin while the kernel before on the stream still runs, if that is this one for "up", which
    writes x.
    """
    _product(x, codes, scales, scale_2, order, offsets, expert, row, top_k, PARTS.index(part),
             rows, first, early, out)  # fmt: skip
    return out
