"""Calls into csrc/causal_conv1d: schemas, output allocation, layout. Tensors are (B, T, D)."""

from __future__ import annotations

import torch

from nemokernels import _ext
from nemokernels._triton import contiguous

WARPS = 4  # per block, conv1d::kWarps in csrc/causal_conv1d/causal_conv1d.h

_forward = _ext.define(
    "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
    "Tensor? initial_states, Tensor? cu_seqlens, bool silu, int chunk, Tensor(a!) y, "
    "Tensor(b!)? states) -> ()"
)
_backward = _ext.define(
    "causal_conv1d_backward(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? seq_idx, Tensor? initial_states, Tensor? cu_seqlens, bool silu, int chunk, "
    "Tensor(a!) partial, Tensor(b!) dx, Tensor(c!) dweight, Tensor(d!) dbias, "
    "Tensor(e!)? dinitial) -> ()"
)
_update = _ext.define(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? cache_seqlens, Tensor? conv_state_indices, Tensor? num_accepted_tokens, "
    "Tensor(b!) y) -> ()"
)
_varlen_states = _ext.define(
    "causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, Tensor(a!) states) -> ()"
)


def forward(x, weight, bias, seq_idx, initial_states, cu_seqlens, silu, final, *, config):
    x = _channel_last(x)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = x.new_empty(x.shape)
    states = x.new_empty(sequences if final else 0, weight.shape[1] - 1, x.shape[2])
    _forward(
        x, weight, bias, seq_idx, initial_states, contiguous(cu_seqlens), silu, config.chunk, y,
        states if final else None,
    )  # fmt: skip
    return y, states


def backward(dy, dfinal, x, weight, bias, seq_idx, initial_states, cu_seqlens, silu, *, config,
             dx=None):  # fmt: skip
    x, dy = _channel_last(x), _channel_last(dy)
    batch, tokens, dim = x.shape
    width = weight.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blocks = -(-batch * -(-tokens // config.chunk) // WARPS)
    partial = x.new_empty(blocks, width + 1, dim, dtype=torch.float32)
    dx = x.new_empty(x.shape) if dx is None else dx
    dweight = weight.new_empty(weight.shape)
    dbias = (weight if bias is None else bias).new_empty(dim)
    dinitial = x.new_empty(0 if initial_states is None else sequences, width - 1, dim)
    _backward(
        dy, dfinal if dfinal.shape[0] > 0 else None, x, weight, bias, seq_idx, initial_states,
        contiguous(cu_seqlens), silu, config.chunk, partial, dx, dweight, dbias,
        None if initial_states is None else dinitial,
    )  # fmt: skip
    return dx, dweight, dbias, dinitial


def update(
    x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, num_accepted_tokens,
    *, config,
):  # fmt: skip
    y = x.new_empty(x.shape)
    per_row = map(contiguous, (cache_seqlens, conv_state_indices, num_accepted_tokens))
    _update(x, conv_state, weight, bias, silu, *per_row, y)
    return y


def varlen_states(x, cu_seqlens, state_len, *, config):
    states = x.new_empty(cu_seqlens.shape[0] - 1, state_len, x.shape[1])
    _varlen_states(x, cu_seqlens.contiguous(), states)
    return states


def _channel_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
