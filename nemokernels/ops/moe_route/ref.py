"""Sigmoid top-k routing in plain torch: the specification and the CPU leg.

T tokens, E experts, k chosen experts per token, R = T * k rows. Scores, weights and their
gradients are in the accumulation dtype (float32; float64 stays float64).

Order is total, so that every backend picks the same experts: a larger selection score first, NaN
above every number, equal scores (and equal group scores) by lower index. An expert of a group that
was not kept is never picked.
"""

from __future__ import annotations

import torch

from nemokernels._activations import sigmoid
from nemokernels._registry import acc_dtype

SUM_EPS = 1e-20


def forward(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scale: float,
):
    """Returns weights (T, k), experts (T, k), counts (E), offsets (E) and order (R)."""
    acc = acc_dtype(logits)
    scores = sigmoid(logits.to(acc))
    choice = scores if correction_bias is None else scores + correction_bias.to(acc)
    experts = select(choice, top_k, n_group, topk_group)
    weights = scores.gather(1, experts)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + SUM_EPS)
    return weights * scale, experts.int(), *group_rows(experts, logits.shape[1])


def ranking(scores: torch.Tensor) -> torch.Tensor:
    """Indices along the last axis: largest first, NaN above all, ties by lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def select(choice: torch.Tensor, top_k: int, n_group: int, topk_group: int) -> torch.Tensor:
    """The k best experts of each token, best first, within the topk_group best groups.

    A group's score is the sum of its two best experts' selection scores.
    """
    order = ranking(choice)
    if topk_group < n_group:
        tokens, experts = choice.shape
        groups = choice.reshape(tokens, n_group, experts // n_group)
        group_scores = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, ranking(group_scores)[:, :topk_group], True)
        allowed = kept[..., None].expand_as(groups).reshape(tokens, experts)
        # A second stable sort, not a -inf mask: a bias of -inf must not tie with a dropped group.
        order = order.gather(1, ranking(allowed.gather(1, order).int()))
    return order[:, :top_k]


def group_rows(experts: torch.Tensor, num_experts: int):
    """Rows of the T * k slots sorted by expert, then by slot.

    Returns counts (E), offsets (E), the end of each expert's rows, and order (R), the slot
    t * k + j that each row serves.
    """
    sorted_experts, order = experts.reshape(-1).sort(stable=True)
    numbers = torch.arange(num_experts, device=experts.device)
    offsets = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    return counts, offsets, order.int()


def backward(
    dweights: torch.Tensor,
    logits: torch.Tensor,
    experts: torch.Tensor,
    norm_topk_prob: bool,
    scale: float,
):
    """With S = sum of the chosen s plus 1e-20 and w_j = scale * s_j / S:

    ds_j = scale / S * (dw_j - sum_i dw_i s_i / S), dlogit_j = ds_j * s_j * (1 - s_j);
    without the normalisation ds_j = scale * dw_j. Zero for experts that were not chosen.
    """
    acc = acc_dtype(logits)
    chosen = logits.gather(1, experts.long()).to(acc)
    s, ds = sigmoid(chosen), dweights.to(acc) * scale
    if norm_topk_prob:
        total = s.sum(-1, keepdim=True) + SUM_EPS
        ds = (ds - (ds * (s / total)).sum(-1, keepdim=True)) / total
    # 1 - s cancels to zero for large logits; sigmoid(-x) does not.
    dchosen = ds * s * sigmoid(-chosen)
    dlogits = torch.zeros_like(logits, dtype=acc, memory_format=torch.contiguous_format)
    return dlogits.scatter_(1, experts.long(), dchosen).to(logits.dtype)
