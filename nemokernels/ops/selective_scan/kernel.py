"""Triton kernels of the selective scan, and their launches.

One program takes some channels of one sequence and walks its tokens a tile at a time. In a tile
(channels, tokens, N) an associative scan along the tokens turns decays and inputs into states; the
state is carried from tile to tile. The backward first walks forward and keeps the state that
enters every tile, then walks back with a second scan for the gradients of the states. Sums over
channels (B, C) and over sequences (A, D, delta_bias) leave partial sums, added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels._tl import offset64, offset_in_row, row_offset, sigmoid, softplus
from nemokernels._triton import (
    Specialisation,
    axes,
    cdiv,
    contiguous,
    next_power_of_2,
    row_divisor,
)
from nemokernels.ops.ssd.chunks import packed_places

LENGTHS = ["T", "tiles", "u_row", "delta_row", "B_row", "C_row", "z_row"]


@triton.jit
def _then(decay, drive, next_decay, next_drive):
    """The map s -> decay * s + drive, followed by the next one."""
    return decay * next_decay, next_decay * drive + next_drive


@triton.jit
def _then_kept(decay, drive, kept, next_decay, next_drive, next_kept):
    """As _then; ``kept`` is what the last map of the chain makes of the state before it alone.

    The difference of the states and their drives is the same, but loses digits.
    """
    passed = next_decay * drive
    return decay * next_decay, passed + next_drive, passed + next_kept


@triton.jit
def _program(per_group, groups, BLOCK_D: tl.constexpr):
    """Block of channels, group and sequence of a program; its channels, and which there are."""
    blocks = tl.cdiv(per_group, BLOCK_D)
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks % groups
    seq = tl.program_id(0) // blocks // groups
    within = block * BLOCK_D + tl.arange(0, BLOCK_D)
    return block, group, seq, group * per_group + within, within < per_group


@triton.jit
def _sequence(seq, bounds_ptr, first_ptr, T, tiles, PACKED: tl.constexpr):
    """Row, first token, number of tokens and first tile of a sequence."""
    row, start, length, tile = seq, 0, T, seq * tiles
    if PACKED:
        row = 0
        start = tl.load(bounds_ptr + seq)
        length = tl.load(bounds_ptr + seq + 1) - start
        tile = tl.load(first_ptr + seq)
    return row, start, length, tile


@triton.jit
def _places(token, channel, strides):
    """Offsets (channels, tokens) into a row (T, D)."""
    return offset_in_row(token[None, :], channel[:, None], strides)


@triton.jit
def _load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _step(
    delta_ptr, bias, token, channel, mask, strides,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """delta + bias and the step, which is zero where there is no token; (channels, tokens)."""
    raw = _load(delta_ptr, _places(token, channel, strides), mask)
    if HAS_BIAS:
        raw += bias[:, None]
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    return raw, tl.where(mask, step, 0.0)


@triton.jit
def _narrow(ptr, token, group, n, live, inside_n, strides):
    """A tile (tokens, N) of B or C."""
    at = offset_in_row(token, group, strides)[:, None] + offset64(n, strides[2])[None, :]
    return _load(ptr, at, live[:, None] & inside_n[None, :])


@triton.jit
def _map(step, u, A, B, inside_n):
    """What a token makes of the state before it: decay * state + drive, (channels, tokens, N)."""
    decay = tl.exp(step[:, :, None] * A[:, None, :])
    drive = (step * u)[:, :, None] * B[None, :, :]
    return decay, tl.where(inside_n[None, None, :], drive, 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def selective_scan_kernel(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    initial_ptr,
    out_ptr,
    final_ptr,
    met_ptr,
    bounds_ptr,
    first_ptr,
    T,
    dim,
    per_group,
    groups,
    N,
    tiles,
    u_row,
    delta_row,
    B_row,
    C_row,
    z_row,
    u_strides,
    delta_strides,
    B_strides,
    C_strides,
    z_strides,
    ROWS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    STORE_MET: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Outputs and last states, or with STORE_MET only the states that enter the tiles."""
    block, group, seq, channel, inside_d = _program(per_group, groups, BLOCK_D)
    row, start, length, tile = _sequence(seq, bounds_ptr, first_ptr, T, tiles, PACKED)
    u_ptr += row_offset(row, u_row, ROWS)
    delta_ptr += row_offset(row, delta_row, ROWS)
    B_ptr += row_offset(row, B_row, ROWS)
    C_ptr += row_offset(row, C_row, ROWS)
    if HAS_Z:
        z_ptr += row_offset(row, z_row, ROWS)
    n = tl.arange(0, BLOCK_N)
    inside_n = n < N
    inside = inside_d[:, None] & inside_n[None, :]
    index = tl.arange(0, BLOCK_T)

    of_state = offset64(channel, N)[:, None] + n[None, :]
    A = _load(A_ptr, of_state, inside)
    state_size = offset64(dim, N)
    state = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if HAS_INITIAL:
        state = _load(initial_ptr, seq * state_size + of_state, inside)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        bias = _load(bias_ptr, channel, inside_d)
    if HAS_D:
        D = _load(D_ptr, channel, inside_d)

    for begin in range(0, length, BLOCK_T):
        if STORE_MET:
            at = (tile + begin // BLOCK_T) * state_size + of_state
            tl.store(met_ptr + at, state, mask=inside)
        live = begin + index < length
        token = start + begin + index
        mask = inside_d[:, None] & live[None, :]
        _, step = _step(delta_ptr, bias, token, channel, mask, delta_strides,
                        HAS_BIAS, SOFTPLUS)  # fmt: skip
        u = _load(u_ptr, _places(token, channel, u_strides), mask)
        B = _narrow(B_ptr, token, group, n, live, inside_n, B_strides)
        decay, drive = _map(step, u, A, B, inside_n)
        decay, states = tl.associative_scan((decay, drive), 1, _then)
        states += decay * state[:, None, :]
        # Past the last token the state stays, so that the tile's last column is it in any case.
        state = tl.sum(tl.where((index == BLOCK_T - 1)[None, :, None], states, 0.0), 1)
        if not STORE_MET:
            C = _narrow(C_ptr, token, group, n, live, inside_n, C_strides)
            y = tl.sum(states * C[None, :, :], 2)
            if HAS_D:
                y += D[:, None] * u
            if HAS_Z:
                z = _load(z_ptr, _places(token, channel, z_strides), mask)
                y *= z * sigmoid(z)
            at = offset64(offset64(row, T) + token, dim)[None, :] + channel[:, None]
            tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
    if not STORE_MET:
        tl.store(final_ptr + seq * state_size + of_state, state, mask=inside)


@triton.jit(do_not_specialize=[*LENGTHS, "tokens", "dout_row"])
def selective_scan_backward_kernel(
    dout_ptr,
    dfinal_ptr,
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    met_ptr,
    du_ptr,
    ddelta_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    dD_ptr,
    dz_ptr,
    dbias_ptr,
    dinitial_ptr,
    bounds_ptr,
    first_ptr,
    T,
    tokens,
    dim,
    per_group,
    groups,
    N,
    tiles,
    dout_row,
    u_row,
    delta_row,
    B_row,
    C_row,
    z_row,
    dout_strides,
    u_strides,
    delta_strides,
    B_strides,
    C_strides,
    z_strides,
    ROWS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients; those of B and C per block of channels (blocks, tokens, groups, N), those of A, D
    and delta_bias per sequence."""
    block, group, seq, channel, inside_d = _program(per_group, groups, BLOCK_D)
    row, start, length, tile = _sequence(seq, bounds_ptr, first_ptr, T, tiles, PACKED)
    dout_ptr += row_offset(row, dout_row, ROWS)
    u_ptr += row_offset(row, u_row, ROWS)
    delta_ptr += row_offset(row, delta_row, ROWS)
    B_ptr += row_offset(row, B_row, ROWS)
    C_ptr += row_offset(row, C_row, ROWS)
    if HAS_Z:
        z_ptr += row_offset(row, z_row, ROWS)
    n = tl.arange(0, BLOCK_N)
    inside_n = n < N
    inside = inside_d[:, None] & inside_n[None, :]
    index = tl.arange(0, BLOCK_T)

    of_state = offset64(channel, N)[:, None] + n[None, :]
    of_sequence = seq * offset64(dim, N) + of_state
    A = _load(A_ptr, of_state, inside)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        bias = _load(bias_ptr, channel, inside_d)
    if HAS_D:
        D = _load(D_ptr, channel, inside_d)

    leaving = _load(dfinal_ptr, of_sequence, inside)  # gradient of the state after the tile
    dA = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    dD = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.cdiv(length, BLOCK_T)
    for back in range(0, count):
        begin = (count - 1 - back) * BLOCK_T
        live = begin + index < length
        token = start + begin + index
        mask = inside_d[:, None] & live[None, :]
        raw, step = _step(delta_ptr, bias, token, channel, mask, delta_strides,
                          HAS_BIAS, SOFTPLUS)  # fmt: skip
        u = _load(u_ptr, _places(token, channel, u_strides), mask)
        B = _narrow(B_ptr, token, group, n, live, inside_n, B_strides)
        C = _narrow(C_ptr, token, group, n, live, inside_n, C_strides)
        dy = _load(dout_ptr, _places(token, channel, dout_strides), mask)
        out_at = offset64(offset64(row, T) + token, dim)[None, :] + channel[:, None]

        # The states once more, as forward.
        met_at = (tile + begin // BLOCK_T) * offset64(dim, N) + of_state
        decay, drive = _map(step, u, A, B, inside_n)
        none = tl.zeros((BLOCK_D, BLOCK_T, BLOCK_N), tl.float32)
        total, states, kept = tl.associative_scan((decay, drive, none), 1, _then_kept)
        entered = total * _load(met_ptr, met_at, inside)[:, None, :]
        states += entered
        kept += entered  # decay * (state before t)
        if HAS_Z:
            z = _load(z_ptr, _places(token, channel, z_strides), mask)
            y = tl.sum(states * C[None, :, :], 2)
            if HAS_D:
                y += D[:, None] * u
            gate = sigmoid(z)
            dz = dy * y * gate * (1.0 + z * (1.0 - gate))
            tl.store(dz_ptr + out_at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            dy *= z * gate

        of_narrow = offset64(block, tokens) + offset64(row, T) + token
        of_narrow = offset64(offset64(of_narrow, groups) + group, N)[:, None] + n[None, :]
        narrow = live[:, None] & inside_n[None, :]
        dC = tl.sum(dy[:, :, None] * states, 0)
        tl.store(dC_ptr + of_narrow, dC, mask=narrow)

        # Gradient of the state after token t: from its output, and through the decay of t + 1.
        following = mask & (index < BLOCK_T - 1)[None, :] & (begin + index + 1 < length)[None, :]
        _, next_step = _step(delta_ptr, bias, token + 1, channel, following, delta_strides,
                             HAS_BIAS, SOFTPLUS)  # fmt: skip
        back_decay = tl.exp(next_step[:, :, None] * A[:, None, :])
        back_drive = dy[:, :, None] * C[None, :, :]
        total, dstates = tl.associative_scan((back_decay, back_drive), 1, _then, reverse=True)
        dstates += total * leaving[:, None, :]
        carried = dstates * decay
        leaving = tl.sum(tl.where((index == 0)[None, :, None], carried, 0.0), 1)

        dB = tl.sum(dstates * (step * u)[:, :, None], 0)
        tl.store(dB_ptr + of_narrow, dB, mask=narrow)
        driven = tl.sum(dstates * B[None, :, :], 2)
        kept *= dstates
        dA += tl.sum(kept * step[:, :, None], 1)
        dstep = driven * u + tl.sum(kept * A[:, None, :], 2)
        du = driven * step
        if HAS_D:
            du += D[:, None] * dy
            dD += tl.sum(dy * u, 1)
        if SOFTPLUS:
            dstep *= sigmoid(raw)  # exactly one above the threshold
        dbias += tl.sum(tl.where(mask, dstep, 0.0), 1)
        tl.store(du_ptr + out_at, du.to(du_ptr.dtype.element_ty), mask=mask)
        tl.store(ddelta_ptr + out_at, dstep.to(ddelta_ptr.dtype.element_ty), mask=mask)

    tl.store(dA_ptr + of_sequence, dA, mask=inside)
    of_channel = offset64(seq, dim) + channel
    if HAS_D:
        tl.store(dD_ptr + of_channel, dD, mask=inside_d)
    if HAS_BIAS:
        tl.store(dbias_ptr + of_channel, dbias, mask=inside_d)
    if HAS_INITIAL:
        tl.store(dinitial_ptr + of_sequence, leaving.to(dinitial_ptr.dtype.element_ty), mask=inside)


class _Problem:
    """Sizes, contiguous small tensors and flags that both kernels take; ``tile`` is an op.Tile."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens, softplus,
                 tile):  # fmt: skip
        self.batch, self.tokens, self.dim = u.shape
        self.groups, self.state = B.shape[2:]
        self.sequences, self.tiles = self.batch, cdiv(self.tokens, tile.tokens)
        self.total, self.bounds, self.first = self.batch * self.tiles, None, None
        if cu_seqlens is not None:
            self.sequences = cu_seqlens.shape[0] - 1
            self.bounds, self.first, _, self.total = packed_places(
                cu_seqlens, self.tokens, tile.tokens
            )
        per_group = self.dim // self.groups
        self.blocks = cdiv(per_group, tile.channels)
        self.grid = (self.sequences * self.groups * self.blocks,)
        A, D, delta_bias, initial = map(contiguous, (A, D, delta_bias, initial_states))
        self.inputs = (u, delta, A, B, C, D, z, delta_bias)
        self.initial = initial
        self.sizes = (self.dim, per_group, self.groups, self.state, self.tiles)
        self.rows = u, delta, B, C, u if z is None else z
        self.options = {
            "HAS_D": D is not None,
            "HAS_Z": z is not None,
            "HAS_BIAS": delta_bias is not None,
            "HAS_INITIAL": initial is not None,
            "SOFTPLUS": softplus,
            "PACKED": cu_seqlens is not None,
            "BLOCK_D": tile.channels,
            "BLOCK_T": tile.tokens,
            "BLOCK_N": next_power_of_2(self.state),
            "num_warps": tile.num_warps,
        }

    def per_token(self, like: torch.Tensor, *shape: int, dtype=None) -> torch.Tensor:
        """Room for every token; zeros where some may not be visited."""
        make = like.new_empty if self.bounds is None else like.new_zeros
        return make(shape or like.shape, dtype=dtype or like.dtype)

    def walk(self, out, final, met) -> None:
        if self.grid[0]:
            selective_scan_kernel[self.grid](
                *self.inputs, self.initial, out, final, met, self.bounds, self.first, self.tokens,
                *self.sizes, *axes(*self.rows), ROWS=row_divisor(*self.rows),
                STORE_MET=met is not None, **self.options,
            )  # fmt: skip


def forward(u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens, softplus, tile):
    """As ref.forward."""
    problem = _Problem(
        u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens, softplus, tile
    )
    out = problem.per_token(u)
    final = u.new_empty(problem.sequences, *A.shape, dtype=torch.float32)
    problem.walk(out, final, None)
    return out, final


def backward(
    dout, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens, softplus, tile
):
    """As ref.backward."""
    p = _Problem(u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens, softplus, tile)
    wide = {"dtype": torch.float32}
    absent = u.new_empty(0)
    du, ddelta = p.per_token(u), p.per_token(delta)
    dz = absent if z is None else p.per_token(z)
    dA = u.new_empty(p.sequences, *A.shape, **wide)
    dD, dbias = (u.new_empty(p.sequences, p.dim, **wide) for _ in range(2))
    parts = (p.blocks, p.batch, p.tokens, p.groups, p.state)
    dB, dC = (p.per_token(u, *parts, **wide) for _ in range(2))
    dinitial = absent if initial_states is None else initial_states.new_empty(initial_states.shape)
    if p.grid[0]:
        met = u.new_empty(p.total, *A.shape, **wide)
        p.walk(None, None, met)
        selective_scan_backward_kernel[p.grid](
            dout, dfinal.contiguous(), *p.inputs, met, du, ddelta, dA, dB, dC, dD, dz, dbias,
            dinitial, p.bounds, p.first, p.tokens, p.batch * p.tokens, *p.sizes,
            *axes(dout, *p.rows), ROWS=row_divisor(dout, *p.rows), **p.options,
        )  # fmt: skip

    def small(like, parts):
        return absent if like is None else parts.sum(0).to(like.dtype)

    return (
        du, ddelta, small(A, dA), small(B, dB), small(C, dC), small(D, dD), dz,
        small(delta_bias, dbias), dinitial,
    )  # fmt: skip


def specialisations():
    """The sizes of Hymba 1.5B's and of an 8B model's Mamba-1 layers, rows and packed."""
    from nemokernels.ops.selective_scan.op import plan

    def launch(grad, batch=8, tokens=2048, dim=3200, dtype=torch.bfloat16, rows=None, gate=True):
        def new(*shape, dtype=dtype):
            return torch.empty(shape, device="meta", dtype=dtype)

        config = plan(16, "", ("triton",))
        u, B = new(batch, tokens, dim), new(batch, tokens, 1, 16)
        A, D = new(dim, 16, dtype=torch.float32), new(dim, dtype=torch.float32)
        z = new(batch, tokens, 2 * dim)[..., dim:] if gate else None
        bounds = new(rows + 1, dtype=torch.int32) if rows else None
        initial = new(rows, dim, 16, dtype=torch.float32) if rows else None
        args = (u, u, A, B, B, D, z, D, initial, bounds, True)
        if not grad:
            return lambda: forward(*args, config.forward)
        final = new(rows or batch, dim, 16, dtype=torch.float32)
        return lambda: backward(u, final, *args, config.backward)

    for label, sizes in {
        "Hymba": {"gate": False},
        "dim 8192": {"dim": 8192},
        "Hymba packed": {"batch": 1, "rows": 8},
        "float32": {"dtype": torch.float32},
    }.items():
        yield Specialisation(f"{label} forward", launch(False, **sizes))
        yield Specialisation(f"{label} backward", launch(True, **sizes))
