"""Warm-up, stable, decay: the learning-rate schedule of the Nemotron 3 runs."""

from __future__ import annotations

import math


def wsd(step: int, *, steps: int, warmup: int, decay: int, peak: float, floor: float) -> float:
    """Learning rate of optimizer step ``step`` (counted from 0).

    ``floor + c * (peak - floor)`` with ``c = (step + 1) / warmup`` while warming up, 1 while
    stable, and ``1 - sqrt(r)`` over the last ``decay`` steps, ``r`` running from 0 to 1. The shape
    is Megatron-LM's WSD with the minus-sqrt decay style.
    """
    if step < warmup:
        return floor + (step + 1) / warmup * (peak - floor)
    progress = (step + 1 - (steps - decay)) / decay if decay else 0.0
    if progress <= 0:
        return peak
    return floor + (1.0 - math.sqrt(min(progress, 1.0))) * (peak - floor)
