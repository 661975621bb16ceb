"""Two parts of a layer at the same time, on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from nemokernels.models.linear import is_exact

__all__ = ["aside", "pays"]

ROWS = 512  # above it one part fills the GPU by itself; where exactly is not measured


def pays(x: torch.Tensor) -> bool:
    """Whether work on the rows of x leaves room on its GPU for other work.

    Not in exact mode, which promises nothing about speed, and not in a graph that torch.compile
    orders.
    """
    few = x.numel() <= ROWS * x.shape[-1]
    return x.is_cuda and few and not is_exact() and not torch.compiler.is_compiling()


def aside(
    part: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Begin ``part(x)``; the function that is returned waits for it and gives the result.

    Where it :func:`pays`, the part is issued on a second stream, which begins at what the present
    stream has reached. Autograd runs its backward on that stream too and joins the two itself. It
    can be captured in a CUDA graph. Elsewhere the part runs at once.
    """
    if not pays(x):
        y = part(x)
        return lambda: y
    here, side = torch.cuda.current_stream(x.device), _stream(x.device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        y = part(x)
    x.record_stream(side)  # its memory must not be used again before the side has read it

    def joined() -> torch.Tensor:
        here.wait_stream(side)
        y.record_stream(here)
        return y

    return joined


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
