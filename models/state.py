"""What a model remembers of its sequences: convolution windows, SSM states, keys, values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemokernels._checks import FLOATS, check, check_tensor

__all__ = ["State"]


class State:
    """Caches of ``slots`` sequences: convolution windows, SSM states, keys and values.

    A model may put ``meta_tokens`` of its own before every sequence. A slot holds them from the
    start (:meth:`begin_with`); neither ``max_length`` nor the lengths count them.

    Args:
        config: the model's; its ``mamba_layers`` and ``kv_heads`` say which layers keep what.
        slots: sequences held at once.
        max_length: tokens a sequence may have, drafts included.
        draft_tokens: how many tokens beyond the first one decode call may take. Every slot keeps
            one SSM state per token of a call.
        dtype: the convolution windows'.
        kv_dtype: the keys' and values', also float8_e4m3fn; None: ``dtype``.
        kv_scales: attention layer -> scales of its E4M3 keys and values (value = scale * code); 1
            where absent.
        ssm_dtype: the SSM states'; None: the config's ``mamba_ssm_cache_dtype``, or float64 for a
            float64 model.
        device: where it lives.

    Attributes:
        conv: per Mamba layer, (slots, conv_dim, W + draft_tokens), a ring: the input at position n
            of a sequence is entry ``n % (W + draft_tokens)``.
        ssm: per Mamba layer, (slots, draft_tokens + 1, heads, head_dim, state_size), a ring: the
            state after position n is entry ``n % (draft_tokens + 1)``.
        keys, values: per attention layer, (slots, prefix + max_length, KV heads, head_dim). Layers
            of the MTP block count on from the trunk's.
        prefix: number of places at the start of every slot that the meta tokens take.
        lengths, mtp_lengths: (slots,) int32, tokens held for the trunk and for the MTP block. They
            alone define what is current: rejected drafts are simply not counted.
    """

    def __init__(
        self,
        config,
        slots: int,
        max_length: int,
        *,
        draft_tokens: int = 0,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        kv_scales: dict[int, tuple[float, float]] | None = None,
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
            kept = config.mamba_ssm_cache_dtype if config.mamba_layers else "float32"
            ssm_dtype = torch.float64 if dtype == torch.float64 else getattr(torch, kept)
        kv_dtype = kv_dtype or dtype
        kv_kinds = (*FLOATS, torch.float8_e4m3fn)
        for name, kind, known in (("dtype", dtype, FLOATS), ("ssm_dtype", ssm_dtype, FLOATS),
                                  ("kv_dtype", kv_dtype, kv_kinds)):  # fmt: skip
            if kind not in known:
                raise TypeError(f"State: `{name}` is {kind}, expected a floating dtype")
        self.slots, self.max_length, self.draft_tokens = slots, max_length, draft_tokens
        zeros = lambda *shape, kind=dtype: torch.zeros(*shape, dtype=kind, device=device)  # noqa: E731
        self.conv: dict[int, torch.Tensor] = {}
        self.ssm: dict[int, torch.Tensor] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.prefix = getattr(config, "meta_tokens", 0)
        for index in config.mamba_layers:
            # Channels are the fast axis: the layout of the convolution's kernels.
            ring = zeros(slots, config.conv_kernel + draft_tokens, config.conv_dim)
            self.conv[index] = ring.transpose(1, 2)
            heads, width = config.mamba_num_heads, config.mamba_head_dim
            shape = (slots, draft_tokens + 1, heads, width, config.ssm_state_size)
            self.ssm[index] = zeros(*shape, kind=ssm_dtype)
        for index, heads in config.kv_heads.items():
            shape = (slots, self.prefix + max_length, heads, config.head_dim)
            self.keys[index], self.values[index] = (zeros(*shape, kind=kv_dtype) for _ in "kv")
        self.kv_scales = {} if kv_dtype != torch.float8_e4m3fn else dict(kv_scales or {})
        # One entry more than there are slots: padding rows read and write the last one.
        self.all_lengths = zeros(slots + 1, kind=torch.int32)
        self.all_mtp_lengths = zeros(slots + 1, kind=torch.int32)
        self.pending: tuple[torch.Tensor, int] | None = None
        # What a sequence begins with: zeros, or the tensors that begin_with saved.
        self.beginning: list[torch.Tensor] | None = None

    @property
    def lengths(self) -> torch.Tensor:
        return self.all_lengths[:-1]

    @property
    def mtp_lengths(self) -> torch.Tensor:
        return self.all_mtp_lengths[:-1]

    @property
    def device(self) -> torch.device:
        return self.all_lengths.device

    def accept(self, counts: torch.Tensor | Sequence[int] | None = None) -> None:
        """Keep the first ``counts[b]`` tokens of every row of the last decode call.

        The others are forgotten, as if they had never been computed. Every decode call of the trunk
        must be followed by exactly one accept.

        Args:
            counts: (B,), 1 to T; None: all tokens of all rows. Entries of padding rows are ignored.
        """
        check("State.accept", self.pending is not None, "there is no decode call to accept")
        slots, tokens = self.pending
        counts = self._counts("State.accept", counts, slots, tokens)
        if self.device.type == "cpu":
            live = counts[slots >= 0]
            check("State.accept", bool(((live >= 1) & (live <= tokens)).all()),
                  f"`counts` must be from 1 to {tokens}, got {counts.tolist()}")  # fmt: skip
        self.all_lengths[self.rows(slots)] += counts
        self.pending = None

    def advance_mtp(
        self, counts: torch.Tensor | Sequence[int], slots: torch.Tensor | None = None
    ) -> None:
        """Move the MTP block's lengths by ``counts`` (B,), forward over what it decoded or back."""
        slots = self.check_slots(slots, len(counts))
        counts = self._counts("State.advance_mtp", counts, slots, 0)
        self.all_mtp_lengths[self.rows(slots)] += counts

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Forget the sequences in ``slots``, by default all, so that new ones can start there."""
        self.check_settled("State.reset")
        rows = list(range(self.slots)) if slots is None else list(slots)
        for tensor in (*self._recurrent(), self.all_lengths, self.all_mtp_lengths):
            tensor[rows] = 0
        for tensor, first in zip(self._recurrent(), self.beginning or ()):
            tensor[rows] = first

    def begin_with(self, slot: int) -> None:
        """Let every sequence begin with what ``slot`` holds now: in all slots at once, and in every
        slot that is reset later. Of the keys and values, only the ``prefix`` places are copied."""
        self.check_settled("State.begin_with")
        self.beginning = [tensor[slot].clone() for tensor in self._recurrent()]
        for tensor, first in zip(self._recurrent(), self.beginning):
            tensor[:] = first
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[:, : self.prefix] = tensor[slot, : self.prefix].clone()

    def fork(self, source: int, target: int) -> None:
        """Make slot ``target`` a copy of slot ``source``, for a second continuation."""
        self.check_settled("State.fork")
        for tensor in self._tensors():
            tensor[target] = tensor[source]

    def snapshot(self) -> list[torch.Tensor]:
        """A copy of everything, for :meth:`restore`."""
        self.check_settled("State.snapshot")
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        """Return to a snapshot, even while a decode call has not been accepted."""
        for tensor, saved in zip(self._tensors(), snapshot, strict=True):
            tensor.copy_(saved)
        self.pending = None

    def check_slots(self, slots: torch.Tensor | None, rows: int) -> torch.Tensor:
        """``slots`` (rows,) int32, or 0, 1, 2, ... for None."""
        if slots is None:
            check("State", rows <= self.slots, f"{rows} rows, but {self.slots} slots")
            return torch.arange(rows, dtype=torch.int32, device=self.device)
        check_tensor("State", "slots", slots, shape=(rows,), dims="(B,)", dtypes=(torch.int32,),
                     device=self.device)  # fmt: skip
        if self.device.type == "cpu" and rows:
            check("State", int(slots.max()) < self.slots,
                  f"`slots` has {int(slots.max())}, but there are {self.slots}")  # fmt: skip
        return slots

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """``slots`` as an index into ``all_lengths`` and its like."""
        return torch.where(slots < 0, self.slots, slots).long()

    def _counts(self, where, counts, slots, tokens) -> torch.Tensor:
        if counts is None:
            counts = torch.full_like(slots, tokens)
        counts = torch.as_tensor(counts, device=self.device).to(torch.int32)
        check_tensor(where, "counts", counts, shape=slots.shape, dims="(B,)")
        return torch.where(slots < 0, 0, counts)  # the padding entry stays zero

    def _recurrent(self) -> list[torch.Tensor]:
        return [*self.conv.values(), *self.ssm.values()]

    def _tensors(self) -> list[torch.Tensor]:
        caches = (self.conv, self.ssm, self.keys, self.values)
        lengths = [self.all_lengths, self.all_mtp_lengths]
        return [tensor for cache in caches for tensor in cache.values()] + lengths

    def check_settled(self, where: str) -> None:
        """Raise while a decode call has not been accepted."""
        check(where, self.pending is None, "the last decode call awaits `accept`")
