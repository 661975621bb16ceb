"""Decoders with rotary embeddings: Llama, Mistral, Nemotron-4 and Llama-Nemotron.

A layer is ``x + attention(norm(x))`` followed by ``x + ffn(norm(x))``; either half may be absent.
Module names are the tensor names of the published checkpoints. Shapes: B rows, T tokens, D the
rotated channels of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from nemokernels import Fp8Normed, relu2
from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.decoder_config import DecoderConfig
from nemokernels.models.linear import Linear, each_row, head
from nemokernels.models.norms import LayerNorm1P, RMSNorm, normed_sum
from nemokernels.models.runs import Run

__all__ = ["Decoder"]

Rope = tuple[torch.Tensor, torch.Tensor]


def rotary_frequencies(config: DecoderConfig, device: torch.device | None = None) -> torch.Tensor:
    """How much each rotated pair of channels turns per position, (D / 2,) float64.

    ``theta ** (-2 i / D)``. With Llama 3.1's scaling, wavelengths above ``original / low`` grow by
    ``factor``, those below ``original / high`` stay, and between the two the frequencies are
    interpolated linearly in ``original / wavelength``.

    Source: Su et al., "RoFormer", 2021; Grattafiori et al., "The Llama 3 herd of models", 2024, and
    its reference implementation for the scaling.
    """
    D, s = config.rotary_dim, config.rope_scaling
    exponents = torch.arange(0, D, 2, dtype=torch.float64, device=device) / D
    frequencies = torch.exp(-math.log(config.rope_theta) * exponents)
    if s is None:
        return frequencies
    turns = frequencies * s.original_max_position_embeddings / (2 * math.pi)
    kept = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / s.factor)


def rope_table(config: DecoderConfig, positions: torch.Tensor, dtype: torch.dtype) -> Rope:
    """Cosines and sines (B, T, 1, D / 2) of the angles at ``positions`` (B, T).

    Angles are computed in float64: in float32 they would be off by 0.004 at position 100,000. The
    result is float32, or float64 for a float64 model.
    """
    angles = positions[..., None, None] * rotary_frequencies(config, positions.device)
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate the channels (i, i + D / 2) of x (B, T, heads, head_dim); those past D stay.

    Computed in float32 (float64 for float64 input), with one cast at the end.
    """
    cos, sin = rope
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embeddings."""

    def __init__(self, config: DecoderConfig, index: int, kv_heads: int, **kwargs):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = Linear(width, inner, **kwargs)
        self.k_proj = Linear(width, kv_heads * config.head_dim, **kwargs)
        self.v_proj = Linear(width, kv_heads * config.head_dim, **kwargs)
        self.o_proj = Linear(inner, width, **kwargs)

    @property
    def readers(self) -> tuple[Linear, ...]:
        return (self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x: torch.Tensor | Fp8Normed, rope: Rope, run: Run) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in self.readers)
        attended = run.attend(self.index, rotate(q, rope), rotate(k, rope), v)
        return self.o_proj(attended.flatten(-2))


class FFN(nn.Module):
    """``down(silu(gate(x)) * up(x))``, or ``down(relu(up(x)) ** 2)`` without a gate."""

    def __init__(self, width: int, inner: int, gated: bool, **kwargs):
        super().__init__()
        self.gate_proj = Linear(width, inner, **kwargs) if gated else None
        self.up_proj = Linear(width, inner, **kwargs)
        self.down_proj = Linear(inner, width, **kwargs)

    @property
    def readers(self) -> tuple[Linear, ...]:
        return (self.up_proj,) if self.gate_proj is None else (self.gate_proj, self.up_proj)

    def forward(self, x: torch.Tensor | Fp8Normed) -> torch.Tensor:
        # torch rounds the tail of a vector's SiLU differently from its body, hence row by row.
        return each_row(self._rows, x)

    def _rows(self, x: torch.Tensor | Fp8Normed) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.up_proj(x), relu2)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and FFN, each with its norm. The next layer's norm does the last addition.

    Takes and returns ``(x, residual)``: the output of the block before, and the residual stream
    that it has still to be added to (None in the first layer).
    """

    def __init__(self, config: DecoderConfig, index: int, **kwargs):
        super().__init__()
        kv_heads, inner = config.blocks[index]
        if kv_heads is not None:
            self.input_layernorm = _norm(config, **kwargs)
            self.self_attn = Attention(config, index, kv_heads, **kwargs)
        if inner is not None:
            self.post_attention_layernorm = _norm(config, **kwargs)
            self.mlp = FFN(config.hidden_size, inner, config.family.gated, **kwargs)
        self.has_attention, self.has_ffn = kv_heads is not None, inner is not None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, rope: Rope, run: Run):
        if self.has_attention:
            readers = self.self_attn.readers
            normed, residual = normed_sum(self.input_layernorm, x, residual, readers)
            x = self.self_attn(normed, rope, run)
        if self.has_ffn:
            readers = self.mlp.readers
            normed, residual = normed_sum(self.post_attention_layernorm, x, residual, readers)
            x = self.mlp(normed)
        return x, residual


class Backbone(nn.Module):
    def __init__(self, config: DecoderConfig, **kwargs):
        super().__init__()
        self.config = config
        empty = torch.empty(config.vocab_size, config.hidden_size, **kwargs)
        self.embed_tokens = nn.Embedding(*empty.shape, _weight=empty)
        self.layers = nn.ModuleList(
            Layer(config, index, **kwargs) for index in range(config.num_hidden_layers)
        )
        self.norm = _norm(config, **kwargs)

    def forward(self, tokens: torch.Tensor, run: Run) -> torch.Tensor:
        x, residual = self.embed_tokens(tokens), None
        rope = rope_table(self.config, run.positions(tokens), x.dtype)
        for layer in self.layers:
            x, residual = layer(x, residual, rope, run)
        return normed_sum(self.norm, x, residual)[0]


class Decoder(CausalLM):
    """A language model of one of the decoder families.

    Args:
        config: its sizes.
        device, dtype: of its parameters. Values are unset until :meth:`reset_parameters` or a
            checkpoint fills them (``build`` and ``from_pretrained`` do).
    """

    backbone = Backbone

    def __init__(
        self,
        config: DecoderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.config = config
        self.model = self.backbone(config, **kwargs)
        self.lm_head = head(config, self.model.embed_tokens, **kwargs)
        self.mtp = None

    @property
    def trunk(self) -> nn.Module:
        return self.model


def _norm(config: DecoderConfig, **kwargs) -> nn.Module:
    kind = LayerNorm1P if config.family.layer_norm else RMSNorm
    return kind(config.hidden_size, config.norm_eps, **kwargs)
