"""Triton kernels of the chunk scan's forward, and the pieces that its backward shares.

Letters as in ref.py. Decays are kept in base 2: a is the running sum of d*A*log2(e) within a chunk
and b = a - log2(d), so that exp2(a_l - b_s) is the decay from s to l times the step d_s, with no
product of its own and exactly zero for d = 0. Float32 tiles would notice that b is rounded (near
the diagonal, where a_l - a_s is exact): for them b is d itself. Both lie in (H, K, L) order,
whatever the layout of the tokens; behind the last token of a sequence d is 0.

A tile of x, B and C comes from a TMA descriptor (which reads zeros past a row's end) or, with
``TMA`` off, from pointers with a mask; masked are tokens of other sequences and padding.
"""

from __future__ import annotations

import inspect

import triton
import triton.language as tl

from nemokernels._tl import offset64, row_offset, sigmoid, softplus

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e36)  # bound of one step's decay: keeps the running sum finite
PRECISION = tl.constexpr("tf32x3")  # of products of float32 tiles: three tf32 products, ~2^-21


# What differs from call to call. Triton would compile anew where one becomes 1 or divisible by 16.
# It would make nothing of it but for the strides of rows, whose divisor is ``ROWS``.
LENGTHS = {"T", "NC", "K", "S", "SEGMENT", "SEGMENTS"}
LENGTHS |= {f"stride_{of}_row" for of in ("x", "y", "o", "z", "b", "c", "m", "dt")}


def jit_for_any_length(fn):
    return triton.jit(fn, do_not_specialize=sorted(LENGTHS & {*inspect.signature(fn).parameters}))


