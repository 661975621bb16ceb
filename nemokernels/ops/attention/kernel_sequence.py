"""Triton kernels of attention: forward, and a backward without atomics.

A program takes one head and a tile of queries, or one key-value head and a tile of keys. Tiles
start where their sequence starts, so that a packed sequence's bits are those it has by itself. Keys
are visited in runs: global tokens, where the window begins, what all queries of the tile see, and
the diagonal; only the third is not masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import offset64, offset_in_row, row_offset
from nemokernels._triton import axes, cdiv, row_divisor

LONG = 1 << 30  # longer than any sequence
LANES = 256  # sequences looked at together


@triton.jit(do_not_specialize=["tiles", "sequences", "length"])
def attention_tiles_kernel(
    cu_seqlens_ptr, table_ptr, tiles, sequences, length, BLOCK_M: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # For every tile: start and end of its sequence, and where in it the tile starts.
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    done = tl.zeros((BLOCK,), tl.int32)
    start, end, first = done, done, done
    for base in range(0, sequences, LANES):
        lane = base + tl.arange(0, LANES)
        inside = lane < sequences
        begins = tl.load(cu_seqlens_ptr + lane, mask=inside, other=0)
        ends = tl.load(cu_seqlens_ptr + lane + 1, mask=inside, other=0)
        begins, ends = tl.maximum(begins, 0), tl.minimum(ends, length)
        needed = tl.cdiv(tl.maximum(ends - begins, 0), BLOCK_M)
        last = tl.cumsum(needed, 0)
        within = (tile - done)[:, None] - (last - needed)[None, :]
        mine = (within >= 0) & (within < needed[None, :])
        start += tl.sum(tl.where(mine, begins[None, :], 0), 1)
        end += tl.sum(tl.where(mine, ends[None, :], 0), 1)
        first += tl.sum(tl.where(mine, within * BLOCK_M, 0), 1)
        done += tl.sum(needed, 0)
    mask = tile < tiles
    tl.store(table_ptr + tile, start, mask=mask)
    tl.store(table_ptr + tiles + tile, end, mask=mask)
    tl.store(table_ptr + 2 * tiles + tile, first, mask=mask)


@triton.jit
def _tile(table_ptr, tile, tiles, length, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    # Row, start and end of the sequence in it, and where in the sequence the tile starts.
    if PACKED:
        start = tl.load(table_ptr + tile)
        return 0, start, tl.load(table_ptr + tiles + tile), tl.load(table_ptr + 2 * tiles + tile)
    else:
        blocks = tl.cdiv(length, BLOCK)
        return tile // blocks, 0, length, tile % blocks * BLOCK


@triton.jit
def _rows(ptr, strides, row, rows, d, dim):
    # (rows, D) of one head, zero past the sequence and the head.
    mask = (row < rows)[:, None] & (d < dim)[None, :]
    at = offset64(row, strides[0])[:, None] + offset64(d, strides[2])[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def _queries(
    table_ptr, tiles, length, keys, heads, PACKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # This program's head, what _tile says of its tile of queries, and how many keys of the sequence
    # lie before its first query.
    head = tl.program_id(0) % heads
    tile = tiles - 1 - tl.program_id(0) // heads  # a row's longest first
    b, start, end, first = _tile(table_ptr, tile, tiles, length, PACKED, BLOCK)
    return head, b, start, end, first, 0 if PACKED else keys - length


@triton.jit
def _scores(qk, place, key, keys, slope, rule, SLOPES: tl.constexpr, MASKED: tl.constexpr):
    # Scores from products; -inf where a key is invisible. place and key broadcast.
    scale, window, global_tokens = rule
    scores = qk * scale
    if SLOPES:
        scores -= slope * (place - key).to(tl.float32)
    if MASKED:
        visible = (key <= place) & (key < keys) & ((key > place - window) | (key < global_tokens))
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def _run(RUN: tl.constexpr, first, count, keys, rule, BLOCK: tl.constexpr):
    # Begin and end of a run of keys for count queries from position first: 0, global tokens; 1,
    # where windows begin; 2, what all queries see; 3, the diagonal. All but the last end are
    # multiples of BLOCK.
    _, window, global_tokens = rule
    last = tl.minimum(first + count, keys) - 1
    near = tl.maximum(first - window + 1, 0) // BLOCK * BLOCK
    diagonal = tl.maximum((first + 1) // BLOCK * BLOCK, near)
    full = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK) * BLOCK
    full = tl.minimum(tl.maximum(full, near), diagonal)
    if RUN == 0:
        return 0, tl.minimum(tl.cdiv(tl.minimum(global_tokens, near), BLOCK) * BLOCK, near)
    elif RUN == 1:
        return near, full
    elif RUN == 2:
        return full, diagonal
    else:
        return diagonal, tl.minimum(last + 1, keys)


@triton.jit
def _score(
    q, k_ptr, v_ptr, key, place, keys, slope, rule, d, dim, k_strides, v_strides,
    SLOPES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # A tile of keys, their values, and the scores of the queries at ``place``.
    k = _rows(k_ptr, k_strides, key, keys, d, dim)
    v = _rows(v_ptr, v_strides, key, keys, d, dim)
    qk = tl.dot(q, k.T, input_precision="ieee")
    return k, v, _scores(qk, place[:, None], key[None, :], keys, slope, rule, SLOPES, MASKED)


@triton.jit
def _attend(
    acc, top, total, q, k_ptr, v_ptr, begin, end, place, keys, slope, rule, dim, k_strides,
    v_strides, SLOPES: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        _, v, scores = _score(q, k_ptr, v_ptr, key, place, keys, slope, rule, d, dim, k_strides,
                              v_strides, SLOPES, MASKED)  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        p = tl.exp(scores - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["tiles", "length", "keys", "q_row", "k_row", "v_row"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slopes_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    rule,
    tiles,
    length,
    keys,
    heads,
    groups,
    dim,
    q_row,
    k_row,
    v_row,
    q_strides,
    k_strides,
    v_strides,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    SLOPES: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, b, start, end, first, ahead = _queries(
        table_ptr, tiles, length, keys, heads, PACKED, BLOCK_M
    )
    if first >= end - start:
        return
    seen = end - start + ahead
    group = head // (heads // groups)
    m, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_ptr += row_offset(b, q_row, ROWS) + offset_in_row(start, head, q_strides)
    q = _rows(q_ptr, q_strides, m, end - start, d, dim)
    k_ptr += row_offset(b, k_row, ROWS) + offset_in_row(start, group, k_strides)
    v_ptr += row_offset(b, v_row, ROWS) + offset_in_row(start, group, v_strides)
    slope = tl.load(slopes_ptr + head) if SLOPES else 0.0
    place = m + ahead
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for run in tl.static_range(0 if WINDOW else 2, 4):
        begin, stop = _run(run, first + ahead, BLOCK_M, seen, rule, BLOCK_N)
        acc, top, total = _attend(
            acc, top, total, q, k_ptr, v_ptr, begin, stop, place, seen, slope, rule, dim,
            k_strides, v_strides, SLOPES, run != 2, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    at = offset64(b, length) + start + m
    at = at * heads + head
    mask = m < end - start
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    out_at = offset64(at, dim)[:, None] + d[None, :]
    tl.store(out_ptr + out_at, out, mask=mask[:, None] & (d < dim)[None, :])
    at = (offset64(b, heads) + head) * length + start + m
    tl.store(lse_ptr + at, top + tl.log(total), mask=mask)


@triton.jit(do_not_specialize=["length", "o_row", "do_row"])
def attention_delta_kernel(
    out_ptr, dout_ptr, delta_ptr, length, heads, dim, o_row, do_row, o_strides, do_strides,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    b = tl.program_id(0) // blocks // heads
    m, d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    out_ptr += row_offset(b, o_row, ROWS) + offset64(head, o_strides[1])
    dout_ptr += row_offset(b, do_row, ROWS) + offset64(head, do_strides[1])
    out = _rows(out_ptr, o_strides, m, length, d, dim)
    dout = _rows(dout_ptr, do_strides, m, length, d, dim)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    at = (offset64(b, heads) + head) * length + m
    tl.store(delta_ptr + at, delta, mask=m < length)


@triton.jit
def _dq(
    acc, q, dout, lse, delta, k_ptr, v_ptr, begin, end, place, keys, slope, rule, dim, k_strides,
    v_strides, SLOPES: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k, v, scores = _score(q, k_ptr, v_ptr, key, place, keys, slope, rule, d, dim, k_strides,
                              v_strides, SLOPES, MASKED)  # fmt: skip
        p = tl.exp(scores - lse[:, None])
        dp = tl.dot(dout, v.T, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tiles", "length", "keys", "q_row", "k_row", "v_row", "do_row"])
def attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    slopes_ptr,
    table_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    rule,
    tiles,
    length,
    keys,
    heads,
    groups,
    dim,
    q_row,
    k_row,
    v_row,
    do_row,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    SLOPES: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, b, start, end, first, ahead = _queries(
        table_ptr, tiles, length, keys, heads, PACKED, BLOCK_M
    )
    if first >= end - start:
        return
    seen = end - start + ahead
    group = head // (heads // groups)
    m, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = m < end - start
    q_ptr += row_offset(b, q_row, ROWS) + offset_in_row(start, head, q_strides)
    q = _rows(q_ptr, q_strides, m, end - start, d, dim)
    dout_ptr += row_offset(b, do_row, ROWS) + offset_in_row(start, head, do_strides)
    dout = _rows(dout_ptr, do_strides, m, end - start, d, dim)
    at = (offset64(b, heads) + head) * length + start + m
    lse = tl.load(lse_ptr + at, mask=mask, other=0.0)
    delta = tl.load(delta_ptr + at, mask=mask, other=0.0)
    k_ptr += row_offset(b, k_row, ROWS) + offset_in_row(start, group, k_strides)
    v_ptr += row_offset(b, v_row, ROWS) + offset_in_row(start, group, v_strides)
    slope = tl.load(slopes_ptr + head) if SLOPES else 0.0
    place = m + ahead
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for run in tl.static_range(0 if WINDOW else 2, 4):
        begin, stop = _run(run, first + ahead, BLOCK_M, seen, rule, BLOCK_N)
        acc = _dq(
            acc, q, dout, lse, delta, k_ptr, v_ptr, begin, stop, place, seen, slope, rule, dim,
            k_strides, v_strides, SLOPES, run != 2, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    at = offset64(b, length) + start + m
    at = offset64(at * heads + head, dim)[:, None] + d[None, :]
    dq = (acc * rule[0]).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + at, dq, mask=mask[:, None] & (d < dim)[None, :])


@triton.jit
def _dkdv(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, begin, end, key, queries, ahead, slope,
    rule, dim, q_strides, do_strides, SLOPES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q = _rows(q_ptr, q_strides, m, queries, d, dim)
        dout = _rows(dout_ptr, do_strides, m, queries, d, dim)
        # A query past the end has probability zero.
        lse = tl.load(lse_ptr + m, mask=m < queries, other=float("inf"))
        delta = tl.load(delta_ptr + m, mask=m < queries, other=0.0)
        kq = tl.dot(k, q.T, input_precision="ieee")
        scores = _scores(kq, (m + ahead)[None, :], key[:, None], queries + ahead, slope, rule,
                         SLOPES, True)  # fmt: skip
        p = tl.exp(scores - lse[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, dout.T, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


# ``length`` and ``keys`` stay specialised: where 16 divides them, lse and delta are loaded two at a
# time. Unspecialised, more registers spill.
@triton.jit(do_not_specialize=["tiles", "q_row", "k_row", "v_row", "do_row"])
def attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    slopes_ptr,
    table_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    rule,
    tiles,
    length,
    keys,
    heads,
    groups,
    dim,
    q_row,
    k_row,
    v_row,
    do_row,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups
    b, start, end, first = _tile(table_ptr, tile, tiles, keys, PACKED, BLOCK_N)
    if first >= end - start:
        return
    scale, window, global_tokens = rule
    ahead = 0 if PACKED else keys - length
    queries = end - start - ahead
    n, d = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_ptr += row_offset(b, k_row, ROWS) + offset_in_row(start, group, k_strides)
    v_ptr += row_offset(b, v_row, ROWS) + offset_in_row(start, group, v_strides)
    k = _rows(k_ptr, k_strides, n, end - start, d, dim)
    v = _rows(v_ptr, v_strides, n, end - start, d, dim)
    q_ptr += row_offset(b, q_row, ROWS)
    dout_ptr += row_offset(b, do_row, ROWS)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Queries from the first that sees a key of the tile to the last. Every pair is masked: a second
    # loop without masks would spill.
    lowest = tl.maximum(first - ahead, 0) // BLOCK_M * BLOCK_M
    highest = queries
    if first >= global_tokens:
        highest = tl.minimum(queries, first + BLOCK_N - 1 + window - ahead)
    shared = heads // groups
    for head in range(group * shared, (group + 1) * shared):
        q_at = offset_in_row(start, head, q_strides)
        do_at = offset_in_row(start, head, do_strides)
        sums_at = (offset64(b, heads) + head) * length + start
        slope = tl.load(slopes_ptr + head) if SLOPES else 0.0
        dk, dv = _dkdv(
            dk, dv, k, v, q_ptr + q_at, dout_ptr + do_at, lse_ptr + sums_at, delta_ptr + sums_at,
            lowest, highest, n, queries, ahead, slope, rule, dim, q_strides, do_strides, SLOPES,
            BLOCK_M, BLOCK_D,
        )  # fmt: skip
    at = offset64(b, keys) + start + n
    at = offset64(at * groups + group, dim)[:, None] + d[None, :]
    mask = (n < end - start)[:, None] & (d < dim)[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def forward(q, k, v, cu_seqlens, slopes, scale, window, global_tokens, config):
    """As ref.forward, without its check of cu_seqlens' values; tokens of no sequence are zero."""
    (rows, length, heads, dim), (_, keys, groups, _) = q.shape, k.shape
    make = q.new_empty if cu_seqlens is None else q.new_zeros
    out, lse = make(q.shape), make((rows, heads, length), dtype=torch.float32)
    if not out.numel():
        return out, lse
    tiles, table = _tiles(cu_seqlens, rows, length, config.block_m)
    slopes, rule, flags = _rule(slopes, scale, window, global_tokens)
    attention_forward_kernel[(tiles * heads,)](
        q, k, v, slopes, table, out, lse, rule, tiles, length, keys, heads, groups, dim,
        *axes(q, k, v), ROWS=row_divisor(q, k, v), PACKED=cu_seqlens is not None, **flags,
        WINDOW=window is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=config.block_d, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def backward(
    dout, q, k, v, out, lse, cu_seqlens, slopes, scale, window, global_tokens, config
):  # fmt: skip
    """As ref.backward, without its check of cu_seqlens' values; tokens of no sequence get zero."""
    (rows, length, heads, dim), (_, keys, groups, _) = q.shape, k.shape
    make = torch.Tensor.new_empty if cu_seqlens is None and length else torch.Tensor.new_zeros
    dq, dk, dv = (make(t, t.shape) for t in (q, k, v))
    if not dq.numel():
        return dq, dk, dv
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    attention_delta_kernel[(rows * heads * cdiv(length, 64),)](
        out, dout, delta, length, heads, dim, *axes(out, dout), ROWS=row_divisor(out, dout),
        BLOCK_M=64, BLOCK_D=config.block_d, num_warps=4,
    )  # fmt: skip
    slopes, rule, flags = _rule(slopes, scale, window, global_tokens)
    sizes = length, keys, heads, groups, dim
    strides = axes(q, k, v, dout)
    flags |= dict(ROWS=row_divisor(q, k, v, dout), PACKED=cu_seqlens is not None,
                  BLOCK_D=config.block_d, num_warps=config.num_warps,
                  num_stages=config.num_stages)  # fmt: skip
    tiles, table = _tiles(cu_seqlens, rows, keys, config.block_m)
    attention_dkdv_kernel[(tiles * groups,)](
        q, k, v, dout, slopes, table, lse, delta, dk, dv, rule, tiles, *sizes, *strides, **flags,
        BLOCK_M=config.block_n, BLOCK_N=config.block_m,
    )  # fmt: skip
    tiles, table = _tiles(cu_seqlens, rows, length, config.block_m)
    attention_dq_kernel[(tiles * heads,)](
        q, k, v, dout, slopes, table, lse, delta, dq, rule, tiles, *sizes, *strides, **flags,
        WINDOW=window is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip
    return dq, dk, dv


def _tiles(cu_seqlens, rows, length, block):
    # How many tiles there are at most, and the table of them where sequences are packed.
    if cu_seqlens is None:
        return rows * cdiv(length, block), None
    sequences = cu_seqlens.shape[0] - 1
    tiles = length // block + min(sequences, length)
    table = cu_seqlens.new_empty(3, max(tiles, 1))
    attention_tiles_kernel[(cdiv(tiles, 32),)](
        cu_seqlens.contiguous(), table, tiles, sequences, length, BLOCK_M=block, LANES=LANES,
        BLOCK=32, num_warps=4,
    )  # fmt: skip
    return tiles, table


def _rule(slopes, scale, window, global_tokens):
    rule = scale, LONG if window is None else min(window, LONG), min(global_tokens, LONG)
    return slopes if slopes is None else slopes.contiguous(), rule, {"SLOPES": slopes is not None}


def specialisations():
    """Launches to compile without a GPU: 8192 tokens, bfloat16."""
    from nemokernels.ops.attention.op import plan_sequences

    def launch(heads, groups, dim, packed, slopes, *rule):
        empty = lambda *s: torch.empty(s, device="meta", dtype=torch.bfloat16)  # noqa: E731
        q, k = empty(1, 8192, heads, dim), empty(1, 8192, groups, dim)
        bounds = torch.empty(9, device="meta", dtype=torch.int32) if packed else None
        lse = torch.empty(1, heads, 8192, device="meta")
        slopes = torch.empty(heads, device="meta") if slopes else None
        configs = [plan_sequences(dim, torch.bfloat16, False, 0, backwards, "", ("triton",), (9, 0))
                   for backwards in (False, True)]  # fmt: skip

        def both():
            forward(q, k, k, bounds, slopes, *rule, configs[0])
            backward(q, q, k, k, q, lse, bounds, slopes, *rule, configs[1])

        return both

    for label, *problem in (
        ("sequences, 32 heads on 2 of 128, packed", 32, 2, 128, True, False, 0.1, None, 0),
        ("sequences, 96 heads on 8 of 192", 96, 8, 192, False, False, 0.1, None, 0),
        ("sequences, window, global tokens, ALiBi", 25, 5, 64, True, True, 0.1, 1024, 128),
    ):
        yield _triton.Specialisation(label, launch(*problem))
