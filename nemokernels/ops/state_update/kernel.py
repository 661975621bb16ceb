"""Triton kernel of selective_state_update.

One program per (sequence, head, block of P): it loads its part of the state once, walks the
sequence's tokens with the state in registers (float32), and stores it where it is wanted. No two
programs touch the same part of a slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import offset64, sigmoid, softplus
from nemokernels._triton import cdiv, contiguous


@triton.jit
def _random_bits(seed, counter, NOISE: tl.constexpr, ROUNDS: tl.constexpr):
    # Up to 16 bits, those of the mask NOISE, for each of the 8 neighbours of every counter
    # (rows, N / 8): pair i of a group takes word i, its low half first. Interleaving puts the two
    # tensors' elements in turn.
    word0, word1, word2, word3 = tl.randint4x(seed, counter, ROUNDS)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return tl.interleave(words & NOISE, (words >> 16) & NOISE).to(tl.int32)


@triton.jit
def _round_stochastically(value, seed, counter, dtype: tl.constexpr, ROUNDS: tl.constexpr):
    # As ref.round_stochastically, on the bits: 0x7F800000 is infinity, 0x38800000 is 2**-14.
    HALF: tl.constexpr = dtype == tl.float16
    NOISE: tl.constexpr = 0x1FFF if HALF else 0xFFFF
    word = value.to(tl.int32, bitcast=True)
    magnitude = word & 0x7FFFFFFF
    bits = _random_bits(seed, counter, NOISE, ROUNDS)
    kept = (magnitude + bits) & (0x7FFFFFFF - NOISE)
    if HALF:
        kept = tl.where(kept < 0x38800000, 0, kept)
    rounded = (kept | (word ^ magnitude)).to(tl.float32, bitcast=True)
    return tl.where(magnitude < 0x7F800000, rounded, value).to(dtype)


@triton.jit
def rounding_counters(head, p, P, N, BLOCK_N: tl.constexpr):
    """The place in a contiguous slot (H, P, N) of every group of 8 along N, for rows p."""
    group_of_8 = tl.arange(0, BLOCK_N // 8) * 8
    return offset64(offset64(head, P) + p, N)[:, None] + group_of_8[None, :]


@triton.jit
def store_state(
    ptr, value, slot, mask, seed, counter, slot_elements,
    STOCHASTIC: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Round a state to the cache's dtype and store it at ``ptr``; not if ``slot`` is negative."""
    if STOCHASTIC:
        counter += offset64(slot, slot_elements)
        value = _round_stochastically(value, seed, counter, ptr.dtype.element_ty, ROUNDS)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask & (slot >= 0))


