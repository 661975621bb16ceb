"""Reward models: a language model's trunk and a linear head read at the end of a response.

Shapes: B rows, T tokens, H hidden size, n sequences, K rewards per sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling

from nemokernels._checks import check, check_tensor
from nemokernels.models import names
from nemokernels.models.causal_lm import INTEGERS, CausalLM
from nemokernels.models.fields import ConfigError
from nemokernels.models.linear import Linear
from nemokernels.models.reward_config import RewardConfig
from nemokernels.models.runs import Run
from nemokernels.models.state import State

__all__ = ["IGNORED", "RewardModel", "attribute_loss", "pairwise_loss"]

IGNORED = -100  # an attribute without a label


class RewardModel(CausalLM):
    """A language model of any family with a reward head in place of its own head.

    Args:
        config: of the language model and the head.
        language: the model whose trunk this one takes over. Its head is replaced by the reward
            head, its MTP block is dropped.
    """

    def __init__(self, config: RewardConfig, language: CausalLM):
        super().__init__()
        self.config, self.mtp = config, None
        self._language = [language]  # in a list, so that it is not a submodule
        self.add_module(names.layout(config).trunk.removesuffix("."), language.trunk)
        weight = next(language.trunk.parameters())
        head = Linear(
            config.hidden_size, config.outputs, config.bias, device=weight.device,
            dtype=language.lm_head.weight.dtype,
        )  # fmt: skip
        *path, leaf = config.head.split(".")
        parent = self
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        if hasattr(parent, leaf):
            raise ConfigError(f"`reward_head.head` is {config.head!r}, which the model has already")
        parent.add_module(leaf, head)
        language.lm_head, language.mtp = head, None

    @classmethod
    def on(cls, language: CausalLM, head: str, **options) -> RewardModel:
        """Put a new reward head on a language model, which the reward model takes over.

        Args:
            language: a language model.
            head: a name for the head's tensors.
            options: ``outputs``, ``bias``, ``weights`` as in :class:`RewardConfig`.
        """
        model = cls(RewardConfig(language.config, head, **options), language)
        for fact in ("file_dtypes", "quantization"):  # what saving asks for
            if hasattr(language, fact):
                setattr(model, fact, getattr(language, fact))
        nn.init.normal_(model.lm_head.weight, std=model.config.initializer_range)
        if model.lm_head.bias is not None:
            nn.init.zeros_(model.lm_head.bias)
        return model.train(language.training)

    @property
    def trunk(self) -> nn.Module:
        return self._language[0].trunk

    @property
    def lm_head(self) -> nn.Module:
        """The reward head, under the name of a language model's head."""
        return self.get_submodule(self.config.head)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        ends: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rewards (n, K) of every sequence.

        Args:
            tokens: (B, T) int64 or int32: rows, padded on the right, or packed sequences in one.
            cu_seqlens: (n + 1,) int32 bounds of the packed sequences.
            ends: (n,) index of the end-of-response token in its sequence, at which the head reads;
                by default the last token. Nothing after it has any influence.

        Raises:
            ValueError: a sequence is empty, or its end lies outside (checked on the CPU).
        """
        hidden = self.hidden(tokens, cu_seqlens=cu_seqlens)
        if cu_seqlens is None:
            starts = torch.arange(len(tokens), device=tokens.device) * tokens.shape[1]
            lengths = torch.full_like(starts, tokens.shape[1])
        else:
            starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        if ends is None:
            ends = lengths - 1
        check_tensor(self.name, "ends", ends, shape=lengths.shape, dims="(n,)", dtypes=INTEGERS,
                     device=tokens.device)  # fmt: skip
        if tokens.device.type == "cpu" and not is_compiling():
            good = ((ends >= 0) & (ends < lengths)).all()
            check(self.name, bool(good), f"`ends` must lie inside sequences of {lengths.tolist()} "
                  f"tokens, got {ends.tolist()}")  # fmt: skip
        return self.lm_head(hidden.flatten(0, 1)[starts + ends])

    def scalar(self, rewards: torch.Tensor) -> torch.Tensor:
        """Sum of rewards (n, K) weighted by ``config.weights``, (n,) in float32."""
        wide = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
        return wide @ wide.new_tensor(self.config.weights)

    def _run(self, *args, **kwargs) -> Run:
        return self._language[0]._run(*args, **kwargs)

    def new_state(self, *args, **kwargs) -> State:
        return self._language[0].new_state(*args, **kwargs)


def pairwise_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """The Bradley-Terry loss ``-log sigmoid(chosen - rejected - margin)`` of every pair (n,)."""
    return -F.logsigmoid(chosen - rejected - margin)


def attribute_loss(rewards: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared error of rewards (n, K), over all labels that are not :data:`IGNORED`.

    It is zero if there are no labels.
    """
    known = labels != IGNORED
    error = torch.where(known, rewards - labels.to(rewards.dtype), 0)
    return error.square().sum() / known.sum().clamp(min=1)
