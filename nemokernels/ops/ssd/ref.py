"""Mamba-2 chunk scan in plain torch: the specification and the CPU leg.

Letters: B batch, T tokens, S sequences, K chunks of L tokens; G groups of R heads (H = G*R), P head
dimension, N state size. Inside, tensors are (K, G, R, L, ...): heads of a group are adjacent.

Everything is in the accumulation dtype (float32; float64 stays float64), except that operands of a
product which a kernel feeds to the tensor cores are first rounded to x's dtype (``_rounded``):
the decayed B and score matrices, the output gradient times decay, the state entering a chunk and
the gradient of the state leaving it (these two to ``state_dtype`` where given). In float32 and
float64 nothing is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nemokernels._activations import SOFTPLUS_THRESHOLD, sigmoid, softplus
from nemokernels._registry import acc_dtype
from nemokernels.ops.ssd.chunks import Chunks, carry, cut


@dataclass(frozen=True)
class Scan:
    """What forward and backward both need. l and s are positions in a chunk, s <= l."""

    chunks: Chunks
    x: torch.Tensor  # (K, G, R, L, P)
    b: torch.Tensor  # (K, G, L, N)
    c: torch.Tensor  # (K, G, L, N)
    raw: torch.Tensor  # (K, G, R, L) dt + dt_bias
    soft: torch.Tensor  # (K, G, R, L) after softplus, before the clamp
    d: torch.Tensor  # (K, G, R, L) step: clamped, zero where there is no token
    within: torch.Tensor  # (K, G, R, L, L) exp(a_l - a_s), zero where l does not see s
    enter: torch.Tensor  # (K, G, R, L) exp(a_l), zero where l does not see the entering state
    leave: torch.Tensor  # (K, G, R, L) exp(a_last - a_s), zero where s does not reach the state
    decay: torch.Tensor  # (K, G, R) exp(a_last), zero where a new sequence starts
    scores: torch.Tensor  # (K, G, 1, L, L) C_l . B_s
    states: torch.Tensor  # (K, G, R, P, N) entering the chunk
    final: torch.Tensor  # (S, G, R, P, N)


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).to(tensor.dtype)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # torch sums in another order where a lone matrix meets a lone column; keep it from seeing one.
    if right.shape[-1] == 1:
        return (left @ F.pad(right, (0, 1)))[..., :1]
    return left @ right


def _heads_first(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """(K, L, H, ...) to (K, G, R, L, ...)."""
    return tensor.unflatten(2, (groups, -1)).movedim(1, 3).contiguous()


def _heads_last(tensor: torch.Tensor) -> torch.Tensor:
    """(K, G, R, L, ...) to (K, L, H, ...)."""
    return tensor.movedim(3, 1).flatten(2, 3)


def _per_group(tensor: torch.Tensor) -> torch.Tensor:
    """(K, G, R, L, P) to (K, G, L, R*P): the heads of a group side by side, for one product."""
    return tensor.transpose(2, 3).flatten(3)


def _per_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(K, G, L, R*P) to (K, G, R, L, P)."""
    return tensor.unflatten(3, (heads, -1)).transpose(2, 3)


def _sum_before(tensor: torch.Tensor) -> torch.Tensor:
    """Exclusive cumulative sum. Subtracting from the inclusive one would lose small terms."""
    return F.pad(tensor.cumsum(-1)[..., :-1], (1, 0))


