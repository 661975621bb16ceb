"""Causal depthwise convolution in plain torch: the specification and the CPU leg.

B rows, T tokens, D channels, W taps, S sequences (a row each, or the segments of cu_seqlens).
Everything is channel-last: x (B, T, D), states (S, W-1, D) with the oldest entry first. Sums run in
the accumulation dtype (float32; float64 stays float64), from the bias and the oldest tap on; one
cast to the dtype of x at the end. States are copies of inputs and never rounded.
"""

from __future__ import annotations

import torch

from nemokernels import _activations
from nemokernels._registry import acc_dtype


class _Frame:
    """The inputs of every sequence with its W-1 history rows in front of them.

    ``tap(w)`` gives every token's input ``W-1-w`` steps back, zero where that lies in another
    sequence.
    """

    def __init__(self, x, width, seq_idx, initial_states, cu_seqlens):
        rows, tokens, channels = x.shape
        self.shape, self.width, self.cu_seqlens = x.shape, width, cu_seqlens
        self.tokens, self.ids = tokens, None
        sequences = rows if cu_seqlens is None else cu_seqlens.numel() - 1
        history = initial_states
        if history is None:
            history = x.new_zeros(sequences, width - 1, channels)
        if cu_seqlens is None:
            self.values = torch.cat((history, x), 1)
            if seq_idx is not None and tokens > 0:
                self.ids = torch.cat((seq_idx[:, :1].expand(-1, width - 1), seq_idx), 1)
            return
        bounds = cu_seqlens.long()
        lengths = bounds.diff()
        if bounds[0] != 0 or (lengths < 0).any() or bounds[-1] > tokens:
            raise ValueError(
                "causal_conv1d: `cu_seqlens` must start at 0, not decrease and end at or before "
                f"the {tokens} tokens of `x`, got {cu_seqlens.tolist()}"
            )
        self.tokens = int(bounds[-1])
        owner = torch.repeat_interleave(torch.arange(sequences, device=x.device), lengths)
        step = torch.arange(width - 1, device=x.device)
        # Row of each token's oldest tap; of each sequence's history; of its last W-1 inputs.
        self.first = torch.arange(self.tokens, device=x.device) + owner * (width - 1)
        shift = torch.arange(sequences, device=x.device) * (width - 1)
        self.history = (bounds[:-1] + shift)[:, None] + step
        self.last = (bounds[1:] + shift)[:, None] + step
        self.values = x.new_empty(1, self.tokens + sequences * (width - 1), channels)
        self.values[:, self.first + width - 1] = x[:, : self.tokens]
        self.values[0, self.history] = history

    def tap(self, w, acc):
        if self.cu_seqlens is not None:
            return self.values[:, self.first + w].to(acc)
        tap = self.values[:, w : w + self.tokens].to(acc)
        return tap if self.ids is None else torch.where(self.same(w)[..., None], tap, 0)

    def same(self, w):
        return self.ids[:, w : w + self.tokens] == self.ids[:, self.width - 1 :]

    def padding(self):
        """(B, T, 1) mask of tokens that belong to no sequence, or None."""
        return None if self.ids is None else (self.ids[:, self.width - 1 :] < 0)[..., None]

    def preactivation(self, weight, bias, acc):
        v = weight.new_zeros((), dtype=acc) if bias is None else bias.to(acc)
        for w in range(self.width):
            v = v + self.tap(w, acc) * weight[:, w].to(acc)
        return v

    def last_inputs(self):
        """What each sequence's next token will find W-1 .. 1 steps back."""
        if self.cu_seqlens is not None:
            return self.values[0, self.last]
        state = self.values[:, self.tokens :]
        return state if self.ids is None else torch.where(self.carried(), state, 0)

    def carried(self):
        final = self.ids[:, -1:]
        return ((self.ids[:, self.tokens :] == final) & (final >= 0))[..., None]


def forward(x, weight, bias, seq_idx, initial_states, cu_seqlens, silu: bool, final: bool):
    """y_t = act(bias + sum_w weight_w * x_{t-(W-1)+w}). Returns y (B, T, D) and states (S, W-1, D).

    Without ``final`` the states are empty.
    """
    acc = torch.promote_types(acc_dtype(x), acc_dtype(weight))
    frame = _Frame(x, weight.shape[1], seq_idx, initial_states, cu_seqlens)
    y = _activate(frame.preactivation(weight, bias, acc), silu).to(x.dtype)
    if frame.ids is not None:
        y = torch.where(frame.padding(), 0, y)
    if frame.tokens < x.shape[1]:
        y = torch.cat((y, y.new_zeros(1, x.shape[1] - frame.tokens, x.shape[2])), 1)
    state = frame.last_inputs() if final else x.new_empty(0, weight.shape[1] - 1, x.shape[2])
    return y, state


