"""The call into csrc/moe_experts. Callers have allocated outputs, checked shapes and dtypes."""

from __future__ import annotations

import torch

from nemokernels import _ext
from nemokernels._triton import aligned, cdiv

PARTS = ("up", "slots", "dhidden")  # moe_experts::Part in csrc/moe_experts/moe_experts.h
ROWS = 128  # of a tile
ALONG, ACROSS, GRADIENT = (256, 232, 224, 192), (256, 192), (192,)  # columns of a tile

_product = _ext.define(
    "moe_experts_product(Tensor a, Tensor weights, Tensor order, Tensor offsets, Tensor? tokens, "
    "Tensor tile_expert, Tensor tile_row, Tensor? slot_weights, Tensor? hidden, "
    "Tensor(b!)? partial, int top_k, int part, int tile_columns, int first, Tensor(a!) out) -> ()"
)


def refusal(*weights: torch.Tensor) -> str:
    """Why the kernels do not take experts (E, rows, columns); empty if they do."""
    for w in weights:
        if w.dtype not in (torch.bfloat16, torch.float16):
            return f"csrc takes bfloat16 and float16, got {w.dtype}"
        if w.shape[1] % 8 or w.shape[2] % 8 or not w.shape[2]:
            return f"csrc takes widths that are multiples of 8, got {tuple(w.shape[1:])}"
        if w.stride(2) != 1 or w.stride(1) % 8 or w.stride(0) % 8 or w.data_ptr() % 16:
            return "csrc takes weights whose rows are contiguous and aligned to 16 bytes"
    return ""


def tile_columns(columns: int, options: tuple[int, ...]) -> int:
    """Of a tile: as few columns as possible are padded, and tiles are wide."""
    return min(options, key=lambda tile: (cdiv(columns, tile) * tile, -tile))


def product(
    a: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor,
    expert: torch.Tensor, row: torch.Tensor, top_k: int, part: str, columns: int,
    out: torch.Tensor, first: int = 0, slot_weights: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None, partial: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """out = part(a_r @ w_e^T) for bfloat16 or float16 rows aligned to 16 bytes.

    out (R, N) has the columns of w (E, width, depth) from ``first`` on; all sizes are multiples of
    8. ``part``: "up" takes the row of a of a row's token and squares what is positive; "slots" puts
    a row where its slot is; "dhidden", as "up", is 2 sqrt(hidden) times slot weight times product,
    and the sums of hidden times product go to ``partial``. ``expert`` and ``row`` are the table of
    tiles of 128 rows; ``columns`` is a tile's other side. ``tokens`` are those of the slots, in
    range, where they are not slot / top_k.
    """
    _product(aligned(a), weights, order, offsets, tokens, expert, row, slot_weights, hidden,
             partial, top_k, PARTS.index(part), columns, first, out)  # fmt: skip
    return out
