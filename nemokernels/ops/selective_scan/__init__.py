"""The selective state space scan of Mamba-1."""

from __future__ import annotations

import torch

from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels._plain import plain
from nemokernels.ops.selective_scan import op, ref

__all__ = ["selective_scan_fn", "selective_scan_ref"]

FN = "selective_scan_fn"


def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_states: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective scan of Mamba-1: every channel has its own step, and a decay per state element.

    Per channel c with state h (N), ``d = softplus(delta + delta_bias)`` (softplus only with
    ``delta_softplus``)::

        h_t[n] = exp(d_t * A[c, n]) * h_{t-1}[n] + d_t * B_t[n] * u_t
        y_t = sum_n h_t[n] * C_t[n] + D[c] * u_t       and with z:  y_t *= z_t * sigmoid(z_t)

    Channel c uses group ``c // (dim / G)`` of B and C. Everything is float32 (float64 for float64
    u) with one cast at the end. Autocast casts nothing.

    Args:
        u: (B, dim, L), float32, bfloat16, float16 or float64, any strides; kernels like channels
            or tokens to be adjacent.
        delta: (B, dim, L), any of these dtypes.
        A: (dim, N), not positive, real; any of these dtypes, usually float32.
        B, C: (B, N, L) or (B, G, N, L), G divides dim; any of these dtypes.
        D, delta_bias: (dim), any of these dtypes.
        z: (B, dim, L), any of these dtypes.
        delta_softplus: apply softplus to delta (the identity above 20).
        return_last_state: also return the state after the last token of each sequence.
        initial_states: (S, dim, N), any of these dtypes; S sequences, that is B rows or the pieces
            of cu_seqlens. None starts from zeros.
        cu_seqlens: (S+1) int32, starts at 0, does not decrease: one row (B = 1) of packed
            sequences. The result equals, bit for bit, that of each sequence alone. Tokens after
            ``cu_seqlens[-1]`` are padding with zero output.

    Returns:
        out (B, dim, L) in u's dtype, with adjacent channels (a view of a (B, L, dim) tensor); with
        ``return_last_state`` ``(out, last)``, last (S, dim, N) in float32 (float64 for float64 u).
        Gradients flow to every floating-point input, through the last state too.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces", 2023.
    Names and argument order are those of ``mamba_ssm.ops.selective_scan_interface``, which has no
    initial states and no packed sequences, also takes B and C that do not vary with the token and
    a complex A (here: errors), and gives no gradient through the last state.
    """
    check_tensor(FN, "u", u, shape=(None,) * 3, dims="(B, dim, L)", dtypes=FLOATS)
    (batch, dim, length), device = u.shape, u.device
    same = dict(dtypes=FLOATS, device=device)
    check_tensor(FN, "A", A, shape=(dim, None), dims="(dim, N)", **same)
    state = A.shape[1]
    B, C = (_grouped(name, t, (batch, state, length), same) for name, t in (("B", B), ("C", C)))
    groups = B.shape[1]
    check(FN, groups > 0 and dim % groups == 0,
          "`B` has {} groups, expected a divisor of the {} channels", groups, dim)  # fmt: skip
    check(FN, C.shape[1] == groups,
          "`C` has {} groups, expected {} like `B`", C.shape[1], groups)  # fmt: skip
    sequences = batch
    if cu_seqlens is not None:
        check_tensor(FN, "cu_seqlens", cu_seqlens, shape=(None,), dims="(S+1,)",
                     dtypes=(torch.int32,), device=device)  # fmt: skip
        check(FN, cu_seqlens.shape[0] >= 1, "`cu_seqlens` needs at least one entry, got none")
        check(FN, batch == 1, "`u` must have one row with `cu_seqlens`, got B = {}", batch)
        sequences = cu_seqlens.shape[0] - 1
    for name, value, shape, dims in (
        ("delta", delta, u.shape, "(B, dim, L)"),
        ("D", D, (dim,), "(dim,)"),
        ("z", z, u.shape, "(B, dim, L)"),
        ("delta_bias", delta_bias, (dim,), "(dim,)"),
        ("initial_states", initial_states, (sequences, dim, state), "(S, dim, N)"),
    ):
        if value is not None or name == "delta":
            check_tensor(FN, name, value, shape=shape, dims=dims, **same)
    u, delta, B, C, z = map(_by_token, (u, delta, B, C, z))
    out, last = op.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens, delta_softplus
    )
    out = out.transpose(1, 2)
    return (out, last) if return_last_state else out


def selective_scan_ref(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`selective_scan_fn` in plain torch: any device, with its gradients, unchecked shapes.

    Source: drop-in for ``mamba_ssm.ops.selective_scan_interface``; its argument order.
    """
    B, C = (t[:, None] if t.dim() == 3 else t for t in (B, C))
    u, delta, B, C, z = map(_by_token, (u, delta, B, C, z))
    out, last = plain(
        ref.forward, ref.backward, range(9),
        u, delta, A, B, C, D, z, delta_bias, None, None, delta_softplus,
    )  # fmt: skip
    out = out.transpose(1, 2)
    return (out, last) if return_last_state else out


def _by_token(value: torch.Tensor | None) -> torch.Tensor | None:
    """(B, ..., L) to (B, L, ...)."""
    return None if value is None else value.movedim(-1, 1)


def _grouped(name: str, value: torch.Tensor, sizes: tuple, same: dict) -> torch.Tensor:
    """B or C as (B, G, N, L)."""
    check_tensor(FN, name, value, **same)
    batch, state, length = sizes
    if value.dim() != 4:
        check_tensor(FN, name, value, shape=sizes, dims="(B, N, L), or with groups (B, G, N, L)")
        return value[:, None]
    check_tensor(FN, name, value, shape=(batch, None, state, length), dims="(B, G, N, L)")
    return value