@triton.jit
def walk_program(H, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """First row of the state, head and sequence of a program that walks a segment (grid axis 1)."""
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    return (program % blocks) * BLOCK_P, (program // blocks) % H, program // (blocks * H)


@triton.jit
def walk_span(sequence, bounds, first, T, NC, PACKED: tl.constexpr):
    """Row, first token, end and number of the first chunk of a sequence."""
    if PACKED:
        row = 0
        begin = tl.load(bounds + sequence)
        end = tl.load(bounds + sequence + 1)
        chunk = tl.load(first + sequence)
    else:
        row = sequence
        begin = 0
        end = T
        chunk = sequence * NC
    return row, begin, end, chunk


@triton.jit
def chunk_span(k, bounds, first, owner, T, NC, S, L: tl.constexpr, PACKED: tl.constexpr):
    """Row, first token and end of chunk k, and whether there is one."""
    if PACKED:
        sequence = tl.load(owner + k)
        real = sequence < S
        sequence = tl.minimum(sequence, S - 1)
        row = 0
        begin = tl.load(bounds + sequence) + (k - tl.load(first + sequence)) * L
        end = tl.load(bounds + sequence + 1)
    else:
        real = k >= 0
        row = k // NC
        begin = (k % NC) * L
        end = T
    return row, begin, end, real


@triton.jit
def live_tokens(seq_idx, row, t0, end, T, L: tl.constexpr, HAS_PAD: tl.constexpr):
    """Which positions of a chunk hold a token that is not padding."""
    t = t0 + tl.arange(0, L)
    live = t < end
    if HAS_PAD:
        live = live & (tl.load(seq_idx + offset64(row, T) + t, mask=live, other=-1) >= 0)
    return live


@triton.jit
def chunk_ids(ids, row, t0, T, L: tl.constexpr):
    """Ids of a chunk's positions, of its last one, and of the position before it."""
    start = ids + offset64(row, T)
    t = tl.minimum(t0 + tl.arange(0, L), T - 1)
    last = tl.load(start + tl.minimum(t0 + L, T) - 1)
    before = tl.load(start + t0 - 1, mask=t0 > 0, other=0)
    return tl.load(start + t), last, before


@triton.jit
def leaving_decay(a_last, a, b, EXACT: tl.constexpr):
    """Decay from every token to the chunk's end, times the step. EXACT: b is d."""
    return tl.exp2(a_last - a) * b if EXACT else tl.exp2(a_last - b)


@triton.jit
def inner_decay(later, earlier, b_earlier, sees, EXACT: tl.constexpr):
    """Decay between two tokens, times the step of the earlier; masked before the exponential."""
    exponent = later - (earlier if EXACT else b_earlier)
    decay = tl.exp2(tl.where(sees, exponent, float("-inf")))
    return decay * b_earlier if EXACT else decay


@triton.jit
def tile(
    source, row, t0, head, column, live, stride_row, stride_token, stride_head,
    WIDTH: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """(L, BLOCK) of a (B, T, heads, WIDTH) tensor, zero where there is nothing."""
    if TMA:
        out = source.load([row, t0, head, column]).reshape(L, BLOCK)
    else:
        start = row_offset(row, stride_row, ROWS) + offset64(t0, stride_token)
        start += offset64(head, stride_head)
        c = column + tl.arange(0, BLOCK)
        within = offset64(tl.arange(0, L), stride_token)[:, None] + c[None, :]
        mask = live[:, None] if WIDTH % BLOCK == 0 else live[:, None] & (c < WIDTH)[None, :]
        out = tl.load(source + start + within, mask=mask, other=0.0)
    return out


@triton.jit
def store_tile(
    target, value, row, t0, head, column, inside, stride_row, stride_token,
    WIDTH: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The counterpart of :func:`tile`; heads of the target are adjacent."""
    if TMA:
        target.store([row, t0, head, column], value.reshape(1, L, 1, BLOCK))
    else:
        c = column + tl.arange(0, BLOCK)
        start = offset64(row, stride_row) + offset64(t0, stride_token) + head * WIDTH
        within = offset64(tl.arange(0, L), stride_token)[:, None] + c[None, :]
        mask = inside[:, None] if WIDTH % BLOCK == 0 else inside[:, None] & (c < WIDTH)[None, :]
        tl.store(target + start + within, value, mask=mask)


@triton.jit
def state_offsets(
    index, p0, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Offsets and mask of a block of the ``index``-th of contiguous (P, N) states."""
    p, n = p0 + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    offsets = offset64(index, P * N) + p[:, None] * N + n[None, :]
    return offsets, (p < P)[:, None] & (n < N)[None, :]


@triton.jit
def store_chunk_state(
    target, value, index, p0, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Store a block of the ``index``-th of the states kept per chunk, padded to whole blocks."""
    rows: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P * BLOCK_P
    if TMA:
        target.store([index * rows + p0, 0], value)
    else:
        offsets, _ = state_offsets(index, p0, rows, BLOCK_N, BLOCK_P, BLOCK_N)
        tl.store(target + offsets, value)


@triton.jit
def load_chunk_state(
    source, index, p0, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The counterpart of :func:`store_chunk_state`."""
    rows: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P * BLOCK_P
    if TMA:
        out = source.load([index * rows + p0, 0])
    else:
        offsets, _ = state_offsets(index, p0, rows, BLOCK_N, BLOCK_P, BLOCK_N)
        out = tl.load(source + offsets)
    return out


@triton.jit
def skip_weight(D, h, p0, P: tl.constexpr, BLOCK_P: tl.constexpr, D_AXES: tl.constexpr):
    """D of a head: one number, or (1, BLOCK_P)."""
    if D_AXES == 2:
        p = p0 + tl.arange(0, BLOCK_P)
        weight = tl.load(D + h * P + p, mask=p < P, other=0.0)[None, :]
    else:
        weight = tl.load(D + h)
    return weight


@jit_for_any_length
def ssd_steps_kernel(
    dt, dt_bias, A, seq_idx, bounds, first, owner, a_out, b_out, d_out,
    T, NC, K, S, H, stride_dt_row, stride_dt_token, stride_dt_head, dt_min, dt_max,
    L: tl.constexpr, BLOCK_H: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_PAD: tl.constexpr, PACKED: tl.constexpr, STORE_STEP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """a, b and, for the backward, the steps d of one chunk and BLOCK_H heads."""
    k = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row, t0, end, real = chunk_span(k, bounds, first, owner, T, NC, S, L, PACKED)
    if real:
        live = live_tokens(seq_idx, row, t0, end, T, L, HAS_PAD)
        mask = live[:, None] & (h < H)[None, :]
        at = offset64(t0 + tl.arange(0, L), stride_dt_token)[:, None]
        at += offset64(row, stride_dt_row) + offset64(h, stride_dt_head)[None, :]
        d = tl.load(dt + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            d += tl.load(dt_bias + h, mask=h < H, other=0.0)[None, :]
        if SOFTPLUS:
            d = softplus(d)
        d = tl.where(d < dt_min, dt_min, d)
        d = tl.where(d > dt_max, dt_max, d)
        d = tl.where(mask, d, 0.0)
        decay = d * (tl.load(A + h, mask=h < H, other=0.0) * LOG2E)[None, :]
        a = tl.cumsum(tl.where(decay < LOWEST, LOWEST, decay), 0)
        to = (offset64(h, K) + k)[None, :] * L + tl.arange(0, L)[:, None]
        tl.store(a_out + to, a, mask=(h < H)[None, :])
        tl.store(b_out + to, d if EXACT else a - tl.log2(d), mask=(h < H)[None, :])
        if STORE_STEP:
            tl.store(d_out + to, d, mask=(h < H)[None, :])


@jit_for_any_length
def ssd_scan_kernel(
    x, B, C, out, ungated, z, D, initial, final, a_in, b_in, seq_idx, ids, bounds, first,
    T, NC, K, H, R, SEGMENT,
    stride_x_row, stride_x_token, stride_x_head, stride_b_row, stride_b_token, stride_b_group,
    stride_c_row, stride_c_token, stride_c_group, stride_z_row, stride_z_token, stride_z_head,
    stride_z_width,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, D_AXES: tl.constexpr, HAS_Z: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_PAD: tl.constexpr, HAS_IDS: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The scan. A program keeps BLOCK_P rows of one head's state in registers and walks its chunks.

    Axis 1 of the grid are the segments of SEGMENT chunks; ``initial`` then holds the state that
    enters each. Products use the tensor cores in x's dtype.
    """
    p0, h, sequence = walk_program(H, P, BLOCK_P)
    g = h // R
    segment = tl.program_id(1)
    row, begin, end, chunk = walk_span(sequence, bounds, first, T, NC, PACKED)
    chunks = tl.cdiv(end - begin, L)
    c0 = segment * SEGMENT
    c1 = tl.minimum(chunks, c0 + SEGMENT)
    a_in += (offset64(h, K) + chunk) * L
    b_in += (offset64(h, K) + chunk) * L

    q = tl.arange(0, L)
    causal = q[:, None] >= q[None, :]
    index = (sequence * tl.num_programs(1) + segment) * H + h
    offsets, inside = state_offsets(index, p0, P, N, BLOCK_P, BLOCK_N)
    if HAS_INITIAL:
        state = tl.load(initial + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if D_AXES > 0:
        skip = skip_weight(D, h, p0, P, BLOCK_P, D_AXES)

    for i in tl.range(c0, c1, num_stages=STAGES):
        t0 = begin + i * L
        live = live_tokens(seq_idx, row, t0, end, T, L, HAS_PAD)
        xv = tile(x, row, t0, h, p0, live, stride_x_row, stride_x_token, stride_x_head,
                  P, L, BLOCK_P, TMA, ROWS)  # fmt: skip
        bv = tile(B, row, t0, g, 0, live, stride_b_row, stride_b_token, stride_b_group,
                  N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
        cv = tile(C, row, t0, g, 0, live, stride_c_row, stride_c_token, stride_c_group,
                  N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
        a, b = tl.load(a_in + i * L + q), tl.load(b_in + i * L + q)
        a_last = tl.load(a_in + i * L + L - 1)
        exact: tl.constexpr = xv.dtype == tl.float32
        enter, leave, decay = tl.exp2(a), leaving_decay(a_last, a, b, exact), tl.exp2(a_last)
        sees = causal
        if HAS_IDS:
            own, last, before = chunk_ids(ids, row, t0, T, L)
            enter = tl.where(own == before, enter, 0.0)
            leave = tl.where(own == last, leave, 0.0)
            decay = tl.where(last == before, decay, 0.0)
            sees = causal & (own[:, None] == own[None, :])

        # The state first: the next chunk waits for nothing else, and it takes fewer registers.
        low, xf = state.to(cv.dtype), xv.to(tl.float32)
        scaled = (xf * leave[:, None]).to(xv.dtype)
        state = tl.dot(tl.trans(scaled), bv, state * decay, input_precision=PRECISION)
        y = tl.dot(cv, tl.trans(low), input_precision=PRECISION) * enter[:, None]
        if D_AXES > 0:
            y += xf * skip
        scores = tl.dot(cv, tl.trans(bv), input_precision=PRECISION)
        scores *= inner_decay(a[:, None], a[None, :], b[None, :], sees, exact)
        y = tl.dot(scores.to(xv.dtype), xv, y, input_precision=PRECISION)
        if HAS_PAD:
            y = tl.where(live[:, None], y, 0.0)  # also where the state is not finite
        tokens = t0 + q < end
        if HAS_Z:
            store_tile(ungated, y.to(xv.dtype), row, t0, h, p0, tokens, offset64(T, H * P), H * P,
                       P, L, BLOCK_P, False)  # fmt: skip
            c = p0 + tl.arange(0, BLOCK_P)
            at_z = row_offset(row, stride_z_row, ROWS) + offset64(h, stride_z_head)
            at_z += offset64(t0 + q, stride_z_token)[:, None] + offset64(c, stride_z_width)[None, :]
            gate = tl.load(z + at_z, mask=live[:, None] & (c < P)[None, :], other=0.0)
            gate = gate.to(tl.float32)
            y = y * gate * sigmoid(gate)
        store_tile(out, y.to(xv.dtype), row, t0, h, p0, tokens, offset64(T, H * P), H * P,
                   P, L, BLOCK_P, TMA)  # fmt: skip

    if segment == tl.maximum(tl.cdiv(chunks, SEGMENT) - 1, 0):
        offsets, inside = state_offsets(sequence * H + h, p0, P, N, BLOCK_P, BLOCK_N)
        tl.store(final + offsets, state, mask=inside)


@jit_for_any_length
def ssd_states_kernel(
    z, M, initial, met, ends, totals, a_in, b_in, seq_idx, ids, bounds, first,
    T, NC, K, H, R, SEGMENT,
    stride_z_row, stride_z_token, stride_z_head, stride_m_row, stride_m_token, stride_m_group,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_IDS: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, TMA_MET: tl.constexpr,
    ROWS: tl.constexpr, REVERSE: tl.constexpr, STORE_MET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States without outputs: z is x and M is B, or in reverse the output's gradient and C.

    With STORE_MET the state entering each chunk goes to ``met`` (padded to whole blocks).
    Otherwise each segment starts from zero, and its end and total decay are stored.
    """
    p0, h, sequence = walk_program(H, P, BLOCK_P)
    g = h // R
    segment = tl.program_id(1)
    row, begin, end, chunk = walk_span(sequence, bounds, first, T, NC, PACKED)
    c0 = segment * SEGMENT
    c1 = tl.minimum(tl.cdiv(end - begin, L), c0 + SEGMENT)
    a_in += (offset64(h, K) + chunk) * L
    b_in += (offset64(h, K) + chunk) * L

    q = tl.arange(0, L)
    index = (sequence * tl.num_programs(1) + segment) * H + h
    offsets, inside = state_offsets(index, p0, P, N, BLOCK_P, BLOCK_N)
    if HAS_INITIAL:
        state = tl.load(initial + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    total = 0.0
    for step in tl.range(c0, c1, num_stages=STAGES):
        if REVERSE:
            i = c1 - 1 - (step - c0)
        else:
            i = step
        t0 = begin + i * L
        live = live_tokens(seq_idx, row, t0, end, T, L, HAS_PAD)
        zv = tile(z, row, t0, h, p0, live, stride_z_row, stride_z_token, stride_z_head,
                  P, L, BLOCK_P, TMA, ROWS)  # fmt: skip
        mv = tile(M, row, t0, g, 0, live, stride_m_row, stride_m_token, stride_m_group,
                  N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
        a, a_last = tl.load(a_in + i * L + q), tl.load(a_in + i * L + L - 1)
        if REVERSE:
            weight = tl.exp2(a)
        else:
            exact: tl.constexpr = zv.dtype == tl.float32
            weight = leaving_decay(a_last, a, tl.load(b_in + i * L + q), exact)
        if HAS_IDS:
            own, last, before = chunk_ids(ids, row, t0, T, L)
            if REVERSE:
                weight = tl.where(own == before, weight, 0.0)
            else:
                weight = tl.where(own == last, weight, 0.0)
            a_last = tl.where(last == before, a_last, float("-inf"))
        if STORE_MET:
            store_chunk_state(met, state.to(zv.dtype), (chunk + i) * H + h, p0, P, BLOCK_P,
                              BLOCK_N, TMA_MET)  # fmt: skip
        scaled = (zv.to(tl.float32) * weight[:, None]).to(zv.dtype)
        state = tl.dot(tl.trans(scaled), mv, state * tl.exp2(a_last), input_precision=PRECISION)
        total += a_last
    if not STORE_MET:
        tl.store(ends + offsets, state, mask=inside)
        tl.store(totals + index, total, mask=p0 == 0)


@jit_for_any_length
def ssd_segments_kernel(
    initial, ends, totals, SEGMENTS, H, SIZE,
    HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace each segment's end, started from zero, by the state that enters the segment."""
    program = tl.program_id(0)
    h = program % H
    sequence = program // H
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < SIZE
    if HAS_INITIAL:
        state = tl.load(initial + offset64(program, SIZE) + o, mask=inside, other=0.0)
        state = state.to(tl.float32)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    for step in range(SEGMENTS):
        if REVERSE:
            segment = SEGMENTS - 1 - step
        else:
            segment = step
        index = (sequence * SEGMENTS + segment) * H + h
        at = ends + offset64(index, SIZE) + o
        end = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        state = state * tl.exp2(tl.load(totals + index)) + end
