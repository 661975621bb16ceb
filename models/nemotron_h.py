"""The Nemotron-H model: one mixer per layer, Mamba-2 or -1, attention, MLP or experts.

Every layer is ``x + mixer(norm(x))``. Shapes: B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from nemokernels._checks import check, check_tensor
from nemokernels._registry import acc_dtype
from nemokernels.models.causal_lm import INTEGERS, CausalLM
from nemokernels.models.config import NemotronHConfig
from nemokernels.models.linear import Linear, head
from nemokernels.models.mamba1 import Mamba1
from nemokernels.models.mamba_config import MambaConfig
from nemokernels.models.mixers import MLP, Attention, Mamba2, MoE
from nemokernels.models.norms import RMSNorm, normed_sum
from nemokernels.models.runs import Run
from nemokernels.models.state import State

__all__ = ["NemotronH"]


class Layer(nn.Module):
    """Norm and mixer. The next layer's norm adds the result to the residual stream.

    Takes and returns ``(x, residual)``: the output of the layer before, and the residual stream
    that it has still to be added to (None in the first layer).
    """

    def __init__(self, config: NemotronHConfig, letter: str, index: int, **kwargs):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, **kwargs)
        if letter == "M":
            self.mixer = Mamba2(config, index, **kwargs)
        elif letter == "m":
            self.mixer = Mamba1(config, index, **kwargs)
        elif letter == "*":
            self.mixer = Attention(config, index, **kwargs)
        elif letter == "E":
            self.mixer = MoE(config, **kwargs)
        else:
            act = config.mlp_hidden_act
            self.mixer = MLP(config.hidden_size, config.intermediate_size, act, **kwargs)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, run: Run):
        normed, residual = normed_sum(self.norm, x, residual, self.mixer.readers)
        return self.mixer(normed, run), residual


class Backbone(nn.Module):
    def __init__(self, config: NemotronHConfig, **kwargs):
        super().__init__()
        self.wide = config.residual_in_fp32
        empty = torch.empty(config.vocab_size, config.hidden_size, **kwargs)
        self.embeddings = nn.Embedding(*empty.shape, _weight=empty)
        self.layers = nn.ModuleList(
            Layer(config.layers[index], letter, index, **kwargs)
            for index, letter in enumerate(config.pattern)
        )
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon, **kwargs)

    def forward(
        self, tokens: torch.Tensor, run: Run, embedded: torch.Tensor | None = None
    ) -> torch.Tensor:
        x, residual = self.embeddings(tokens) if embedded is None else embedded, None
        for layer in self.layers:
            x, residual = layer(x, residual, run)
            if self.wide:
                residual = residual.to(acc_dtype(residual))
        return self.norm_f(x, residual)[0]


class MTP(nn.Module):
    """The multi-token-prediction block: it turns a hidden state and the next token into the hidden
    state that predicts the token after that."""

    def __init__(self, config: NemotronHConfig, **kwargs):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        trunk = len(config.pattern)
        self.layers = nn.ModuleList(
            Layer(config.layers[trunk + index], letter, trunk + index, **kwargs)
            for index, letter in enumerate(config.mtp_pattern)
        )
        # In the published names the block's first and last modules belong to its first and last
        # layer.
        self.layers[0].enorm = RMSNorm(width, eps, **kwargs)
        self.layers[0].hnorm = RMSNorm(width, eps, **kwargs)
        self.layers[0].eh_proj = Linear(2 * width, width, **kwargs)
        self.layers[-1].final_layernorm = RMSNorm(width, eps, **kwargs)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor, run: Run) -> torch.Tensor:
        first, last = self.layers[0], self.layers[-1]
        x = first.eh_proj(torch.cat([first.enorm(embedded), first.hnorm(hidden)], -1))
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, run)
        return last.final_layernorm(x, residual)[0]


class NemotronH(CausalLM):
    """A Nemotron-H, a plain Mamba-2 or a plain Mamba-1 language model.

    Args:
        config: its sizes.
        device, dtype: of its parameters; A_log, D, dt_bias and the routers are at least float32.
            Values are unset until :meth:`reset_parameters` or a checkpoint fills them
            (``build`` and ``from_pretrained`` do).
    """

    def __init__(
        self,
        config: NemotronHConfig | MambaConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.config = config
        self.backbone = Backbone(config, **kwargs)
        self.lm_head = head(config, self.backbone.embeddings, **kwargs)
        self.mtp = MTP(config, **kwargs) if config.mtp_pattern else None

    @property
    def trunk(self) -> Backbone:
        return self.backbone

    def mtp_hidden(
        self,
        hidden: torch.Tensor,
        next_tokens: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        state: State | None = None,
        slots: torch.Tensor | None = None,
        decode: bool = False,
    ) -> torch.Tensor:
        """One step of multi-token prediction.

        Position i combines the hidden state h_i (which predicts token i+1) with token i+1 and
        returns a hidden state that predicts token i+2. Applied to its own output and the tokens one
        place further on, it predicts one token further ahead each time.

        Args:
            hidden: (B, T, H) from :meth:`hidden` or from this function.
            next_tokens: (B, T), at each position the token after those that ``hidden`` has seen.
            cu_seqlens, state, slots, decode: as :meth:`hidden`. The state counts the block's tokens
                separately; when decoding, only ``state.advance_mtp`` moves that count.

        Returns:
            (B, T, H), after the block's final norm; ``lm_head`` turns it into logits.
        """
        check("NemotronH", self.mtp is not None, "this model has no MTP block")
        check_tensor("NemotronH", "next_tokens", next_tokens, shape=hidden.shape[:2],
                     dims="(B, T)", dtypes=INTEGERS)  # fmt: skip
        with torch.set_grad_enabled(torch.is_grad_enabled() and state is None):
            run = self._run(next_tokens, cu_seqlens, state, slots, decode, mtp=True)
            hidden = self.mtp(hidden, self.backbone.embeddings(next_tokens), run)
            run.commit()
        return hidden
