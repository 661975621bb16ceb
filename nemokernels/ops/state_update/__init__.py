"""One or a few decode steps of the Mamba recurrences against a cache of states."""

from __future__ import annotations

import torch

from nemokernels._checks import FLOATS, check, check_tensor, check_unshared
from nemokernels._philox import rounding_seed
from nemokernels.ops.state_update import op, ref

__all__ = ["selective_state_update", "selective_state_update_ref"]

FN = "selective_state_update"
INTEGERS = (torch.int32, torch.int64)


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    *,
    dst_state_batch_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    philox_rounds: int = 5,
) -> torch.Tensor:
    """Advance SSM states in place by one token per row, or by a short packed sequence per row.

    Per token, with head h reading group ``g = h // (H / G)``::

        d = softplus(dt + dt_bias)          (or dt + dt_bias; no limits are applied)
        S[h, p, n] = S[h, p, n] * exp(d * A) + d * x[h, p] * B[g, n]
        y[h, p] = (sum_n S[h, p, n] * C[g, n] + D * x[h, p]) * silu(z[h, p])

    All of it is in float32 (float64 if the state or x is float64); y comes from the unrounded S.
    S is rounded to the state's dtype when stored, and stays unrounded from token to token within
    one call. Under autocast nothing is cast. There is no gradient.

    **Slots.** Sequence b starts from slot ``state_batch_indices[b]`` (from slot b without it) and
    writes its last state back there, or to ``dst_state_batch_indices[b]``. A 2-D
    ``state_batch_indices`` (n, M) gives every token a slot: the sequence starts from
    ``[b, max(num_accepted_tokens[b] - 1, 0)]`` and the state after its token t is stored in
    ``[b, t]`` (of ``dst_state_batch_indices``, if that is given and 2-D). Rejecting drafts
    therefore costs nothing: the next call passes how many tokens of this one were accepted.

    **Padding.** A negative start slot marks a padding row: its outputs are zero and nothing is
    stored. A negative destination stores nothing for that token. Rows of x past ``cu_seqlens[-1]``
    are padding too. A sequence without tokens stores nothing.

    **Conflicts.** Within one call no slot may be written twice, nor written by one sequence and
    started from by another. Several sequences may start from one slot that none writes.

    **Stochastic rounding.** With ``seed``, a float16 or bfloat16 state is stored rounded up or down
    with probability proportional to the distance, from 13 or 16 random bits: they are added below
    the kept mantissa bits of the magnitude, which is then truncated. Infinities and NaN stay. In
    float16 magnitudes below 2**-14 become zero of the same sign, those from 65536 infinity. The
    bits are
    Philox-4x32 words of key ``seed`` and counter ``((slot * H + h) * P + p) * N + 8 * (n // 8)``,
    the element offset within a contiguous state of a group of 8 neighbours along N; pair
    ``(n % 8) // 2`` takes that word, its even element from bit 0 on, its odd one from bit 16. The
    noise depends on seed and slot alone, not on batch or grid, so **pass another seed at every
    step and layer**, or errors repeat instead of averaging out.

    Args:
        state: (slots, H, P, N), written in place, float32, bfloat16, float16 or float64, any
            strides without overlap.
        x: (T, H, P), any of these dtypes; T = batch, or all tokens packed under cu_seqlens.
        dt: (T, H, P) or (T, H, 1), before bias and softplus.
        A: (H, P, N), negative; P and N, or N alone, may be 1.
        B, C: (T, G, N), G a divisor of H.
        D, dt_bias: (H, P) or (H, 1).
        z: (T, H, P).
        dt_softplus: apply softplus to dt + dt_bias (the identity above 20).
        state_batch_indices: (n,) or (n, M) int32 or int64; n = T, or the number of sequences.
        dst_state_batch_indices: (n,) or (n, M) likewise.
        num_accepted_tokens: (n,) int32 or int64, 1 to M; less than 1 counts as 1. Needs a 2-D
            state_batch_indices.
        cu_seqlens: (n + 1,) int32, where each sequence begins in x, ending with the last one's end.
        seed: 64-bit int or one-element int64 tensor; None rounds to nearest.
        philox_rounds: rounds of the generator, at least 1.

    Axes that are expanded with stride zero are taken as size 1, so Mamba-2's expanded dt, A, D and
    dt_bias cost no more than the sizes they came from. Mamba-1's form, without heads, is accepted
    too: state (slots, P, N), x, dt, z (T, P), A (P, N), B, C (T, N), D, dt_bias (P).

    Returns:
        y in x's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value. The
            values of the index tensors are checked, before anything is written, where the
            reference runs; kernels trust them.
        RuntimeError: an input requires a gradient.

    Source: Dao and Gu, "Transformers are SSMs", 2024. Names and order are those of
    ``mamba_ssm.ops.triton.selective_state_update`` (where ``dt_bias=None`` fails with expanded
    views), the keywords those of vLLM (where a padding row's output is not zero).
    """
    heads = isinstance(state, torch.Tensor) and state.dim() == 4
    head, group = ("H, ", "G, ") if heads else ("", "")
    check_tensor(FN, "state", state, dtypes=FLOATS)
    check(FN, state.dim() in (3, 4),
          "`state` has shape {}, expected (slots, H, P, N) or (slots, P, N)",
          tuple(state.shape))  # fmt: skip
    check_unshared(FN, "state", state)
    slots, *lead, P, N = state.shape
    common = dict(dtypes=FLOATS, device=state.device)
    check_tensor(FN, "x", x, shape=(None, *lead, P), dims=f"(T, {head}P)", **common)
    T = x.shape[0]
    dt = _tied("dt", dt, (T, *lead, P), 1, f"(T, {head}P)", common)
    A = _tied("A", A, (*lead, P, N), 2, f"({head}P, N)", common)
    check_tensor(FN, "B", B, shape=(T, *[None] * heads, N), dims=f"(T, {group}N)", **common)
    check_tensor(FN, "C", C, shape=B.shape, dims="the shape of B", **common)
    if heads:
        check(FN, B.shape[1] > 0 and lead[0] % B.shape[1] == 0,
              "`B` has {} groups, expected a divisor of the {} heads",
              B.shape[1], lead[0])  # fmt: skip
    if D is not None:
        D = _tied("D", D, (*lead, P), 1, f"({head}P)", common)
    if z is not None:
        check_tensor(FN, "z", z, shape=x.shape, dims="the shape of x", **common)
    if dt_bias is not None:
        dt_bias = _tied("dt_bias", dt_bias, (*lead, P), 1, f"({head}P)", common)
    _check_slots(slots, T, state_batch_indices, dst_state_batch_indices, num_accepted_tokens,
                 cu_seqlens, state.device)  # fmt: skip
    seed = rounding_seed(FN, seed, philox_rounds, state)
    y = op.selective_state_update(
        *_with_heads(state, x, dt, A, B, C, D, z, dt_bias), dt_softplus, state_batch_indices,
        dst_state_batch_indices, num_accepted_tokens, cu_seqlens, seed, philox_rounds,
    )  # fmt: skip
    return y if heads else y.squeeze(1)


