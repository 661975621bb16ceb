"""Experts over the ranks of a process group: tokens travel to their experts and back.

Rank p of N holds experts p * E / N to (p + 1) * E / N. Every rank routes its own tokens to all
experts. A token travels once to each rank that holds some of its experts, whatever their number,
and comes back as one row. No row is dropped or padded. T tokens, k slots each, X the experts'
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from nemokernels import Route, moe_experts, ragged_route

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
    tokens. A rank adds up a token's slots that live there, in their order, as without a group, and
    rounds the sum to x's dtype; the token adds up these sums in the order of the ranks, in float32
    (float64 for float64), with one cast at the end. So y differs from that of one process by half
    an ulp of each rank's sum at most, beside the order of the wide sum and the last rounding; so
    does the gradient of x, and the others have the same cast points. An expert computes the rows of
    rank 0 first, then of rank 1 and so on, each rank's in the order of its slots. So equal inputs
    give equal bits.

    Forward there are five exchanges: how much goes where, the tokens, the weights and the local
    experts of their slots, and what the experts return; backward three. The host waits for the
    first, so a CUDA graph cannot capture the call. Kept for the backward are the rows that arrived,
    each a token of some rank, their slots' hidden layers, and the routing.

    Args:
        x: (T, X), this rank's tokens.
        up, down: (E / N, F, X) and (E / N, X, F), this rank's experts.
        route: of this rank's tokens, over all E experts.
        group: of N ranks.

    Returns:
        y (T, X) in x's dtype.
    """
    tokens, slots, message, row_trip, slot_trip = _plan(route, up.shape[0], group)
    arrived, weights = _Dispatch.apply(x, route.weights, tokens, slots, row_trip, slot_trip)
    message = slot_trip.there(message)
    row = (message & 1).cumsum(0)  # of each slot, counted from 1
    starts = torch.arange(arrived.shape[0] + 1, device=x.device)
    starts = torch.searchsorted(row, starts, right=True, out_int32=True)
    here = ragged_route(weights, message >> 1, starts, num_experts=up.shape[0])
    return _Combine.apply(moe_experts(arrived, up, down, here), tokens, x.shape[0], row_trip)


@dataclass(frozen=True)
class _Trip:
    """How many rows of a tensor this rank sends to each rank of the group, and how many come."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup

    def there(self, tensor: torch.Tensor) -> torch.Tensor:
        return _exchange(tensor, self.sent, self.received, self.group)

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        return _exchange(tensor, self.received, self.sent, self.group)


def _exchange(tensor: torch.Tensor, sent: list[int], received: list[int], group) -> torch.Tensor:
    arrived = tensor.new_empty(sum(received), *tensor.shape[1:])
    dist.all_to_all_single(arrived, tensor.contiguous(), received, sent, group=group)
    return arrived


def _plan(route: Route, local: int, group: dist.ProcessGroup):
    """What this rank sends, sorted by rank, then by token, then by slot.

    Returns the tokens that travel, one per token and rank; the slots (T * k); a message (T * k)
    about each, which is twice its expert's number on that rank, plus one if it is the first slot of
    its row; and the trips of the rows and of the slots.
    """
    ranks, experts = group.size(), route.experts.flatten()
    rank, slots = (experts // local).sort(stable=True)
    token = slots // route.experts.shape[1]
    first = torch.ones_like(token, dtype=torch.bool)
    first[1:] = (token[1:] != token[:-1]) | (rank[1:] != rank[:-1])
    slots_of = route.counts.view(ranks, local).sum(1)
    ends = torch.cat([slots_of.new_zeros(1), first.cumsum(0)])[slots_of.cumsum(0)]
    sent = torch.stack([ends.diff(prepend=ends.new_zeros(1)), slots_of], 1)
    arriving = torch.empty_like(sent)
    dist.all_to_all_single(arriving, sent, group=group)
    sent, received = torch.stack([sent, arriving]).mT.tolist()
    trips = (_Trip(*counts, group) for counts in zip(sent, received))
    message = experts[slots] % local * 2 + first
    return token[first], slots, message, *trips


class _Dispatch(torch.autograd.Function):
    """Send tokens, one row per token and rank, and the weights of the slots that are there."""

    @staticmethod
    def forward(ctx, x, weights, tokens, slots, row_trip, slot_trip):
        ctx.shape, ctx.trips = weights.shape, (row_trip, slot_trip)
        ctx.save_for_backward(tokens, slots)
        return row_trip.there(x[tokens]), slot_trip.there(weights.flatten()[slots])

    @staticmethod
    @once_differentiable
    def backward(ctx, drows, dweights):
        (tokens, slots), (row_trip, slot_trip) = ctx.saved_tensors, ctx.trips
        dx = _token_sum(row_trip.back(drows), tokens, ctx.shape[0], row_trip.sent)
        dweights = slot_trip.back(dweights)
        by_slot = torch.empty_like(dweights)
        by_slot[slots] = dweights
        return dx, by_slot.view(ctx.shape), None, None, None, None


class _Combine(torch.autograd.Function):
    """Bring the ranks' sums back to their tokens and add them up."""

    @staticmethod
    def forward(ctx, sums, tokens, count, trip):
        ctx.trip = trip
        ctx.save_for_backward(tokens)
        return _token_sum(trip.back(sums), tokens, count, trip.sent)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (tokens,) = ctx.saved_tensors
        return ctx.trip.there(dy[tokens]), None, None, None


def _token_sum(
    rows: torch.Tensor, tokens: torch.Tensor, count: int, sizes: list[int]
) -> torch.Tensor:
    """The sum of each token's rows, rank after rank, in float32 (float64), rounded once."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(count, rows.shape[1], dtype=wide)
    for part, here in zip(rows.split(sizes), tokens.split(sizes)):
        total.index_add_(0, here, part.to(wide))  # no token twice: nothing depends on an order
    return total.to(rows.dtype)
