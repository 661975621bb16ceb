"""The models' one matrix product, and the mode in which it does not depend on its batch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from nemokernels import Fp8Normed

__all__ = ["Linear", "TiedHead", "each_row", "exact", "head", "is_exact", "linear", "row_by_row"]


class _Mode(threading.local):
    exact = False


_mode = _Mode()


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Inside the block, compute every token on its own, by the same calls whatever the batch is.

    A library chooses the order of a product's sums by the number of rows, so that the last bits of
    a token's result depend on how many tokens are computed together. Inside this block they do not:
    each row goes through the same one-row call, and a 16-bit SSM state is rounded after every
    token. (All other kernels compute a row the same way in any batch.) Speculative decoding then
    emits exactly the tokens of plain decoding. The price is the speed of batching.
    """
    before, _mode.exact = _mode.exact, True
    try:
        yield
    finally:
        _mode.exact = before


def is_exact() -> bool:
    """Whether this is inside :func:`exact`."""
    return _mode.exact


def row_by_row(fn: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """``fn(rows)`` for rows (N, D), in :func:`exact` mode one row at a time."""
    if not _mode.exact or rows.shape[0] <= 1:
        return fn(rows)
    return torch.cat([fn(row) for row in rows.split(1)])


def each_row(
    fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor | Fp8Normed
) -> torch.Tensor:
    """``fn(x)`` for x (..., D), in :func:`exact` mode one row at a time."""
    if not _mode.exact:
        return fn(x)
    rows = row_by_row(fn, x.reshape(-1, x.shape[-1]))
    return rows.view(*x.shape[:-1], rows.shape[-1])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` for x (..., in), weight (out, in) and bias (out,)."""
    return each_row(lambda rows: F.linear(rows, weight, bias), x)


class Linear(nn.Linear):
    """A linear layer; its values come from the model's ``reset_parameters``."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False, **kwargs):
        super().__init__(inputs, outputs, bias=bias, **kwargs)

    def reset_parameters(self) -> None:
        pass

    def input_scale(self) -> torch.Tensor | None:
        """The scale under which the layer takes its input in FP8; None: it takes values alone."""
        return None

    def forward(
        self, x: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Apply the layer to x, or to ``act(x)``, which an FP8 layer then need not store."""
        return linear(x if act is None else act(x), self.weight, self.bias)


class TiedHead(nn.Module):
    """A head whose weight is the embeddings'. It owns none, so that the weight has one name."""

    def __init__(self, embeddings: nn.Embedding):
        super().__init__()
        self.source = [embeddings]  # in a list, it does not become a submodule

    @property
    def weight(self) -> nn.Parameter:
        return self.source[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


def head(config, embeddings: nn.Embedding, **kwargs) -> nn.Module:
    """The language model's head: tied to the embeddings where the config says so."""
    if config.tie_word_embeddings:
        return TiedHead(embeddings)
    return Linear(config.hidden_size, config.vocab_size, **kwargs)
