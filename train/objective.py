"""The training loss: the next token's cross-entropy and the MTP block's."""

from __future__ import annotations

import torch
from torch import nn

from nemokernels import linear_cross_entropy
from nemokernels.models import CausalLM
from nemokernels.train.data import IGNORE, PAD, Batch, shift


class Objective(nn.Module):
    """``L = L_main + (w / K) * sum_k L_k`` over packed sequences.

    ``L_main`` is the mean cross-entropy of the next token. ``L_k`` is that of the MTP block applied
    ``k`` times: at position i it sees tokens up to i+k and predicts token i+k+1. A label never
    crosses a sequence boundary; positions without a label are ignored. ``w`` is the weight of the
    MTP loss (0.3 for Nemotron 3 Super, 0.1 for Ultra), ``K`` the number of depths (2 for both).
    Image tokens are not used as labels.

    The objective is a module that contains the model, so that FSDP gathers the embedding and the
    head once for all losses of a step.
    """

    def __init__(self, model: CausalLM, *, mtp_depths: int, mtp_weight: float):
        super().__init__()
        self.model, self.mtp_weight = model, mtp_weight
        self.mtp_depths = mtp_depths if model.config.mtp_pattern else 0

    def forward(
        self, batch: Batch, labels_total: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the losses, divided by the global label counts ``labels_total`` (1 + depths,).

        Returns the loss to differentiate and the value of every term: main, depth 1, depth 2, ...
        Their sums over ranks and micro-batches are the global means.
        """
        model, cu_seqlens = self.model, batch.cu_seqlens
        seen = {}
        if batch.pixels is not None:
            seen["image_features"] = model.image_features(batch.pixels)
        hidden = model.hidden(batch.tokens, cu_seqlens=cu_seqlens, **seen)
        terms = [self._loss(hidden, self._labels(batch, 1)) / labels_total[0]]
        for depth in range(1, self.mtp_depths + 1):
            ahead = shift(batch, depth, PAD)[None]
            hidden = model.mtp_hidden(hidden, ahead, cu_seqlens=cu_seqlens)
            labels = self._labels(batch, depth + 1)
            terms.append(self._loss(hidden, labels) / labels_total[depth])
        loss = terms[0]
        if self.mtp_depths:
            loss = loss + self.mtp_weight / self.mtp_depths * sum(terms[1:])
        return loss, torch.stack([t.detach() for t in terms])

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(
            hidden[0], self.model.lm_head.weight, labels, ignore_index=IGNORE, reduction="sum"
        )

    def label_counts(self, batch: Batch) -> torch.Tensor:
        """(1 + depths,): how many labels each term of this batch has."""
        depths = range(1, self.mtp_depths + 2)
        return torch.stack([(self._labels(batch, by) != IGNORE).sum() for by in depths]).float()

    def _labels(self, batch: Batch, by: int) -> torch.Tensor:
        """(n,): the token ``by`` positions ahead; ignored past the end and at image tokens."""
        labels = shift(batch, by, IGNORE)
        image = self.model.image_token_id
        return labels if image is None else labels.masked_fill(labels == image, IGNORE)
