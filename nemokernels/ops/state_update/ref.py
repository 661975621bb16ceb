"""Selective state update in plain torch: the specification and the CPU leg.

T tokens, n sequences of up to M tokens, H heads of size P, G groups, N state size. Everything
between load and store is in the accumulation dtype (float32; float64 if the state or x is). A row's
bits do not depend on its batch: torch's exp and log1p give the same bits at every position, its
sigmoid and softplus do not (hence _activations).
"""

from __future__ import annotations

import torch

from nemokernels._activations import silu, softplus
from nemokernels._checks import check
from nemokernels._philox import philox4x32
from nemokernels._registry import acc_dtype

FN = "selective_state_update"
LACKS = {torch.float16: 13, torch.bfloat16: 16}  # mantissa bits that float32 has more


def forward(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    state_batch_indices: torch.Tensor | None,
    dst_state_batch_indices: torch.Tensor | None,
    num_accepted_tokens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seed: torch.Tensor | None,
    philox_rounds: int,
) -> torch.Tensor:
    """Step every sequence through its tokens, storing states as it goes; returns y (T, H, P)."""
    acc = torch.promote_types(acc_dtype(state), acc_dtype(x))
    start, length, source, target = _sequences(
        state.shape[0], x, state_batch_indices, dst_state_batch_indices, num_accepted_tokens,
        cu_seqlens,
    )  # fmt: skip
    x_acc, A, B, C = (_wide(t, acc) for t in (x, A, B, C))
    d = _wide(dt, acc)
    if dt_bias is not None:
        d = d + dt_bias.to(acc)
    if dt_softplus:
        d = softplus(d)

    y = torch.zeros(x.shape, dtype=acc, device=x.device)
    running = _wide(state[source], acc)
    for t in range(target.shape[1]):
        rows = (length > t).nonzero()[:, 0]
        token = start[rows] + t
        decay = torch.exp(d[token][..., None] * A)
        drive = (d[token] * x_acc[token])[..., None] * _per_head(B[token], state)
        stepped = running[rows] * decay + drive
        out = (stepped * _per_head(C[token], state)).sum(-1)
        if D is not None:
            out = out + D.to(acc) * x_acc[token]
        if z is not None:
            gate = _wide(z[token], acc)
            out = out * silu(gate)
        y[token], running[rows] = out, stepped
        kept = target[rows, t] >= 0
        slots = target[rows, t][kept]
        state[slots] = rounded(stepped[kept], slots, state.dtype, seed, philox_rounds)
    return y.to(x.dtype)


