"""The three ways a model call runs over tokens.

A mixer does not know whether it trains, prefills or decodes. It asks its run for everything that
looks across tokens: attention, and convolution and scan (for a Mamba-2 mixer in one call). A model
with rotary embeddings also asks for the tokens' positions.

* :class:`Packed`: without a state, for training and scoring.
* :class:`Prefill`: the chunked kernels, which continue from a state and update it.
* :class:`Decode`: the recurrent kernels, a few tokens per row, provisional until accepted.
"""

from __future__ import annotations

from typing import Protocol

import torch

from nemokernels import (
    Fp8Normed,
    attention,
    attention_with_cache,
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    mamba_step,
    selective_scan_fn,
    selective_state_update,
)
from nemokernels._checks import check, check_tensor
from nemokernels.models.linear import is_exact
from nemokernels.models.state import State

__all__ = ["Decode", "Packed", "Prefill", "Run"]


class Run(Protocol):
    """How the mixers of one model call look across tokens. ``layer`` is a layer's index."""

    def mamba(self, mixer, zxbcdt) -> torch.Tensor | Fp8Normed:
        """All of a Mamba-2 mixer between its projections: convolution, scan and gated norm."""

    def conv(self, layer, x, weight, bias) -> torch.Tensor:
        """Causal convolution and SiLU of x (B, T, channels)."""

    def selective_scan(self, layer, x, dt, A, B, C, *, D, dt_bias, z) -> torch.Tensor:
        """Mamba-1 scan of x (B, T, channels), gated by z."""

    def attend(self, layer, q, k, v, **bias) -> torch.Tensor:
        """Causal attention of q (B, T, heads, head_dim); ``bias`` as ``attention`` takes it."""

    def positions(self, tokens) -> torch.Tensor:
        """Positions of tokens (B, T) in their sequences, after the model's prefix if it has one.

        int64, (B, T) or (1, T).
        """

    def prepend(self, x, prefix) -> torch.Tensor:
        """x (B, T, H) with ``prefix`` (P, H) put before every sequence that begins in this call."""

    def strip(self, x) -> torch.Tensor:
        """x without the vectors that :meth:`prepend` inserted."""

    def commit(self) -> None:
        """Called after all layers have run."""


class Packed:
    """Whole sequences: one per row, or those that ``cu_seqlens`` packs into a single row."""

    def __init__(self, config, cu_seqlens: torch.Tensor | None):
        self.config, self.cu_seqlens = config, cu_seqlens

    def conv(self, layer, x, weight, bias):
        y = causal_conv1d_fn(
            x.transpose(1, 2), weight, bias, activation="silu", cu_seqlens=self.cu_seqlens
        )
        return y.transpose(1, 2)

    def mamba(self, mixer, zxbcdt):
        c, weights = self.config, mixer.weights()
        return mamba_split_conv1d_scan_combined(
            zxbcdt, weights.pop("weight"), weights.pop("bias"), chunk_size=c.chunk_size,
            dt_limit=c.time_step_limit, headdim=c.mamba_head_dim, ngroups=c.n_groups,
            norm=mixer.gated_norm, cu_seqlens=self.cu_seqlens, **weights,
        )  # fmt: skip

    def selective_scan(self, layer, x, dt, A, B, C, *, D, dt_bias, z):
        return _selective_scan(x, dt, A, B, C, D, z, dt_bias, cu_seqlens=self.cu_seqlens)[0]

    def attend(self, layer, q, k, v, **bias):
        return attention(q, k, v, cu_seqlens=self.cu_seqlens, **bias)

    def positions(self, tokens):
        index = torch.arange(tokens.shape[1], device=tokens.device)
        if self.cu_seqlens is None:
            return index[None]
        return (index - self.cu_seqlens[_sequence(self.cu_seqlens, index)])[None]

    def prepend(self, x, prefix):
        rows, length, width = x.shape
        if self.cu_seqlens is None:
            self.places = torch.arange(length, device=x.device) + len(prefix)
            return torch.cat([prefix.expand(rows, -1, -1), x], 1)
        index = torch.arange(length, device=x.device)
        self.places = index + len(prefix) * (_sequence(self.cu_seqlens, index) + 1)
        sequences = self.cu_seqlens.shape[0] - 1
        ahead = torch.arange(sequences + 1, dtype=torch.int32, device=x.device) * len(prefix)
        self.cu_seqlens = self.cu_seqlens + ahead
        index = self.cu_seqlens[:-1, None] + torch.arange(len(prefix), device=x.device)
        longer = x.new_zeros(1, length + sequences * len(prefix), width)
        longer = longer.index_copy(1, index.flatten(), prefix.repeat(sequences, 1)[None])
        return longer.index_copy(1, self.places, x)

    def strip(self, x):
        return x.index_select(1, self.places)

    def commit(self):
        pass