def backward(dy, dfinal, x, weight, bias, seq_idx, initial_states, cu_seqlens, silu: bool):
    """dv = dy act'(v); dx_t = sum_w weight_{W-1-w} dv_{t+w}; dweight_w = sum_t dv_t x_{t-(W-1)+w}.

    The gradient of a padding token's output is taken as zero. ``dfinal`` without rows means none;
    the gradient of the initial states is empty where there are none.
    """
    acc = torch.promote_types(acc_dtype(x), acc_dtype(weight))
    width = weight.shape[1]
    frame = _Frame(x, width, seq_idx, initial_states, cu_seqlens)
    dv = dy[:, : frame.tokens].to(acc)
    if silu:
        v = frame.preactivation(weight, bias, acc)
        gate = _activations.sigmoid(v)
        dv = dv * (gate * (1 + v * (1 - gate)))
    if frame.ids is not None:
        dv = torch.where(frame.padding(), 0, dv)
    dvalues = torch.zeros(frame.values.shape, dtype=acc, device=x.device)
    dweight = weight.new_empty(weight.shape)
    for w in range(width):
        dweight[:, w] = (dv * frame.tap(w, acc)).sum((0, 1)).to(weight.dtype)
        dtap = dv * weight[:, w].to(acc)
        if cu_seqlens is not None:
            dvalues[:, frame.first + w] += dtap
        elif frame.ids is None:
            dvalues[:, w : w + frame.tokens] += dtap
        else:
            dvalues[:, w : w + frame.tokens] += torch.where(frame.same(w)[..., None], dtap, 0)
    if dfinal.shape[0] > 0:
        if cu_seqlens is not None:
            dvalues[0, frame.last] += dfinal.to(acc)
        else:
            kept = dfinal.to(acc)
            kept = kept if frame.ids is None else torch.where(frame.carried(), kept, 0)
            dvalues[:, frame.tokens :] += kept
    dx, dhistory = dvalues[:, width - 1 :], dvalues[:, : width - 1]
    if cu_seqlens is not None:
        dx = dvalues.new_zeros(x.shape)
        dx[:, : frame.tokens] = dvalues[:, frame.first + width - 1]
        dhistory = dvalues[0, frame.history]
    if initial_states is None:
        dhistory = dhistory[:0]
    dbias = dv.sum((0, 1)).to(weight.dtype if bias is None else bias.dtype)
    return dx.to(x.dtype), dweight, dbias, dhistory.to(x.dtype)


def update(
    x, conv_state, weight, bias, silu: bool, cache_seqlens, conv_state_indices, num_accepted_tokens
):
    """Convolve T new tokens with the history in conv_state (slots, D, L) and store them there."""
    acc = torch.promote_types(acc_dtype(x), acc_dtype(weight))
    width, length, tokens = weight.shape[1], conv_state.shape[2], x.shape[1]
    slots = conv_state_indices
    if slots is None:
        slots = torch.arange(x.shape[0], device=x.device)
    live = slots >= 0
    slots, new = slots[live].long(), x[live]
    state = conv_state[slots].transpose(1, 2)  # (rows, L, D), a copy
    if num_accepted_tokens is not None:
        start = (num_accepted_tokens[live].long() - 1).clamp(0, length - (width - 1))
    elif cache_seqlens is not None:
        start = cache_seqlens[live].long() - (width - 1)
    else:
        start = torch.full_like(slots, length - (width - 1))
    window = (start[:, None] + torch.arange(width - 1, device=x.device)) % length
    history = torch.take_along_dim(state, window[..., None], 1)
    frame = _Frame(new, width, None, history, None)
    y = x.new_zeros(x.shape)
    y[live] = _activate(frame.preactivation(weight, bias, acc), silu).to(x.dtype)
    if num_accepted_tokens is not None:
        if tokens > 0:
            state[:, : width - 2 + tokens] = torch.cat((history[:, 1:], new), 1)
    elif cache_seqlens is not None:
        kept = torch.arange(max(0, tokens - length), tokens, device=x.device)
        target = (cache_seqlens[live].long()[:, None] + kept) % length
        state.scatter_(1, target[..., None].expand(-1, -1, x.shape[2]), new[:, kept])
    else:
        state = torch.cat((state, new), 1)[:, -length:]
    conv_state[slots] = state.transpose(1, 2)
    return y


def varlen_states(x, cu_seqlens, state_len: int):
    """Last ``state_len`` rows of every sequence of x (tokens, D), zeros in front of short ones."""
    bounds = cu_seqlens.long()
    back = torch.arange(-state_len, 0, device=x.device)
    rows = bounds[1:, None] + back
    inside = (rows >= bounds[:-1, None])[..., None]
    padded = torch.cat((x.new_zeros(1, x.shape[1]), x))
    return torch.where(inside, padded[rows.clamp(min=-1) + 1], 0)


def _activate(v, silu: bool):
    return _activations.silu(v) if silu else v
