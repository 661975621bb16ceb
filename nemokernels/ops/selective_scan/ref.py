"""Mamba-1 selective scan in plain torch: the specification and the CPU leg.

Letters: B batch, T tokens, S sequences of up to M tokens, D channels, G groups of R channels
(D = G*R), N state size. One token after the other, all in the accumulation dtype (float32; float64
stays float64) with one cast at the end. A step is computed by the same operations as in
selective_state_update, so that decoding continues a scan bit for bit. The backward keeps the state
of every token: M times the memory of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemokernels._activations import SOFTPLUS_THRESHOLD, sigmoid, silu, softplus
from nemokernels._registry import acc_dtype
from nemokernels.ops.ssd.chunks import Chunks, cut

FN = "selective_scan_fn"


@dataclass(frozen=True)
class Rows:
    """The inputs, one row per sequence that has tokens; past a sequence's end they are zero."""

    chunks: Chunks
    live: torch.Tensor  # (S) whether the sequence has tokens
    u: torch.Tensor  # (K, M, D), K rows
    raw: torch.Tensor  # (K, M, D) delta + delta_bias
    step: torch.Tensor  # (K, M, D) after softplus; zero where there is no token
    A: torch.Tensor  # (D, N)
    B: torch.Tensor  # (K, M, G, N)
    C: torch.Tensor  # (K, M, G, N)
    start: torch.Tensor  # (S, D, N)

    def tokens(self, reverse: bool = False) -> Iterator[int]:
        steps = range(self.u.shape[1])
        return reversed(steps) if reverse else iter(steps)

    def per_channel(self, grouped: torch.Tensor) -> torch.Tensor:
        """(K, G, N) to (K, D, N)."""
        return grouped.repeat_interleave(self.u.shape[2] // grouped.shape[1], 1)

    def decay(self, t: int) -> torch.Tensor:
        return torch.exp(self.step[:, t, :, None] * self.A)

    def drive(self, t: int) -> torch.Tensor:
        return (self.step[:, t] * self.u[:, t])[..., None] * self.per_channel(self.B[:, t])


def _rows(u, delta, A, B, C, delta_bias, initial_states, cu_seqlens, delta_softplus) -> Rows:
    acc, (batch, length, channels) = acc_dtype(u), u.shape
    longest = length if cu_seqlens is None else max(cu_seqlens.diff().tolist(), default=0)
    chunks = cut(batch, length, max(longest, 1), None, cu_seqlens, u.device, FN)
    raw = chunks.gather(delta, acc)
    if delta_bias is not None:
        raw = raw + delta_bias.to(acc)
    step = (softplus(raw) if delta_softplus else raw).masked_fill(~chunks.valid[..., None], 0)
    shape = (len(chunks.count), channels, A.shape[1])
    start = u.new_zeros(shape, dtype=acc) if initial_states is None else initial_states.to(acc)
    return Rows(
        chunks, chunks.count > 0, chunks.gather(u, acc), raw, step, A.to(acc).contiguous(),
        chunks.gather(B, acc), chunks.gather(C, acc), start,
    )  # fmt: skip


def _read(s: Rows, t: int, state: torch.Tensor, D: torch.Tensor | None) -> torch.Tensor:
    y = (state * s.per_channel(s.C[:, t])).sum(-1)
    return y if D is None else y + D.to(y.dtype) * s.u[:, t]


def forward(u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens, delta_softplus):
    """Returns out (B, T, D) and the state after the last token of each sequence, (S, D, N)."""
    s = _rows(u, delta, A, B, C, delta_bias, initial_states, cu_seqlens, delta_softplus)
    state, y = s.start[s.live], torch.zeros_like(s.u)
    for t in s.tokens():
        state = state * s.decay(t) + s.drive(t)
        y[:, t] = _read(s, t, state, D)
    if z is not None:
        y = y * silu(s.chunks.gather(z, y.dtype))
    final = s.start.clone()
    final[s.live] = state
    return s.chunks.scatter(y, u), final


def backward(
    dout, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens, delta_softplus
):
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_states (empty where absent)."""
    s = _rows(u, delta, A, B, C, delta_bias, initial_states, cu_seqlens, delta_softplus)
    acc, groups, absent = s.u.dtype, B.shape[2], u.new_empty(0)
    dy = s.chunks.gather(dout, acc)
    states = [s.start[s.live]]
    for t in s.tokens():
        states.append(states[-1] * s.decay(t) + s.drive(t))
    dz = dD = dbias = dinitial = absent
    if z is not None:
        y = torch.zeros_like(s.u)
        for t in s.tokens():
            y[:, t] = _read(s, t, states[t + 1], D)
        gate = s.chunks.gather(z, acc)
        sig = sigmoid(gate)
        dz = s.chunks.scatter(dy * y * sig * (1 + gate * (1 - sig)), z)
        dy = dy * gate * sig

    def grouped(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(1, (groups, -1)).sum(2)

    du, dstep = torch.zeros_like(s.u), torch.zeros_like(s.u)
    dA, dB, dC = torch.zeros_like(s.A), torch.zeros_like(s.B), torch.zeros_like(s.C)
    leaving = dfinal.to(acc)[s.live]  # gradient of the state that token t leaves
    for t in s.tokens(reverse=True):
        dC[:, t] = grouped(dy[:, t, :, None] * states[t + 1])
        leaving = leaving + dy[:, t, :, None] * s.per_channel(s.C[:, t])
        through = leaving * s.decay(t)
        carried = through * states[t]
        driven = (leaving * s.per_channel(s.B[:, t])).sum(-1)
        du[:, t] = driven * s.step[:, t]
        dstep[:, t] = driven * s.u[:, t] + (carried * s.A).sum(-1)
        dA += (carried * s.step[:, t, :, None]).sum(0)
        dB[:, t] = grouped((s.step[:, t] * s.u[:, t])[..., None] * leaving)
        leaving = through
    if D is not None:
        dD = (dy * s.u).sum((0, 1)).to(D.dtype)
        du = du + D.to(acc) * dy
    dstep = dstep.masked_fill(~s.chunks.valid[..., None], 0)
    if delta_softplus:
        dstep = torch.where(s.raw <= SOFTPLUS_THRESHOLD, dstep * sigmoid(s.raw), dstep)
    if delta_bias is not None:
        dbias = dstep.sum((0, 1)).to(delta_bias.dtype)
    if initial_states is not None:
        dinitial = dfinal.to(acc, copy=True)
        dinitial[s.live] = leaving
        dinitial = dinitial.to(initial_states.dtype)
    return (
        s.chunks.scatter(du, u), s.chunks.scatter(dstep, delta), dA.to(A.dtype),
        s.chunks.scatter(dB, B), s.chunks.scatter(dC, C), dD, dz, dbias, dinitial,
    )  # fmt: skip
