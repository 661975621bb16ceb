"""Products of two operands in NVFP4 in plain torch: the specification.

An operand (R, K) is packed E2M1 codes (R, K/2) and E4M3 block scales as bytes in 128 x 4 tiles
(see nvfp4.ref.swizzle).

Cast points: e2m1(code) * scale has at most 6 significant bits, and a product of two such values at
most 12: exact in float32. They accumulate in the dtype of alpha (float32; float64 for an oracle),
alpha multiplies the sum, the epilogue follows, then one cast: to bfloat16, or none from float64.
"""

from __future__ import annotations

import torch

from nemokernels.ops.moe_experts.passes import SLOT_BYTES, columns_at_once
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
    dtype: torch.dtype | None = None,
    first: int = 0,
    columns: int | None = None,
) -> torch.Tensor:
    """alpha_e * a_r @ b_e^T for the rows r of every expert e, relu(.)**2 of it if asked; (R, N).

    a_scales are those of :func:`group_scales`, offsets the end of each expert's rows. Of the N
    columns so many from ``first``, a multiple of 128, on.
    """
    acc, columns = alpha.dtype, b.shape[1] if columns is None else columns
    b, b_scales = b[:, first : first + columns], b_scales[:, first:]
    out = a.new_zeros((a.shape[0], columns), dtype=dtype or out_dtype(alpha))
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
    rows, ends = scales.shape[0], offsets.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    tiles = (counts + TILE - 1) // TILE * TILE
    shift = tiles.cumsum(0) - tiles - (ends - counts)  # padding before each expert
    target = torch.arange(rows, device=scales.device) + shift[expert_of(rows, offsets)]
    padded = padded_rows(rows, offsets.shape[0])
    spread = scales.new_zeros(padded, scales.shape[1])
    return nvfp4.swizzle(spread.index_copy(0, target.clamp(0, padded - 1), scales))


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


def compose(
    multiply, x, x_scale, up, up_scales, up_scale_2, hidden_scale, down, down_scales, down_scale_2,
    weights, offsets, order, quantize=nvfp4.quantize, slot_bytes=SLOT_BYTES,
) -> torch.Tensor:  # fmt: skip
    """:func:`experts` with the grouped product and the quantiser that are given.

    Rows that leave the down projection take at most ``slot_bytes`` at a time. A route that is none
    gives wrong results, within bounds.
    """
    slot = order.long().clamp(0, order.numel() - 1)
    codes, scales, scale_2 = quantize(x, LARGEST * x_scale.float().reshape(()), 1, None, 0, False)
    token = slot // weights.shape[1]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    alpha = up_scale_2.to(acc) * scale_2.to(acc)
    hidden = multiply(codes[token], group_scales(scales[token], offsets), up, up_scales, alpha,
                      offsets, True, x.dtype)  # fmt: skip
    amax = LARGEST * hidden_scale.float()
    expert = expert_of(slot.numel(), offsets)
    codes, scales, scale_2 = quantize(hidden, amax[expert], 1, None, 0, False)
    alpha = down_scale_2.to(acc) * nvfp4.global_scale(amax).to(acc)
    scales, width = group_scales(scales, offsets), x.shape[1]
    row_of = torch.zeros_like(slot)  # the row of each slot
    row_of[slot] = torch.arange(slot.numel(), device=slot.device)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = columns_at_once(slot.numel(), width, x.element_size(), TILE, slot_bytes)
    for first in range(0, width, columns):
        here = min(columns, width - first)
        rows = multiply(codes, scales, down, down_scales, alpha, offsets, False, x.dtype, first,
                        here)  # fmt: skip
        choices = (rows[place] for place in row_of.view(weights.shape).unbind(1))
        y[:, first : first + here] = sum_of(choices, weights, x.dtype)
        del rows  # its memory is the next one's
    return y