def _scan(
    x, dt, A, B, C, dt_bias, initial_states, seq_idx, cu_seqlens,
    chunk_size, dt_softplus, dt_min, dt_max,
) -> Scan:  # fmt: skip
    acc, groups = acc_dtype(x), B.shape[2]
    heads = x.shape[2] // groups
    chunks = cut(*x.shape[:2], chunk_size, seq_idx, cu_seqlens, x.device)

    # 1. Steps and their running decay a within the chunk. The order is bias, softplus, clamp.
    raw = _heads_first(chunks.gather(dt, acc), groups)
    if dt_bias is not None:
        raw = raw + dt_bias.to(acc).view(groups, heads, 1)
    soft = softplus(raw) if dt_softplus else raw
    d = soft.clamp(dt_min, dt_max).masked_fill(~chunks.valid[:, None, None], 0)
    # The bound keeps the sum finite; its exponential is zero long before.
    lowest = torch.finfo(acc).min / (2 * chunk_size)
    a = (d * A.to(acc).view(groups, heads, 1)).clamp_min(lowest).cumsum(-1)

    # Masked before the exponential, which overflows where s > l, and after. (Not filled with -inf:
    # exp has a slow path for it.)
    sees = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    enter, leave, decay = a.exp(), (a[..., -1:] - a).exp(), a[..., -1].exp()
    if chunks.ids is not None:
        ids, last = chunks.ids, chunks.ids[:, -1]
        sees = (sees & (ids[:, :, None] == ids[:, None]))[:, None, None]
        enter = enter * (ids == chunks.before[:, None])[:, None, None]
        leave = leave * (ids == last[:, None])[:, None, None]
        decay = decay * (last == chunks.before)[:, None, None]
    within = (a[..., None] - a[..., None, :]).masked_fill_(~sees, 0).exp_().masked_fill_(~sees, 0)

    # 2. What each chunk adds to the state.
    x_ = _heads_first(chunks.gather(x, acc), groups)
    b = chunks.gather(B, acc).transpose(1, 2).contiguous()
    c = chunks.gather(C, acc).transpose(1, 2).contiguous()
    scaled = _rounded(b[:, :, None] * (leave * d)[..., None], x.dtype)
    added = _product(x_.transpose(-1, -2), scaled)

    # 3. Pass states on, 4. scores.
    rows = chunks.first.shape[0]
    start = (
        x_.new_zeros(rows, *added.shape[1:])
        if initial_states is None
        else initial_states.to(acc).reshape(rows, *added.shape[1:])
    )
    states, final = carry(start, decay, added, chunks, reverse=False)
    scores = _product(c, b.transpose(-1, -2))[:, :, None]
    return Scan(chunks, x_, b, c, raw, soft, d, within, enter, leave, decay, scores, states, final)


def _from_state(s: Scan, states: torch.Tensor) -> torch.Tensor:
    """exp(a_l) * S C_l, (K, G, R, L, P): what the entering state adds to the output."""
    product = _product(s.c, states.flatten(2, 3).transpose(-1, -2))
    return _per_head(product, states.shape[2]) * s.enter[..., None]


def _skip(D: torch.Tensor, s: Scan) -> torch.Tensor:
    """D (H) or (H, P) to (G, R, 1, 1 or P)."""
    return D.to(s.x.dtype).reshape(*s.x.shape[1:3], 1, -1)


def forward(
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
    chunk_size, dt_softplus, dt_min, dt_max, state_dtype,
):  # fmt: skip
    """Returns out, the states after the last token of each sequence, and out before the gate.

    The last is in x's dtype and only there with z (empty otherwise).
    """
    s = _scan(x, dt, A, B, C, dt_bias, initial_states, seq_idx, cu_seqlens,
              chunk_size, dt_softplus, dt_min, dt_max)  # fmt: skip
    # 5. Output from inside the chunk, from the entering state, and past both.
    y = _product(_rounded(s.scores * s.within * s.d[..., None, :], x.dtype), s.x)
    y = y + _from_state(s, _rounded(s.states, state_dtype or C.dtype))
    if D is not None:
        y = y + _skip(D, s) * s.x
    final = s.final.flatten(1, 2)
    if z is None:
        return s.chunks.scatter(_heads_last(y), x), final, x.new_empty(0)
    gate = _heads_first(s.chunks.gather(z, s.x.dtype), B.shape[2])
    gated = y * gate * sigmoid(gate)
    out, ungated = (s.chunks.scatter(_heads_last(v), x) for v in (gated, y))
    return out, final, ungated


def backward_joined(*args):
    """As backward, but the gradients of x, B and C lie side by side in one tensor, the first."""
    dx, ddt, dA, dB, dC, *rest = backward(*args)
    return torch.cat([t.flatten(2) for t in (dx, dB, dC)], -1), ddt, dA, *rest


