"""Causal depthwise convolution of width 2 to 4: training, prefill and decoding."""

from __future__ import annotations

from functools import partial

import torch

from nemokernels._checks import FLOATS, check, check_tensor, check_unshared
from nemokernels._plain import plain
from nemokernels.ops.causal_conv1d import op, ref

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
    "causal_conv1d_varlen_states_ref",
]

INT32 = (torch.int32,)
INTEGERS = (torch.int32, torch.int64)


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution over time, with packed sequences and carried states.

    ``y[b,c,t] = act(bias[c] + sum_w weight[c,w] * x[b,c,t-(W-1)+w])``, act = identity or SiLU.
    Inputs before a sequence's first token are its initial state, or zero. Products and sums are in
    float32 (float64 where x or weight is); one cast to x's dtype. Autocast casts nothing.

    Sequences are the rows of x, or come from one of

    * ``seq_idx``: a tap counts only where its ``seq_idx`` equals the token's. Negative: a padding
      token, whose output is exactly 0 and whose output gradient is ignored. An initial state
      belongs to the sequence of the row's first token. The final state is the history of the last
      token's sequence (zero where another sequence lies, or if the last token is padding).
    * ``cu_seqlens``: packed batch of one row; states are per sequence. Equal, bit for bit, to
      calling each sequence by itself. Tokens after ``cu_seqlens[-1]`` are padding.

    Args:
        x: (B, dim, T), float32, bfloat16, float16 or float64, any strides. Strides of a transposed
            (B, T, dim) tensor are the fast ones; others are copied to that layout first.
        weight: (dim, W), W 2, 3 or 4, any of these dtypes; the last tap meets the current token.
        bias: (dim), any of these dtypes.
        seq_idx: (B, T) int32. Excludes cu_seqlens.
        initial_states: (S, dim, W-1) in x's dtype, oldest first; S sequences.
        return_final_states: also return the last W-1 inputs (not outputs) of every sequence.
        final_states_out: (S, dim, W-1) in x's dtype; receives and replaces the returned states.
        activation: None, "silu" or "swish" (the same).
        cu_seqlens: (S+1) int32, starts at 0, does not decrease.

    Returns:
        y (B, dim, T) in x's dtype, a transposed view of a (B, T, dim) tensor; with
        ``return_final_states`` ``(y, states)``, states (S, dim, W-1). Gradients flow to x, weight,
        bias and initial_states, through both.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: drop-in for causal-conv1d (Dao-AILab) 1.6, which takes seq_idx and states only
    channel-last, only for dim a multiple of 8, and not together.
    """
    fn = "causal_conv1d_fn"
    check_tensor(fn, "x", x, shape=(None, None, None), dims="(B, dim, T)", dtypes=FLOATS)
    batch, dim, tokens = x.shape
    check_filter(fn, x, weight, bias)
    sequences = batch
    if seq_idx is not None:
        check(fn, cu_seqlens is None, "`seq_idx` and `cu_seqlens` exclude each other, got both")
        check_tensor(fn, "seq_idx", seq_idx, shape=(batch, tokens), dims="(B, T)", dtypes=INT32,
                     device=x.device)  # fmt: skip
    if cu_seqlens is not None:
        _check_bounds(fn, cu_seqlens, x.device)
        check(fn, batch == 1, "`x` must have one row with `cu_seqlens`, got B = {}", batch)
        sequences = cu_seqlens.shape[0] - 1
    states = {"initial_states": initial_states, "final_states_out": final_states_out}
    for name, state in states.items():
        if state is not None:
            check_tensor(fn, name, state, shape=(sequences, dim, weight.shape[1] - 1),
                         dims="(S, dim, W-1)", dtypes=(x.dtype,), device=x.device)  # fmt: skip
    check(fn, final_states_out is None or return_final_states,
          "`final_states_out` needs return_final_states=True, got False")  # fmt: skip
    y, final = op.causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        seq_idx,
        None if initial_states is None else initial_states.transpose(1, 2),
        cu_seqlens,
        is_silu(fn, activation),
        return_final_states,
    )
    y = y.transpose(1, 2)
    if not return_final_states:
        return y
    final = final.transpose(1, 2)
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    *,
    num_accepted_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve new tokens with the history kept in ``conv_state`` and append them to it.

    The mathematics of :func:`causal_conv1d_fn`, with the W-1 inputs before the first new token
    taken from the state. The state, L entries per channel, is used in one of three ways:

    * plain: the newest entry is last; afterwards the state is the last L of (state, x).
    * ``cache_seqlens``: a ring; row b is written from ``cache_seqlens[b] % L`` on.
    * ``num_accepted_tokens``: speculation with L >= W-1 + drafts. The previous call wrote a base
      token and drafts, of which ``num_accepted_tokens[b]`` (base included, clamped to
      1 .. L-W+2) stand. History is read at that offset, so rejected drafts need no copy; afterwards
      the state holds the W-2 newest of that history, then x, then what it held there before. Pass 1
      after a plain prefill whose state was written to the front of the L entries. T = 0 changes
      nothing.

    Args:
        x: (B, dim) or (B, dim, T), float32, bfloat16, float16 or float64, any strides.
        conv_state: (slots, dim, L), L >= W-1, x's dtype, any strides. Changed in place.
        weight, bias: as in :func:`causal_conv1d_fn`.
        activation: None, "silu" or "swish".
        cache_seqlens: (B) int32.
        conv_state_indices: (B) int32, the slot of each row, different for all rows; without it
            row b uses slot b. Negative: the output is zero, no state changes.
        num_accepted_tokens: (B) int32. Excludes cache_seqlens.

    Returns:
        y in x's shape and dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        RuntimeError: an input requires grad; the state update has no gradient.

    Source: drop-in for causal-conv1d (Dao-AILab) 1.6; the speculative form is that of vLLM's
    causal_conv1d_update, which leaves the output of a negative index unwritten.
    """
    fn = "causal_conv1d_update"
    check_tensor(fn, "x", x, dtypes=FLOATS)
    check(fn, x.dim() in (2, 3),
          "`x` has shape {}, expected (B, dim) or (B, dim, T)", tuple(x.shape))  # fmt: skip
    batch, dim = x.shape[:2]
    tokens = x.shape[2] if x.dim() == 3 else 1
    check_filter(fn, x, weight, bias)
    slots = batch if conv_state_indices is None else None
    check_tensor(fn, "conv_state", conv_state, shape=(slots, dim, None), dims="(slots, dim, L)",
                 dtypes=(x.dtype,), device=x.device)  # fmt: skip
    check_unshared(fn, "conv_state", conv_state)
    length, width = conv_state.shape[2], weight.shape[1]
    check(
        fn, length >= width - 1, "`conv_state` keeps {} entries, expected >= {}", length, width - 1
    )
    check(fn, cache_seqlens is None or num_accepted_tokens is None,
          "`cache_seqlens` and `num_accepted_tokens` exclude each other, got both")  # fmt: skip
    check(
        fn,
        num_accepted_tokens is None or tokens <= length - width + 2,
        "`x` has {} tokens, expected at most {} (L - W + 2) with num_accepted_tokens",
        tokens,
        length - width + 2,
    )
    per_row = {
        "cache_seqlens": cache_seqlens,
        "conv_state_indices": conv_state_indices,
        "num_accepted_tokens": num_accepted_tokens,
    }
    for name, value in per_row.items():
        if value is not None:
            check_tensor(fn, name, value, shape=(batch,), dims="(B,)", dtypes=INT32,
                         device=x.device)  # fmt: skip
    y = op.causal_conv1d_update(
        (x if x.dim() == 3 else x[..., None]).transpose(1, 2),
        conv_state,
        weight,
        bias,
        is_silu(fn, activation),
        cache_seqlens,
        conv_state_indices,
        num_accepted_tokens,
    ).transpose(1, 2)
    return y if x.dim() == 3 else y[..., 0]


