"""The call into csrc/moe_experts. Callers have allocated outputs, checked shapes and dtypes."""

from __future__ import annotations

import torch

from nemokernels import _ext
from nemokernels._triton import aligned, cdiv

PARTS = ("up", "slots", "dhidden")  # moe_experts::Part in csrc/moe_experts/moe_experts.h
ROWS = 128  # of a tile
ALONG, ACROSS, GRADIENT = (256, 232, 224, 192), (256, 192), (192,)  # columns of a tile
EIGHT = (160, 128)  # of E4M3

_product = _ext.define(
    "moe_experts_product(Tensor a, Tensor weights, Tensor order, Tensor offsets, Tensor? tokens, "
    "Tensor tile_expert, Tensor tile_row, Tensor? slot_weights, Tensor? hidden, "
    "Tensor(b!)? partial, Tensor? a_scale, Tensor? b_scale, Tensor? out_scale, int top_k, "
    "int part, int tile_columns, int first, Tensor(a!) out) -> ()"
)


def refusal(*weights: torch.Tensor) -> str:
    """Why the kernels do not take experts (E, rows, columns), E4M3 as bytes; empty if they do."""
    for w in weights:
        if w.dtype not in (torch.bfloat16, torch.float16, torch.uint8):
            return f"csrc takes bfloat16, float16 and E4M3, got {w.dtype}"
        unit = 16 // w.element_size()
        if w.shape[1] % unit or w.shape[2] % unit or not w.shape[2]:
            return f"csrc takes widths that are multiples of {unit}, got {tuple(w.shape[1:])}"
        if w.stride(2) != 1 or w.stride(1) % unit or w.stride(0) % unit or w.data_ptr() % 16:
            return "csrc takes weights whose rows are contiguous and aligned to 16 bytes"
    return ""


def tile_columns(columns: int, options: tuple[int, ...]) -> int:
    """Of a tile: as few columns as possible are padded, and tiles are wide."""
    return min(options, key=lambda tile: (cdiv(columns, tile) * tile, -tile))


def product(
    a: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor,
    expert: torch.Tensor, row: torch.Tensor, top_k: int, part: str, columns: int,
    out: torch.Tensor, first: int = 0, tokens: torch.Tensor | None = None,
    gradient: tuple[torch.Tensor, ...] = (None,) * 3,
    scales: tuple[torch.Tensor, ...] = (None,) * 3,
) -> torch.Tensor:  # fmt: skip
    """out = part(a_r @ w_e^T) for rows aligned to 16 bytes, bfloat16, float16 or E4M3 as bytes.

    out (R, N) has the columns of w (E, width, depth) from ``first`` on; all sizes are multiples of
    16 bytes. ``part``: "up" takes the row of a of a row's token and squares what is positive;
    "slots" puts a row where its slot is; "dhidden", as "up", is 2 sqrt(hidden) times slot weight
    times product, and the sums of hidden times product go to ``partial``.

    ``expert`` and ``row`` are the table of tiles of 128 rows; ``columns`` is a tile's other side.
    ``tokens`` are those of the slots, by default ``top_k`` slots each. ``gradient`` is slot
    weights, hidden and partial. ``scales``, of E4M3: that of a, one or one per token ("up") or one
    per expert; that of w, one per expert or one per column of each; and of "up" that by which the
    result is divided, one per expert. The result is E4M3 too; "slots" gives bfloat16.
    """
    _product(aligned(a), weights, order, offsets, tokens, expert, row, *gradient, *scales, top_k,
             PARTS.index(part), columns, first, out)  # fmt: skip
    return out