def selective_state_update_ref(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
) -> torch.Tensor:
    """:func:`selective_state_update` in plain torch: any device, no gradient, unchecked shapes.

    Raises:
        RuntimeError: an input requires a gradient.

    Source: drop-in for ``mamba_ssm.ops.triton.selective_state_update``, whose reference has a
    gradient and takes y from the state as it is stored; its argument order.
    """
    tensors = (state, x, dt, A, B, C, D, z, dt_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("selective_state_update_ref writes into `state` and has no gradient; "
                           "call it under torch.no_grad() or detach its inputs")  # fmt: skip
    with torch.no_grad():
        y = ref.forward(*_with_heads(*tensors), dt_softplus, None, None, None, None, None, 1)
    return y if state.dim() == 4 else y.squeeze(1)


def _with_heads(state, x, dt, A, B, C, D, z, dt_bias) -> tuple[torch.Tensor | None, ...]:
    """The tensors of Mamba-1's form with one head and one group; others as they are."""
    if state.dim() == 4:
        return state, x, dt, A, B, C, D, z, dt_bias
    state, x, dt, B, C = (t.unsqueeze(1) for t in (state, x, dt, B, C))
    A, D, dt_bias = (None if t is None else t.unsqueeze(0) for t in (A, D, dt_bias))
    return state, x, dt, A, B, C, D, None if z is None else z.unsqueeze(1), dt_bias


def _tied(name: str, value, shape: tuple, axes: int, dims: str, common: dict) -> torch.Tensor:
    # The last `axes` axes may have size 1 (the last alone, or all of them); stride zero means 1.
    check_tensor(FN, name, value, **common)
    want = list(shape)
    for axis in range(len(shape) - 1, len(shape) - 1 - axes, -1):
        if value.dim() != len(shape) or value.shape[axis] != 1:
            break
        want[axis] = 1
    check_tensor(FN, name, value, shape=want, dims=dims)
    for axis in range(len(shape) - 1, len(shape) - 1 - axes, -1):
        if value.shape[axis] > 1 and value.stride(axis) != 0:
            break
        value = value.narrow(axis, 0, min(value.shape[axis], 1))
    return value


def _check_slots(slots, tokens, source, destination, accepted, cu_seqlens, device) -> None:
    rows = tokens
    if cu_seqlens is not None:
        check_tensor(FN, "cu_seqlens", cu_seqlens, shape=(None,), dims="(n + 1,)",
                     dtypes=(torch.int32,), device=device)  # fmt: skip
        rows = cu_seqlens.shape[0] - 1
        check(FN, rows >= 0, "`cu_seqlens` is empty, expected n + 1 elements")
    for name, value in (
        ("state_batch_indices", source),
        ("dst_state_batch_indices", destination),
    ):
        if value is not None:
            check_tensor(FN, name, value, dtypes=INTEGERS, device=device)
            check(FN, value.dim() in (1, 2) and value.shape[0] == rows
                  and (value.dim() == 1 or value.shape[1] > 0),
                  "`{}` has shape {}, expected ({},) or ({}, M)",
                  name, tuple(value.shape), rows, rows)  # fmt: skip
    if source is None:
        check(FN, rows == slots,
              "`state` has {} slots, expected one for each of the {} sequences where "
              "state_batch_indices is not given", slots, rows)  # fmt: skip
    if accepted is not None:
        check_tensor(FN, "num_accepted_tokens", accepted, shape=(rows,), dims="(n,)",
                     dtypes=INTEGERS, device=device)  # fmt: skip
        check(FN, source is not None and source.dim() == 2,
              "`num_accepted_tokens` needs a 2-D state_batch_indices")  # fmt: skip
