"""What the router must move. T tokens, E experts, k slots per token."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(T: int, E: int, k: int, itemsize: int) -> Cost:
    """Logits read; weights (float32), experts and order (int32), counts and offsets written."""
    return Cost(T * E * itemsize + 12 * T * k + 8 * E)


def backward(T: int, E: int, k: int, itemsize: int) -> Cost:
    """Logits, dweights and experts read; dlogits written."""
    return Cost(2 * T * E * itemsize + 8 * T * k)
