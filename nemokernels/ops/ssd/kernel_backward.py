"""Triton kernels of the chunk scan's backward. See kernel_forward.py for letters and layouts.

S and G are the state entering a chunk and the gradient of the state leaving it. Every chunk's are
kept, so chunks (SPAN tokens) are longer here than the tiles (L tokens) of products that fit the
registers; a and b run over the whole chunk. Square tiles are transposed: rows are the earlier token
s, columns the later token l, so that they are the left operands of the products for dx and dB. Sums
over the heads of a group stay in one program: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemokernels._tl import offset64, row_offset, sigmoid, softplus
from nemokernels.ops.ssd.kernel_forward import (
    PRECISION,
    chunk_ids,
    chunk_span,
    inner_decay,
    jit_for_any_length,
    leaving_decay,
    live_tokens,
    load_chunk_state,
    skip_weight,
    state_offsets,
    store_chunk_state,
    store_tile,
    tile,
    walk_program,
    walk_span,
)

# Stands for a step of zero where a sum is divided by the step again.
TINY = tl.constexpr(1e-30)


@triton.jit
def store_skip_gradient(
    dD, product, k, h, p0, H, own, P: tl.constexpr, BLOCK_P: tl.constexpr, D_AXES: tl.constexpr
):
    """If ``own``, tile k's part of dD, x * dy: (tiles, H, P), or (tiles, H, blocks) for D (H)."""
    if D_AXES == 2:
        p = p0 + tl.arange(0, BLOCK_P)
        tl.store(dD + offset64(k, H * P) + h * P + p, tl.sum(product, 0), mask=own & (p < P))
    else:
        blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
        at = (offset64(k, H) + h) * blocks + p0 // BLOCK_P
        tl.store(dD + at, tl.sum(tl.sum(product, 1), 0), mask=own)


