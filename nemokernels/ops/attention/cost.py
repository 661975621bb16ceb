"""What causal attention must move and multiply. H query heads, KV key-value heads, head size D."""

from __future__ import annotations

from nemokernels._cost import Cost


def pairs(T: int, S: int) -> int:
    """Query-key pairs that meet where the last of T queries sees all S keys."""
    return T * S - T * (T - 1) // 2


def forward(B: int, T: int, H: int, KV: int, D: int, itemsize: int, unit: str) -> Cost:
    """q, k and v read, out written; two products over the pairs."""
    return Cost(2 * B * T * (H + KV) * D * itemsize, 4 * B * H * D * pairs(T, T), unit)


def backward(B: int, T: int, H: int, KV: int, D: int, itemsize: int, unit: str) -> Cost:
    """q, k, v, out and dout read, dq, dk and dv written; five products over the pairs."""
    return Cost(4 * B * T * (H + KV) * D * itemsize, 10 * B * H * D * pairs(T, T), unit)


def with_cache(
    B: int, T: int, S: int, H: int, KV: int, D: int, cache_itemsize: int, itemsize: int, unit: str
) -> Cost:
    """T new tokens after S in the cache: the cache read, k and v written to it; q, k, v read; out
    written."""
    moved = B * D * (2 * (S + T) * KV * cache_itemsize + 2 * T * (H + KV) * itemsize)
    return Cost(moved, 4 * B * H * D * pairs(T, S + T), unit)
