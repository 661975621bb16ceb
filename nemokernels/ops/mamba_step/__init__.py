"""A Mamba-2 layer's decode step in one launch: convolution, step sizes, recurrence, gate."""

from __future__ import annotations

import torch

from nemokernels._checks import FLOATS, check, check_tensor, check_unshared
from nemokernels._philox import rounding_seed
from nemokernels.ops.mamba_step import op

__all__ = ["mamba_step"]

FN = "mamba_step"
NO_LIMIT = (0.0, float("inf"))


def mamba_step(
    xBC: torch.Tensor,
    dt: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A: torch.Tensor,
    lengths: torch.Tensor,
    *,
    ngroups: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    seed: int | torch.Tensor | None = None,
    philox_rounds: int = 5,
) -> torch.Tensor:
    """Take one or a few new tokens per row through convolution and recurrence of a Mamba-2 layer.

    Per row and token, at position ``n`` of its sequence (``lengths[b]`` for the first)::

        x, B, C = split(silu(conv_bias + sum_w conv_weight[:, w] * xBC[n - (W-1) + w]))
        d = clamp(softplus(dt + dt_bias), *dt_limit)
        S[h] = S[h] * exp(d * A[h]) + d * x[h] B[g]^T          head h reads group g = h // (H / G)
        y[h] = (S[h] C[g] + D[h] * x[h]) * silu(z[h])

    Inputs and states before a sequence's first token are zero. The convolved values are rounded to
    xBC's dtype; everything after is in float32 (float64 if the SSM state or xBC is); y comes from
    the unrounded S, which is rounded to the state's dtype when stored and stays unrounded from
    token to token of one call. Under autocast nothing is cast. There is no gradient.

    **Both states are rings, addressed by position.** The input at position n is entry ``n % L`` of
    the slot's convolution state, the state after it is ``ssm_state[slot, n % M]``. With
    ``L >= W - 1 + T`` and ``M >= T`` no call overwrites what a shorter history would need: to
    reject drafts, pass the smaller length to the next call (at least one token of a call must
    stand). A sequence of length 0 starts from zeros, whatever its slot holds.

    Args:
        xBC: (B, T, H*P + 2*G*N), float32, bfloat16, float16 or float64, any strides: x, B and C
            before the convolution, as the input projection orders them.
        dt: (B, T, H), before bias and softplus.
        conv_state: (slots, H*P + 2*G*N, L), xBC's dtype, any strides (channels side by side are
            the fast ones). Changed in place.
        ssm_state: (slots, M, H, P, N), any of these dtypes, any strides. Changed in place.
        conv_weight: (H*P + 2*G*N, W), W 2, 3 or 4; conv_bias (H*P + 2*G*N) or None.
        A: (H,), negative.
        lengths: (B,) int32, tokens each sequence holds already.
        ngroups: G, a divisor of H.
        D, dt_bias: (H,).
        z: (B, T, H*P), gates y; a norm that gates by itself wants none.
        slots: (B,) int32, all different; without it row b uses slot b. Negative: a padding row,
            whose output is zero and which touches no state.
        dt_limit: least and largest d.
        seed: rounds a 16-bit ssm_state stochastically, exactly as ``selective_state_update`` does
            with slots counted over (slots, M). **Another one at every step and layer.**
        philox_rounds: rounds of the generator, at least 1.

    Returns:
        y (B, T, H, P) in xBC's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value. The
            values of slots and lengths are checked where the reference runs; kernels trust them.
        RuntimeError: an input requires a gradient.

    Source: Dao and Gu, "Transformers are SSMs", 2024. The composition of ``causal_conv1d_update``
    and ``selective_state_update`` with their rings, which together it equals.
    """
    check_tensor(FN, "ssm_state", ssm_state, shape=(None,) * 5, dims="(slots, M, H, P, N)",
                 dtypes=FLOATS)  # fmt: skip
    check_unshared(FN, "ssm_state", ssm_state)
    held, states, H, P, N = ssm_state.shape
    common = dict(dtypes=FLOATS, device=ssm_state.device)
    check(FN, isinstance(ngroups, int) and ngroups >= 1 and H % ngroups == 0,
          "`ngroups` is {}, expected a divisor of the {} heads", ngroups, H)  # fmt: skip
    channels = H * P + 2 * ngroups * N
    check_tensor(FN, "xBC", xBC, shape=(None, None, channels), dims="(B, T, H*P + 2*G*N)", **common)
    rows, tokens, _ = xBC.shape
    check_tensor(FN, "dt", dt, shape=(rows, tokens, H), dims="(B, T, H)", **common)
    if z is not None:
        check_tensor(FN, "z", z, shape=(rows, tokens, H * P), dims="(B, T, H*P)", **common)
    check_tensor(FN, "conv_weight", conv_weight, shape=(channels, None), dims="(H*P + 2*G*N, W)",
                 **common)  # fmt: skip
    width = conv_weight.shape[1]
    check(FN, 2 <= width <= 4, "`conv_weight` has {} taps, expected 2, 3 or 4", width)
    if conv_bias is not None:
        check_tensor(FN, "conv_bias", conv_bias, shape=(channels,), dims="(H*P + 2*G*N,)", **common)
    check_tensor(FN, "conv_state", conv_state, shape=(held, channels, None),
                 dims="(slots, H*P + 2*G*N, L)", dtypes=(xBC.dtype,),
                 device=ssm_state.device)  # fmt: skip
    check_unshared(FN, "conv_state", conv_state)
    check(FN, conv_state.shape[2] >= width - 1 + tokens,
          "`conv_state` keeps {} entries, expected at least W - 1 + T = {}", conv_state.shape[2],
          width - 1 + tokens)  # fmt: skip
    check(FN, states >= max(tokens, 1), "`ssm_state` keeps {} states of a slot, expected at least "
          "one for each of the {} tokens", states, tokens)  # fmt: skip
    for name, value in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if value is not None or name == "A":
            check_tensor(FN, name, value, shape=(H,), dims="(H,)", **common)
    for name, value in (("lengths", lengths), ("slots", slots)):
        if value is not None or name == "lengths":
            check_tensor(FN, name, value, shape=(rows,), dims="(B,)", dtypes=(torch.int32,),
                         device=ssm_state.device)  # fmt: skip
    check(FN, slots is not None or rows <= held,
          "`ssm_state` has {} slots, fewer than the {} rows of `xBC`", held, rows)  # fmt: skip
    check(FN, len(dt_limit) == 2 and 0 <= dt_limit[0] <= dt_limit[1],
          "`dt_limit` is {}, expected two numbers, 0 <= least <= largest", dt_limit)  # fmt: skip
    return op.mamba_step(
        xBC, dt, z, conv_state, ssm_state, conv_weight, conv_bias, A, D, dt_bias, lengths, slots,
        ngroups, *map(float, dt_limit), rounding_seed(FN, seed, philox_rounds, ssm_state),
        philox_rounds,
    )  # fmt: skip
