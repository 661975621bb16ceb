"""Triton kernel of mamba_step.

One program per (row, head, block of P), as in selective_state_update: its part of the state stays
in registers (float32) from token to token. It convolves its own channels of x, and B and C of its
group, which the group's other programs do too: 2 * N channels of a few taps against BLOCK_P * N of
state. Only the group's first program stores B and C. Entries of the convolution ring that a call
writes are never those it reads (L >= W - 1 + T), so the order of programs does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import offset64, row_offset, sigmoid, softplus
from nemokernels._triton import cdiv, contiguous, row_divisor
from nemokernels.ops.state_update.kernel import rounding_counters, store_state


@triton.jit
def _convolve(
    xBC_ptr, ring_ptr, weight_ptr, bias_ptr, channel, inside, t, length, L, stride_x_t, stride_x_c,
    stride_ring_c, stride_ring_l, stride_weight_c, stride_weight_w,
    HAS_BIAS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU of some channels at token t, rounded to xBC's dtype, in float32.

    Taps reach into the call's own tokens, before those into the ring, before that they are zero.
    """
    x_at = offset64(channel, stride_x_c)
    ring_at = offset64(channel, stride_ring_c)
    value = tl.zeros(channel.shape, tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for w in tl.static_range(W):
        back = W - 1 - w
        token = t - back
        position = length + token
        entry = tl.maximum(position, 0) % L
        new = tl.load(
            xBC_ptr + x_at + offset64(token, stride_x_t), mask=inside & (token >= 0), other=0.0
        )
        old = tl.load(
            ring_ptr + ring_at + offset64(entry, stride_ring_l),
            mask=inside & (token < 0) & (position >= 0),
            other=0.0,
        )
        tap = tl.where(token >= 0, new, old).to(tl.float32)
        weight_at = offset64(channel, stride_weight_c) + w * stride_weight_w
        value += tap * tl.load(weight_ptr + weight_at, mask=inside, other=0.0).to(tl.float32)
    value *= sigmoid(value)
    return value.to(xBC_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _keep(
    xBC_ptr, ring_ptr, channel, inside, t, entry, stride_x_t, stride_x_c, stride_ring_c,
    stride_ring_l,
):  # fmt: skip
    """Token t of some channels, as it is, into an entry of the ring."""
    x_at = offset64(t, stride_x_t) + offset64(channel, stride_x_c)
    value = tl.load(xBC_ptr + x_at, mask=inside, other=0.0)
    ring_at = offset64(entry, stride_ring_l) + offset64(channel, stride_ring_c)
    tl.store(ring_ptr + ring_at, value, mask=inside)


# T stays specialised: one token needs no loop, which takes three times the registers.
@triton.jit(do_not_specialize=["stride_x_b", "stride_dt_b", "stride_z_b"])
def mamba_step_kernel(
    xBC_ptr,
    dt_ptr,
    z_ptr,
    conv_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    A_ptr,
    D_ptr,
    dt_bias_ptr,
    lengths_ptr,
    slots_ptr,
    seed_ptr,
    y_ptr,
    dt_min,
    dt_max,
    T,
    H,
    P,
    N,
    L,
    M,
    G,
    stride_x_b,
    stride_x_t,
    stride_x_c,
    stride_dt_b,
    stride_dt_t,
    stride_dt_h,
    stride_z_b,
    stride_z_t,
    stride_z_c,
    stride_conv_slot,
    stride_conv_c,
    stride_conv_l,
    stride_state_slot,
    stride_state_m,
    stride_state_h,
    stride_state_p,
    stride_state_n,
    stride_weight_c,
    stride_weight_w,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(P, BLOCK_P)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % H
    row = tl.program_id(0) // blocks // H
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    slot = tl.cast(row, tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row).to(tl.int64)
    live = slot >= 0
    length = tl.load(lengths_ptr + row)

    inside_p, inside_n = (p < P) & live, (n < N) & live
    inside = inside_p[:, None] & inside_n[None, :]
    at = offset64(p, stride_state_p)[:, None] + offset64(n, stride_state_n)[None, :]
    at += offset64(head, stride_state_h)
    slot_ptr = state_ptr + offset64(slot, stride_state_slot)
    begin = slot_ptr + offset64(tl.maximum(length - 1, 0) % M, stride_state_m)
    state = tl.load(begin + at, mask=inside & (length > 0), other=0.0).to(tl.float32)

    A = tl.load(A_ptr + head).to(tl.float32)
    dt_bias = 0.0
    if HAS_DT_BIAS:
        dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    if HAS_D:
        D = tl.load(D_ptr + head).to(tl.float32)
    seed = 0
    if STOCHASTIC:
        seed = tl.load(seed_ptr)
    counter = rounding_counters(head, p, P, N, BLOCK_N)
    slot_elements = offset64(H, P) * N

    heads_per_group = H // G
    group = head // heads_per_group
    first = (head % heads_per_group == 0) & (block == 0)
    x_channel = head * P + p
    B_channel = H * P + group * N + n
    C_channel = B_channel + G * N
    xBC_ptr += row_offset(row, stride_x_b, ROWS)
    conv_ptr += offset64(slot, stride_conv_slot)

    for t in range(0, T):
        x = _convolve(
            xBC_ptr, conv_ptr, weight_ptr, bias_ptr, x_channel, inside_p, t, length, L, stride_x_t,
            stride_x_c, stride_conv_c, stride_conv_l, stride_weight_c, stride_weight_w, HAS_BIAS, W,
        )  # fmt: skip
        B = _convolve(
            xBC_ptr, conv_ptr, weight_ptr, bias_ptr, B_channel, inside_n, t, length, L, stride_x_t,
            stride_x_c, stride_conv_c, stride_conv_l, stride_weight_c, stride_weight_w, HAS_BIAS, W,
        )  # fmt: skip
        C = _convolve(
            xBC_ptr, conv_ptr, weight_ptr, bias_ptr, C_channel, inside_n, t, length, L, stride_x_t,
            stride_x_c, stride_conv_c, stride_conv_l, stride_weight_c, stride_weight_w, HAS_BIAS, W,
        )  # fmt: skip
        dt_at = offset64(row, stride_dt_b) + offset64(t, stride_dt_t)
        dt_at += offset64(head, stride_dt_h)
        d = softplus(tl.load(dt_ptr + dt_at).to(tl.float32) + dt_bias)
        # Not tl.minimum and tl.maximum, which would drop a NaN.
        d = tl.where(d < dt_min, dt_min, tl.where(d > dt_max, dt_max, d))
        state = state * tl.exp(d * A) + (d * x)[:, None] * B[None, :]
        out = tl.sum(state * C[None, :], 1)
        if HAS_D:
            out += D * x
        if HAS_Z:
            z_at = row_offset(row, stride_z_b, ROWS) + offset64(t, stride_z_t)
            z_at += offset64(x_channel, stride_z_c)
            z = tl.load(z_ptr + z_at, mask=inside_p, other=0.0).to(tl.float32)
            out *= z * sigmoid(z)
        out = tl.where(live, out, 0.0)
        y_at = offset64(offset64(offset64(row, T) + t, H) + head, P) + p
        tl.store(y_ptr + y_at, out.to(y_ptr.dtype.element_ty), mask=p < P)

        entry = (length + t) % L
        _keep(
            xBC_ptr, conv_ptr, x_channel, inside_p, t, entry, stride_x_t, stride_x_c,
            stride_conv_c, stride_conv_l,
        )  # fmt: skip
        _keep(
            xBC_ptr, conv_ptr, B_channel, inside_n & first, t, entry, stride_x_t, stride_x_c,
            stride_conv_c, stride_conv_l,
        )  # fmt: skip
        _keep(
            xBC_ptr, conv_ptr, C_channel, inside_n & first, t, entry, stride_x_t, stride_x_c,
            stride_conv_c, stride_conv_l,
        )  # fmt: skip
        place = (length + t) % M
        store_state(
            slot_ptr + offset64(place, stride_state_m) + at, state,
            tl.where(live, slot * M + place, -1), inside, seed, counter, slot_elements,
            STOCHASTIC, ROUNDS,
        )  # fmt: skip


def step(
    xBC, dt, z, conv_state, ssm_state, conv_weight, conv_bias, A, D, dt_bias, lengths, slots,
    groups, dt_min, dt_max, seed, rounds, config,
):  # fmt: skip
    """As ref.forward, without its checks of slots and lengths."""
    rows, tokens, _ = xBC.shape
    _, M, H, P, N = ssm_state.shape
    y = xBC.new_empty(rows, tokens, H, P)
    conv_bias, A, D, dt_bias, lengths, slots = map(
        contiguous, (conv_bias, A, D, dt_bias, lengths, slots)
    )
    grid = (rows * H * cdiv(P, config.block_p),)
    if grid[0] and tokens:
        mamba_step_kernel[grid](
            xBC, dt, z, conv_state, ssm_state, conv_weight, conv_bias, A, D, dt_bias, lengths,
            slots, seed, y, dt_min, dt_max, tokens, H, P, N, conv_state.shape[2], M, groups,
            *xBC.stride(), *dt.stride(), *((0, 0, 0) if z is None else z.stride()),
            *conv_state.stride(), *ssm_state.stride(), *conv_weight.stride(),
            W=conv_weight.shape[1], ROWS=row_divisor(xBC, z), HAS_BIAS=conv_bias is not None,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_DT_BIAS=dt_bias is not None,
            HAS_SLOTS=slots is not None, ROUNDS=rounds, BLOCK_P=config.block_p,
            STOCHASTIC=seed is not None and ssm_state.dtype.itemsize == 2,
            BLOCK_N=config.block_n, num_warps=config.num_warps,
        )  # fmt: skip
    return y


def specialisations():
    """Launches to compile without a GPU: decode and verification of the models, the H100's plan."""
    from nemokernels.ops.mamba_step.op import plan

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, device="meta", dtype=dtype)

    def launch(rows, H, dtype, P=64, tokens=1, seed=None):
        config = plan(rows, H, P, 128, dtype, "", ("triton",), 132)
        inner, channels = H * P, H * P + 2048
        packed = empty(rows, tokens, inner + channels + H)
        per_head = empty(H, dtype=torch.float32)
        ints = empty(rows, dtype=torch.int32)
        conv = empty(1024, 3 + tokens, channels).transpose(1, 2)
        args = (
            packed[..., inner:-H], packed[..., -H:], None, conv,
            empty(1024, tokens, H, P, 128, dtype=dtype), empty(channels, 4), empty(channels),
            per_head, per_head, per_head, ints, ints, 8, 0.0, float("inf"), seed, 5,
        )  # fmt: skip
        return lambda: step(*args, config)

    seed = torch.empty(1, dtype=torch.int64, device="meta")
    for label, args in {
        "nano3 float32, batch 256": (256, 64, torch.float32),
        "nano3 float32, batch 1": (1, 64, torch.float32),
        "nano 4B float32, batch 8": (8, 96, torch.float32, 80),
        "super float32, 64 x 4 tokens": (64, 128, torch.float32, 64, 4),
        "nano3 stochastic float16, batch 256": (256, 64, torch.float16, 64, 1, seed),
    }.items():
        yield _triton.Specialisation(label, launch(*args))
