"""Run two parts of a layer at the same time on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from nemokernels.models.linear import is_exact

__all__ = ["aside", "pays"]

ROWS = 512  # with more rows one part fills the GPU; the exact limit is not measured


def pays(x: torch.Tensor) -> bool:
    """Whether work on the rows of x leaves room on its GPU for other work.

    False in exact mode, which promises nothing about speed, and under torch.compile, which orders
    the graph itself.
    """
    few = x.numel() <= ROWS * x.shape[-1]
    return x.is_cuda and few and not is_exact() and not torch.compiler.is_compiling()


def aside(
    part: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Begin ``part(x)``; return a function that waits for it and returns its result.

    Where it :func:`pays`, the part runs on a second stream, after everything the current stream
    holds already. Autograd runs its backward on that stream too and joins the two itself. CUDA
    graphs can capture it. Elsewhere the part runs at once.
    """
    if not pays(x):
        y = part(x)
        return lambda: y
    here, side = torch.cuda.current_stream(x.device), _stream(x.device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        y = part(x)
    x.record_stream(side)  # keeps its memory until the second stream has read it

    def joined() -> torch.Tensor:
        here.wait_stream(side)
        y.record_stream(here)
        return y

    return joined


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
