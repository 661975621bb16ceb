"""The call into csrc/moe_route."""

from __future__ import annotations

import torch

from nemokernels import _ext

# kMostExperts, kMostChosen and kMostSlots in csrc/moe_route/moe_route.h
EXPERTS, CHOSEN, SLOTS = 512, 32, 2048

_route = _ext.define(
    "moe_route(Tensor logits, Tensor? bias, int top_k, int n_group, int topk_group, "
    "bool normalise, float scale, Tensor(a!) weights, Tensor(b!) chosen, Tensor(c!) counts, "
    "Tensor(d!) offsets, Tensor(e!) order) -> ()"
)


def barred(tokens: int, experts: int, top_k: int, n_group: int) -> str:
    """Why csrc does not take so many tokens; "" if it does."""
    if experts > EXPERTS:
        return f"csrc takes up to {EXPERTS} experts, got {experts}"
    if max(top_k, n_group) > CHOSEN:
        return f"csrc takes up to {CHOSEN} experts per token and groups, got {top_k} and {n_group}"
    if tokens * top_k > SLOTS:
        return f"csrc takes up to {SLOTS} slots, got {tokens * top_k}"
    return ""


def forward(logits, correction_bias, top_k, n_group, topk_group, norm_topk_prob, scale):
    """As ref.forward."""
    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    chosen, counts, offsets, order = (
        logits.new_empty(shape, dtype=torch.int32)
        for shape in ((tokens, top_k), experts, experts, tokens * top_k)
    )
    _route(logits, correction_bias, top_k, n_group, topk_group, norm_topk_prob, scale, weights,
           chosen, counts, offsets, order)  # fmt: skip
    return weights, chosen, counts, offsets, order