class Prefill:
    """Any number of tokens per sequence. Each sequence continues its slot; all tokens are kept.

    Rows are treated as packed sequences, so that one path serves both. The host reads the lengths.
    """

    def __init__(
        self,
        config,
        state: State,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        slots: torch.Tensor | None,
        *,
        mtp: bool,
    ):
        state.check_settled("Prefill")
        self.config, self.state, self.mtp = config, state, mtp
        rows, length = tokens.shape
        if cu_seqlens is None:
            cu_seqlens = length * torch.arange(rows + 1, dtype=torch.int32, device=tokens.device)
        else:
            check_tensor("Prefill", "cu_seqlens", cu_seqlens, shape=(None,),
                         dtypes=(torch.int32,), device=state.device)  # fmt: skip
            check("Prefill", rows == 1, f"`tokens` has {rows} rows, expected 1 with `cu_seqlens`")
            check("Prefill", len(cu_seqlens) >= 1, "`cu_seqlens` is empty, expected at least [0]")
        self.cu_seqlens, self.bounds = cu_seqlens, cu_seqlens.tolist()
        self.slots = state.check_slots(slots, len(self.bounds) - 1)
        self.live = [(i, slot) for i, slot in enumerate(self.slots.tolist()) if slot >= 0]
        self._check_sequences(rows * length)
        places = state.rows(self.slots)
        self.lengths = state.all_mtp_lengths if mtp else state.all_lengths
        starts = self.lengths[places].tolist()
        self._check_room(starts)
        self.starts = [start + state.prefix for start in starts]  # that the cache holds already
        # The sequences that have a slot, their slots, and where they begin and end.
        self.sequences = (self.slots >= 0).nonzero().squeeze(1)
        self.places = places[self.sequences]
        self.begin = self.lengths[self.places].long() + state.prefix
        self.end = self.begin + cu_seqlens.diff()[self.sequences]

    def _check_sequences(self, tokens: int) -> None:
        slots, bounds = [slot for _, slot in self.live], self.bounds
        check("Prefill", bounds == sorted(bounds) and (bounds[0], bounds[-1]) == (0, tokens),
              f"`cu_seqlens` must ascend from 0 to {tokens}, got {bounds}")  # fmt: skip
        check("Prefill", len(set(slots)) == len(slots), f"`slots` repeats a slot: {slots}")

    def _check_room(self, starts: list[int]) -> None:
        for i, slot in self.live:
            end = starts[i] + self.bounds[i + 1] - self.bounds[i]
            check("Prefill", end <= self.state.max_length,
                  f"slot {slot} would hold {end} tokens, but `max_length` is "
                  f"{self.state.max_length}")  # fmt: skip

    def mamba(self, mixer, zxbcdt):
        c, weights = self.config, mixer.weights()
        z, xBC, dt = mixer.split(zxbcdt)
        xBC = self.conv(mixer.index, xBC, weights.pop("weight"), weights.pop("bias"))
        groups = c.n_groups * c.ssm_state_size
        x, B, C = xBC.flatten(0, 1)[None].split([c.d_inner, groups, groups], -1)
        y, final = mamba_chunk_scan_combined(
            x.unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim)),
            dt.flatten(0, 1)[None],
            weights.pop("A"),
            B.unflatten(-1, (c.n_groups, -1)),
            C.unflatten(-1, (c.n_groups, -1)),
            c.chunk_size,
            **weights,
            initial_states=self._initial(mixer.index),
            cu_seqlens=self.cu_seqlens,
            dt_softplus=True,
            dt_limit=c.time_step_limit,
            return_final_states=True,
        )
        self._keep(mixer.index, final)
        return mixer.gated_norm(y.view(*z.shape[:2], *y.shape[2:]), z)

    def conv(self, layer, x, weight, bias):
        cache, back = self.state.conv[layer], 1 - weight.shape[1]
        steps = torch.arange(back, 0, device=x.device)
        history = cache[self.places[:, None], :, (self.begin[:, None] + steps) % cache.shape[2]]
        initial = x.new_zeros(len(self.starts), x.shape[-1], -back)
        initial[self.sequences] = history.transpose(1, 2).to(x.dtype)
        y, final = causal_conv1d_fn(
            x.flatten(0, 1)[None].transpose(1, 2), weight, bias, initial_states=initial,
            return_final_states=True, activation="silu", cu_seqlens=self.cu_seqlens,
        )  # fmt: skip
        final = final[self.sequences].transpose(1, 2).to(cache.dtype)
        cache[self.places[:, None], :, (self.end[:, None] + steps) % cache.shape[2]] = final
        return y.transpose(1, 2).reshape(x.shape)

    def selective_scan(self, layer, x, dt, A, B, C, *, D, dt_bias, z):
        x, dt, B, C, rows = (t.flatten(0, 1)[None] for t in (x, dt, B, C, z))
        initial = self._initial(layer).squeeze(1)
        y, final = _selective_scan(
            x, dt, A, B, C, D, rows, dt_bias, initial_states=initial, cu_seqlens=self.cu_seqlens
        )
        self._keep(layer, final[:, None])
        return y.reshape(z.shape)

    def _initial(self, layer) -> torch.Tensor:
        """SSM states of all sequences; zeros where there is no slot."""
        cache = self.state.ssm[layer]
        initial = cache.new_zeros(len(self.starts), *cache.shape[2:])
        initial[self.sequences] = cache[self.places, (self.begin - 1) % cache.shape[1]]
        return initial

    def _keep(self, layer, final: torch.Tensor) -> None:
        cache = self.state.ssm[layer]
        cache[self.places, (self.end - 1) % cache.shape[1]] = final[self.sequences].to(cache.dtype)

    def attend(self, layer, q, k, v, **bias):
        keys, values = self.state.keys[layer], self.state.values[layer]
        scales = self.state.kv_scales.get(layer, (1.0, 1.0))
        shape, (q, k, v) = q.shape, (t.flatten(0, 1) for t in (q, k, v))
        out = torch.zeros_like(q)
        if not any(self.starts):
            out = attention(q[None], k[None], v[None], cu_seqlens=self.cu_seqlens, **bias)[0]
        for i, slot in self.live:
            new, start = slice(self.bounds[i], self.bounds[i + 1]), self.starts[i]
            end = start + new.stop - new.start
            for cache, fresh, scale in zip((keys, values), (k, v), scales):
                cache[slot, start:end] = _in_units(fresh[new], cache.dtype, scale)
            if any(self.starts):
                past = (cache[slot, :end].to(q.dtype)[None] * scale
                        for cache, scale in zip((keys, values), scales))  # fmt: skip
                out[new] = attention(q[new][None], *past, **bias)[0]
        return out.view(shape)

    def positions(self, tokens):
        index = torch.arange(tokens.numel(), device=tokens.device)
        sequence = _sequence(self.cu_seqlens, index)
        before = torch.tensor(self.starts, dtype=torch.int64, device=tokens.device)
        return (before[sequence] + index - self.cu_seqlens[sequence]).view(tokens.shape)

    def prepend(self, x, prefix):
        return x  # the state has it

    def strip(self, x):
        return x

    def commit(self):
        self.lengths[self.places] += self.cu_seqlens.diff()[self.sequences]


