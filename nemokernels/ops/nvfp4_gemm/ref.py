"""Products of two operands in NVFP4 in plain torch: the specification.

An operand (R, K) is packed E2M1 codes (R, K/2) and E4M3 block scales as bytes in 128 x 4 tiles
(see nvfp4.ref.swizzle).

Cast points: e2m1(code) * scale has at most 6 significant bits, and a product of two such values at
most 12: exact in float32. They accumulate in the dtype of alpha (float32; float64 for an oracle),
alpha multiplies the sum, the epilogue follows, then one cast: to bfloat16, or none from float64.
"""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype
from nemokernels.ops.moe_experts.passes import SLOT_BYTES, at_once, in_passes
from nemokernels.ops.moe_experts.ref import segments, slots_of, sum_of
from nemokernels.ops.nvfp4 import ref as nvfp4

TILE = 128  # rows that share a tile of scales
LARGEST = nvfp4.E2M1_MAX * nvfp4.E4M3_MAX  # amax = LARGEST * input scale


def values(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e2m1(code) * scale (R, K), without a global scale."""
    blocks = nvfp4.unswizzle(scales, codes.shape[-2], codes.shape[-1] // 8)
    one = torch.ones((), dtype=dtype, device=codes.device)
    return nvfp4.dequantize(codes, blocks.contiguous(), one, dtype)


def out_dtype(alpha: torch.Tensor) -> torch.dtype:
    """bfloat16, but float64 for an oracle."""
    return torch.float64 if alpha.dtype == torch.float64 else torch.bfloat16


def product(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
) -> torch.Tensor:
    """alpha * a @ b^T (M, N)."""
    acc = alpha.dtype
    return (_linear(a, a_scales, b, b_scales, acc) * alpha).to(out_dtype(alpha))


def grouped_product(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    offsets: torch.Tensor,
    squared_relu: bool,
    first: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """alpha_e * a_r @ b_e^T for the rows r of every expert e, relu(.)**2 of it if asked; (R, N).

    a_scales are those of :func:`group_scales`, offsets the end of each expert's rows. An ``out``
    that is given takes as many of the N columns as it has, from ``first``, a multiple of 128, on.
    """
    acc = alpha.dtype
    if out is None:
        out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype(alpha))
    b, b_scales = b[:, first : first + out.shape[1]], b_scales[:, first:]
    tile = 0
    for e, r in segments(offsets):
        tiles = -(-(r.stop - r.start) // TILE) * TILE
        y = _linear(a[r], a_scales[tile : tile + tiles], b[e], b_scales[e], acc) * alpha[e]
        out[r] = (y.relu().square() if squared_relu else y).to(out.dtype)
        tile += tiles
    return out


def _linear(a, a_scales, b, b_scales, acc):
    return torch.nn.functional.linear(values(a, a_scales, acc), values(b, b_scales, acc))


def padded_rows(rows: int, experts: int) -> int:
    """The most rows that ``rows`` take when every expert's begin at a whole tile."""
    return (rows + (TILE - 1) * min(experts, rows)) // TILE * TILE


def expert_of(rows: int, offsets: torch.Tensor) -> torch.Tensor:
    """The expert of each row, from the end of each expert's rows."""
    row = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    last = max(offsets.shape[0] - 1, 0)
    return torch.searchsorted(offsets, row, right=True).clamp(max=last)


def group_scales(scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Block scales (R, K/16), rows sorted by expert, swizzled, each expert's beginning at a tile.

    The result has padded_rows(R, E) rows; what no expert uses is zero. No size is read back.
    """
    rows, blocks = scales.shape
    tiles = no_scales(rows, blocks, offsets)
    put_scales(tiles, scales, expert_of(rows, offsets), offsets)
    return tiles


def no_scales(rows: int, blocks: int, offsets: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape of :func:`group_scales`, for so many rows and blocks."""
    shape = nvfp4.swizzled_shape((padded_rows(rows, offsets.shape[0]), blocks))
    return torch.zeros(shape, dtype=torch.uint8, device=offsets.device)


def put_scales(
    tiles: torch.Tensor, scales: torch.Tensor, expert: torch.Tensor, offsets: torch.Tensor,
    first: int = 0,
) -> None:  # fmt: skip
    """Write the block scales of the rows from ``first`` on into the ``tiles`` of all rows; each row
    has its ``expert``. In bounds whatever the offsets are."""
    ends = offsets.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    taken = (counts + TILE - 1) // TILE * TILE
    shift = taken.cumsum(0) - taken - (ends - counts)  # padding before each expert
    row = torch.arange(first, first + scales.shape[0], device=scales.device) + shift[expert]
    nvfp4.put_rows(tiles, row.clamp(0, tiles.shape[0] - 1), scales)


def experts(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    up: torch.Tensor,
    up_scales: torch.Tensor,
    up_scale_2: torch.Tensor,
    hidden_scale: torch.Tensor,
    down: torch.Tensor,
    down_scales: torch.Tensor,
    down_scale_2: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
) -> torch.Tensor:
    """y of moe_experts' reference with x, up, down and the hidden layers in NVFP4.

    x is quantised with amax = 2688 x_scale, hidden with 2688 hidden_scale of the row's expert.
    Rounded to x's dtype are hidden, before it is quantised, and the rows that leave the down
    projection.
    """
    slots_of(offsets, order)  # raises where these are no route
    return compose(grouped_product, x, x_scale, up, up_scales, up_scale_2, hidden_scale, down,
                   down_scales, down_scale_2, weights, offsets, order)  # fmt: skip


def add_up(
    rows: torch.Tensor, weights: torch.Tensor, row_of: torch.Tensor, out: torch.Tensor
) -> None:
    """out_t = sum_j weights_tj * rows[row_of_tj], by the rules of moe_experts' reference."""
    choices = (rows.index_select(0, row) for row in row_of.view(weights.shape).unbind(1))
    out.copy_(sum_of(choices, weights, out.dtype))


def compose(
    multiply, x, x_scale, up, up_scales, up_scale_2, hidden_scale, down, down_scales, down_scale_2,
    weights, offsets, order, quantize=nvfp4.quantize, combine=add_up, slot_bytes=SLOT_BYTES,
) -> torch.Tensor:  # fmt: skip
    """:func:`experts` with the grouped product, the quantiser and the sum over slots of the caller.

    Of the hidden layer codes and block scales are held, 4.5 bits per element. What the first
    product reads and writes is held for a piece of the rows at a time, and the rows that leave the
    second for a block of columns, either within ``slot_bytes`` (128 rows or columns are the least).
    Only shapes say where to cut, and no bit of the result depends on it. A route that is none gives
    wrong results, within bounds.
    """
    slots, width = order.numel(), x.shape[1]
    slot = order.long().clamp(0, slots - 1)
    row_of = slot.new_zeros(slots, dtype=torch.int32)
    row_of[slot] = torch.arange(slots, dtype=torch.int32, device=slot.device)
    amax = LARGEST * hidden_scale.float()
    codes, scales = _hidden(multiply, quantize, x, x_scale, up, up_scales, up_scale_2, amax,
                            slot // weights.shape[1], offsets, slot_bytes)  # fmt: skip
    acc = acc_dtype(x)
    alpha = down_scale_2.to(acc) * nvfp4.global_scale(amax).to(acc)

    def project(rows, first):
        multiply(codes, scales, down, down_scales, alpha, offsets, False, first, rows)

    columns = at_once(width, slots * x.element_size(), TILE, slot_bytes)
    return in_passes(
        x.new_empty(slots, columns), x.new_empty(x.shape), project,
        lambda rows, out: combine(rows, weights, row_of, out),
    )  # fmt: skip


def _hidden(
    multiply, quantize, x, x_scale, up, up_scales, up_scale_2, amax, token, offsets, slot_bytes
):
    """Codes (R, F/2) of the hidden layer and its block scales as of :func:`group_scales`."""
    rows, width, acc = token.numel(), up.shape[1], acc_dtype(x)
    x_codes, x_scales, scale_2 = quantize(
        x, LARGEST * x_scale.float().reshape(()), 1, None, 0, False
    )
    alpha = up_scale_2.to(acc) * scale_2.to(acc)
    # A row takes X * 11 / 16 bytes for codes of x and, on their way into tiles, its block scales;
    # F * 5 / 8 beside the hidden layer for the same of that. The rest is for indices.
    each = x.shape[1] + width * (x.element_size() + 1)
    piece = at_once(rows, each, TILE, slot_bytes)
    hidden = x.new_empty(min(piece, rows), width)
    codes = up.new_empty(rows, width // 2)
    tiles = no_scales(rows, width // nvfp4.BLOCK, offsets)
    for first in range(0, rows, piece):
        end = min(first + piece, rows)
        here = offsets.clamp(first, end) - first  # an expert that is cut ends here and begins again
        out, of = hidden[: end - first], token[first:end]
        multiply(x_codes.index_select(0, of), group_scales(x_scales.index_select(0, of), here),
                 up, up_scales, alpha, here, True, 0, out)  # fmt: skip
        expert = expert_of(end - first, here)
        codes[first:end], scales, _ = quantize(out, amax[expert], 1, None, 0, False)
        put_scales(tiles, scales, expert, offsets, first)
    return codes, tiles
