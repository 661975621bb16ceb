"""Registration of selective_state_update with torch.library."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from nemokernels import _backends, _triton, _tuned
from nemokernels._registry import family, register
from nemokernels.ops.state_update import ref

FAMILY = family("state_update", {"triton": _triton.reason})

WIDEST = 8192  # state size N; a program holds at least one whole row


@dataclass(frozen=True)
class Config:
    """Which backend runs, rows of P and padded N per program; why not Triton if it does not."""

    backend: str
    block_p: int = 0
    block_n: int = 0
    num_warps: int = 0
    reason: str = ""


def plan(
    sequences: int,
    H: int,
    P: int,
    N: int,
    dtype: torch.dtype,
    unsupported: str,
    backends: tuple[str, ...],
    processors: int,
    op: str = FAMILY.name,
) -> Config:
    """The configuration for so many sequences and states of ``dtype``.

    ``unsupported`` says what bars Triton; 64 bytes of state per thread are in flight, and P is
    split until every multiprocessor has two programs. Not measured. ``op`` names who asks.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if not unsupported and N > WIDEST:
        unsupported = f"the Triton kernel takes state sizes up to {WIDEST}, got {N}"
    if _triton.needs_reference(op, unsupported, backends):
        return Config("reference", reason=unsupported)
    block_n = max(_triton.next_power_of_2(N), 8)
    per_thread = 64 // dtype.itemsize
    block_p = min(_triton.next_power_of_2(P), max(4 * 32 * per_thread // block_n, 1))
    while block_p > 4 and sequences * H * _triton.cdiv(P, block_p) < 2 * processors:
        block_p //= 2
    num_warps = min(max(block_p * block_n // (32 * per_thread), 1), 8)
    return Config("triton", block_p, block_n, num_warps)


def _plan(state, x, *rest) -> Config:
    floats, cu_seqlens = rest[:7], rest[11]
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    problem = (sequences, *state.shape[1:], state.dtype)
    config = plan(
        *problem, _triton.unsupported(state, x, *floats), _backends.usable(FAMILY.name, x.device),
        _triton.processors(x.device),
    )  # fmt: skip
    return _tuned.tuned(FAMILY.name, x.device, problem, config)


def candidates(config: Config, backward: bool) -> Iterator[Config]:
    """What may be faster than ``config`` on some card: other rows of P and warps per program."""
    for block_p, num_warps in itertools.product((4, 8, 16, 32, 64), (1, 2, 4, 8)):
        yield replace(config, block_p=block_p, num_warps=num_warps)


def _example(device: torch.device, dtype: torch.dtype):
    """Five rows: three tokens, none, padding, one token, two tokens of which one is not stored."""
    H, P, N, G, T = 4, 16, 24, 2, 8
    randn = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)  # noqa: E731
    ints = lambda *rows: torch.tensor(rows, device=device, dtype=torch.int32)  # noqa: E731
    state = torch.randn(14, H, P, N, device=device)
    A = -torch.rand(H, 1, 1, device=device) - 0.5
    D, dt_bias = torch.randn(2, H, 1, device=device)
    slots = ints([3, 4, 5], [8, 6, 7], [-1, 1, 2], [0, 1, 2], [9, 11, -1])
    return (
        state, randn(T, H, P), randn(T, H, 1), A, randn(T, G, N), randn(T, G, N), D,
        randn(T, H, P), dt_bias, True, slots, None, ints(2, 1, 1, 0, 2), ints(0, 3, 3, 4, 5, 7),
        None, 5,
    )  # fmt: skip


selective_state_update = register(
    FAMILY,
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices, "
    "Tensor? dst_state_batch_indices, Tensor? num_accepted_tokens, Tensor? cu_seqlens, "
    "Tensor? seed, int philox_rounds) -> Tensor",
    reference=ref.forward,
    fake=lambda state, x, *rest: x.new_empty(x.shape),
    example=_example,
    plan=_plan,
    kernel="state_update.kernel:update",
)
