"""Cross-entropy of a linear classifier without storing its logits."""

from __future__ import annotations

import torch

from nemokernels._autocast import autocast
from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.cross_entropy import op

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

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64, any strides.
        weight: (V, D), hidden's dtype; V at least 1.
        targets: the leading axes of hidden, int64 or int32, in [0, V) or ``ignore_index``.
        ignore_index: the target of tokens that do not count.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1].
        z_loss: weight of the squared log-partition; not negative.
        reduction: "mean" over the tokens that count (0, with zero gradient, if none does), "sum",
            or "none" for the loss of every token.

    Returns:
        A scalar, or for "none" a tensor of targets' shape; float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value. The
            values of targets are checked where the reference runs.

    Source: blockwise logits as in Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
    Models", 2024; label smoothing as ``torch.nn.functional.cross_entropy`` defines it; z-loss as in
    Chowdhery et al., "PaLM", 2022.
    """
    check_tensor(_NAME, "hidden", hidden, dtypes=FLOATS)
    check(_NAME, hidden.dim() >= 1, "`hidden` needs at least one axis, got a scalar")
    check_tensor(_NAME, "weight", weight, shape=(None, hidden.shape[-1]), dims="(V, D)",
                 dtypes=FLOATS, device=hidden.device)  # fmt: skip
    check(_NAME, weight.shape[0] >= 1, "`weight` has no rows, expected at least one class")
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
    loss, _ = op.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]) if hidden.dim() != 2 else hidden,
        weight,
        targets.reshape(-1),
        ignore_index,
        label_smoothing,
        z_loss,
    )
    if reduction == "none":
        return loss.reshape(targets.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (targets != ignore_index).sum().clamp(min=1)
