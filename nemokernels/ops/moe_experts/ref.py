"""Squared-ReLU experts in plain torch: the specification and the CPU leg.

T tokens of width X, E experts of width F, R rows sorted by expert, one per slot. A token has k
slots, R = T * k; in a ragged route, whose weights are (R,), token t has the slots ``starts[t]`` to
``starts[t + 1] - 1``.

Cast points, those of a fused kernel: every product accumulates in the accumulation dtype
(float32; float64 stays float64) and its epilogue is applied before rounding. Rounded to the dtype
of x are hidden (R, F), the rows that leave the down projection, and in the backward the rows of
da, of w * hidden and of dx. Sums over a token's slots run in slot order in the accumulation dtype
with one cast at the end. The forward keeps hidden alone: relu(a) is its square root.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.nn.functional import linear

from nemokernels._registry import acc_dtype


def forward(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor | None,
):
    """y_t = sum_j w_tj * down_e relu(up_e x_t)**2, e the j-th choice of t. Returns y and hidden."""
    acc, slot = acc_dtype(x), slots_of(offsets, order)
    rows = x[tokens_of(slot, weights, starts, x.shape[0])].to(acc)
    hidden = x.new_empty(slot.numel(), up.shape[1])
    out = x.new_empty(slot.numel(), x.shape[1])  # in slot order
    for e, r in segments(offsets):
        hidden[r] = linear(rows[r], up[e].to(acc)).relu_().square_().to(x.dtype)
        out[slot[r]] = linear(hidden[r].to(acc), down[e].to(acc)).to(x.dtype)
    return _token_sum(out, weights, starts, True), hidden


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor | None,
    hidden: torch.Tensor,
):
    """Per row, with g = down_e^T dy_t: dw = hidden . g and da = 2 relu(a) * w * g.

    dx_t sums up_e^T da over the slots of t; dup_e = sum da x_t^T; ddown_e = sum dy_t (w hidden)^T.
    An expert without rows gets exact zeros. Returns dx, dup, ddown, dweights.
    """
    acc, slot = acc_dtype(x), order.long()
    token = tokens_of(slot, weights, starts, x.shape[0])
    rows, grads = x[token].to(acc), dy[token].to(acc)
    row_weights = weights.to(acc).reshape(-1, 1)[slot]
    dup, ddown = torch.zeros_like(up), torch.zeros_like(down)
    dweights = weights.new_empty(slot.numel())
    dout = x.new_empty(slot.numel(), x.shape[1])
    for e, r in segments(offsets):
        h, w = hidden[r].to(acc), row_weights[r]
        g = grads[r] @ down[e].to(acc)
        dweights[slot[r]] = (h * g).sum(-1).to(weights.dtype)
        da = (2 * h.sqrt() * (w * g)).to(x.dtype).to(acc)
        dup[e] = (da.T @ rows[r]).to(up.dtype)
        ddown[e] = (grads[r].T @ (w * h).to(x.dtype).to(acc)).to(down.dtype)
        dout[slot[r]] = (da @ up[e].to(acc)).to(x.dtype)
    dx = _token_sum(dout, weights, starts, False)
    return dx, dup, ddown, dweights.view_as(weights)


def forward_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    up: torch.Tensor,
    up_scale: torch.Tensor,
    hidden_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y of :func:`forward` with x, up, down and the hidden layer in E4M3 (bytes here).

    A matrix is its E4M3 values times its scale: one or one per token (x), one per expert or one per
    row of an expert's matrix (up, down), one per expert (hidden). Products of the values accumulate
    wide and are multiplied by the weight's scale and then by the other one. The hidden layer is
    relu(.)**2 * (1 / hidden_scale), saturated at 448 and rounded once. Rows that leave the down
    projection, and y, are rounded to ``dtype``.
    """
    acc, slot = acc_dtype(weights), slots_of(offsets, order)
    x, up, down = (t.view(torch.float8_e4m3fn) for t in (x, up, down))
    token = slot // weights.shape[1]
    row_scale = x_scale.to(acc).reshape(-1, 1).expand(x.shape[0], 1)
    out = x.new_empty((slot.numel(), x.shape[1]), dtype=dtype)  # in slot order
    for e, r in segments(offsets):
        rows, scale = x[token[r]].to(acc), hidden_scale[e].to(acc)
        a = linear(rows, up[e].to(acc)) * up_scale[e].to(acc) * row_scale[token[r]]
        hidden = (a.relu().square() * (1 / scale)).clamp(max=448).to(torch.float8_e4m3fn)
        rows = linear(hidden.to(acc), down[e].to(acc)) * down_scale[e].to(acc) * scale
        out[slot[r]] = rows.to(dtype)
    return slot_sum(out.view(*weights.shape, x.shape[1]), weights)


def slots_of(offsets: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``order`` in int64. Raises ValueError where these are no route."""
    ends, rows = [0, *offsets.tolist()], order.numel()
    if ends != sorted(ends) or ends[-1] != rows:
        where = "moe_experts: `route.offsets` must not decrease and end at"
        raise ValueError(f"{where} {rows}, got {ends[1:]!s:.99}")
    slot = order.long()
    if rows and not (0 <= slot.min() and slot.max() < rows):
        raise ValueError(f"moe_experts: `route.order` has slots outside 0 to {rows - 1}")
    if slot.unique().numel() != rows:
        raise ValueError("moe_experts: `route.order` holds a slot twice, expected each once")
    return slot


def tokens_of(
    slot: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor | None, tokens: int
) -> torch.Tensor:
    """The token of each slot. Raises ValueError where ``starts`` are none of so many tokens."""
    if starts is None:
        return slot // weights.shape[1]
    ends = starts.tolist()
    if ends != sorted(ends) or (ends[0], ends[-1]) != (0, slot.numel()):
        where = "moe_experts: `route.starts` must not decrease from 0 to"
        raise ValueError(f"{where} {slot.numel()}, got {ends!s:.99}")
    counts = starts.diff()
    return torch.arange(tokens, device=slot.device).repeat_interleave(counts)[slot]


def segments(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            yield e, slice(start, end)
        start = end


def _token_sum(slots, weights, starts, weighted):
    # The sum of each token's slots (R, X), weighted or plain.
    factors = weights if weighted else None
    if starts is None:
        return slot_sum(slots.view(*weights.shape, slots.shape[1]), factors)
    return ragged_sum(slots, factors, starts)


def slot_sum(slots: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """sum_j weights[:, j] * slots[:, j] (T, k, X) -> (T, X), in the order of j, rounded once."""
    return sum_of(slots.unbind(1), weights, slots.dtype)


def ragged_sum(
    slots: torch.Tensor, weights: torch.Tensor | None, starts: torch.Tensor
) -> torch.Tensor:
    """The same of slots (R, X) and weights (R,), those of token t from ``starts[t]`` on."""
    acc, counts = acc_dtype(slots), starts.diff()
    total = slots.new_zeros(counts.numel(), slots.shape[1], dtype=acc)
    for j in range(int(counts.max()) if counts.numel() else 0):
        here = (counts > j).nonzero()[:, 0]
        at = starts[here].long() + j
        part = slots[at].to(acc)
        total[here] += part if weights is None else part * weights[at, None].to(acc)
    return total.to(slots.dtype)


def sum_of(
    parts: Iterable[torch.Tensor], weights: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """sum_j weights[:, j] * parts_j, each (T, X), in the order of j, rounded once to ``dtype``."""
    acc, total = acc_dtype(dtype), 0.0
    for j, part in enumerate(parts):
        part = part.to(acc)
        total = total + (part if weights is None else part * weights[:, j, None].to(acc))
    return total.to(dtype)