@triton.jit(do_not_specialize=["source_width", "target_width"])
def state_update_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    dt_bias_ptr,
    y_ptr,
    source_ptr,
    target_ptr,
    accepted_ptr,
    cu_seqlens_ptr,
    seed_ptr,
    H,
    P,
    N,
    heads_per_group,
    source_width,
    target_width,
    stride_state_slot,
    stride_state_h,
    stride_state_p,
    stride_state_n,
    stride_x_t,
    stride_x_h,
    stride_x_p,
    stride_dt_t,
    stride_dt_h,
    stride_dt_p,
    stride_A_h,
    stride_A_p,
    stride_A_n,
    stride_B_t,
    stride_B_g,
    stride_B_n,
    stride_C_t,
    stride_C_g,
    stride_C_n,
    stride_D_h,
    stride_D_p,
    stride_z_t,
    stride_z_h,
    stride_z_p,
    stride_bias_h,
    stride_bias_p,
    DT_P: tl.constexpr,
    A_P: tl.constexpr,
    A_N: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_P: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    TARGET_PER_TOKEN: tl.constexpr,
    PACKED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(P, BLOCK_P)
    head = tl.program_id(0) // blocks % H
    sequence = tl.program_id(0) // blocks // H
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)

    # Which tokens, and which slot to start from. A negative slot marks padding.
    start, length = sequence, 1
    if PACKED:
        start = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    source = tl.cast(sequence, tl.int64)
    if HAS_SOURCE:
        source_at = offset64(sequence, source_width)
        if HAS_ACCEPTED:
            accepted = tl.load(accepted_ptr + sequence).to(tl.int64)
            source_at += tl.minimum(tl.maximum(accepted - 1, 0), source_width - 1)
        source = tl.load(source_ptr + source_at).to(tl.int64)
    live = source >= 0

    inside_p = p < P
    inside_n = n < N
    inside = inside_p[:, None] & inside_n[None, :] & live & (length > 0)
    at = offset64(p, stride_state_p)[:, None] + offset64(n, stride_state_n)[None, :]
    at += offset64(head, stride_state_h)
    state_at = offset64(source, stride_state_slot) + at
    state = tl.load(state_ptr + state_at, mask=inside, other=0.0).to(tl.float32)

    if A_P:
        A_at = offset64(head, stride_A_h) + offset64(p, stride_A_p)[:, None]
        A_mask = inside_p[:, None]
        if A_N:
            A_at += offset64(n, stride_A_n)[None, :]
            A_mask &= inside_n[None, :]
        A = tl.load(A_ptr + A_at, mask=A_mask, other=0.0).to(tl.float32)
    else:
        A = tl.load(A_ptr + offset64(head, stride_A_h)).to(tl.float32)
    if HAS_BIAS:
        bias_at = offset64(head, stride_bias_h)
        if BIAS_P:
            bias_at += offset64(p, stride_bias_p)
            bias = tl.load(dt_bias_ptr + bias_at, mask=inside_p, other=0.0).to(tl.float32)
        else:
            bias = tl.load(dt_bias_ptr + bias_at).to(tl.float32)
    if HAS_D:
        D_at = offset64(head, stride_D_h) + offset64(p, stride_D_p)
        D = tl.load(D_ptr + D_at, mask=inside_p, other=0.0).to(tl.float32)
    seed = 0
    if STOCHASTIC:
        seed = tl.load(seed_ptr)
    counter = rounding_counters(head, p, P, N, BLOCK_N)
    slot_elements = offset64(H, P) * N

    group = head // heads_per_group
    for t in range(0, length):
        token = start + t
        x_at = offset64(token, stride_x_t) + offset64(head, stride_x_h) + offset64(p, stride_x_p)
        x = tl.load(x_ptr + x_at, mask=inside_p, other=0.0).to(tl.float32)
        B_at = offset64(token, stride_B_t) + offset64(group, stride_B_g) + n * stride_B_n
        B = tl.load(B_ptr + B_at, mask=inside_n, other=0.0).to(tl.float32)
        C_at = offset64(token, stride_C_t) + offset64(group, stride_C_g) + n * stride_C_n
        C = tl.load(C_ptr + C_at, mask=inside_n, other=0.0).to(tl.float32)
        d_at = offset64(token, stride_dt_t) + offset64(head, stride_dt_h)
        if DT_P:
            d_at += offset64(p, stride_dt_p)
            d = tl.load(dt_ptr + d_at, mask=inside_p, other=0.0).to(tl.float32)
        else:
            d = tl.load(dt_ptr + d_at).to(tl.float32)
        if HAS_BIAS:
            d += bias
        if SOFTPLUS:
            d = softplus(d)
        drive = (d * x)[:, None] * B[None, :]
        if DT_P or BIAS_P:
            state = state * tl.exp(d[:, None] * A) + drive
        else:
            state = state * tl.exp(d * A) + drive
        out = tl.sum(state * C[None, :], 1)
        if HAS_D:
            out += D * x
        if HAS_Z:
            z_at = offset64(token, stride_z_t) + offset64(head, stride_z_h)
            z_at += offset64(p, stride_z_p)
            z = tl.load(z_ptr + z_at, mask=inside_p, other=0.0).to(tl.float32)
            out *= z * sigmoid(z)
        out = tl.where(live, out, 0.0)
        y_at = offset64(offset64(token, H) + head, P) + p
        tl.store(y_ptr + y_at, out.to(y_ptr.dtype.element_ty), mask=inside_p)
        if TARGET_PER_TOKEN:
            target_at = offset64(sequence, target_width) + t
            target = tl.load(target_ptr + target_at, mask=t < target_width, other=-1).to(tl.int64)
            store_state(
                state_ptr + offset64(target, stride_state_slot) + at, state, target, inside, seed,
                counter, slot_elements, STOCHASTIC, ROUNDS,
            )  # fmt: skip
    if not TARGET_PER_TOKEN:
        target = source
        if HAS_TARGET:
            target = tl.load(target_ptr + sequence).to(tl.int64)
        store_state(
            state_ptr + offset64(target, stride_state_slot) + at, state, target, inside, seed,
            counter, slot_elements, STOCHASTIC, ROUNDS,
        )  # fmt: skip


