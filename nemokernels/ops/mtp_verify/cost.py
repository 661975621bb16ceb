"""What verification must move: one pass over the logits."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(B: int, K: int, V: int, itemsize: int, probs_itemsize: int = 0) -> Cost:
    """The K + 1 rows of every request once; of the drafts' distributions, where given, one row."""
    return Cost(B * ((K + 1) * V * itemsize + V * probs_itemsize * (K > 0)))
