"""What a router does in training besides routing: it counts tokens and balances loads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemokernels import balance_loss

__all__ = ["Balance", "carrying", "recomputing"]


class Balance(NamedTuple):
    """The sequence-level auxiliary loss of a router, averaged over a whole optimizer step.

    Attributes:
        coefficient: its weight; 1e-4 for Nemotron 3 Nano and Super.
        length: tokens per sequence; the last of a batch may be shorter.
        sequences: number of sequences in a step, over all its micro-batches and ranks.
    """

    coefficient: float
    length: int
    sequences: int

    def loss(self, logits: torch.Tensor, top_k: int) -> torch.Tensor:
        """For logits (T, E), the sum of :func:`nemokernels.balance_loss` over the sequences,
        divided by ``sequences``."""
        tokens = logits.shape[0]
        here = -(-tokens // self.length)
        bounds = torch.arange(here + 1, device=logits.device) * self.length
        share = self.coefficient * here / self.sequences
        bounds = bounds.clamp(max=tokens)
        return balance_loss(logits, top_k=top_k, cu_seqlens=bounds, coefficient=share)


class _Carrying(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        (loss,) = ctx.saved_tensors
        return dx, torch.ones_like(loss)


def carrying(x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Return x; a backward that passes through it also differentiates ``loss``.

    So a layer's own loss need not be returned by the model, and it stays right when a layer is
    recomputed.
    """
    return _Carrying.apply(x, loss)


def recomputing() -> bool:
    """Whether this forward runs inside a backward, for activations that were not kept.

    What is counted was counted in the first run already. torch.compile keeps such effects out of
    its recomputation by itself.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