def causal_conv1d_varlen_states(
    x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int
) -> torch.Tensor:
    """The last ``state_len`` inputs of every packed sequence, as a convolution state.

    Args:
        x: (tokens, dim), float32, bfloat16, float16 or float64, any strides.
        cu_seqlens: (S+1) int32 or int64.
        state_len: entries to keep; a shorter sequence has zeros in front.

    Returns:
        (S, dim, state_len) in x's dtype, strides of a transposed (S, state_len, dim) tensor. Not
        differentiable: causal_conv1d_fn returns states that are.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: drop-in for causal-conv1d (Dao-AILab) 1.6.
    """
    fn = "causal_conv1d_varlen_states"
    check_tensor(fn, "x", x, shape=(None, None), dims="(tokens, dim)", dtypes=FLOATS)
    _check_bounds(fn, cu_seqlens, x.device, INTEGERS)
    check(fn, state_len >= 1, "`state_len` must be at least 1, got {}", state_len)
    bounds = cu_seqlens.to(torch.int32)
    return op.causal_conv1d_varlen_states(x, bounds, state_len).transpose(1, 2)


def causal_conv1d_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`causal_conv1d_fn` in plain torch: any device, with its gradients, unchecked shapes.

    Source: drop-in for causal-conv1d (Dao-AILab) 1.7, whose reference has no final states with
    ``seq_idx``; its argument order.
    """
    history = None if initial_states is None else initial_states.transpose(1, 2)
    silu = is_silu("causal_conv1d_ref", activation)
    y, final = plain(
        partial(ref.forward, final=True), ref.backward, (0, 1, 2, 4),
        x.transpose(1, 2), weight, bias, seq_idx, history, None, silu,
    )  # fmt: skip
    y, final = y.transpose(1, 2), final.transpose(1, 2)
    if not return_final_states:
        return y
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update_ref(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`causal_conv1d_update` in plain torch: any device, unchecked shapes.

    Source: drop-in for causal-conv1d (Dao-AILab) 1.7; its argument order.
    """
    tokens = (x if x.dim() == 3 else x[..., None]).transpose(1, 2)
    silu = is_silu("causal_conv1d_update_ref", activation)
    y = ref.update(tokens, conv_state, weight, bias, silu, cache_seqlens, None, None)
    y = y.transpose(1, 2)
    return y if x.dim() == 3 else y[..., 0]


