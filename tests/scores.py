"""Router logits for the tests of routing."""

import math

import torch

INF, NAN = math.inf, math.nan


def spread(tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of which no two of a token have scores that rounding could confuse."""
    steps = torch.rand(tokens, experts).argsort(-1).to(torch.float32)
    return ((steps + 0.5) * (8 / experts) - 4).to(dtype)


def not_finite() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 8 tokens with NaN and infinities in several of them, and such a bias."""
    logits, bias = spread(8, 16), torch.zeros(16)
    logits[1, 5] = NAN
    logits[2] = NAN
    logits[3, ::2] = -INF
    logits[4, 3], logits[4, 4] = INF, -INF
    logits[5] = -INF
    logits[6] = -200.0
    bias[9], bias[2] = -INF, INF
    return logits, bias
