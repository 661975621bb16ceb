"""Train a reward model on pairs of responses: a better and a worse one to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from nemokernels.models import RewardModel, pairwise_loss
from nemokernels.train.data import Corpus, DataError, shuffled


class PairBatch(NamedTuple):
    """Sequences packed end to end: chosen, rejected, chosen, ...; ``margins`` one per pair."""

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    margins: torch.Tensor


class Pairs:
    """Pairs of token sequences in an order that is a pure function of (seed, step).

    Args:
        chosen, rejected: prompt and response of every pair, each up to its end-of-response token.
        margins: least difference that the rewards of each pair should have; by default 0.
        windows: pairs per optimizer step, over all ranks.
        seq_len: length of the longest sequence allowed.
        seed: seed of the order.

    Raises:
        DataError: fewer pairs than one step needs, lists of different lengths, or a sequence that
            is empty or too long.
    """

    def __init__(
        self,
        chosen: Sequence[Sequence[int]],
        rejected: Sequence[Sequence[int]],
        margins: Sequence[float] | None = None,
        *,
        windows: int,
        seq_len: int,
        seed: int,
    ):
        self.count, self.windows, self.seed = len(chosen), windows, seed
        margins = [0.0] * self.count if margins is None else margins
        if not self.count == len(rejected) == len(margins):
            raise DataError(
                f"{self.count} chosen, {len(rejected)} rejected sequences, {len(margins)} margins"
            )
        if self.count < windows:
            raise DataError(f"{self.count} pairs, fewer than one step needs ({windows})")
        self.sequences = [torch.as_tensor(row) for pair in zip(chosen, rejected) for row in pair]
        lengths = torch.tensor([len(row) for row in self.sequences])
        if not 1 <= lengths.min() <= lengths.max() <= seq_len:
            raise DataError(f"sequences have {lengths.min()} to {lengths.max()} tokens, expected 1 "
                            f"to {seq_len}")  # fmt: skip
        self.margins = torch.tensor(margins, dtype=torch.float32)
        self.corpus = Corpus(torch.cat(self.sequences), lengths.cumsum(0))

    def at(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """The part of a step's pairs that ``rank`` of ``world`` works on."""
        epoch, position = divmod(step, self.count // self.windows)
        first = position * self.windows
        order = shuffled(self.count, self.seed, epoch)
        mine = order[first : first + self.windows][rank::world]
        rows = [self.sequences[2 * pair + side] for pair in mine.tolist() for side in (0, 1)]
        lengths = torch.tensor([0, *map(len, rows)])
        return PairBatch(torch.cat(rows)[None], lengths.cumsum(0).int(), self.margins[mine])


class PairObjective(nn.Module):
    """The mean pairwise loss, and the share of pairs whose rejected response scores no lower.

    An ``objective`` for the Trainer; see :func:`~nemokernels.models.pairwise_loss`.
    """

    def __init__(self, model: RewardModel):
        super().__init__()
        self.model = model

    def forward(self, batch: PairBatch, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the batch divided by ``totals`` (2,), the global numbers of pairs."""
        model = self.model
        rewards = model.scalar(model(batch.tokens, cu_seqlens=batch.cu_seqlens))
        chosen, rejected = rewards[0::2], rewards[1::2]
        loss = pairwise_loss(chosen, rejected, batch.margins).sum() / totals[0]
        wrong = (chosen <= rejected).sum() / totals[1]
        return loss, torch.stack([loss.detach(), wrong])

    def label_counts(self, batch: PairBatch) -> torch.Tensor:
        """(2,): the number of pairs in the batch, for the loss and for the share."""
        return torch.full((2,), float(len(batch.margins)), device=batch.tokens.device)
