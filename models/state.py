"""What a model remembers of its sequences, and the three ways a model call runs over tokens.

A mixer does not know whether it trains, prefills or decodes. It asks its run for the three
operations that look across tokens: the convolution, the scan and attention.

* :class:`Packed` - no state: training and scoring.
* :class:`Prefill` - chunked kernels, continuing from a state and writing to it.
* :class:`Decode` - recurrent kernels, a few tokens per row, kept provisionally until accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

import nemokernels
from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels._registry import acc_dtype
from nemokernels.models.config import NemotronHConfig

__all__ = ["Decode", "Packed", "Prefill", "Run", "State"]


class State:
    """Caches of ``slots`` sequences: convolution windows, SSM states, keys and values.

    Args:
        config: of the model.
        slots: sequences held at once.
        max_length: tokens a sequence may have, drafts included.
        draft_tokens: tokens beyond the first that one decode call may take. Every slot keeps one
            SSM state per token of a call, so that rejecting drafts copies nothing.
        dtype: of the convolution windows and of keys and values.
        ssm_dtype: of the SSM states; None: the config's ``mamba_ssm_cache_dtype``, or float64 for
            a float64 model.
        device: where it lives.

    Attributes:
        conv: per Mamba layer, (slots, conv_dim, W - 1 + draft_tokens).
        ssm: per Mamba layer, (slots, draft_tokens + 1, heads, head_dim, state_size).
        keys, values: per attention layer, (slots, max_length, KV heads, head_dim). Layers of the
            MTP block count on from the trunk's.
        lengths, mtp_lengths: (slots,) int32, tokens held for the trunk and for the MTP block.
        accepted: (slots,) int32, how many tokens of the slot's last decode call stand, counted
            from 1; the current SSM state is at this index minus one.
    """

    def __init__(
        self,
        config: NemotronHConfig,
        slots: int,
        max_length: int,
        *,
        draft_tokens: int = 0,
        dtype: torch.dtype = torch.float32,
        ssm_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        for name, value, low in (
            ("slots", slots, 1),
            ("max_length", max_length, 1),
            ("draft_tokens", draft_tokens, 0),
        ):
            check("State", isinstance(value, int) and value >= low,
                  f"`{name}` must be an integer of at least {low}, got {value!r}")  # fmt: skip
        if ssm_dtype is None:
            ssm_dtype = getattr(torch, config.mamba_ssm_cache_dtype)
            ssm_dtype = torch.float64 if dtype == torch.float64 else ssm_dtype
        for name, kind in (("dtype", dtype), ("ssm_dtype", ssm_dtype)):
            if kind not in FLOATS:
                raise TypeError(f"State: `{name}` is {kind}, expected a floating dtype")
        self.slots, self.max_length, self.draft_tokens = slots, max_length, draft_tokens
        zeros = lambda *shape, kind=dtype: torch.zeros(*shape, dtype=kind, device=device)  # noqa: E731
        self.conv: dict[int, torch.Tensor] = {}
        self.ssm: dict[int, torch.Tensor] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for index, letter in enumerate(config.pattern + config.mtp_pattern):
            if letter == "M":
                window = config.conv_kernel - 1 + draft_tokens
                # Channels are the fast axis: the layout of the convolution's kernels.
                self.conv[index] = zeros(slots, window, config.conv_dim).transpose(1, 2)
                heads, width = config.mamba_num_heads, config.mamba_head_dim
                shape = (slots, draft_tokens + 1, heads, width, config.ssm_state_size)
                self.ssm[index] = zeros(*shape, kind=ssm_dtype)
            elif letter == "*":
                shape = (slots, max_length, config.num_key_value_heads, config.head_dim)
                self.keys[index], self.values[index] = zeros(*shape), zeros(*shape)
        # One entry more than there are slots: padding rows read and write the last.
        self._lengths = zeros(slots + 1, kind=torch.int32)
        self._mtp_lengths = zeros(slots + 1, kind=torch.int32)
        self._accepted = zeros(slots + 1, kind=torch.int32).fill_(1)
        self._window = config.conv_kernel - 1
        self._pending: tuple[torch.Tensor, int] | None = None

    @property
    def lengths(self) -> torch.Tensor:
        return self._lengths[:-1]

    @property
    def mtp_lengths(self) -> torch.Tensor:
        return self._mtp_lengths[:-1]

    @property
    def accepted(self) -> torch.Tensor:
        return self._accepted[:-1]

    @property
    def device(self) -> torch.device:
        return self._lengths.device

    def accept(self, counts: torch.Tensor | Sequence[int] | None = None) -> None:
        """Keep the first ``counts[b]`` tokens of every row of the last decode call.

        The rest is forgotten, as if it had never been computed. Exactly one accept follows every
        decode call of the trunk.

        Args:
            counts: (B,), 1 to T; None: all tokens of all rows. Entries of padding rows are ignored.
        """
        check("State.accept", self._pending is not None, "there is no decode call to accept")
        slots, tokens = self._pending
        counts = self._counts("State.accept", counts, slots, tokens)
        if self.device.type == "cpu":
            live = counts[slots >= 0]
            check("State.accept", bool(((live >= 1) & (live <= tokens)).all()),
                  f"`counts` must be from 1 to {tokens}, got {counts.tolist()}")  # fmt: skip
        rows = self._rows(slots)
        self._accepted[rows] = counts
        self._lengths[rows] += counts
        self._pending = None

    def advance_mtp(
        self, counts: torch.Tensor | Sequence[int], slots: torch.Tensor | None = None
    ) -> None:
        """Move the MTP block's lengths by ``counts`` (B,), forward over what it decoded or back."""
        slots = self.check_slots(slots, len(counts))
        self._mtp_lengths[self._rows(slots)] += self._counts("State.advance_mtp", counts, slots, 0)

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Forget the sequences in ``slots``, by default all. They can then start anew."""
        rows = list(range(self.slots)) if slots is None else list(slots)
        for tensor in (*self.conv.values(), *self.ssm.values(), self._lengths, self._mtp_lengths):
            tensor[rows] = 0
        self._accepted[rows] = 1

    def fork(self, source: int, target: int) -> None:
        """Make slot ``target`` a copy of slot ``source``, for a second continuation."""
        self._settled("State.fork")
        for tensor in self._tensors():
            tensor[target] = tensor[source]

    def snapshot(self) -> list[torch.Tensor]:
        """A copy of everything, for :meth:`restore`."""
        self._settled("State.snapshot")
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        """Return to a snapshot, also from within an unaccepted decode call."""
        for tensor, saved in zip(self._tensors(), snapshot, strict=True):
            tensor.copy_(saved)
        self._pending = None

    def check_slots(self, slots: torch.Tensor | None, rows: int) -> torch.Tensor:
        """``slots`` (rows,) int32, or 0, 1, 2, ... for None."""
        if slots is None:
            check("State", rows <= self.slots, f"{rows} rows, but {self.slots} slots")
            return torch.arange(rows, dtype=torch.int32, device=self.device)
        check_tensor("State", "slots", slots, shape=(rows,), dims="(B,)", dtypes=(torch.int32,),
                     device=self.device)  # fmt: skip
        return slots

    def _rows(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.where(slots < 0, self.slots, slots).long()

    def _counts(self, where, counts, slots, tokens) -> torch.Tensor:
        if counts is None:
            return torch.full_like(slots, tokens)
        counts = torch.as_tensor(counts, device=self.device).to(torch.int32)
        check_tensor(where, "counts", counts, shape=slots.shape, dims="(B,)")
        return counts

    def _tensors(self) -> list[torch.Tensor]:
        caches = (self.conv, self.ssm, self.keys, self.values)
        lengths = [self._lengths, self._mtp_lengths, self._accepted]
        return [tensor for cache in caches for tensor in cache.values()] + lengths

    def _settled(self, where: str) -> None:
        check(where, self._pending is None, "the last decode call awaits `accept`")


class Run(Protocol):
    """One model call: how its mixers look across tokens. ``layer`` numbers the layers."""

    def conv(self, layer, x, weight, bias) -> torch.Tensor:
        """Causal convolution and SiLU of x (B, T, channels)."""

    def scan(self, layer, x, dt, A, B, C, *, D, dt_bias) -> torch.Tensor:
        """Mamba-2 scan of x (B, T, heads, head_dim)."""

    def attend(self, layer, q, k, v) -> torch.Tensor:
        """Causal attention of q (B, T, heads, head_dim)."""

    def commit(self) -> None:
        """All layers have run."""


class Packed:
    """Rows, or the sequences ``cu_seqlens`` packs into one row, each from its beginning."""

    def __init__(self, config: NemotronHConfig, cu_seqlens: torch.Tensor | None):
        self.config, self.cu_seqlens = config, cu_seqlens

    def conv(self, layer, x, weight, bias):
        y = nemokernels.causal_conv1d_fn(
            x.transpose(1, 2), weight, bias, activation="silu", cu_seqlens=self.cu_seqlens
        )
        return y.transpose(1, 2)

    def scan(self, layer, x, dt, A, B, C, *, D, dt_bias):
        return nemokernels.mamba_chunk_scan_combined(
            x, dt, A, B, C, self.config.chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True,
            dt_limit=self.config.time_step_limit, cu_seqlens=self.cu_seqlens,
        )  # fmt: skip

    def attend(self, layer, q, k, v):
        return nemokernels.attention(q, k, v, cu_seqlens=self.cu_seqlens)

    def commit(self):
        pass


class Prefill:
    """Any number of tokens per sequence, each continuing its slot, all of them kept.

    Rows are treated as packed sequences, so one path serves both. Reads the lengths on the host.
    """

    def __init__(
        self,
        config: NemotronHConfig,
        state: State,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        slots: torch.Tensor | None,
        *,
        mtp: bool,
    ):
        state._settled("Prefill")
        self.config, self.state, self.mtp = config, state, mtp
        rows, length = tokens.shape
        if cu_seqlens is None:
            cu_seqlens = length * torch.arange(rows + 1, dtype=torch.int32, device=tokens.device)
        else:
            check_tensor("Prefill", "cu_seqlens", cu_seqlens, shape=(None,),
                         dtypes=(torch.int32,), device=state.device)  # fmt: skip
        self.cu_seqlens, self.bounds = cu_seqlens, cu_seqlens.tolist()
        self.slots = state.check_slots(slots, len(self.bounds) - 1)
        self.lengths = state._mtp_lengths if mtp else state._lengths
        self.starts = self.lengths[state._rows(self.slots)].tolist()
        self.live = [(i, slot) for i, slot in enumerate(self.slots.tolist()) if slot >= 0]
        for i, slot in self.live:
            end = self.starts[i] + self.bounds[i + 1] - self.bounds[i]
            check("Prefill", end <= state.max_length,
                  f"slot {slot} would hold {end} tokens, but `max_length` is "
                  f"{state.max_length}")  # fmt: skip

    def conv(self, layer, x, weight, bias):
        state, window = self.state, self.state._window
        initial = x.new_zeros(len(self.starts), x.shape[-1], window)
        for i, slot in self.live:
            first = int(state._accepted[slot]) - 1
            initial[i] = state.conv[layer][slot, :, first : first + window]
        y, final = nemokernels.causal_conv1d_fn(
            x.flatten(0, 1)[None].transpose(1, 2), weight, bias, initial_states=initial,
            return_final_states=True, activation="silu", cu_seqlens=self.cu_seqlens,
        )  # fmt: skip
        for i, slot in self.live:
            state.conv[layer][slot, :, :window] = final[i]
        return y.transpose(1, 2).reshape(x.shape)

    def scan(self, layer, x, dt, A, B, C, *, D, dt_bias):
        ssm, shape = self.state.ssm[layer], x.shape
        initial = ssm.new_zeros(len(self.starts), *ssm.shape[2:])
        for i, slot in self.live:
            initial[i] = ssm[slot, int(self.state._accepted[slot]) - 1]
        x, dt, B, C = (t.flatten(0, 1)[None] for t in (x, dt, B, C))
        y, final = nemokernels.mamba_chunk_scan_combined(
            x, dt, A, B, C, self.config.chunk_size, D=D, dt_bias=dt_bias, initial_states=initial,
            cu_seqlens=self.cu_seqlens, dt_softplus=True, dt_limit=self.config.time_step_limit,
            return_final_states=True,
        )  # fmt: skip
        for i, slot in self.live:
            ssm[slot, 0] = final[i].to(ssm.dtype)
        return y.view(shape)

    def attend(self, layer, q, k, v):
        keys, values = self.state.keys[layer], self.state.values[layer]
        shape, (q, k, v) = q.shape, (t.flatten(0, 1) for t in (q, k, v))
        for i, slot in self.live:
            new, start = slice(self.bounds[i], self.bounds[i + 1]), self.starts[i]
            end = start + new.stop - new.start
            keys[slot, start:end] = k[new].to(keys.dtype)
            values[slot, start:end] = v[new].to(values.dtype)
        if not any(self.starts):
            out = nemokernels.attention(q[None], k[None], v[None], cu_seqlens=self.cu_seqlens)
            return out.view(shape)
        out = torch.zeros_like(q)
        for i, slot in self.live:
            new = slice(self.bounds[i], self.bounds[i + 1])
            end = self.starts[i] + new.stop - new.start
            past = (cache[slot, :end].to(q.dtype)[None] for cache in (keys, values))
            out[new] = nemokernels.attention(q[new][None], *past)[0]
        return out.view(shape)

    def commit(self):
        lengths = self.cu_seqlens.diff()
        rows = self.state._rows(self.slots)
        self.lengths[rows] += lengths
        if not self.mtp:
            self.state._accepted[rows] = 1


class Decode:
    """A few tokens per row, computed like one token after the other."""

    def __init__(
        self,
        config: NemotronHConfig,
        state: State,
        tokens: torch.Tensor,
        slots: torch.Tensor | None,
        *,
        mtp: bool,
    ):
        rows, length = tokens.shape
        if not mtp:
            state._settled("Decode")
            check("Decode", 1 <= length <= state.draft_tokens + 1,
                  f"`tokens` has {length} per row, expected 1 to draft_tokens + 1 = "
                  f"{state.draft_tokens + 1}")  # fmt: skip
        self.config, self.state, self.mtp, self.length = config, state, mtp, length
        self.slots = state.check_slots(slots, rows)
        index = state._rows(self.slots)
        self.lengths = (state._mtp_lengths if mtp else state._lengths)[index]
        self.accepted = state._accepted[index]

    def conv(self, layer, x, weight, bias):
        y = nemokernels.causal_conv1d_update(
            x.transpose(1, 2), self.state.conv[layer], weight, bias, "silu",
            conv_state_indices=self.slots, num_accepted_tokens=self.accepted,
        )  # fmt: skip
        return y.transpose(1, 2)

    def scan(self, layer, x, dt, A, B, C, *, D, dt_bias):
        ssm, (rows, tokens, heads, width) = self.state.ssm[layer], x.shape
        per_slot = ssm.shape[1]
        places = self.slots[:, None] * per_slot + torch.arange(
            per_slot, dtype=torch.int32, device=x.device
        )
        low, high = self.config.time_step_limit
        if (low, high) != (0.0, float("inf")):  # the recurrent kernel has no limit of its own
            dt = F.softplus(dt.to(acc_dtype(x)) + dt_bias).clamp(low, high)
            dt_bias = torch.zeros_like(dt_bias)
        y = nemokernels.selective_state_update(
            ssm.flatten(0, 1),
            x.flatten(0, 1),
            dt.flatten(0, 1)[..., None].expand(-1, -1, width),
            A[:, None, None].expand(-1, width, ssm.shape[-1]),
            B.flatten(0, 1),
            C.flatten(0, 1),
            D[:, None].expand(-1, width),
            dt_bias=dt_bias[:, None].expand(-1, width),
            dt_softplus=(low, high) == (0.0, float("inf")),
            state_batch_indices=torch.where(self.slots[:, None] < 0, -1, places),
            num_accepted_tokens=self.accepted,
            cu_seqlens=tokens * torch.arange(rows + 1, dtype=torch.int32, device=x.device),
        )
        return y.view(rows, tokens, heads, width)

    def attend(self, layer, q, k, v):
        keys, values = self.state.keys[layer], self.state.values[layer]
        return nemokernels.attention_with_cache(
            q, k, v, keys, values, self.lengths, slots=self.slots
        )

    def commit(self):
        if not self.mtp:
            self.state._pending = (self.slots, self.length)
