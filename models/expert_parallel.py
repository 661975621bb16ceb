"""Experts over the ranks of a process group: rows travel to their experts and back.

Rank p of N holds experts p * E / N to (p + 1) * E / N. Every rank routes its own tokens to all
experts. No row is dropped or padded. T tokens, k slots each, X the experts' width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from nemokernels import Route, moe_experts

__all__ = ["moe_experts_over"]


@torch.compiler.disable
def moe_experts_over(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    route: Route,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """:func:`nemokernels.moe_experts` with the experts spread over the ranks of ``group``.

    All ranks of the group must call it together, forward and backward, each with any number of
    tokens. An expert computes the rows of rank 0 first, then of rank 1 and so on, each rank's in
    the order of its slots; a token adds up its slots in order. So equal inputs give equal bits. As
    without a group, the result of a slot is rounded to x's dtype; unlike there, so is its gradient.

    There are three exchanges: how many rows go where, the rows, and what the experts return. The
    host waits for the first, so a CUDA graph cannot capture the call.

    Args:
        x: (T, X), this rank's tokens.
        up, down: (E / N, F, X) and (E / N, X, F), this rank's experts.
        route: of this rank's tokens, over all E experts.
        group: of N ranks.

    Returns:
        y (T, X) in x's dtype.
    """
    local, ranks = up.shape[0], group.size()
    counts = route.counts.view(ranks, local)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    sent, received = torch.stack([counts.sum(1), arriving.sum(1)]).tolist()
    trip = (route.order.long(), sent, received, group)
    rows = _Dispatch.apply(x, route.weights.shape[1], *trip)
    y = moe_experts(rows, up, down, _arrived(arriving, sum(received), route.weights))
    return _Combine.apply(y, route.weights, *trip)


def _arrived(counts: torch.Tensor, rows: int, weights: torch.Tensor) -> Route:
    """The route of rows that arrived sorted by rank, then by expert: one slot of weight 1 each."""
    ranks, local = counts.shape
    numbers = torch.arange(local, dtype=torch.int32, device=counts.device).repeat(ranks)
    experts = numbers.repeat_interleave(counts.flatten(), output_size=rows)
    total = counts.sum(0, dtype=torch.int32)
    return Route(
        weights.new_ones(rows, 1),
        experts[:, None],
        total,
        total.cumsum(0, dtype=torch.int32),
        experts.sort(stable=True).indices.int(),
    )


def _exchange(rows: torch.Tensor, sent: list[int], received: list[int], group) -> torch.Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


class _Dispatch(torch.autograd.Function):
    """Send one row per slot, sorted by expert, to the ranks that hold the experts."""

    @staticmethod
    def forward(ctx, x, slots, order, sent, received, group):
        ctx.slots, ctx.trip = slots, (received, sent, group)
        ctx.save_for_backward(order)
        return _exchange(x[order // slots], sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        (order,) = ctx.saved_tensors
        back = _by_slot(_exchange(drows, *ctx.trip), order, ctx.slots)
        return _slot_sum(back, None), None, None, None, None, None


class _Combine(torch.autograd.Function):
    """Bring the rows back to their tokens: ``y_t = sum_j w_tj row_tj``."""

    @staticmethod
    def forward(ctx, rows, weights, order, sent, received, group):
        slots = _by_slot(_exchange(rows, received, sent, group), order, weights.shape[1])
        ctx.trip = (sent, received, group)
        ctx.save_for_backward(slots, weights, order)
        return _slot_sum(slots, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        slots, weights, order = ctx.saved_tensors
        wide = dy.to(weights.dtype)
        dweights, dslots = torch.empty_like(weights), torch.empty_like(slots)
        for j in range(weights.shape[1]):
            dweights[:, j] = (slots[:, j].to(wide.dtype) * wide).sum(-1)
            dslots[:, j] = weights[:, j, None] * wide
        drows = _exchange(dslots.flatten(0, 1)[order], *ctx.trip)
        return drows, dweights, None, None, None, None


def _by_slot(rows: torch.Tensor, order: torch.Tensor, slots: int) -> torch.Tensor:
    """(T, k, X) from rows sorted by expert."""
    out = torch.empty_like(rows)
    out[order] = rows
    return out.view(-1, slots, rows.shape[1])


def _slot_sum(slots: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """sum_j w_tj * slots_tj in the order of j, in float32 (float64 for float64), rounded once."""
    wide = torch.promote_types(slots.dtype, torch.float32)
    total = slots.new_zeros(slots.shape[0], slots.shape[2], dtype=wide)
    for j in range(slots.shape[1]):
        part = slots[:, j].to(wide)
        total += part if weights is None else part * weights[:, j, None]
    return total.to(slots.dtype)
