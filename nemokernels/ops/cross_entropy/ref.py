"""What cross-entropy needs of a linear layer's logits, in plain torch: specification and CPU leg.

N tokens, D features, V classes here of ``classes`` in all: ``first`` to ``first + V``. Tokens that
are ignored are left out before anything is computed; the others are processed in blocks of rows
whose logits fit in ``LOGITS_BYTES``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nemokernels._checks import check
from nemokernels._registry import acc_dtype

LOGITS_BYTES = 64 << 20


def rows_per_block(classes: int, dtype: torch.dtype) -> int:
    """Rows whose logits fit in ``LOGITS_BYTES``; at least one."""
    return max(1, LOGITS_BYTES // (max(classes, 1) * dtype.itemsize))


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    first: int,
    classes: int,
    sums: bool,
):
    """Of every token (N) the log-sum-exp of its logits, its target's logit, the sum of its logits.

    l = hidden weight^T in the accumulation dtype, from inputs widened without rounding. All three
    are zero where the target is ignored, the second where the target is not among the classes here,
    the third unless ``sums``.
    """
    acc = acc_dtype(hidden)
    lse, chosen, total = hidden.new_zeros(3, hidden.shape[0], dtype=acc)
    wide = weight.to(acc)
    for rows, here, column in _blocks(targets, weight.shape[0], ignore_index, first, classes, acc):
        logits = hidden[rows].to(acc) @ wide.T
        lse[rows] = logits.logsumexp(-1)
        chosen[rows[here]] = logits[here, column]
        if sums:
            total[rows] = logits.sum(-1)
    return lse, chosen, total


def backward(
    dlse: torch.Tensor,
    dchosen: torch.Tensor,
    dtotal: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    first: int,
    classes: int,
):
    """dl = dlse * exp(l - lse) + dchosen * onehot(target) + dtotal.

    dl is rounded to hidden's dtype; dhidden = dl weight and dweight = dl^T hidden accumulate in
    the accumulation dtype and are cast once.
    """
    acc = acc_dtype(hidden)
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    dweight = weight.new_zeros(weight.shape, dtype=acc)
    wide = weight.to(acc)
    for rows, here, column in _blocks(targets, weight.shape[0], ignore_index, first, classes, acc):
        x = hidden[rows].to(acc)
        dlogits = (x @ wide.T).sub_(lse[rows, None]).exp_().mul_(dlse[rows, None])
        dlogits[here, column] += dchosen[rows[here]]
        if dtotal is not None:
            dlogits += dtotal[rows, None]
        dlogits = dlogits.to(hidden.dtype).to(acc)
        dhidden[rows] = (dlogits @ wide).to(hidden.dtype)
        dweight += dlogits.T @ x
    return dhidden, dweight.to(weight.dtype)


def _blocks(
    targets: torch.Tensor, here: int, ignore_index: int, first: int, classes: int, acc: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    # Row numbers of tokens that count; which of these have their target here; in which column.
    rows = (targets != ignore_index).nonzero()[:, 0]
    target = targets[rows].long()
    wrong = (target < 0) | (target >= classes)
    if wrong.any():
        at = wrong.nonzero()[0, 0]
        check(
            "linear_cross_entropy",
            False,
            f"`targets` holds {target[at].item()} at token {rows[at].item()}, expected a "
            f"class in [0, {classes}) or ignore_index {ignore_index}",
        )
    size = rows_per_block(here, acc)
    for block in range(0, rows.shape[0], size):
        column = target[block : block + size] - first
        inside = ((column >= 0) & (column < here)).nonzero()[:, 0]
        yield rows[block : block + size], inside, column[inside]
