"""Triton kernels of moe_route: one chooses, weighs and counts, one or two more sort the slots.

T tokens, E experts, k slots per token, R = T * k. Every expert is a lane: group g of SPAN lanes
holds the experts from ``g * group_size`` on, so lanes and experts are in the same order.

Sorting is by counting. The slots are cut into pieces; each piece's rows for an expert follow those
of the pieces before it, so the order is that of the slots whatever order the programs run in. Row p
of a table counts the slots of piece p that chose each expert. A piece is what a number of choosing
programs choose, so that they count while the ids are in registers; sums of integers do not depend
on the order of the atomics. A lone piece is counted by the program that sorts it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import offset64, sigmoid
from nemokernels._triton import cdiv, contiguous
from nemokernels.ops.moe_route import native
from nemokernels.ops.moe_route.ref import SUM_EPS

SCAN_ROWS, SCAN_COLUMNS = 64, 32
EPS = tl.constexpr(SUM_EPS)
LAST = tl.constexpr(-0x80000000)  # behind every score, also -inf


@triton.jit
def _rank(x):
    # int32 in the order of float32, NaN above every number. No score is -0: a sum with a sigmoid.
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, bits, 0x7FFFFFFF)


@triton.jit
def _unrank(key):
    # The float32 whose rank is the high word of an int64.
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _pack(rank, low):
    return (rank.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def moe_route_clear_kernel(counts_ptr, table_ptr, experts, LANES: tl.constexpr):
    # Zeroes what the choosing programs add to.
    lane = tl.arange(0, LANES)
    zero = tl.zeros((LANES,), tl.int32)
    tl.store(table_ptr + offset64(tl.program_id(0), LANES) + lane, zero)
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + lane, zero, mask=lane < experts)


@triton.jit(do_not_specialize=["tokens", "share"])
def moe_route_choose_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    counts_ptr,
    table_ptr,
    tokens,
    share,
    group_size,
    n_group,
    scale,
    stride_logits_row,
    stride_logits_column,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    SPAN: tl.constexpr,
    KEPT: tl.constexpr,
    PAIR: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    # KEPT: groups kept, 0 for all. PAIR: groups have two experts or more. COUNTED: the width of the
    # table, 0 for a lone piece; every ``share`` programs choose for a piece.
    LANES: tl.constexpr = GROUPS * SPAN
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    expert = lane // SPAN * group_size + lane % SPAN
    real = (lane // SPAN < n_group) & (lane % SPAN < group_size)
    row_at = offset64(token, stride_logits_row)[:, None]
    mask = (token < tokens)[:, None] & real[None, :]
    at = row_at + offset64(expert, stride_logits_column)[None, :]
    choice = sigmoid(tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32))
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    rank = tl.where(real[None, :], _rank(choice), LAST)
    # The low word settles ties for the lower lane and says which lane it is.
    low = tl.broadcast_to((LANES - 1 - lane)[None, :], (ROWS, LANES))
    key = _pack(rank, low)
    if KEPT > 0:
        grouped = tl.reshape(key, (ROWS, GROUPS, SPAN))
        best = tl.max(grouped, 2)
        score = _unrank(best)
        if PAIR:
            others = tl.where(grouped == best[:, :, None], -9223372036854775807, grouped)
            score += _unrank(tl.max(others, 2))
        group = tl.arange(0, GROUPS)
        group_rank = tl.where((group < n_group)[None, :], _rank(score), LAST)
        group_low = tl.broadcast_to((GROUPS - 1 - group)[None, :], (ROWS, GROUPS))
        group_key = _pack(group_rank, group_low)
        left = group_key
        for _ in tl.static_range(KEPT):
            threshold = tl.max(left, 1)[:, None]
            left = tl.where(left == threshold, -9223372036854775807, left)
        kept = (group_key >= threshold)[:, :, None] & (tl.arange(0, SPAN) >= 0)[None, None, :]
        rank = tl.where(tl.reshape(kept, (ROWS, LANES)), rank, LAST)
        key = _pack(rank, low)
    top = tl.topk(key, SLOTS)
    chosen = LANES - 1 - (top & (LANES - 1)).to(tl.int32)
    chosen = chosen // SPAN * group_size + chosen % SPAN
    slot = tl.arange(0, SLOTS)
    mask = (token < tokens)[:, None] & (slot < TOP_K)[None, :]
    at = row_at + offset64(chosen, stride_logits_column)
    s = sigmoid(tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32))
    s = tl.where(mask, s, 0.0)
    if NORM:
        s = s / (tl.sum(s, 1) + EPS)[:, None]
    at = offset64(token, TOP_K)[:, None] + slot[None, :]
    tl.store(weights_ptr + at, s * scale, mask=mask)
    tl.store(experts_ptr + at, chosen, mask=mask)
    if COUNTED > 0:
        piece_ptr = table_ptr + offset64(tl.program_id(0) // share, COUNTED)
        tl.atomic_add(counts_ptr + chosen, 1, mask=mask, sem="relaxed")
        tl.atomic_add(piece_ptr + chosen, 1, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["tokens"])
def moe_route_backward_kernel(
    dweights_ptr,
    logits_ptr,
    experts_ptr,
    dlogits_ptr,
    tokens,
    experts,
    scale,
    stride_logits_row,
    stride_logits_column,
    NORM: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    mask = (token < tokens)[:, None] & (slot < TOP_K)[None, :]
    at = offset64(token, TOP_K)[:, None] + slot[None, :]
    chosen = tl.load(experts_ptr + at, mask=mask, other=-1)
    mask &= (chosen >= 0) & (chosen < experts)  # what is no expert has no gradient
    ds = tl.load(dweights_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    at = offset64(token, stride_logits_row)[:, None] + offset64(chosen, stride_logits_column)
    x = tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.where(mask, sigmoid(x), 0.0)
    if NORM:
        total = (tl.sum(s, 1) + EPS)[:, None]
        ds = (ds - tl.sum(ds * (s / total), 1)[:, None]) / total
    d = tl.where(mask, ds * s * sigmoid(-x), 0.0)
    lane = tl.arange(0, LANES)
    dlogits = tl.zeros((ROWS, LANES), tl.float32)
    for j in range(TOP_K):
        here = (slot == j)[None, :]
        expert = tl.sum(tl.where(here, chosen, 0), 1)
        value = tl.sum(tl.where(here, d, 0.0), 1)
        dlogits = tl.where(lane[None, :] == expert[:, None], value[:, None], dlogits)
    at = offset64(token, experts)[:, None] + lane[None, :]
    mask = (token < tokens)[:, None] & (lane < experts)[None, :]
    tl.store(dlogits_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _count(experts_ptr, begin, end, LANES: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((LANES,), tl.int32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        expert = tl.load(experts_ptr + i, mask=i < end, other=0)
        total += tl.histogram(expert, LANES, mask=i < end).to(tl.int32)
    return total


@triton.jit(do_not_specialize=["pieces"])
def moe_route_scan_kernel(
    table_ptr, pieces, LANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    # Replaces every column by the sums of what is above.
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, pieces, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < pieces)[:, None] & (column < LANES)[None, :]
        at = offset64(row, LANES)[:, None] + column[None, :]
        count = tl.load(table_ptr + at, mask=mask, other=0)
        before = tl.cumsum(count, 0) - count + total[None, :]
        tl.store(table_ptr + at, before, mask=mask)
        total += tl.sum(count, 0)


@triton.jit(do_not_specialize=["slots", "piece"])
def moe_route_order_kernel(
    experts_ptr,
    table_ptr,
    counts_ptr,
    offsets_ptr,
    order_ptr,
    slots,
    piece,
    experts,
    ALONE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # ALONE: the only program, which counts for itself.
    begin = tl.program_id(0) * piece
    end = begin + tl.minimum(piece, slots - begin)
    lane = tl.arange(0, LANES)
    if ALONE:
        counts = _count(experts_ptr, begin, end, LANES, BLOCK)
        tl.store(counts_ptr + lane, counts, mask=lane < experts)
    else:
        counts = tl.load(counts_ptr + lane, mask=lane < experts, other=0)
    ends = tl.cumsum(counts, 0)
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + lane, ends, mask=lane < experts)
    free = ends - counts  # the next row of each expert
    if not ALONE:
        free += tl.load(table_ptr + offset64(tl.program_id(0), LANES) + lane)
    i = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        slot = start + i
        expert = tl.load(experts_ptr + slot, mask=slot < end, other=0)
        same = expert[:, None] == expert[None, :]
        earlier = tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
        row = tl.gather(free, expert, 0) + earlier
        tl.store(order_ptr + row, slot, mask=slot < end)
        free += tl.histogram(expert, LANES, mask=slot < end).to(tl.int32)


def forward(logits, correction_bias, top_k, n_group, topk_group, norm_topk_prob, scale, config):
    """As ref.forward."""
    if config.backend == "csrc":
        return native.forward(
            logits, correction_bias, top_k, n_group, topk_group, norm_topk_prob, scale
        )
    tokens, experts = logits.shape
    slots, group_size, lanes = tokens * top_k, experts // n_group, _triton.next_power_of_2(experts)
    pieces = max(cdiv(slots, config.piece), 1)
    integers = lambda *shape: logits.new_empty(shape, dtype=torch.int32)  # noqa: E731
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    chosen, order = integers(tokens, top_k), integers(slots)
    counts, offsets = integers(experts), integers(experts)
    # No row of it is an output: who keeps the counts must not keep a table of all pieces.
    table = integers(pieces if pieces > 1 else 0, lanes)
    if pieces > 1:
        moe_route_clear_kernel[(pieces,)](counts, table, experts, LANES=lanes, num_warps=4)
    if tokens:
        bias = contiguous(correction_bias)
        moe_route_choose_kernel[(cdiv(tokens, config.rows),)](
            logits, bias, weights, chosen, counts, table, tokens,
            config.piece // (config.rows * top_k), group_size, n_group, scale, *logits.stride(),
            HAS_BIAS=bias is not None, NORM=norm_topk_prob,
            GROUPS=_triton.next_power_of_2(n_group), SPAN=_triton.next_power_of_2(group_size),
            KEPT=topk_group if topk_group < n_group else 0, PAIR=group_size > 1, TOP_K=top_k,
            SLOTS=_triton.next_power_of_2(top_k), ROWS=config.rows,
            COUNTED=lanes if pieces > 1 else 0, num_warps=config.num_warps,
        )  # fmt: skip
    if pieces > 1:
        moe_route_scan_kernel[(cdiv(lanes, SCAN_COLUMNS),)](
            table, pieces, LANES=lanes, ROWS=SCAN_ROWS, COLUMNS=SCAN_COLUMNS, num_warps=4
        )
    moe_route_order_kernel[(pieces,)](
        chosen, table, counts, offsets, order, slots, config.piece, experts, ALONE=pieces == 1,
        LANES=lanes, BLOCK=config.block, num_warps=4,
    )  # fmt: skip
    return weights, chosen, counts, offsets, order


def backward(dweights, logits, experts, norm_topk_prob, scale, config):
    """As ref.backward."""
    tokens, width = logits.shape
    top_k = experts.shape[1]
    dlogits = logits.new_empty(logits.shape)
    if tokens:
        moe_route_backward_kernel[(cdiv(tokens, config.rows),)](
            dweights.contiguous(), logits, experts.contiguous(), dlogits, tokens, width, scale,
            *logits.stride(), NORM=norm_topk_prob, TOP_K=top_k,
            SLOTS=_triton.next_power_of_2(top_k), LANES=_triton.next_power_of_2(width),
            ROWS=config.rows, num_warps=config.num_warps,
        )  # fmt: skip
    return dlogits


def specialisations():
    """Launches to compile without a GPU: the routers of the models, the H100's plan."""
    from nemokernels.ops.moe_route.op import plan

    def launch(tokens, experts, top_k, n_group=1):
        config = plan(tokens, experts, top_k, "", ("triton",), 132)
        logits = torch.empty(tokens, experts, device="meta")
        weights = torch.empty(tokens, top_k, device="meta")
        chosen = torch.empty(tokens, top_k, device="meta", dtype=torch.int32)
        bias = logits[0]

        def both():
            forward(logits, bias, top_k, n_group, cdiv(n_group, 2), True, 2.5, config)
            backward(weights, logits, chosen, True, 2.5, config)

        return both

    for label, *problem in (
        ("128 experts, top 6", 16384, 128, 6),
        ("512 experts, top 22", 16384, 512, 22),
        ("few tokens", 8, 128, 6),
        ("groups", 8, 256, 8, 8),
    ):
        yield _triton.Specialisation(label, launch(*problem))
