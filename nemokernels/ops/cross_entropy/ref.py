"""Linear cross-entropy in plain torch: the specification and the CPU leg.

N tokens, D features, V classes. Tokens that are ignored are left out before anything is computed;
the others are processed in blocks of rows whose logits fit in ``LOGITS_BYTES``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nemokernels._checks import check
from nemokernels._registry import acc_dtype

LOGITS_BYTES = 64 << 20


def rows_per_block(classes: int, dtype: torch.dtype) -> int:
    """Rows whose logits fit in ``LOGITS_BYTES``; at least one."""
    return max(1, LOGITS_BYTES // (classes * dtype.itemsize))


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
):
    """Loss and log-sum-exp (N) of every token, both zero where the target is ignored.

    l = hidden weight^T in the accumulation dtype, from inputs widened without rounding.
    """
    acc = acc_dtype(hidden)
    loss = hidden.new_zeros(hidden.shape[0], dtype=acc)
    lse = torch.zeros_like(loss)
    wide = weight.to(acc)
    for rows, target in _blocks(targets, weight.shape[0], ignore_index, acc):
        logits = hidden[rows].to(acc) @ wide.T
        block = logits.logsumexp(-1)
        nll = block - (1.0 - label_smoothing) * logits.gather(1, target[:, None])[:, 0]
        if label_smoothing:
            nll -= label_smoothing * logits.mean(-1)
        loss[rows] = nll + z_loss * block.square()
        lse[rows] = block
    return loss, lse


def backward(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
):
    """dl = dloss * ((1 + 2 z lse) softmax(l) - (1 - s) onehot(target) - s / V).

    dl is rounded to hidden's dtype; dhidden = dl weight and dweight = dl^T hidden accumulate in
    the accumulation dtype and are cast once.
    """
    acc = acc_dtype(hidden)
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    dweight = weight.new_zeros(weight.shape, dtype=acc)
    wide = weight.to(acc)
    for rows, target in _blocks(targets, weight.shape[0], ignore_index, acc):
        x, z, g = hidden[rows].to(acc), lse[rows, None], dloss[rows, None].to(acc)
        dlogits = (x @ wide.T).sub_(z).exp_().mul_(g * (1.0 + 2.0 * z_loss * z))
        dlogits.scatter_add_(1, target[:, None], g * (label_smoothing - 1.0))
        if label_smoothing:
            dlogits -= g * (label_smoothing / weight.shape[0])
        dlogits = dlogits.to(hidden.dtype).to(acc)
        dhidden[rows] = (dlogits @ wide).to(hidden.dtype)
        dweight += dlogits.T @ x
    return dhidden, dweight.to(weight.dtype)


def _blocks(
    targets: torch.Tensor, classes: int, ignore_index: int, acc: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # Pairs (row numbers, their targets as int64) over the tokens that count.
    rows = (targets != ignore_index).nonzero()[:, 0]
    target = targets[rows].long()
    wrong = (target < 0) | (target >= classes)
    if wrong.any():
        first = wrong.nonzero()[0, 0]
        check(
            "linear_cross_entropy",
            False,
            f"`targets` holds {target[first].item()} at token {rows[first].item()}, expected a "
            f"class in [0, {classes}) or ignore_index {ignore_index}",
        )
    size = rows_per_block(classes, acc)
    return zip(rows.split(size), target.split(size)) if rows.numel() else iter(())
