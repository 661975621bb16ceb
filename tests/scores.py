"""Router logits for the tests of routing."""

import torch


def spread(tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of which no two of a token have scores that rounding could confuse."""
    steps = torch.rand(tokens, experts).argsort(-1).to(torch.float32)
    return ((steps + 0.5) * (8 / experts) - 4).to(dtype)