class Decode:
    """A few tokens per row, computed as if one after the other."""

    def __init__(
        self,
        config,
        state: State,
        tokens: torch.Tensor,
        slots: torch.Tensor | None,
        *,
        mtp: bool,
    ):
        rows, length = tokens.shape
        if not mtp:
            state.check_settled("Decode")
            check("Decode", 1 <= length <= state.draft_tokens + 1,
                  f"`tokens` has {length} per row, expected 1 to draft_tokens + 1 = "
                  f"{state.draft_tokens + 1}")  # fmt: skip
        self.config, self.state, self.mtp, self.length = config, state, mtp, length
        self.slots = state.check_slots(slots, rows)
        index = state.rows(self.slots)
        lengths = (state.all_mtp_lengths if mtp else state.all_lengths)[index]
        self.lengths = lengths + state.prefix if state.prefix else lengths

    def mamba(self, mixer, zxbcdt):
        weights, c = mixer.weights(), self.config
        z, xBC, dt = mixer.split(zxbcdt)

        def step(first, xBC, dt):
            return mamba_step(
                xBC, dt, self.state.conv[mixer.index], self.state.ssm[mixer.index],
                weights["weight"], weights["bias"], weights["A"], self.lengths + first,
                ngroups=c.n_groups, D=weights["D"], dt_bias=weights["dt_bias"], slots=self.slots,
                dt_limit=c.time_step_limit,
            )  # fmt: skip

        return mixer.gated_norm(self._exactly(step, xBC, dt), z)

    def conv(self, layer, x, weight, bias):
        y = causal_conv1d_update(
            x.transpose(1, 2), self.state.conv[layer], weight, bias, "silu", self.lengths,
            self.slots,
        )  # fmt: skip
        return y.transpose(1, 2)

    def selective_scan(self, layer, x, dt, A, B, C, *, D, dt_bias, z):
        ssm = self.state.ssm[layer]
        states, small = ssm.shape[1], dict(D=D[None], dt_bias=dt_bias[None], dt_softplus=True)

        def step(first, x, dt, B, C, z):
            rows, tokens = x.shape[:2]
            position = self.lengths[:, None] + first
            position = position + torch.arange(-1, tokens, dtype=torch.int32, device=x.device)
            places = self.slots[:, None] * states + position % states
            places = torch.where(self.slots[:, None] < 0, -1, places)
            x, dt, B, C, z = (t.flatten(0, 1)[:, None] for t in (x, dt, B, C, z))
            return selective_state_update(
                ssm.flatten(0, 1), x, dt, A[None], B, C, z=z, **small,
                state_batch_indices=places[:, 0], dst_state_batch_indices=places[:, 1:],
                cu_seqlens=tokens * torch.arange(rows + 1, dtype=torch.int32, device=x.device),
            ).view(rows, tokens, -1)  # fmt: skip

        return self._exactly(step, x, dt, B, C, z)

    def _exactly(self, step, *packed: torch.Tensor) -> torch.Tensor:
        """``step(0, *packed)`` for tensors (rows, tokens, ...). In exact mode one token at a time,
        each from the stored state of the one before, so that a 16-bit state is rounded after every
        token."""
        if not is_exact() or packed[0].shape[1] <= 1:
            return step(0, *packed)
        parts = zip(*(t.split(1, 1) for t in packed))
        return torch.cat([step(token, *part) for token, part in enumerate(parts)], 1)

    def attend(self, layer, q, k, v, **bias):
        keys, values = self.state.keys[layer], self.state.values[layer]
        k_scale, v_scale = self.state.kv_scales.get(layer, (1.0, 1.0))
        return attention_with_cache(
            q, k, v, keys, values, self.lengths, slots=self.slots, k_scale=k_scale,
            v_scale=v_scale, **bias,
        )  # fmt: skip

    def positions(self, tokens):
        return self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)

    def prepend(self, x, prefix):
        return x  # the state has it

    def strip(self, x):
        return x

    def commit(self):
        if not self.mtp:
            self.state.pending = (self.slots, self.length)


def _selective_scan(x, dt, A, B, C, D, z, dt_bias, **options):
    """selective_scan_fn for tensors (B, T, channels); also returns the last states."""
    x, dt, B, C, z = (t.transpose(1, 2) for t in (x, dt, B, C, z))
    y, last = selective_scan_fn(
        x, dt, A, B, C, D, z, dt_bias, delta_softplus=True, return_last_state=True, **options
    )
    return y.transpose(1, 2), last


def _sequence(cu_seqlens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The packed sequence to which each token ``index`` belongs."""
    return torch.searchsorted(cu_seqlens, index.to(torch.int32), right=True) - 1


def _in_units(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """x as a cache of this dtype stores it; the same as ``attention_with_cache`` writes."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide * (1.0 / scale)).clamp(-448.0, 448.0).to(dtype)
