"""Triton kernels of causal_conv1d, where csrc is not built. Tensors are channel-last: (B, T, D).

A program has a block of tokens and channels, and loads every tap of it: the same rows again, which
the cache still has. Sequences are rows, segments of ``cu_seqlens`` (``owner`` names each token's,
-1 past the last) or runs of equal ``seq_idx``; where one begins and ends is looked up per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import column_sum, offset64, row_offset, sigmoid
from nemokernels._triton import cdiv, contiguous, row_divisor


@triton.jit
def _places(t, row, T, owner_ptr, bounds_ptr, PACKED: tl.constexpr):
    """Of tokens t: whether they are in a sequence, which one, and where it begins and ends."""
    live = (t >= 0) & (t < T)
    if PACKED:
        owner = tl.load(owner_ptr + t, mask=live, other=-1)
        live &= owner >= 0
        begin = tl.load(bounds_ptr + owner, mask=live, other=0)
        end = tl.load(bounds_ptr + owner + 1, mask=live, other=0)
    else:
        owner, begin, end = tl.zeros_like(t) + row, tl.zeros_like(t), tl.zeros_like(t) + T
    return live, owner, begin, end


@triton.jit
def _tap(
    x_ptr, initial_ptr, ids_ptr, first_id, t, own_id, live, owner, begin, back, channel, inside,
    stride_x_t, stride_initial_s, stride_initial_w, stride_ids_t,
    HAS_INITIAL: tl.constexpr, HAS_IDS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Inputs ``back`` steps before tokens t, of their own sequences, in float32."""
    at = t - back
    here = live & (at >= begin)
    if HAS_IDS:
        here &= tl.load(ids_ptr + offset64(at, stride_ids_t), mask=here, other=-1) == own_id
    value = tl.load(
        x_ptr + offset64(at, stride_x_t)[:, None] + channel[None, :],
        mask=here[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    if HAS_INITIAL:
        before = live & (at < begin)
        if HAS_IDS:
            before &= own_id == first_id
        slot = offset64(owner, stride_initial_s) + (at - begin + W - 1) * stride_initial_w
        value += tl.load(
            initial_ptr + slot[:, None] + channel[None, :],
            mask=before[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
    return value


@triton.jit
def _weight(weight_ptr, w, channel, inside, stride_weight_d, stride_weight_w):
    at = weight_ptr + offset64(channel, stride_weight_d) + w * stride_weight_w
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _preactivation(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr, first_id, t, own_id, live, owner, begin,
    channel, inside, stride_x_t, stride_weight_d, stride_weight_w, stride_initial_s,
    stride_initial_w, stride_ids_t,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_IDS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    value = tl.zeros((t.shape[0], channel.shape[0]), tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        tap = _tap(
            x_ptr, initial_ptr, ids_ptr, first_id, t, own_id, live, owner, begin, W - 1 - w,
            channel, inside, stride_x_t, stride_initial_s, stride_initial_w, stride_ids_t,
            HAS_INITIAL, HAS_IDS, W,
        )  # fmt: skip
        weight = _weight(weight_ptr, w, channel, inside, stride_weight_d, stride_weight_w)
        value += tap * weight[None, :]
    return value


@triton.jit
def _ids(ids_ptr, t, live, stride_ids_t, HAS_IDS: tl.constexpr):
    """The seq_idx of tokens t, and which of them are no padding."""
    own_id = tl.zeros_like(t)
    if HAS_IDS:
        own_id = tl.load(ids_ptr + offset64(t, stride_ids_t), mask=live, other=-1)
        live &= own_id >= 0
    return own_id, live


@triton.jit(do_not_specialize=["T", "stride_x_b", "stride_ids_b"])
def conv1d_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr, owner_ptr, bounds_ptr, y_ptr, T, D,
    stride_x_b, stride_x_t, stride_weight_d, stride_weight_w, stride_initial_s, stride_initial_w,
    stride_ids_b, stride_ids_t,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_IDS: tl.constexpr,
    PACKED: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(D, BLOCK_D)
    blocks = tl.cdiv(T, BLOCK_T)
    channel = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(0) // columns // blocks
    t = tl.program_id(0) // columns % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = channel < D
    x_ptr += row_offset(row, stride_x_b, ROWS)
    first_id = 0
    if HAS_IDS:
        ids_ptr += offset64(row, stride_ids_b)
        first_id = tl.load(ids_ptr)
    live, owner, begin, end = _places(t, row, T, owner_ptr, bounds_ptr, PACKED)
    own_id, live = _ids(ids_ptr, t, live, stride_ids_t, HAS_IDS)
    value = _preactivation(
        x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr, first_id, t, own_id, live, owner, begin,
        channel, inside, stride_x_t, stride_weight_d, stride_weight_w, stride_initial_s,
        stride_initial_w, stride_ids_t, HAS_BIAS, HAS_INITIAL, HAS_IDS, W,
    )  # fmt: skip
    if SILU:
        value *= sigmoid(value)
    value = tl.where(live[:, None], value, 0.0)
    at = offset64(offset64(row, T) + t, D)[:, None] + channel[None, :]
    mask = (t < T)[:, None] & inside[None, :]
    tl.store(y_ptr + at, value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr, first_id, t, own_id, live, owner,
    begin, channel, inside, stride_dy_t, stride_x_t, stride_weight_d, stride_weight_w,
    stride_initial_s, stride_initial_w, stride_ids_t,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_IDS: tl.constexpr, SILU: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Of the preactivations of tokens t; zero for padding."""
    mask = live[:, None] & inside[None, :]
    at = offset64(t, stride_dy_t)[:, None] + channel[None, :]
    dv = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        value = _preactivation(
            x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr, first_id, t, own_id, live, owner,
            begin, channel, inside, stride_x_t, stride_weight_d, stride_weight_w,
            stride_initial_s, stride_initial_w, stride_ids_t, HAS_BIAS, HAS_INITIAL, HAS_IDS, W,
        )  # fmt: skip
        gate = sigmoid(value)
        dv *= gate * (1.0 + value * (1.0 - gate))
    return tl.where(mask, dv, 0.0)


@triton.jit(do_not_specialize=["T", "stride_dy_b", "stride_x_b", "stride_ids_b"])
def conv1d_backward_kernel(
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr, owner_ptr, bounds_ptr,
    dx_ptr, partial_ptr, T, D, CHUNK, stride_dx_t, stride_dy_b, stride_dy_t, stride_x_b,
    stride_x_t, stride_weight_d, stride_weight_w, stride_initial_s, stride_initial_w,
    stride_ids_b, stride_ids_t,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_FINAL: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of a chunk of tokens, and its part of dweight and dbias as a row of ``partial``."""
    columns = tl.cdiv(D, BLOCK_D)
    chunks = tl.cdiv(T, CHUNK)
    channel = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(0) // columns
    row, chunk = part // chunks, part % chunks
    inside = channel < D
    dy_ptr += row_offset(row, stride_dy_b, ROWS)
    x_ptr += row_offset(row, stride_x_b, ROWS)
    first_id, last_id = 0, 0
    if HAS_IDS:
        ids_ptr += offset64(row, stride_ids_b)
        first_id = tl.load(ids_ptr)
        last_id = tl.load(ids_ptr + offset64(T - 1, stride_ids_t))
    tap = tl.arange(0, 8)  # rows of the sums: W taps, then the bias
    sums = tl.zeros((8, BLOCK_D), tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        live, owner, begin, end = _places(t, row, T, owner_ptr, bounds_ptr, PACKED)
        own_id, counted = _ids(ids_ptr, t, live, stride_ids_t, HAS_IDS)
        dx = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for k in tl.static_range(W):
            later = t + k
            there, its_owner, its_begin, _ = _places(later, row, T, owner_ptr, bounds_ptr, PACKED)
            its_id, there = _ids(ids_ptr, later, there, stride_ids_t, HAS_IDS)
            dv = _gradient(
                dy_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr, first_id, later, its_id,
                there, its_owner, its_begin, channel, inside, stride_dy_t, stride_x_t,
                stride_weight_d, stride_weight_w, stride_initial_s, stride_initial_w, stride_ids_t,
                HAS_BIAS, HAS_INITIAL, HAS_IDS, SILU, W,
            )  # fmt: skip
            related = there & live & (t >= its_begin)
            if HAS_IDS:
                related &= its_id == own_id
            weight = _weight(weight_ptr, W - 1 - k, channel, inside, stride_weight_d,
                             stride_weight_w)  # fmt: skip
            dx += tl.where(related[:, None], dv * weight[None, :], 0.0)
            if k == 0:
                sums += tl.where((tap == W)[:, None], tl.sum(dv, 0)[None, :], 0.0)
                for w in tl.static_range(W):
                    x = _tap(
                        x_ptr, initial_ptr, ids_ptr, first_id, t, own_id, counted, owner, begin,
                        W - 1 - w, channel, inside, stride_x_t, stride_initial_s, stride_initial_w,
                        stride_ids_t, HAS_INITIAL, HAS_IDS, W,
                    )  # fmt: skip
                    sums += tl.where((tap == w)[:, None], tl.sum(dv * x, 0)[None, :], 0.0)
        if HAS_FINAL:
            slot = t - end + W - 1
            carried = live & (slot >= 0)
            if HAS_IDS:
                carried &= counted & (own_id == last_id)
            at = (offset64(owner, W - 1) + slot) * D
            dx += tl.load(
                dfinal_ptr + at[:, None] + channel[None, :],
                mask=carried[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
        at = offset64(offset64(row, T) + t, stride_dx_t)[:, None] + channel[None, :]
        mask = (t < T)[:, None] & inside[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    at = offset64(offset64(part, W + 1) + tap, D)[:, None] + channel[None, :]
    tl.store(partial_ptr + at, sums, mask=(tap <= W)[:, None] & inside[None, :])


@triton.jit
def _bounds(sequence, T, bounds_ptr, PACKED: tl.constexpr):
    """Row, beginning and end of a sequence."""
    if PACKED:
        return 0, tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    else:
        return sequence, 0, T


@triton.jit(do_not_specialize=["T", "stride_dy_b", "stride_x_b", "stride_ids_b"])
def conv1d_initial_gradient_kernel(
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr, bounds_ptr,
    dinitial_ptr, T, D, stride_dy_b, stride_dy_t, stride_x_b, stride_x_t, stride_weight_d,
    stride_weight_w, stride_initial_s, stride_initial_w, stride_ids_b, stride_ids_t,
    HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of the history of one sequence: through its first W - 1 tokens, and, where it is shorter,
    through its final state."""
    columns = tl.cdiv(D, BLOCK_D)
    channel = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    sequence = tl.program_id(0) // columns
    inside = channel < D
    row, begin_of, end_of = _bounds(sequence, T, bounds_ptr, PACKED)
    dy_ptr += row_offset(row, stride_dy_b, ROWS)
    x_ptr += row_offset(row, stride_x_b, ROWS)
    i = tl.arange(0, 4)
    t = begin_of + i
    live = (i < W - 1) & (t < end_of)
    begin, owner = tl.zeros_like(t) + begin_of, tl.zeros_like(t) + sequence
    first_id, last_id = 0, 0
    if HAS_IDS:
        ids_ptr += offset64(row, stride_ids_b)
        first_id = tl.load(ids_ptr)
        last_id = tl.load(ids_ptr + offset64(T - 1, stride_ids_t))
    own_id, live = _ids(ids_ptr, t, live, stride_ids_t, HAS_IDS)
    dv = _gradient(
        dy_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr, first_id, t, own_id, live,
        owner, begin, channel, inside, stride_dy_t, stride_x_t, stride_weight_d, stride_weight_w,
        stride_initial_s, stride_initial_w, stride_ids_t, HAS_BIAS, True, HAS_IDS, SILU, W,
    )  # fmt: skip
    if HAS_IDS:
        dv = tl.where((own_id == first_id)[:, None], dv, 0.0)
    for j in tl.static_range(W - 1):
        # Token i meets history entry j with tap j - i.
        tap = j - i
        at = offset64(channel, stride_weight_d)[None, :] + (tap * stride_weight_w)[:, None]
        mask = (tap >= 0)[:, None] & inside[None, :]
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(weight * dv, 0)
        slot = j - (end_of - begin_of)
        if HAS_FINAL:
            carried = slot >= 0
            if HAS_IDS:
                carried &= (first_id == last_id) & (last_id >= 0)
            at = (offset64(sequence, W - 1) + slot) * D + channel
            total += tl.load(dfinal_ptr + at, mask=inside & carried, other=0.0).to(tl.float32)
        at = (offset64(sequence, W - 1) + j) * D + channel
        tl.store(dinitial_ptr + at, total.to(dinitial_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "stride_x_b", "stride_ids_b"])
def conv1d_states_kernel(
    x_ptr, initial_ptr, ids_ptr, bounds_ptr, states_ptr, T, D, entries, stride_x_b, stride_x_t,
    stride_initial_s, stride_initial_w, stride_ids_b, stride_ids_t,
    HAS_INITIAL: tl.constexpr, HAS_IDS: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The last ``entries`` inputs of a sequence, its history counted among them."""
    columns = tl.cdiv(D, BLOCK_D)
    channel = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    sequence = tl.program_id(0) // columns
    inside = channel < D
    row, begin, end = _bounds(sequence, T, bounds_ptr, PACKED)
    x_ptr += row_offset(row, stride_x_b, ROWS)
    first_id, last_id = 0, 0
    if HAS_IDS:
        ids_ptr += offset64(row, stride_ids_b)
        first_id = tl.load(ids_ptr)
        last_id = tl.load(ids_ptr + offset64(T - 1, stride_ids_t))
    for j in range(0, entries):
        at = end - entries + j
        here = at >= begin
        if HAS_IDS:
            its_id = tl.load(ids_ptr + offset64(at, stride_ids_t), mask=here, other=first_id)
            carried = (its_id == last_id) & (last_id >= 0)
        else:
            carried = True
        value = tl.load(
            x_ptr + offset64(at, stride_x_t) + channel, mask=inside & here & carried, other=0.0
        )
        if HAS_INITIAL:
            slot = offset64(sequence, stride_initial_s) + (at - begin + entries) * stride_initial_w
            old = tl.load(
                initial_ptr + slot + channel, mask=inside & (at < begin) & carried, other=0.0
            )
            value = tl.where(here, value, old)
        to = (offset64(sequence, entries) + j) * D + channel
        tl.store(states_ptr + to, value, mask=inside)


@triton.jit(do_not_specialize=["L", "S"])
def conv1d_update_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, lengths_ptr, slots_ptr, accepted_ptr, y_ptr, T, D, L, S,
    stride_x_b, stride_x_t, stride_state_s, stride_state_d, stride_state_l, stride_weight_d,
    stride_weight_w,
    HAS_BIAS: tl.constexpr, RING: tl.constexpr, HAS_SLOTS: tl.constexpr, DRAFTED: tl.constexpr,
    SILU: tl.constexpr, W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All tokens of a row for a block of channels. The history is read before anything is written;
    the plain form then moves entries towards the front, from the front on."""
    columns = tl.cdiv(D, BLOCK_D)
    channel = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(0) // columns
    slot = tl.cast(row, tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row).to(tl.int64)
    inside = (channel < D) & (slot >= 0) & (slot < S)
    x_ptr += offset64(row, stride_x_b) + channel
    state_ptr += offset64(slot, stride_state_s) + offset64(channel, stride_state_d)
    start = L - (W - 1)
    if RING:
        length = tl.load(lengths_ptr + row)
        start = length - (W - 1)
    if DRAFTED:
        accepted = tl.load(accepted_ptr + row).to(tl.int32)
        start = tl.minimum(tl.maximum(accepted - 1, 0), L - (W - 1))
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    # The W - 1 inputs before the next token, oldest first; those W does not reach stay zero.
    dtype = state_ptr.dtype.element_ty
    old, mid, new = (tl.zeros((BLOCK_D,), dtype), tl.zeros((BLOCK_D,), dtype),
                     tl.zeros((BLOCK_D,), dtype))  # fmt: skip
    for j in tl.static_range(W - 1):
        entry = (start + j) % L
        entry = tl.where(entry < 0, entry + L, entry)
        kept = tl.load(state_ptr + offset64(entry, stride_state_l), mask=inside, other=0.0)
        old, mid, new = mid, new, kept
    second, newest = mid, new
    for t in range(0, T):
        x = tl.load(x_ptr + offset64(t, stride_x_t), mask=inside, other=0.0)
        value = bias
        if W >= 4:
            weight = _weight(weight_ptr, W - 4, channel, inside, stride_weight_d, stride_weight_w)
            value += weight * old.to(tl.float32)
        if W >= 3:
            weight = _weight(weight_ptr, W - 3, channel, inside, stride_weight_d, stride_weight_w)
            value += weight * mid.to(tl.float32)
        weight = _weight(weight_ptr, W - 2, channel, inside, stride_weight_d, stride_weight_w)
        value += weight * new.to(tl.float32)
        weight = _weight(weight_ptr, W - 1, channel, inside, stride_weight_d, stride_weight_w)
        value += weight * x.to(tl.float32)
        if SILU:
            value *= sigmoid(value)
        value = tl.where(slot >= 0, value, 0.0)
        value = tl.where(slot < S, value, float("nan"))  # a slot that does not exist shows
        at = offset64(offset64(row, T) + t, D) + channel
        tl.store(y_ptr + at, value.to(y_ptr.dtype.element_ty), mask=channel < D)
        old, mid, new = mid, new, x

    if RING:
        for t in range(tl.maximum(T - L, 0), T):
            x = tl.load(x_ptr + offset64(t, stride_x_t), mask=inside, other=0.0)
            entry = (length + t) % L
            entry = tl.where(entry < 0, entry + L, entry)
            tl.store(state_ptr + offset64(entry, stride_state_l), x, mask=inside)
    elif DRAFTED:
        if T > 0:
            if W >= 4:
                tl.store(state_ptr, second, mask=inside)
            if W >= 3:
                tl.store(state_ptr + (W - 3) * stride_state_l, newest, mask=inside)
        for t in range(0, T):
            x = tl.load(x_ptr + offset64(t, stride_x_t), mask=inside, other=0.0)
            tl.store(state_ptr + offset64(W - 2 + t, stride_state_l), x, mask=inside)
    else:
        for entry in range(0, L):
            source = entry + T
            moved = tl.load(
                state_ptr + offset64(source, stride_state_l), mask=inside & (source < L), other=0.0
            )
            x = tl.load(
                x_ptr + offset64(source - L, stride_x_t), mask=inside & (source >= L), other=0.0
            )
            moved = tl.where(source < L, moved, x)
            tl.store(state_ptr + offset64(entry, stride_state_l), moved, mask=inside)


def forward(x, weight, bias, seq_idx, initial_states, cu_seqlens, silu, final, *, config):
    """As ref.forward."""
    x = _channel_last(x)
    rows, tokens, dim = x.shape
    bias, bounds, owner = contiguous(bias), contiguous(cu_seqlens), _owner(tokens, cu_seqlens)
    initial = _channel_last(initial_states)
    y = x.new_empty(x.shape)
    grid = (rows * cdiv(tokens, config.block_t) * cdiv(dim, config.block_d),)
    if grid[0]:
        conv1d_forward_kernel[grid](
            x, weight, bias, initial, seq_idx, owner, bounds, y, tokens, dim, *x.stride()[:2],
            *weight.stride(), *_strides(initial), *_strides(seq_idx),
            HAS_BIAS=bias is not None, HAS_INITIAL=initial is not None,
            HAS_IDS=seq_idx is not None, PACKED=bounds is not None, SILU=silu,
            W=weight.shape[1], ROWS=row_divisor(x), BLOCK_T=config.block_t, BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip
    sequences = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = x.new_empty(sequences if final else 0, weight.shape[1] - 1, dim)
    _states(x, seq_idx, initial, bounds, states, config)
    return y, states


def backward(dy, dfinal, x, weight, bias, seq_idx, initial_states, cu_seqlens, silu, *, config,
             dx=None):  # fmt: skip
    """As ref.backward; ``dx``, if given, is written to: channel-last, its tokens may lie apart, at
    one distance in all rows."""
    x, dy, initial = _channel_last(x), _channel_last(dy), _channel_last(initial_states)
    (rows, tokens, dim), width = x.shape, weight.shape[1]
    dense_bias, bounds, owner = contiguous(bias), contiguous(cu_seqlens), _owner(tokens, cu_seqlens)
    sequences = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = dfinal.contiguous() if dfinal.shape[0] else None
    dx = x.new_empty(x.shape) if dx is None else dx
    dinitial = x.new_empty(0 if initial is None else sequences, width - 1, dim)
    parts = rows * cdiv(tokens, config.chunk)
    partial = x.new_empty(parts, width + 1, dim, dtype=torch.float32)
    columns = cdiv(dim, config.block_d)
    given = (weight, dense_bias, initial, seq_idx)
    strides = (*dy.stride()[:2], *x.stride()[:2], *weight.stride(), *_strides(initial),
               *_strides(seq_idx))  # fmt: skip
    flags = dict(HAS_BIAS=bias is not None, HAS_IDS=seq_idx is not None,
                 HAS_FINAL=final is not None, PACKED=bounds is not None, SILU=silu, W=width,
                 ROWS=row_divisor(x, dy), BLOCK_D=config.block_d,
                 num_warps=config.num_warps)  # fmt: skip
    if parts * columns:
        conv1d_backward_kernel[(parts * columns,)](
            dy, final, x, *given, owner, bounds, dx, partial, tokens, dim, config.chunk,
            dx.stride(1), *strides, HAS_INITIAL=initial is not None,
            BLOCK_T=config.block_t, **flags,
        )  # fmt: skip
    if dinitial.numel() and not tokens:
        dinitial.copy_(0 if final is None else final)
    elif dinitial.numel():
        conv1d_initial_gradient_kernel[(sequences * columns,)](
            dy, final, x, *given, bounds, dinitial, tokens, dim, *strides, **flags
        )
    sums = x.new_zeros(width + 1, dim, dtype=torch.float32)
    if parts:
        column_sum(partial.view(parts, -1), sums)
    dbias = sums[width].to((weight if bias is None else bias).dtype)
    return dx, sums[:width].T.to(weight.dtype).contiguous(), dbias, dinitial


def update(
    x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, num_accepted_tokens,
    *, config,
):  # fmt: skip
    """As ref.update."""
    x = _channel_last(x)
    rows, tokens, dim = x.shape
    bias, lengths, slots, accepted = map(
        contiguous, (bias, cache_seqlens, conv_state_indices, num_accepted_tokens)
    )
    y = x.new_empty(x.shape)
    grid = (rows * cdiv(dim, config.block_d),)
    if grid[0] and tokens:
        conv1d_update_kernel[grid](
            x, conv_state, weight, bias, lengths, slots, accepted, y, tokens, dim,
            conv_state.shape[2], conv_state.shape[0], *x.stride()[:2], *conv_state.stride(),
            *weight.stride(),
            HAS_BIAS=bias is not None, RING=lengths is not None, HAS_SLOTS=slots is not None,
            DRAFTED=accepted is not None, SILU=silu, W=weight.shape[1], BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip
    return y


def varlen_states(x, cu_seqlens, state_len, *, config):
    """As ref.varlen_states."""
    x = _channel_last(x[None])
    states = x.new_empty(cu_seqlens.shape[0] - 1, state_len, x.shape[2])
    _states(x, None, None, cu_seqlens.contiguous(), states, config)
    return states


def _states(x, seq_idx, initial, bounds, states, config):
    sequences, entries, dim = states.shape
    grid = (sequences * cdiv(dim, config.block_d),)
    if grid[0] and not x.shape[1]:
        states.copy_(0 if initial is None else initial)
    elif grid[0]:
        conv1d_states_kernel[grid](
            x, initial, seq_idx, bounds, states, x.shape[1], dim, entries, *x.stride()[:2],
            *_strides(initial), *_strides(seq_idx), HAS_INITIAL=initial is not None,
            HAS_IDS=seq_idx is not None, PACKED=bounds is not None, ROWS=row_divisor(x),
            BLOCK_D=config.block_d, num_warps=config.num_warps,
        )  # fmt: skip


def _owner(tokens: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor | None:
    """The sequence each token is in, -1 past the last; computed on the device."""
    if cu_seqlens is None:
        return None
    index = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens, index, right=True, out_int32=True) - 1
    return torch.where(index < cu_seqlens[-1], owner, -1)


def _channel_last(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.stride(2) == 1 else x.contiguous()


def _strides(t: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else t.stride()[:2]


def specialisations():
    """Launches to compile without a GPU: the mixers of Nemotron-H 8B and Nano, bfloat16."""
    from nemokernels.ops.causal_conv1d.op import plan

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, device="meta", dtype=dtype)

    def arguments(dim, packed):
        x = empty(1 if packed else 8, 4096, dim + 8192)[..., :dim]
        bounds = empty(9, dtype=torch.int32) if packed else None
        initial = empty(8, 3, dim) if packed else None
        return (x, empty(dim, 4), empty(dim), None, initial, bounds, True)

    def launch(kind, dim, packed=False):
        config = plan(8, 4096, dim, (torch.bfloat16,), ("triton",), 132)
        args = arguments(dim, packed)
        if kind == "forward":
            return lambda: forward(*args, packed, config=config)
        final = empty(8, 3, dim) if packed else empty(0, 3, dim)
        return lambda: backward(empty(*args[0].shape), final, *args, config=config)

    def step():
        config = plan(64, 1, 6144, (torch.bfloat16,), ("triton",), 132)
        state, ints = empty(256, 4, 6144).transpose(1, 2), empty(64, dtype=torch.int32)
        return update(empty(64, 1, 6144), state, empty(6144, 4), empty(6144), True, ints, ints,
                      None, config=config)  # fmt: skip

    yield _triton.Specialisation("h8b forward", launch("forward", 10240))
    yield _triton.Specialisation("h8b backward", launch("backward", 10240))
    yield _triton.Specialisation("nano3 packed forward", launch("forward", 6144, True))
    yield _triton.Specialisation("nano3 packed backward", launch("backward", 6144, True))
    yield _triton.Specialisation("nano3 update, batch 64", step)
