"""Sigmoid top-k routing of a mixture of experts, and what keeps its experts evenly loaded."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels._registry import acc_dtype
from nemokernels.ops.moe_route import op, ref

__all__ = [
    "RaggedRoute",
    "Route",
    "balance_loss",
    "moe_route",
    "ragged_route",
    "update_correction_bias",
]


class Route(NamedTuple):
    """Where every token goes. T tokens, k slots per token, E experts, R = T * k rows.

    Attributes:
        weights: (T, k), float32 (float64 for float64 logits), the weight of each slot.
        experts: (T, k), int32, distinct within a token, best selection score first.
        counts: (E,), int32, rows per expert.
        offsets: (E,), int32, inclusive cumulative sum of counts: where each expert's rows end.
        order: (R,), int32. Rows are sorted by expert and, within one, by slot; row r serves slot
            ``order[r] = t * k + j``, the j-th choice of token t.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    order: torch.Tensor


class RaggedRoute(NamedTuple):
    """Where tokens go that have any number of slots each. T tokens, E experts, R slots.

    Attributes:
        weights: (R,), float32 (or float64), the weight of each slot.
        offsets: (E,), int32: where each expert's rows end.
        order: (R,), int32. Rows are sorted by expert and, within one, by slot; row r serves slot
            ``order[r]``.
        starts: (T + 1,), int32, from 0 to R: token t has the slots ``starts[t]`` to
            ``starts[t + 1] - 1``.
    """

    weights: torch.Tensor
    offsets: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor


def moe_route(
    logits: torch.Tensor,
    *,
    top_k: int,
    correction_bias: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scale: float = 1.0,
) -> Route:
    """Choose ``top_k`` experts per token by sigmoid score and weigh them.

    ``s = sigmoid(logits)``, selection score ``c = s + correction_bias``. Experts are split into
    ``n_group`` contiguous groups; the ``topk_group`` groups with the largest sum of their two best
    c are kept, and the k experts of largest c among them are chosen. Weights come from s, not c:
    ``w = s / (sum of the chosen s + 1e-20) * scale``, or ``s * scale`` without ``norm_topk_prob``.

    Ties go to the lower expert (or group) index. A NaN ranks above every number, so a token whose
    logits hold a NaN chooses distinct experts and gets a NaN weight for that expert, and with
    ``norm_topk_prob`` for all of its slots; other tokens are untouched. Everything is in float32
    (float64 for float64 logits), under autocast too. Nothing waits for the device.

    Gradients reach ``logits`` through the weights of the chosen experts; ``correction_bias`` has
    none (``update_correction_bias`` moves it).

    Args:
        logits: (T, E), float32, bfloat16, float16 or float64, any strides.
        top_k: experts per token, 1 to E / n_group * topk_group.
        correction_bias: (E,), any of these dtypes; float32 in a model of any dtype.
        n_group, topk_group: number of groups and of groups kept. n_group divides E.
        norm_topk_prob: divide the chosen scores by their sum.
        scale: the routed scaling factor, applied last.

    Returns:
        A Route.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 2.1.2; the group score and
    the order of normalisation and scaling are those of transformers 5.23 NemotronHTopkRouter.
    """
    where = "moe_route"
    check_tensor(where, "logits", logits, shape=(None, None), dims="(T, E)", dtypes=FLOATS)
    tokens, experts = logits.shape
    check(where, n_group >= 1 and experts % n_group == 0,
          "`n_group` must divide the number of experts {}, got {}", experts, n_group)  # fmt: skip
    check(
        where,
        1 <= topk_group <= n_group,
        "`topk_group` must be between 1 and n_group = {}, got {}",
        n_group,
        topk_group,
    )
    eligible = experts // n_group * topk_group
    check(where, 1 <= top_k <= eligible,
          "`top_k` must be in 1 to {} (eligible experts), got {}", eligible, top_k)  # fmt: skip
    check(
        where,
        tokens * top_k < 2**31,
        "`logits` has {} tokens, too many for 32-bit rows with top_k {}",
        tokens,
        top_k,
    )
    if correction_bias is not None:
        check_tensor(where, "correction_bias", correction_bias, shape=(experts,), dims="(E,)",
                     dtypes=FLOATS, device=logits.device)  # fmt: skip
    return Route(*op.moe_route(logits, correction_bias, top_k, n_group, topk_group,
                               norm_topk_prob, float(scale)))  # fmt: skip