def backward(
    dout, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, ungated,
    chunk_size, dt_softplus, dt_min, dt_max, state_dtype,
):  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_states (empty where absent).

    States and scores are computed again. The gradient of the decays is a sum of terms that do not
    cancel each other; the shorter ``out . dout - ddt * dt`` loses all its digits.
    """
    s = _scan(x, dt, A, B, C, dt_bias, initial_states, seq_idx, cu_seqlens,
              chunk_size, dt_softplus, dt_min, dt_max)  # fmt: skip
    acc, groups, heads = s.x.dtype, B.shape[2], s.x.shape[2]
    absent = x.new_empty(0)
    dy = _heads_first(s.chunks.gather(dout, acc), groups)
    dz = dD = dbias = dinitial = absent
    if z is not None:
        gate = _heads_first(s.chunks.gather(z, acc), groups)
        sig, y = sigmoid(gate), _heads_first(s.chunks.gather(ungated, acc), groups)
        dz = s.chunks.scatter(_heads_last(dy * y * sig * (1 + gate * (1 - sig))), z)
        dy = dy * gate * sig
    if D is not None:
        per_channel = (dy * s.x).sum((0, 3))
        dD = (per_channel if D.dim() == 2 else per_channel.sum(-1)).reshape(D.shape).to(D.dtype)
    dy = _rounded(dy, x.dtype)

    # Gradients of the states: entering (S) and leaving (G) every chunk.
    seen = _rounded(dy * s.enter[..., None], x.dtype).transpose(-1, -2).flatten(2, 3)
    dstates = _product(seen, s.c).unflatten(2, (heads, -1))
    end = dfinal.to(acc).reshape(s.final.shape)
    leaving, dstart = carry(end, s.decay, dstates, s.chunks, reverse=True)
    if initial_states is not None:
        dinitial = dstart.flatten(1, 2).to(initial_states.dtype)
    low_states = _rounded(s.states, state_dtype or x.dtype)
    low_leaving = _rounded(leaving, state_dtype or x.dtype)

    # u_s = gradient of d_s * x_s: through the leaving state, and through later outputs.
    via_state = _product(s.b, low_leaving.flatten(2, 3).transpose(-1, -2))
    via_state = _per_head(via_state, heads) * s.leave[..., None]
    u = via_state + _product(_rounded(s.scores * s.within, x.dtype).transpose(-1, -2), dy)
    dx = s.d[..., None] * u
    if D is not None:
        dx = dx + _skip(D, s) * dy
    dd = (u * s.x).sum(-1)

    # B and C: through the scores, and through the leaving and entering states.
    inner = _product(dy, s.x.transpose(-1, -2)) * s.within * s.d[..., None, :]
    dscores = _rounded(inner.sum(2), x.dtype)
    into_state = _per_group(s.x * (s.leave * s.d)[..., None])
    out_of_state = _per_group(dy * s.enter[..., None])
    dB = _product(into_state, low_leaving.flatten(2, 3))
    dB = dB + _product(dscores.transpose(-1, -2), s.c)
    dC = _product(out_of_state, low_states.flatten(2, 3)) + _product(dscores, s.b)

    # Decay of step k: it acts between every s < k <= l, where 'before the chunk' counts as s and
    # 'after the chunk' as l.
    to_output = (dy * _from_state(s, low_states)).sum(-1)
    to_output[..., -1] += s.decay * (leaving * s.states).sum((-1, -2))
    ddecay = to_output.flip(-1).cumsum(-1).flip(-1)
    from_input = s.d * (s.x * via_state).sum(-1)
    ddecay = ddecay + _sum_before(from_input) + _sum_before(inner * s.scores).tril_().sum(-2)
    dA = (ddecay * s.d).sum((0, 3)).reshape(A.shape).to(A.dtype)

    ddt = dd + ddecay * A.to(acc).view(groups, heads, 1)
    acts = s.chunks.valid[:, None, None] & (s.soft >= dt_min) & (s.soft <= dt_max)
    ddt = ddt.masked_fill(~acts, 0)
    if dt_softplus:
        ddt = torch.where(s.raw <= SOFTPLUS_THRESHOLD, ddt * sigmoid(s.raw), ddt)
    if dt_bias is not None:
        dbias = ddt.sum((0, 3)).reshape(dt_bias.shape).to(dt_bias.dtype)
    return (
        s.chunks.scatter(_heads_last(dx), x),
        s.chunks.scatter(_heads_last(ddt), dt),
        dA,
        s.chunks.scatter(dB.transpose(1, 2), B),
        s.chunks.scatter(dC.transpose(1, 2), C),
        dD,
        dz,
        dbias,
        dinitial,
    )
