"""The Mamba-2 scan in chunks, alone and with the convolution and norm that surround it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.causal_conv1d import check_filter, is_silu
from nemokernels.ops.gated_rms_norm import check_arguments
from nemokernels.ops.ssd import op
from nemokernels.ops.ssd.mixer import Sizes, mix
from nemokernels.ops.ssd.projection import project

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]

INT32 = (torch.int32,)
NO_LIMIT = (0.0, float("inf"))


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Selective state space scan of Mamba-2 (SSD), computed in chunks.

    Per head, with state S (P, N), ``d = clamp(softplus(dt + dt_bias), *dt_limit)`` (softplus only
    with ``dt_softplus``)::

        S_t = exp(d_t * A) * S_{t-1} + d_t * x_t B_t^T
        y_t = S_t C_t + D * x_t            and with z:  y_t *= z_t * sigmoid(z_t)

    Head h uses group ``h // (H / G)`` of B and C. Steps, decays, states and all sums are float32
    (float64 for float64 x); the result does not depend on ``chunk_size`` beyond rounding. Autocast
    casts nothing.

    Sequences are the rows, or come from one of

    * ``seq_idx``: tokens of one row with different ids do not see each other; chunks stay at
      multiples of ``chunk_size``. A sequence's tokens are adjacent and no id comes back later in
      the row. Ids before a row count as 0: initial states reach only tokens with id 0. The final
      state is that of the row's last sequence. Negative ids are padding: the output there is zero
      and the state passes through unchanged.
    * ``cu_seqlens``: one row of packed sequences. Chunks restart at every sequence, so the result
      equals, bit for bit, that of each sequence alone; states are per sequence. Tokens after
      ``cu_seqlens[-1]`` are padding. Of ``seq_idx``, if given too, only the sign is used.

    Args:
        x: (B, T, H, P), float32, bfloat16, float16 or float64, any strides.
        dt: (B, T, H), any of these dtypes.
        A: (H), not positive; any of these dtypes, usually float32.
        B, C: (B, T, G, N) in x's dtype, G divides H.
        chunk_size: tokens per chunk, at least 1.
        D: (H) or (H, P), any of these dtypes.
        z: (B, T, H, P), any of these dtypes.
        dt_bias: (H), any of these dtypes.
        initial_states: (S, H, P, N), any of these dtypes; S sequences, that is B rows or the
            pieces of cu_seqlens.
        seq_idx: (B, T) int32.
        cu_seqlens: (S+1) int32, starts at 0, does not decrease. Needs B = 1.
        dt_softplus: apply softplus to dt (identity above 20).
        dt_limit: least and largest step, 0 <= least <= largest.
        return_final_states: also return the state after the last token of each sequence.
        return_varlen_states: the same states once more, as the peer names them under cu_seqlens.
        state_dtype: what the state that enters a chunk is rounded to for its product with C (and
            its gradient likewise); None means C's dtype. The state carried on is never rounded.

    Returns:
        out (B, T, H, P) in x's dtype; with states ``(out, final)``, ``(out, varlen)`` or
        ``(out, final, varlen)``, states (S, H, P, N) in float32 (float64 for float64 x). Gradients
        flow to every floating-point input, through the states too.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: Dao and Gu, "Transformers are SSMs", 2024; names and argument order are those of
    ``mamba_ssm.ops.triton.ssd_combined``. There ``cu_seqlens`` masks nothing, only asks for
    per-sequence states, and has no backward; outputs at padding are unspecified, and padding at the
    end of a chunk drops the state.
    """
    fn = "mamba_chunk_scan_combined"
    check_tensor(fn, "x", x, shape=(None,) * 4, dims="(B, T, H, P)", dtypes=FLOATS)
    (batch, length, heads, _), device = x.shape, x.device
    check_tensor(fn, "B", B, shape=(batch, length, None, None), dims="(B, T, G, N)",
                 dtypes=(x.dtype,), device=device)  # fmt: skip
    check_tensor(fn, "C", C, shape=B.shape, dims="the shape of B", dtypes=(x.dtype,), device=device)
    groups, state = B.shape[2:]
    check(fn, groups > 0 and heads % groups == 0,
          "`B` has {} groups, expected a divisor of the {} heads", groups, heads)  # fmt: skip
    check(fn, cu_seqlens is not None or not return_varlen_states,
          "`return_varlen_states` needs `cu_seqlens`, got None")  # fmt: skip
    tensors = dict(dt=dt, A=A, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states,
                   seq_idx=seq_idx)  # fmt: skip
    _check_scan(
        fn, "x", (*x.shape, state), device, tensors, cu_seqlens, chunk_size, dt_limit, state_dtype
    )
    out, final, _ = op.ssd_chunk_scan(
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
        chunk_size, dt_softplus, *map(float, dt_limit), state_dtype,
    )  # fmt: skip
    states = (final,) * (return_final_states + return_varlen_states)
    return (out, *states) if states else out


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    norm: Callable[[torch.Tensor, torch.Tensor], Any] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A whole Mamba-2 mixer from its input projection on: convolution, scan, norm, projection.

    The last axis of ``zxbcdt`` is ``[2*M MLP, z (H*P), x (H*P), B (G*N), C (G*N), dt (H)]``; M is
    what the width leaves over, 0 in Nemotron::

        x, B, C = split(causal_conv1d_fn([x, B, C], conv1d_weight, conv1d_bias, activation))
        y = mamba_chunk_scan_combined(x, dt, A, B, C, ..., dt_softplus=True)
        y = rmsnorm_fn(y, rmsnorm_weight, z=z, group_size=H*P/G)     or, without weight, gated by z
        out = [silu(mlp[:M]) * mlp[M:], y] @ outproj_weight^T + outproj_bias

    softplus is always on. **Nemotron passes norm_before_gate=False**; the default is the peer's.
    It is composed of the three ops; their backwards fill one gradient of zxbcdt. The output
    projection follows autocast, nothing else does. For the backward it keeps zxbcdt, the scan's
    output and the small tensors; the convolution and the norm are computed again. An output
    projection without a norm keeps what it reads.

    Args:
        zxbcdt: (B, T, 2*M + 2*H*P + 2*G*N + H), float32, bfloat16, float16 or float64.
        conv1d_weight: (H*P + 2*G*N, W), W 2, 3 or 4; N follows from its rows.
        conv1d_bias: (H*P + 2*G*N) or None.
        dt_bias, A: (H). A is not positive.
        D: (H, P), or (H) together with headdim.
        chunk_size, initial_states, dt_limit, state_dtype, return_final_states: as in
            :func:`mamba_chunk_scan_combined`. The convolution starts from zeros.
        seq_idx: (B, T) int32, for the convolution and the scan. Excludes cu_seqlens.
        activation: None, "silu" or "swish", of the convolution.
        rmsnorm_weight: (H*P); rmsnorm_eps is added to the mean square.
        outproj_weight: (E, M + H*P); outproj_bias (E) needs it.
        headdim: P; may be left out if D is (H, P).
        ngroups: G.
        norm_before_gate: as in rmsnorm_fn.
        cu_seqlens: (S+1) int32, packed sequences (not in the peer).
        norm: called with the ungated y (B, T, H, P) and z (B, T, H*P) in place of the norm; what it
            returns is out (not in the peer). Excludes rmsnorm_weight and outproj_weight; M is 0.

    Returns:
        out (B, T, M + H*P), or (B, T, E) with outproj_weight; with ``return_final_states``
        ``(out, states)``, states (S, H, P, N). At padding y is zero before the output projection.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: as :func:`mamba_chunk_scan_combined`.
    """
    fn = "mamba_split_conv1d_scan_combined"
    check_tensor(fn, "zxbcdt", zxbcdt, shape=(None,) * 3, dims="(B, T, features)", dtypes=FLOATS)
    check_tensor(fn, "conv1d_weight", conv1d_weight, shape=(None, None), dims="(channels, W)")
    check_tensor(fn, "D", D)
    check(fn, D.dim() in (1, 2),
          "`D` has shape {}, expected (H,) or (H, P)", tuple(D.shape))  # fmt: skip
    check(fn, D.dim() == 2 or headdim is not None, "`headdim` is None, needed with `D` of one axis")
    check(fn, D.dim() == 1 or headdim in (None, D.shape[1]),
          "`headdim` is {}, but `D` has {} columns", headdim, D.shape[-1])  # fmt: skip
    heads, width = D.shape[0], D.shape[1] if D.dim() == 2 else headdim
    _check_integer(fn, "headdim", width)
    _check_integer(fn, "ngroups", ngroups)
    inner, channels = heads * width, conv1d_weight.shape[0]
    state, rest = divmod(channels - inner, 2 * ngroups)
    check(
        fn,
        state >= 0 and rest == 0,
        "`conv1d_weight` has {} rows, expected {} + 2 * {} * N",
        channels,
        inner,
        ngroups,
    )
    features, needed = zxbcdt.shape[-1], inner + channels + heads
    mlp, rest = divmod(features - needed, 2)
    check(fn, mlp >= 0 and rest == 0,
          "`zxbcdt` has {} features, expected 2 * M + {}", features, needed)  # fmt: skip
    check(fn, seq_idx is None or cu_seqlens is None,
          "`seq_idx` and `cu_seqlens` exclude each other, got both")  # fmt: skip
    check(fn, outproj_bias is None or outproj_weight is not None,
          "`outproj_bias` needs `outproj_weight`, got None")  # fmt: skip

    check(fn, norm is None or (rmsnorm_weight is None and outproj_weight is None and not mlp),
          "`norm` excludes `rmsnorm_weight`, `outproj_weight` and an MLP")  # fmt: skip

    if outproj_weight is not None:
        check_tensor(fn, "outproj_weight", outproj_weight, shape=(None, mlp + inner),
                     dims="(E, M + H*P)", dtypes=FLOATS, device=zxbcdt.device)  # fmt: skip
    if outproj_bias is not None:
        check_tensor(fn, "outproj_bias", outproj_bias, shape=(outproj_weight.shape[0],),
                     dims="(E,)", dtypes=FLOATS, device=zxbcdt.device)  # fmt: skip

    mixed, sizes = zxbcdt, Sizes(heads, width, ngroups, state)
    if norm is not None:  # which gates, and gives z a gradient
        outside, mixed = zxbcdt.split([inner, channels + heads], dim=-1)
    elif mlp:
        outside, mixed = zxbcdt.split([2 * mlp, needed], dim=-1)
    z, xbc, dt = sizes.split(mixed)
    gate = sizes.per_head(z) if rmsnorm_weight is None and norm is None else None
    check_filter(fn, xbc.transpose(1, 2), conv1d_weight, conv1d_bias)
    tensors = dict(dt=dt, A=A, D=D, z=gate, dt_bias=dt_bias, initial_states=initial_states,
                   seq_idx=seq_idx)  # fmt: skip
    _check_scan(
        fn, "zxbcdt", (*zxbcdt.shape[:2], heads, width, state), zxbcdt.device, tensors, cu_seqlens,
        chunk_size, dt_limit, state_dtype,
    )  # fmt: skip
    if rmsnorm_weight is not None:
        check_arguments(fn, z, rmsnorm_weight, None, None, rmsnorm_eps, inner // ngroups)
    eps = float(rmsnorm_eps)
    y, final, scanned = mix(
        mixed, conv1d_weight, conv1d_bias, A, D, dt_bias, rmsnorm_weight, initial_states, seq_idx,
        cu_seqlens, sizes=sizes, silu=is_silu(fn, activation), norm=(eps, norm_before_gate),
        options=(chunk_size, True, *map(float, dt_limit), state_dtype),
    )  # fmt: skip
    if norm is not None:
        y = norm(sizes.per_head(y), outside)
        return (y, final) if return_final_states else y
    beside = None
    if mlp:
        gate, value = outside.chunk(2, dim=-1)
        beside = F.silu(gate) * value
    if outproj_weight is not None and rmsnorm_weight is not None:
        again = (scanned, rmsnorm_weight, None, z, eps, inner // ngroups, norm_before_gate)
        y = project(y, beside, outproj_weight, outproj_bias, again)
    else:
        y = y if beside is None else torch.cat([beside, y], dim=-1)
        y = y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y


def _check_scan(
    fn, packed, sizes, device, tensors, cu_seqlens, chunk_size, dt_limit, state_dtype
) -> None:
    """What both functions ask of the scan; ``packed`` names the argument that has one row."""
    batch, length, heads, width, state = sizes
    _check_integer(fn, "chunk_size", chunk_size)
    sequences = batch
    if cu_seqlens is not None:
        check_tensor(fn, "cu_seqlens", cu_seqlens, shape=(None,), dims="(S+1,)", dtypes=INT32,
                     device=device)  # fmt: skip
        check(fn, cu_seqlens.shape[0] >= 1, "`cu_seqlens` needs at least one entry, got none")
        check(fn, batch == 1, "`{}` must have one row with `cu_seqlens`, got B = {}",
              packed, batch)  # fmt: skip
        sequences = cu_seqlens.shape[0] - 1
    D = tensors["D"]
    per_channel = isinstance(D, torch.Tensor) and D.dim() == 2
    expected = {
        "dt": ((batch, length, heads), "(B, T, H)", FLOATS),
        "A": ((heads,), "(H,)", FLOATS),
        "D": ((heads, width) if per_channel else (heads,), "(H,) or (H, P)", FLOATS),
        "z": ((batch, length, heads, width), "the shape of x", FLOATS),
        "dt_bias": ((heads,), "(H,)", FLOATS),
        "initial_states": ((sequences, heads, width, state), "(S, H, P, N)", FLOATS),
        "seq_idx": ((batch, length), "(B, T)", INT32),
    }
    for name, (shape, dims, dtypes) in expected.items():
        value = tensors[name]
        if value is not None or name in ("dt", "A"):
            check_tensor(fn, name, value, shape=shape, dims=dims, dtypes=dtypes, device=device)
    check(fn, len(dt_limit) == 2 and 0 <= dt_limit[0] <= dt_limit[1],
          "`dt_limit` is {}, expected two numbers, 0 <= least <= largest", dt_limit)  # fmt: skip
    if state_dtype is not None and state_dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{fn}: `state_dtype` is {state_dtype}, expected None or one of {names}")


def _check_integer(fn: str, name: str, value: int) -> None:
    check(fn, isinstance(value, int) and value >= 1,
          "`{}` must be an integer of at least 1, got {!r}", name, value)  # fmt: skip