def round_stochastically(
    value: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """float32 to ``dtype``, up with probability (distance to the lower neighbour) / spacing.

    Of the random ``bits`` of an element the lowest 13 (float16) or 16 (bfloat16) are added below
    the kept mantissa bits of the magnitude, which is then truncated. Infinities and NaN stay. In
    float16 magnitudes below 2**-14 afterwards become zero of the same sign, from 65536 on infinity;
    bfloat16 has the range of float32.
    """
    noise = (1 << LACKS[dtype]) - 1
    magnitude = (value.view(torch.int32) & 0x7FFFFFFF) + (bits & noise).to(torch.int32)
    kept = (magnitude & ~noise).view(torch.float32)
    if dtype == torch.float16:
        kept = torch.where(kept < 2.0**-14, 0.0, kept)
    return torch.where(value.isfinite(), kept.copysign(value), value).to(dtype)


def rounding_bits(
    shape: torch.Size, slots: torch.Tensor, seed: torch.Tensor, rounds: int
) -> torch.Tensor:
    """16 random bits for every element of the states (H, P, N) in these slots.

    A group of 8 neighbours along N shares one Philox call, whose counter is the group's element
    offset; pair i of the group takes word i, low half first.
    """
    H, P, N = shape
    row = torch.arange(H * P, device=slots.device).view(H, P, 1)
    group = torch.arange(0, N, 8, device=slots.device)
    offset = (slots.view(-1, 1, 1, 1) * (H * P) + row) * N + group
    words = torch.stack(philox4x32(seed, offset, rounds=rounds), -1)
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten(3)[..., :N]


def rounded(
    value: torch.Tensor,
    slots: torch.Tensor,
    dtype: torch.dtype,
    seed: torch.Tensor | None,
    rounds: int,
) -> torch.Tensor:
    """``value`` (rows, H, P, N) as it is stored in these slots of a state of ``dtype``."""
    if seed is not None and dtype in LACKS:
        bits = rounding_bits(value.shape[1:], slots, seed, rounds)
        return round_stochastically(value.float(), bits, dtype)
    return value.to(dtype)


def _sequences(slots, x, source, target, accepted, cu_seqlens):
    # Of the sequences that are not padding: first token, number of tokens, slot to start from, and
    # the slot that the state after step t goes to (n, steps), -1 for none.
    tokens, device = x.shape[0], x.device
    if cu_seqlens is None:
        start, length = torch.arange(tokens, device=device), x.new_ones(tokens, dtype=torch.long)
    else:
        start, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        bounds = cu_seqlens.tolist()
        check(FN, bounds[0] >= 0 and bounds[-1] <= tokens and bounds == sorted(bounds),
              "`cu_seqlens` must ascend from 0 or more to at most {} tokens, got {}",
              tokens, bounds)  # fmt: skip
    source = torch.arange(start.shape[0], device=device) if source is None else source
    target = source if target is None else target
    if source.dim() == 2:
        source = _accepted(source, accepted)
    live = ((source >= 0) & (length > 0)).nonzero()[:, 0]
    start, length, source, target = (t[live].long() for t in (start, length, source, target))
    steps = int(length.max()) if live.numel() else 0
    step = torch.arange(steps, device=device)
    if target.dim() == 1:
        target = torch.where(step == length[:, None] - 1, target[:, None], -1)
    else:
        check(FN, steps <= target.shape[1],
              "`cu_seqlens` holds a sequence of {} tokens, expected at most the {} slots that each "
              "sequence has", steps, target.shape[1])  # fmt: skip
        target = torch.where(step < length[:, None], target[:, :steps], -1)
    _check_conflicts(slots, live.tolist(), source.tolist(), target.tolist())
    return start, length, source, target


def _accepted(source: torch.Tensor, accepted: torch.Tensor | None) -> torch.Tensor:
    # The slot of the last accepted token, the first where nothing is said.
    if accepted is None:
        return source[:, 0]
    width = source.shape[1]
    column = (accepted.long() - 1).clamp(0, width - 1)
    chosen = source.gather(1, column[:, None])[:, 0]
    most = int(accepted[chosen >= 0].max()) if (chosen >= 0).any() else 0
    check(FN, most <= width, "`num_accepted_tokens` holds {}, expected at most {}", most, width)
    return chosen


def _check_conflicts(slots: int, rows: list, source: list, target: list) -> None:
    writer: dict[int, int] = {}
    for row, written in zip(rows, target):
        for slot in written:
            check(FN, slot < slots,
                  "a destination of sequence {} is slot {}, expected below {}: "
                  "`dst_state_batch_indices`, or `state_batch_indices` without it",
                  row, slot, slots)  # fmt: skip
            check(FN, slot < 0 or slot not in writer,
                  "slot {} is written twice, by sequences {} and {}: `dst_state_batch_indices`, or "
                  "`state_batch_indices` without it, must not repeat a slot",
                  slot, writer.get(slot), row)  # fmt: skip
            if slot >= 0:
                writer[slot] = row
    for row, slot in zip(rows, source):
        check(FN, slot < slots,
              "`state_batch_indices` starts sequence {} from slot {}, expected below {}",
              row, slot, slots)  # fmt: skip
        check(FN, writer.get(slot, row) == row,
              "`state_batch_indices` starts sequence {} from slot {}, which sequence {} writes",
              row, slot, writer.get(slot))  # fmt: skip


def _per_head(t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    # (rows, G, N) -> (rows, H, 1, N)
    return t.repeat_interleave(state.shape[1] // max(t.shape[1], 1), 1)[:, :, None]


def _wide(t: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    return t.contiguous().to(acc)