def causal_conv1d_varlen_states_ref(
    x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int
) -> torch.Tensor:
    """:func:`causal_conv1d_varlen_states` in plain torch: any device, unchecked shapes.

    Source: drop-in for causal-conv1d (Dao-AILab) 1.7; its argument order.
    """
    return ref.varlen_states(x, cu_seqlens, state_len).transpose(1, 2)


def check_filter(fn: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise unless weight and bias fit x (B, dim, ...)."""
    dim = x.shape[1]
    check_tensor(fn, "weight", weight, shape=(dim, None), dims="(dim, W)", dtypes=FLOATS,
                 device=x.device)  # fmt: skip
    check(fn, 2 <= weight.shape[1] <= 4,
          "`weight` has {} taps, expected 2, 3 or 4", weight.shape[1])  # fmt: skip
    if bias is not None:
        check_tensor(fn, "bias", bias, shape=(dim,), dims="(dim,)", dtypes=FLOATS,
                     device=x.device)  # fmt: skip


def _check_bounds(fn, cu_seqlens, device, dtypes=INT32) -> None:
    check_tensor(fn, "cu_seqlens", cu_seqlens, shape=(None,), dims="(S+1,)", dtypes=dtypes,
                 device=device)  # fmt: skip
    check(fn, cu_seqlens.shape[0] >= 1, "`cu_seqlens` needs at least one entry, got none")


def is_silu(fn: str, activation: str | None) -> bool:
    """Whether an ``activation`` argument asks for SiLU; raise if it asks for something else."""
    check(fn, activation in (None, "silu", "swish"),
          "`activation` is {!r}, expected None, \"silu\" or \"swish\"", activation)  # fmt: skip
    return activation is not None