def update(
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, source, target, accepted, cu_seqlens, seed,
    rounds, config,
):  # fmt: skip
    """As ref.forward, without its checks of index values."""
    (_, H, P, N), tokens = state.shape, x.shape[0]
    sequences = tokens if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # Rows of x that no sequence has are padding, which no program visits.
    y = x.new_empty(x.shape) if cu_seqlens is None else x.new_zeros(x.shape)
    if target is None and source is not None and source.dim() == 2:
        target = source
    source, target, accepted, cu_seqlens = map(contiguous, (source, target, accepted, cu_seqlens))
    grid = (sequences * H * cdiv(P, config.block_p),)
    if grid[0] and tokens:
        state_update_kernel[grid](
            state, x, dt, A, B, C, D, z, dt_bias, y, source, target, accepted, cu_seqlens, seed,
            H, P, N, H // B.shape[1], _width(source), _width(target), *state.stride(),
            *x.stride(), *_strides(dt, 3), *A.stride(), *B.stride(), *C.stride(), *_strides(D, 2),
            *_strides(z, 3), *_strides(dt_bias, 2),
            DT_P=dt.shape[2] > 1, A_P=A.shape[1:] != (1, 1), A_N=A.shape[2] != 1,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None,
            BIAS_P=dt_bias is not None and dt_bias.shape[1] > 1, SOFTPLUS=dt_softplus,
            HAS_SOURCE=source is not None, HAS_ACCEPTED=accepted is not None,
            HAS_TARGET=target is not None,
            TARGET_PER_TOKEN=target is not None and target.dim() == 2,
            PACKED=cu_seqlens is not None,
            STOCHASTIC=seed is not None and state.dtype.itemsize == 2, ROUNDS=rounds,
            BLOCK_P=config.block_p, BLOCK_N=config.block_n, num_warps=config.num_warps,
        )  # fmt: skip
    return y


def _width(slots: torch.Tensor | None) -> int:
    return slots.shape[1] if slots is not None and slots.dim() == 2 else 1


def _strides(t: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    # The last axis of dt, D and dt_bias may be 1 wide where P is not: every p reads its element.
    if t is None:
        return (0,) * dims
    return (*t.stride()[:-1], t.stride(-1) if t.shape[-1] > 1 else 0)


def specialisations():
    """Launches to compile without a GPU: decode and verification of the models, the H100's plan."""
    from nemokernels.ops.state_update.op import plan

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, device="meta", dtype=dtype)

    def launch(sequences, H, dtype, tokens=1, seed=None):
        config = plan(sequences, H, 64, 128, dtype, "", ("triton",), 132)
        packed = empty(sequences * tokens, H * 64 + 2048)
        x = packed[:, : H * 64].unflatten(1, (H, 64))
        B = C = packed[:, H * 64 : H * 64 + 1024].unflatten(1, (8, 128))
        state = empty(1024, H, 64, 128, dtype=dtype)
        per_head = empty(H, 1, dtype=torch.float32)
        slots, bounds = empty(sequences, tokens, dtype=torch.int32), None
        accepted = slots[:, 0] if tokens > 1 else None
        if tokens > 1:
            bounds = empty(sequences + 1, dtype=torch.int32)
        else:
            slots = slots[:, 0]
        args = (
            state, x, empty(sequences * tokens, H, 1), per_head[..., None], B, C, per_head, None,
            per_head, True, slots, None, accepted, bounds, seed, 5,
        )  # fmt: skip
        return lambda: update(*args, config)

    seed = torch.empty(1, dtype=torch.int64, device="meta")
    for label, args in {
        "nano3 float32, batch 256": (256, 64, torch.float32),
        "nano3 bfloat16, batch 256": (256, 64, torch.bfloat16),
        "nano3 float32, batch 1": (1, 64, torch.float32),
        "super float32, 64 x 4 tokens": (64, 128, torch.float32, 4),
        "nano3 stochastic float16, batch 256": (256, 64, torch.float16, 1, seed),
        "nano3 stochastic bfloat16, batch 256": (256, 64, torch.bfloat16, 1, seed),
    }.items():
        yield _triton.Specialisation(label, launch(*args))
