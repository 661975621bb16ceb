"""Cross-entropy over a vocabulary that is split over the ranks of a process group.

Every rank computes the same loss. So a sum over ranks passes its gradient on as it is, and what all
ranks hold alike collects its gradient from all of them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return _reduce(dx, dist.ReduceOp.SUM, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _reduce(x, dist.ReduceOp.SUM, group)

    @staticmethod
    def backward(ctx, dout):
        return dout, None


def replicated(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x, the same on every rank; its gradient is the sum of the ranks' gradients."""
    return _Replicated.apply(x, group)


def combine(lse, chosen, total, keep, group):
    """Log-sum-exp, target logit and sum of logits of the whole vocabulary, from each rank's part.

    Two collectives on a few numbers per token. Zero where ``keep`` is false.
    """
    peak = _reduce(lse.detach(), dist.ReduceOp.MAX, group)
    mass, chosen, total = _Sum.apply(torch.stack([(lse - peak).exp(), chosen, total]), group)
    # A token that does not count has lse 0 on every rank, which is no log of anything.
    return torch.where(keep, peak + mass.log(), 0.0), chosen, total


def _reduce(x: torch.Tensor, op: dist.ReduceOp, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group)
    return x