def ragged_route(
    weights: torch.Tensor, experts: torch.Tensor, starts: torch.Tensor, *, num_experts: int
) -> RaggedRoute:
    """Sort by expert the slots of tokens that have any number of them each.

    For tokens that were routed elsewhere, as under expert parallelism, where a rank sees the slots
    of its own experts. Gradients reach ``weights``. Nothing waits for the device.

    Args:
        weights: (R,), float32 or float64, the weight of each slot, token after token.
        experts: (R,), int32, the expert of each slot, 0 to ``num_experts`` - 1.
        starts: (T + 1,), int32, from 0 to R, not decreasing: token t has the slots ``starts[t]`` to
            ``starts[t + 1] - 1``, none if they are the same.
        num_experts: E.

    Returns:
        A RaggedRoute, for :func:`moe_experts`, which refuses what is none: starts that are not as
        above, experts out of range. On a GPU the values are not read back to be checked.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    where = "ragged_route"
    check_tensor(where, "weights", weights, shape=(None,), dims="(R,)",
                 dtypes=(torch.float32, torch.float64))  # fmt: skip
    integers = dict(dtypes=(torch.int32,), device=weights.device)
    check_tensor(where, "experts", experts, shape=weights.shape, dims="(R,)", **integers)
    check_tensor(where, "starts", starts, shape=(None,), dims="(T + 1,)", **integers)
    check(where, starts.shape[0] >= 1, "`starts` is empty, expected (T + 1,) entries")
    check(where, num_experts >= 1, "`num_experts` must be at least 1, got {}", num_experts)
    # Negative numbers behind all experts, so that they are not counted among the rows of the first.
    experts = torch.where(experts < 0, num_experts, experts)
    _, offsets, order = ref.group_rows(experts, num_experts)
    return RaggedRoute(weights, offsets, order, starts)


def balance_loss(
    logits: torch.Tensor,
    *,
    top_k: int,
    cu_seqlens: torch.Tensor | None = None,
    coefficient: float = 1e-4,
) -> torch.Tensor:
    """Sequence-level auxiliary loss that pulls the router towards even loads.

    For a sequence of T tokens ``coefficient * E / (k * T**2) * sum_e P_e * n_e``: P_e sums, over
    the tokens, the sigmoid scores normalised to one over **all** experts; n_e counts the tokens
    that have e among the k best of these scores (no correction bias, no groups). The mean over
    the sequences that have tokens; equal loads give ``coefficient``. Float32 (float64 for float64
    logits), under autocast too. The gradient flows through P alone.

    Args:
        logits: (T, E), one sequence or, with cu_seqlens, several; or (B, T, E), B sequences.
        top_k: experts per token, 1 to E.
        cu_seqlens: (n + 1,), int32 or int64 boundaries starting at 0, with (T, E) logits. Tokens
            from cu_seqlens[-1] on are padding and do not count.
        coefficient: the weight of this loss.

    Returns:
        A scalar. Zero without tokens.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, equations 17 to 20; Megatron-LM's
    sequence auxiliary loss.
    """
    where = "balance_loss"
    check_tensor(where, "logits", logits, dtypes=FLOATS)
    check(where, logits.dim() in (2, 3),
          "`logits` must be (T, E) or (B, T, E), got shape {}", tuple(logits.shape))  # fmt: skip
    experts = logits.shape[-1]
    check(where, 1 <= top_k <= experts,
          "`top_k` must be in 1 to {} (experts), got {}", experts, top_k)  # fmt: skip
    if cu_seqlens is None:
        batch, length = (1, logits.shape[0]) if logits.dim() == 2 else logits.shape[:2]
        ends = length * torch.arange(1, batch + 1, device=logits.device)
    else:
        check(where, logits.dim() == 2,
              "`cu_seqlens` needs (T, E) `logits`, got shape {}", tuple(logits.shape))  # fmt: skip
        check_tensor(where, "cu_seqlens", cu_seqlens, shape=(None,), dims="(n + 1,)",
                     dtypes=(torch.int32, torch.int64), device=logits.device)  # fmt: skip
        check(where, cu_seqlens.numel() >= 1, "`cu_seqlens` needs at least one entry, got none")
        ends = cu_seqlens[1:].long()
    scores = logits.reshape(-1, experts).to(acc_dtype(logits)).sigmoid()
    scores = scores / (scores.sum(-1, keepdim=True) + ref.SUM_EPS)
    with torch.no_grad():
        rows, sequences = torch.arange(scores.shape[0], device=logits.device), len(ends)
        owner = torch.searchsorted(ends, rows, right=True)  # == sequences for padding
        # The order of the scores is that before they were normalised.
        best = op.moe_route(logits.reshape(-1, experts), None, top_k, 1, 1, False, 1.0)[1]
        best = best + owner[:, None] * experts
        # Integer sums: exact in any order, so that atomics cost no reproducibility.
        load = best.new_zeros((sequences + 1) * experts)
        load.index_add_(0, best.reshape(-1), torch.ones_like(best).reshape(-1))
        load = load.view(sequences + 1, experts)
        length = load.sum(-1, keepdim=True) // top_k
        # Every token of a sequence weighs its scores by the same n_e / T**2.
        share = load.to(scores.dtype) / (length.to(scores.dtype) ** 2).clamp(min=1)
        share[sequences] = 0
        present = (length[:sequences] > 0).sum().clamp(min=1)
        share = share[owner] / present
    return (scores * share).sum() * (coefficient * experts / top_k)


def update_correction_bias(
    bias: torch.Tensor, counts: torch.Tensor, rate: float = 1e-3
) -> torch.Tensor:
    """Move the selection bias one step towards even loads, in place.

    ``bias_e += rate * sign(mean(counts) - counts_e)``, sign(0) = 0, no clamp, no re-centring. Once
    per optimizer step, with the tokens of all its micro-batches; in distributed training the
    caller sums ``counts`` over the ranks first. Leading axes (layers) are independent.

    Args:
        bias: (..., E), float32 or float64 (steps of 1e-3 vanish in 16 bits), overwritten.
        counts: (..., E), tokens per expert, any integer or floating dtype.
        rate: the step.

    Returns:
        ``bias``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: Wang et al., "Auxiliary-loss-free load balancing strategy for mixture-of-experts", 2024.
    """
    where = "update_correction_bias"
    check_tensor(where, "bias", bias, dtypes=(torch.float32, torch.float64))
    check(where, bias.dim() >= 1, "`bias` needs at least one axis, got a scalar")
    check_tensor(where, "counts", counts, shape=bias.shape, dims="the shape of bias",
                 device=bias.device)  # fmt: skip
    with torch.no_grad():
        counts = counts.double()  # counts * E is exact up to 2**53
        excess = counts.shape[-1] * counts - counts.sum(-1, keepdim=True)
        return bias.sub_(excess.sign().to(bias.dtype), alpha=rate)