@jit_for_any_length
def ssd_gate_backward_kernel(
    dout, z, ungated, x, dz, dy_out, dD, seq_idx, bounds, first, owner,
    T, NC, S, H,
    stride_o_row, stride_o_token, stride_o_head, stride_x_row, stride_x_token, stride_x_head,
    stride_z_row, stride_z_token, stride_z_head, stride_z_width, stride_dz_token,
    P: tl.constexpr, L: tl.constexpr, SPAN: tl.constexpr, BLOCK_P: tl.constexpr,
    D_AXES: tl.constexpr, HAS_PAD: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dz, the gradient of the ungated output in x's dtype, and dD from its unrounded value."""
    parts: tl.constexpr = SPAN // L
    k, h, p0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_P
    row, t0, end, real = chunk_span(k // parts, bounds, first, owner, T, NC, S, SPAN, PACKED)
    t0 += k % parts * L
    if real:
        live = live_tokens(seq_idx, row, t0, end, T, L, HAS_PAD)
        q, c = tl.arange(0, L), p0 + tl.arange(0, BLOCK_P)
        go = tile(dout, row, t0, h, p0, live, stride_o_row, stride_o_token, stride_o_head,
                  P, L, BLOCK_P, False, ROWS).to(tl.float32)  # fmt: skip
        y = tile(ungated, row, t0, h, p0, live, offset64(T, H * P), H * P, P,
                 P, L, BLOCK_P, False, ROWS).to(tl.float32)  # fmt: skip
        at_z = row_offset(row, stride_z_row, ROWS) + offset64(h, stride_z_head)
        at_z += offset64(t0 + q, stride_z_token)[:, None] + offset64(c, stride_z_width)[None, :]
        gate = tl.load(z + at_z, mask=live[:, None] & (c < P)[None, :], other=0.0).to(tl.float32)
        sig = sigmoid(gate)
        tokens = t0 + q < end
        grad = go * y * sig * (1.0 + gate * (1.0 - sig))
        store_tile(dz, grad, row, t0, h, p0, tokens, offset64(T, stride_dz_token), stride_dz_token,
                   P, L, BLOCK_P, False)  # fmt: skip
        dy = go * gate * sig
        store_tile(dy_out, dy, row, t0, h, p0, tokens, offset64(T, H * P), H * P,
                   P, L, BLOCK_P, False)  # fmt: skip
        if D_AXES > 0:
            xv = tile(x, row, t0, h, p0, live, stride_x_row, stride_x_token, stride_x_head,
                      P, L, BLOCK_P, False, ROWS)  # fmt: skip
            store_skip_gradient(dD, xv.to(tl.float32) * dy, k, h, p0, H, True, P, BLOCK_P, D_AXES)


@jit_for_any_length
def ssd_walk_backward_kernel(
    dy, B, C, dx, D, dfinal, leaving, dinitial, a_in, b_in, seq_idx, ids, bounds, first,
    T, NC, K, H, R, SEGMENT, stride_dx_token,
    stride_y_row, stride_y_token, stride_y_head, stride_b_row, stride_b_token, stride_b_group,
    stride_c_row, stride_c_token, stride_c_group,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, SPAN: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, D_AXES: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_PAD: tl.constexpr, HAS_IDS: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    ROWS: tl.constexpr, TMA_MET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, walking the tiles from last to first with G in registers; stores G of every chunk.

    ``dfinal`` holds the gradient that enters each segment from behind. x is not read here: with it
    the tiles of two programs no longer fit one multiprocessor's shared memory.
    """
    parts: tl.constexpr = SPAN // L
    p0, h, sequence = walk_program(H, P, BLOCK_P)
    g = h // R
    segment = tl.program_id(1)
    row, begin, end, chunk = walk_span(sequence, bounds, first, T, NC, PACKED)
    tiles = tl.cdiv(end - begin, L)
    c0 = segment * SEGMENT * parts
    c1 = tl.minimum(tiles, c0 + SEGMENT * parts)
    a_in += (offset64(h, K) + chunk) * SPAN
    b_in += (offset64(h, K) + chunk) * SPAN

    q = tl.arange(0, L)
    causal = q[:, None] <= q[None, :]
    index = (sequence * tl.num_programs(1) + segment) * H + h
    offsets, inside = state_offsets(index, p0, P, N, BLOCK_P, BLOCK_N)
    state = tl.load(dfinal + offsets, mask=inside, other=0.0).to(tl.float32)
    if D_AXES > 0:
        skip = skip_weight(D, h, p0, P, BLOCK_P, D_AXES)

    for step in tl.range(c0, c1, num_stages=STAGES):
        i = c1 - 1 - (step - c0)
        t0 = begin + i * L
        live = live_tokens(seq_idx, row, t0, end, T, L, HAS_PAD)
        dyv = tile(dy, row, t0, h, p0, live, stride_y_row, stride_y_token, stride_y_head,
                   P, L, BLOCK_P, TMA, ROWS)  # fmt: skip
        bv = tile(B, row, t0, g, 0, live, stride_b_row, stride_b_token, stride_b_group,
                  N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
        cv = tile(C, row, t0, g, 0, live, stride_c_row, stride_c_token, stride_c_group,
                  N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
        a, b = tl.load(a_in + i * L + q), tl.load(b_in + i * L + q)
        a_last = tl.load(a_in + i * L + L - 1)
        a_before = tl.load(a_in + i * L - 1, mask=i % parts > 0, other=0.0)
        exact: tl.constexpr = dyv.dtype == tl.float32
        enter, leave = tl.exp2(a - a_before), leaving_decay(a_last, a, b, exact)
        decay = tl.exp2(a_last - a_before)
        sees = causal
        if HAS_IDS:
            own, last, before = chunk_ids(ids, row, t0, T, L)
            enter = tl.where(own == before, enter, 0.0)
            leave = tl.where(own == last, leave, 0.0)
            decay = tl.where(last == before, decay, 0.0)
            sees = causal & (own[:, None] == own[None, :])

        low, dyf = state.to(dyv.dtype), dyv.to(tl.float32)
        if i % parts == parts - 1 or i == tiles - 1:
            store_chunk_state(leaving, low, (chunk + i // parts) * H + h, p0, P, BLOCK_P, BLOCK_N,
                              TMA_MET)  # fmt: skip
        scaled = (dyf * enter[:, None]).to(dyv.dtype)
        state = tl.dot(tl.trans(scaled), cv, state * decay, input_precision=PRECISION)
        v = tl.dot(bv, tl.trans(low), input_precision=PRECISION) * leave[:, None]
        if D_AXES > 0:
            v += dyf * skip
        scores = tl.dot(bv, tl.trans(cv), input_precision=PRECISION)
        scores *= inner_decay(a[None, :], a[:, None], b[:, None], sees, exact)
        v = tl.dot(scores.to(dyv.dtype), dyv, v, input_precision=PRECISION)
        if HAS_PAD:
            v = tl.where(live[:, None], v, 0.0)  # also where the state is not finite
        store_tile(dx, v.to(dyv.dtype), row, t0, h, p0, t0 + q < end,
                   offset64(T, stride_dx_token), stride_dx_token, P, L, BLOCK_P, TMA)  # fmt: skip

    if HAS_INITIAL:
        if segment == 0:
            offsets, inside = state_offsets(sequence * H + h, p0, P, N, BLOCK_P, BLOCK_N)
            tl.store(dinitial + offsets, state, mask=inside)


@jit_for_any_length
def ssd_scores_backward_kernel(
    x, dy, B, C, dscores, dD, sums, a_in, d_in, seq_idx, ids, bounds, first, owner,
    T, NC, K, S, H, G, R,
    stride_x_row, stride_x_token, stride_x_head, stride_y_row, stride_y_token, stride_y_head,
    stride_b_row, stride_b_token, stride_b_group, stride_c_row, stride_c_token, stride_c_group,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, SPAN: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, D_AXES: tl.constexpr, HAS_PAD: tl.constexpr, HAS_IDS: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of one chunk and group, transposed and summed over heads.

    Per head also the sums of q_sl = (x_s . dy_l) * decay * d_s * scores_sl over l and over s: the
    gradient of the decay of step k is the sum of q over s < k <= l. Float32 tiles, where a
    difference of such sums would lose digits, leave for each k the sum over s <= k < l instead of
    that over s. And dD's part, x . dy.

    A chunk of two tiles is three programs. That of s in the first and l in the second tile keeps
    its sums apart, those over l in the first half and those over s in the second.
    """
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    parts: tl.constexpr = SPAN // L
    pairs: tl.constexpr = 2 * parts - 1
    pair = tl.program_id(0) % pairs
    program = tl.program_id(0) // pairs
    g = program % G
    k = program // G
    row, t0, end, real = chunk_span(k, bounds, first, owner, T, NC, S, SPAN, PACKED)
    if real:
        part, part_l = pair // 2, (pair + 1) // 2
        over_l = sums + offset64(2 * (part_l - part), H) * K * SPAN
        over_s = sums + offset64(1 + part_l - part, H) * K * SPAN
        s, l = part * L + tl.arange(0, L), part_l * L + tl.arange(0, L)
        t_s, t_l = t0 + part * L, t0 + part_l * L
        live_s = live_tokens(seq_idx, row, t_s, end, T, L, HAS_PAD)
        live_l = live_tokens(seq_idx, row, t_l, end, T, L, HAS_PAD)
        bv = tile(B, row, t_s, g, 0, live_s, stride_b_row, stride_b_token, stride_b_group,
                  N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
        cv = tile(C, row, t_l, g, 0, live_l, stride_c_row, stride_c_token, stride_c_group,
                  N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
        scores = tl.dot(bv, tl.trans(cv), input_precision=PRECISION)
        sees = s[:, None] <= l[None, :]
        if HAS_IDS:
            own_s, _, _ = chunk_ids(ids, row, t_s, T, L)
            own_l, _, _ = chunk_ids(ids, row, t_l, T, L)
            sees = sees & (own_s[:, None] == own_l[None, :])
        total = tl.zeros((L, L), tl.float32)
        for i in tl.range(0, R, num_stages=STAGES):
            h = g * R + i
            products = tl.zeros((L, L), tl.float32)
            for block in tl.static_range(blocks):
                p0 = block * BLOCK_P
                xv = tile(x, row, t_s, h, p0, live_s, stride_x_row, stride_x_token, stride_x_head,
                          P, L, BLOCK_P, TMA, ROWS)  # fmt: skip
                dyv = tile(dy, row, t_l, h, p0, live_l, stride_y_row, stride_y_token,
                           stride_y_head, P, L, BLOCK_P, TMA, ROWS)  # fmt: skip
                if D_AXES > 0:
                    product = xv.to(tl.float32) * dyv.to(tl.float32)
                    store_skip_gradient(dD, product, k * parts + part, h, p0, H, part == part_l,
                                        P, BLOCK_P, D_AXES)  # fmt: skip
                products = tl.dot(xv, tl.trans(dyv), products, input_precision=PRECISION)
            at = (offset64(h, K) + k) * SPAN
            a_s, a_l = tl.load(a_in + at + s), tl.load(a_in + at + l)
            d = tl.maximum(tl.load(d_in + at + s), TINY)
            exact: tl.constexpr = bv.dtype == tl.float32
            tl.static_assert(parts == 1 or (parts == 2 and not exact))
            b = d if exact else a_s - tl.log2(d)
            products *= inner_decay(a_l[None, :], a_s[:, None], b[:, None], sees, exact)
            total += products
            products *= scores
            tl.store(over_l + at + s, tl.sum(products, 1))
            if exact:
                before = tl.cumsum(products, 0)
                later = tl.sum(tl.where(s[:, None] < l[None, :], before, 0.0), 1)
                tl.store(over_s + at + s, later)
            else:
                tl.store(over_s + at + l, tl.sum(products, 0))
        to = offset64(program, SPAN * SPAN) + s[:, None] * SPAN + l[None, :]
        tl.store(dscores + to, total.to(bv.dtype))


@jit_for_any_length
def ssd_group_backward_kernel(
    z, B, C, states, others, dscores, grad, w_out, through, a_in, d_in, seq_idx, ids, bounds,
    first, owner, T, NC, K, S, H, G, R, stride_grad_token,
    stride_z_row, stride_z_token, stride_z_head, stride_b_row, stride_b_token, stride_b_group,
    stride_c_row, stride_c_token, stride_c_group,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, SQUARE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, OF_C: tl.constexpr, HAS_PAD: tl.constexpr, HAS_IDS: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dB of one chunk and group (z is x, states are G), or dC with OF_C (z is dy, states are S).

    Per head also w: the part through the states times B, without the step, or times C. With OF_C
    ``others`` are G, and ``through`` gets what a decay of the whole chunk multiplies, <G, S>.
    Tiles are whole chunks here; ``dscores`` has squares of SQUARE tokens where s may precede l.
    """
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    g = program % G
    k = program // G
    row, t0, end, real = chunk_span(k, bounds, first, owner, T, NC, S, L, PACKED)
    if real:
        q = tl.arange(0, L)
        live = live_tokens(seq_idx, row, t0, end, T, L, HAS_PAD)
        if OF_C:
            mv = tile(C, row, t0, g, 0, live, stride_c_row, stride_c_token, stride_c_group,
                      N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
        else:
            mv = tile(B, row, t0, g, 0, live, stride_b_row, stride_b_token, stride_b_group,
                      N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
        if HAS_IDS:
            own, last, before = chunk_ids(ids, row, t0, T, L)
        total = tl.zeros((L, BLOCK_N), tl.float32)
        for i in tl.range(0, R, num_stages=STAGES):
            h = g * R + i
            at = (offset64(h, K) + k) * L
            a, a_last = tl.load(a_in + at + q), tl.load(a_in + at + L - 1)
            weight = tl.exp2(a) if OF_C else tl.exp2(a_last - a)
            if HAS_IDS:
                weight = tl.where(own == (before if OF_C else last), weight, 0.0)
            part = tl.zeros((L, BLOCK_N), tl.float32)
            inner = 0.0
            for block in tl.static_range(blocks):
                p0 = block * BLOCK_P
                zv = tile(z, row, t0, h, p0, live, stride_z_row, stride_z_token, stride_z_head,
                          P, L, BLOCK_P, TMA, ROWS)  # fmt: skip
                state = load_chunk_state(states, k * H + h, p0, P, BLOCK_P, BLOCK_N, TMA)
                if OF_C:
                    other = load_chunk_state(others, k * H + h, p0, P, BLOCK_P, BLOCK_N, TMA)
                    both = state.to(tl.float32) * other.to(tl.float32)
                    inner += tl.sum(tl.sum(both, 1), 0)
                part = tl.dot(zv, state, part, input_precision=PRECISION)
            tl.store(w_out + at + q, tl.sum(part * mv.to(tl.float32), 1) * weight)
            if OF_C:
                total += part * weight[:, None]
                inner *= tl.exp2(a_last)
                if HAS_IDS:
                    inner = tl.where(last == before, inner, 0.0)
                tl.store(through + offset64(h, K) + k, inner)
            else:
                total += part * (weight * tl.load(d_in + at + q))[:, None]
        from_scores = tl.load(
            dscores + offset64(program, L * L) + q[:, None] * L + q[None, :],
            mask=(q // SQUARE)[:, None] <= (q // SQUARE)[None, :], other=0.0,
        )  # fmt: skip
        if OF_C:
            bv = tile(B, row, t0, g, 0, live, stride_b_row, stride_b_token, stride_b_group,
                      N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
            total = tl.dot(tl.trans(from_scores), bv, total, input_precision=PRECISION)
        else:
            cv = tile(C, row, t0, g, 0, live, stride_c_row, stride_c_token, stride_c_group,
                      N, L, BLOCK_N, TMA, ROWS)  # fmt: skip
            total = tl.dot(from_scores, cv, total, input_precision=PRECISION)
        if HAS_PAD:
            total = tl.where(live[:, None], total, 0.0)
        store_tile(grad, total.to(mv.dtype), row, t0, g, 0, t0 + q < end,
                   offset64(T, stride_grad_token), stride_grad_token,
                   N, L, BLOCK_N, TMA)  # fmt: skip


@jit_for_any_length
def ssd_steps_backward_kernel(
    dt, dt_bias, A, sums, r_in, p_in, d_in, through, ddt, dA, dbias, seq_idx, bounds,
    first, owner, T, NC, K, S, H, stride_dt_row, stride_dt_token, stride_dt_head,
    stride_ddt_token, dt_min, dt_max, L: tl.constexpr, BLOCK_H: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, PACKED: tl.constexpr,
    EXACT: tl.constexpr, HAS_CROSS: tl.constexpr,
):  # fmt: skip
    """ddt of one chunk and BLOCK_H heads, and the chunk's part of dA and ddt_bias, (K, H)."""
    k = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row, t0, end, real = chunk_span(k, bounds, first, owner, T, NC, S, L, PACKED)
    if real:
        q = tl.arange(0, L)
        heads = h < H
        live = live_tokens(seq_idx, row, t0, end, T, L, HAS_PAD)[None, :] & heads[:, None]
        at_dt = offset64(t0 + q, stride_dt_token)[None, :]
        at_dt += offset64(row, stride_dt_row) + offset64(h, stride_dt_head)[:, None]
        raw = tl.load(dt + at_dt, mask=live, other=0.0).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(dt_bias + h, mask=heads, other=0.0)[:, None]
        soft = softplus(raw) if SOFTPLUS else raw

        # The decay of step j acts from earlier tokens and the entering state to later ones and the
        # leaving state. The sum over earlier tokens is shifted, not taken as a difference.
        at = (offset64(h, K) + k)[:, None] * L + q[None, :]
        mask = heads[:, None] & (q >= 0)[None, :]
        d = tl.load(d_in + at, mask=mask, other=0.0)
        r = tl.load(r_in + at, mask=mask, other=0.0)
        shifted = mask & (q > 0)[None, :]
        earlier = tl.load(r_in + at - 1, mask=shifted, other=0.0)
        earlier *= tl.load(d_in + at - 1, mask=shifted, other=0.0)
        later = tl.load(p_in + at, mask=mask, other=0.0)
        over_l = tl.load(sums + at, mask=mask, other=0.0)
        over_s = sums + offset64(H, K) * L
        if EXACT:
            inner = tl.load(over_s + at - 1, mask=shifted, other=0.0)
        else:
            later += tl.load(over_s + at, mask=mask, other=0.0) - over_l
            inner = 0.0
        if HAS_CROSS:
            across = tl.load(sums + offset64(2 * H, K) * L + at, mask=mask, other=0.0)
            first_half = (q < L // 2)[None, :]
            later += tl.where(first_half, -across, across)
            over_l += tl.where(first_half, across, 0.0)
        decay = tl.cumsum(later, 1, reverse=True) + tl.cumsum(earlier, 1) + inner
        decay += tl.load(through + offset64(h, K) + k, mask=heads, other=0.0)[:, None]
        rate = tl.load(A + h, mask=heads, other=0.0)[:, None]
        grad = decay * rate + r + over_l / tl.maximum(d, TINY)
        grad = tl.where(live & (soft >= dt_min) & (soft <= dt_max), grad, 0.0)
        if SOFTPLUS:
            grad *= sigmoid(raw)  # 1 from 17 on, before the threshold where softplus ends
        token = offset64(offset64(row, T) + t0 + q, stride_ddt_token)
        tl.store(
            ddt + token[None, :] + h[:, None], grad, mask=(t0 + q < end)[None, :] & heads[:, None]
        )
        to = offset64(k, H) + h
        tl.store(dA + to, tl.sum(decay * d, 1), mask=heads)
        if HAS_BIAS:
            tl.store(dbias + to, tl.sum(grad, 1), mask=heads)
