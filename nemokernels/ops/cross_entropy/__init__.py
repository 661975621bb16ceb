"""Cross-entropy of a linear classifier without storing its logits."""

from __future__ import annotations

import torch

from nemokernels._autocast import autocast
from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.cross_entropy import op, parallel

__all__ = ["linear_cross_entropy"]

_NAME = "linear_cross_entropy"
_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of ``softmax(hidden @ weight.T)``; the (N, V) logits never exist whole.

    With ``l = hidden @ weight.T`` and ``lse = log(sum(exp(l)))`` the loss of a token is
    ``lse - (1 - label_smoothing) * l[target] - label_smoothing * mean(l) + z_loss * lse**2``,
    in natural units. Logits, softmax and loss are in float32 (float64 for float64 input): logits
    are sums of exact products and are not rounded to the input's dtype. The backward recomputes
    them block by block, rounds their gradient to hidden's dtype before the two products, and
    accumulates both in float32.

    A token whose target is ``ignore_index`` has zero loss and zero gradient whatever its hidden
    state holds, NaN included. Under autocast hidden and weight are cast to the autocast dtype.

    With ``group`` the vocabulary is split over its ranks: each passes its own rows of the weight,
    split as ``torch.chunk`` does, and the same hidden and targets. Every rank gets the whole loss,
    the gradient of its own rows, and the whole gradient of hidden: the ranks' parts, each in
    hidden's dtype, summed. Four numbers per token are exchanged, never logits.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64, any strides.
        weight: (V, D), hidden's dtype; V at least 1.
        targets: the leading axes of hidden, int64 or int32, in [0, V) or ``ignore_index``.
        ignore_index: the target of tokens that do not count.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1].
        z_loss: weight of the squared log-partition; not negative.
        reduction: "mean" over the tokens that count (0, with zero gradient, if none does), "sum",
            or "none" for the loss of every token.
        group: the process group over whose ranks the vocabulary is split.
        vocab_size: V over all ranks of ``group``; given with it only.

    Returns:
        A scalar, or for "none" a tensor of targets' shape; float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value. The
            values of targets are checked where the reference runs; the kernels make the loss and
            the gradients of a token with a wrong one NaN.

    Source: blockwise logits as in Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
    Models", 2024; label smoothing as ``torch.nn.functional.cross_entropy`` defines it; z-loss as in
    Chowdhery et al., "PaLM", 2022.
    """
    check_tensor(_NAME, "hidden", hidden, dtypes=FLOATS)
    check(_NAME, hidden.dim() >= 1, "`hidden` needs at least one axis, got a scalar")
    check_tensor(_NAME, "weight", weight, shape=(None, hidden.shape[-1]), dims="(V, D)",
                 dtypes=FLOATS, device=hidden.device)  # fmt: skip
    first, classes = _vocabulary(weight.shape[0], group, vocab_size)
    check_tensor(_NAME, "targets", targets, shape=hidden.shape[:-1],
                 dims="the leading axes of hidden", dtypes=(torch.int64, torch.int32),
                 device=hidden.device)  # fmt: skip
    check(_NAME, 0.0 <= label_smoothing <= 1.0,
          "`label_smoothing` must be in [0, 1], got {}", label_smoothing)  # fmt: skip
    check(_NAME, z_loss >= 0.0, "`z_loss` must not be negative, got {}", z_loss)
    check(_NAME, reduction in _REDUCTIONS,
          "`reduction` must be one of {}, got {!r}", ', '.join(_REDUCTIONS), reduction)  # fmt: skip
    hidden, weight = autocast(hidden, weight)
    check_tensor(_NAME, "weight", weight, dtypes=(hidden.dtype,))
    hidden = hidden.reshape(-1, hidden.shape[-1]) if hidden.dim() != 2 else hidden
    if group is not None:
        hidden = parallel.replicated(hidden, group)
    flat, smooth = targets.reshape(-1), label_smoothing > 0.0
    parts = op.linear_log_sum_exp(hidden, weight, flat, ignore_index, first, classes, smooth)
    keep = flat != ignore_index
    if group is not None:
        parts = parallel.combine(*parts, keep, group)
    lse, chosen, total = parts
    loss = lse - (1.0 - label_smoothing) * chosen
    if smooth:
        loss = loss - label_smoothing / classes * total
    if z_loss:
        loss = loss + z_loss * lse.square()
    if reduction == "none":
        return loss.reshape(targets.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / keep.sum().clamp(min=1)


def _vocabulary(rows: int, group, vocab_size: int | None) -> tuple[int, int]:
    # The first class of this rank, and how many there are over all ranks.
    check(_NAME, (group is None) == (vocab_size is None),
          "`vocab_size` is {}, expected it with `group` and only with it", vocab_size)  # fmt: skip
    if group is None:
        check(_NAME, rows >= 1, "`weight` has no rows, expected at least one class")
        return 0, rows
    check(_NAME, vocab_size >= 1, "`vocab_size` must be at least 1, got {}", vocab_size)
    ranks, rank = group.size(), group.rank()
    most = -(-vocab_size // ranks)
    first = min(rank * most, vocab_size)
    check(_NAME, rows == min(most, vocab_size - first),
          "`weight` has {} rows on rank {} of {}, expected {} of {}",
          rows, rank, ranks, min(most, vocab_size - first), vocab_size)  # fmt: skip
    return first, vocab_size
