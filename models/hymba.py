"""Hymba: every layer runs attention and Mamba-1 side by side on one projection of its input.

A layer is ``x + mixer(norm(x))`` followed by ``x + ffn(norm(x))``. ``meta_tokens`` learned vectors
stand before every sequence: they take the first positions, the tokens those after them. The
published checkpoint's tensor names are not known; those used here follow the module names of the
published block. Shapes: B rows, T tokens, D width of either branch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nemokernels import Fp8Normed
from nemokernels.models.decoder import FFN, Decoder, Rope, rope_table, rotate
from nemokernels.models.hymba_config import HymbaConfig
from nemokernels.models.linear import Linear
from nemokernels.models.mamba1 import SelectiveScan
from nemokernels.models.norms import RMSNorm, normed_sum
from nemokernels.models.runs import Prefill, Run
from nemokernels.models.state import State

__all__ = ["Hymba"]

KeysValues = tuple[torch.Tensor, torch.Tensor]


class Mixer(nn.Module):
    """``out_proj((norm1(attention) + norm2(mamba)) / 2)``.

    The rows of ``in_proj`` give queries, keys, values, the Mamba branch's input and its gate. A
    layer that attends to another layer's keys and values has no rows for its own.
    """

    def __init__(self, config: HymbaConfig, index: int, **kwargs):
        super().__init__()
        self.config, self.source = config, config.sources[index]
        self.owns_keys = self.source == index
        inner, heads = config.d_inner, config.num_key_value_heads
        keys = (heads * config.qk_head_dim, heads * config.v_head_dim) if self.owns_keys else ()
        self.sizes = (config.num_attention_heads * config.qk_head_dim, *keys, inner, inner)
        self.in_proj = Linear(config.hidden_size, sum(self.sizes), **kwargs)
        self.mamba = SelectiveScan(config, index, norms=config.rms_norm_eps, **kwargs)
        self.pre_avg_layernorm1 = RMSNorm(inner, config.rms_norm_eps, **kwargs)
        self.pre_avg_layernorm2 = RMSNorm(inner, config.rms_norm_eps, **kwargs)
        self.out_proj = Linear(inner, config.hidden_size, **kwargs)
        self.rule = {"scale": config.qk_head_dim**-0.5}
        if index not in config.global_attn_layers:
            self.rule |= {"window": config.sliding_window, "global_tokens": config.meta_tokens}

    @property
    def readers(self) -> tuple[Linear, ...]:
        return (self.in_proj,)

    def forward(self, x: torch.Tensor | Fp8Normed, rope: Rope, run: Run, shared: KeysValues | None):
        """The output (B, T, H), and the keys and values it attended to."""
        q, *own, x, gate = self.in_proj(x).split(self.sizes, -1)
        if self.owns_keys:
            k, v = own
            v = v.unflatten(-1, (-1, self.config.v_head_dim))
            shared = (self._rotated(k, rope), self._padded(v))
        attended = run.attend(self.source, self._rotated(q, rope), *shared, **self.rule)
        attended = attended[..., : self.config.v_head_dim].flatten(-2)
        scanned = self.mamba(x, gate, run)
        y = self.pre_avg_layernorm1(attended) + self.pre_avg_layernorm2(scanned)
        return self.out_proj(y / 2), shared

    def _rotated(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        return self._padded(rotate(x.unflatten(-1, (-1, self.config.qk_head_dim)), rope))

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        # Attention takes one head size, so the narrower side is padded. Zeros change no score;
        # those of the values are cut off again.
        return F.pad(x, (0, self.config.head_dim - x.shape[-1]))


class Layer(nn.Module):
    """Mixer and FFN, each with its norm. The next layer's norm does the last addition."""

    def __init__(self, config: HymbaConfig, index: int, **kwargs):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kwargs)
        self.mixer = Mixer(config, index, **kwargs)
        self.pre_ffn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kwargs)
        self.mlp = FFN(config.hidden_size, config.intermediate_size, gated=True, **kwargs)

    def forward(self, x, residual, shared, rope: Rope, run: Run):
        normed, residual = normed_sum(self.input_layernorm, x, residual, self.mixer.readers)
        x, shared = self.mixer(normed, rope, run, shared)
        normed, residual = normed_sum(self.pre_ffn_layernorm, x, residual, self.mlp.readers)
        return self.mlp(normed), residual, shared


class Backbone(nn.Module):
    def __init__(self, config: HymbaConfig, **kwargs):
        super().__init__()
        self.config = config
        empty = torch.empty(config.vocab_size, config.hidden_size, **kwargs)
        self.embed_tokens = nn.Embedding(*empty.shape, _weight=empty)
        self.meta_tokens = nn.Parameter(
            torch.empty(config.meta_tokens, config.hidden_size, **kwargs)
        )
        self.layers = nn.ModuleList(
            Layer(config, index, **kwargs) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kwargs)

    def forward(self, tokens: torch.Tensor, run: Run) -> torch.Tensor:
        x = run.prepend(self.embed_tokens(tokens), self.meta_tokens)
        return run.strip(self.through(x, run))

    def through(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """From embeddings to the hidden states after the final norm."""
        rope = rope_table(self.config, run.positions(x[..., 0]), x.dtype)
        residual = shared = None
        for layer in self.layers:
            x, residual, shared = layer(x, residual, shared, rope, run)
        return self.norm(x, residual)[0]


class Hymba(Decoder):
    """A Hymba language model; A_log and D are at least float32."""

    backbone = Backbone

    def new_state(self, slots: int, max_length: int, **options) -> State:
        """Room for ``slots`` sequences of up to ``max_length`` tokens; see :class:`State`.

        Every slot begins with the state that the meta tokens leave behind, computed now with the
        model's present weights. ``max_length`` and the state's lengths do not count them.
        """
        state = super().new_state(slots, max_length, **options)
        meta = self.model.meta_tokens
        with torch.no_grad():
            state.all_lengths[0] = -state.prefix
            none = torch.zeros(1, len(meta), dtype=torch.int32, device=state.device)
            first = torch.zeros(1, dtype=torch.int32, device=state.device)
            run = Prefill(self.config, state, none, None, first, mtp=False)
            self.model.through(meta[None], run)
            run.commit()
            state.begin_with(0)
        return state
