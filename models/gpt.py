"""Decoders like GPT-3: BLOOM with ALiBi, MT-NLG with learned positions.

A layer is ``x + attention(norm(x))`` followed by ``x + mlp(norm(x))``, with biases throughout.
Module names are the tensor names of BLOOM's checkpoints. Shapes: B rows, T tokens, H heads.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.compiler import is_compiling

from nemokernels._checks import check
from nemokernels.models.activations import ACTIVATIONS
from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.gpt_config import GPTConfig
from nemokernels.models.linear import Linear, TiedHead, each_row
from nemokernels.models.norms import LayerNorm, normed_sum
from nemokernels.models.runs import Run
from nemokernels.models.state import State

__all__ = ["GPT"]


def alibi_slopes(heads: int, device: torch.device | None = None) -> torch.Tensor:
    """How fast each head's scores fall with distance, (H,) float32.

    For n heads, n a power of two, the slope of head i = 1 ... n is ``2 ** (-8 i / n)`` per token.
    For other numbers of heads, let n be the power of two below: the first n heads have these
    slopes, the others every second slope of 2 n heads, ``2 ** (-4 j / n)`` for j = 1, 3, 5, ...

    Source: Press et al., "Train short, test long", 2022, and its reference implementation.
    """
    n = 1 << (heads.bit_length() - 1)
    index = torch.arange(heads, dtype=torch.float64, device=device)
    exponents = torch.where(index < n, 8 * (index + 1), 4 * (2 * (index - n) + 1)) / n
    return torch.exp2(-exponents).float()


class Attention(nn.Module):
    """Causal attention; rows of the fused projection are grouped (head, (q, k, v), channel)."""

    def __init__(self, config: GPTConfig, index: int, **kwargs):
        super().__init__()
        self.index, self.shape = index, (config.n_head, 3, config.head_dim)
        width = config.hidden_size
        self.query_key_value = Linear(width, 3 * width, bias=True, **kwargs)
        self.dense = Linear(width, width, bias=True, **kwargs)

    def forward(self, x: torch.Tensor, slopes: torch.Tensor | None, run: Run) -> torch.Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, self.shape).unbind(-2)
        return self.dense(run.attend(self.index, q, k, v, alibi_slopes=slopes).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, **kwargs):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.dense_h_to_4h = Linear(width, inner, bias=True, **kwargs)
        self.dense_4h_to_h = Linear(inner, width, bias=True, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torch rounds the tail of a vector's GELU differently from its body, hence row by row.
        return each_row(self._rows, x)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.dense_h_to_4h(x), self.act)


class Layer(nn.Module):
    """Attention and MLP, each with its norm. The next layer's norm does the last addition.

    Takes and returns ``(x, residual)``: the output of the layer before, and the residual stream
    that it has still to be added to (None in the first layer).
    """

    def __init__(self, config: GPTConfig, index: int, **kwargs):
        super().__init__()
        self.input_layernorm = _norm(config, **kwargs)
        self.self_attention = Attention(config, index, **kwargs)
        self.post_attention_layernorm = _norm(config, **kwargs)
        self.mlp = MLP(config, **kwargs)

    def forward(self, x, residual, slopes: torch.Tensor | None, run: Run):
        normed, residual = normed_sum(self.input_layernorm, x, residual)
        x = self.self_attention(normed, slopes, run)
        normed, residual = normed_sum(self.post_attention_layernorm, x, residual)
        return self.mlp(normed), residual


class Backbone(nn.Module):
    def __init__(self, config: GPTConfig, **kwargs):
        super().__init__()
        self.config = config
        self.word_embeddings = _embedding(config.vocab_size, config, **kwargs)
        if config.family.alibi:
            self.word_embeddings_layernorm = _norm(config, **kwargs)
        else:
            self.position_embeddings = _embedding(config.max_position_embeddings, config, **kwargs)
        self.h = nn.ModuleList(Layer(config, index, **kwargs) for index in range(config.n_layer))
        self.ln_f = _norm(config, **kwargs)

    @property
    def layers(self) -> nn.ModuleList:
        return self.h

    def forward(self, tokens: torch.Tensor, run: Run) -> torch.Tensor:
        x, residual, slopes = self.word_embeddings(tokens), None, None
        if self.config.family.alibi:
            x = self.word_embeddings_layernorm(x)
            slopes = alibi_slopes(self.config.n_head, x.device)
        else:
            x = x + self.position_embeddings(run.positions(tokens))
        for layer in self.h:
            x, residual = layer(x, residual, slopes, run)
        return normed_sum(self.ln_f, x, residual)[0]


class GPT(CausalLM):
    """A language model like GPT-3.

    Args:
        config: its sizes.
        device, dtype: of its parameters. Values are unset until :meth:`reset_parameters` or a
            checkpoint fills them (``build`` and ``from_pretrained`` do).
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        dtype = dtype or torch.get_default_dtype()
        self.transformer = Backbone(config, device=device, dtype=dtype)
        self.lm_head = TiedHead(self.transformer.word_embeddings)
        self.mtp = None

    @property
    def trunk(self) -> Backbone:
        return self.transformer

    def new_state(self, slots: int, max_length: int, **options) -> State:
        self._check_length("max_length", max_length)
        return super().new_state(slots, max_length, **options)

    def _run(self, tokens, cu_seqlens, state, slots, decode, *, mtp: bool) -> Run:
        if state is None and cu_seqlens is None:
            self._check_length("tokens", tokens.shape[1])
        elif state is None and cu_seqlens.device.type == "cpu" and not is_compiling():
            self._check_length("cu_seqlens", max(cu_seqlens.diff().tolist(), default=0))
        return super()._run(tokens, cu_seqlens, state, slots, decode, mtp=mtp)

    def _check_length(self, name: str, length: int) -> None:
        limit = self.config.max_position_embeddings
        check("GPT", limit is None or length <= limit,
              "`{}` has sequences of {} tokens, but {} positions were learned",
              name, length, limit)  # fmt: skip


def _norm(config: GPTConfig, **kwargs) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.layer_norm_epsilon, **kwargs)


def _embedding(rows: int, config: GPTConfig, **kwargs) -> nn.Embedding:
    empty = torch.empty(rows, config.hidden_size, **kwargs)
    return nn.Embedding(*empty.shape, _weight=empty)
