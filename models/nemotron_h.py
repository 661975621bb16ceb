"""The Nemotron-H model: one mixer per layer, Mamba-2, attention, MLP or mixture of experts.

Every layer is ``x + mixer(norm(x))``. Shapes: B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nemokernels._checks import check, check_tensor
from nemokernels.models.config import NemotronHConfig
from nemokernels.models.init import reset_parameters
from nemokernels.models.linear import Linear
from nemokernels.models.mixers import MLP, Attention, Mamba2, MoE, RMSNorm, Router
from nemokernels.models.runs import Decode, Packed, Prefill, Run
from nemokernels.models.state import State
from nemokernels.models.variants import find_config

__all__ = ["NemotronH", "build"]

INTEGERS = (torch.int64, torch.int32)


class Layer(nn.Module):
    """norm and mixer. The sum with the residual stream happens in the next layer's norm.

    Takes ``(x, residual)``, the output of the layer before and the stream it is to be added to
    (None in the first layer), and returns the same pair for the next one.
    """

    def __init__(self, config: NemotronHConfig, letter: str, index: int, **kwargs):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, **kwargs)
        if letter == "M":
            self.mixer = Mamba2(config, index, **kwargs)
        elif letter == "*":
            self.mixer = Attention(config, index, **kwargs)
        elif letter == "E":
            self.mixer = MoE(config, **kwargs)
        else:
            self.mixer = MLP(config.hidden_size, config.intermediate_size, **kwargs)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, run: Run):
        if residual is None:
            return self.mixer(self.norm(x), run), x
        normed, residual = self.norm(x, residual)
        return self.mixer(normed, run), residual


class Backbone(nn.Module):
    def __init__(self, config: NemotronHConfig, **kwargs):
        super().__init__()
        empty = torch.empty(config.vocab_size, config.hidden_size, **kwargs)
        self.embeddings = nn.Embedding(*empty.shape, _weight=empty)
        self.layers = nn.ModuleList(
            Layer(config, letter, index, **kwargs) for index, letter in enumerate(config.pattern)
        )
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon, **kwargs)

    def forward(self, tokens: torch.Tensor, run: Run) -> torch.Tensor:
        x, residual = self.embeddings(tokens), None
        for layer in self.layers:
            x, residual = layer(x, residual, run)
        return self.norm_f(x, residual)[0]


class MTP(nn.Module):
    """The multi-token-prediction block: from a hidden state and the next token to the hidden state
    that predicts the token after it."""

    def __init__(self, config: NemotronHConfig, **kwargs):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.layers = nn.ModuleList(
            Layer(config, letter, len(config.pattern) + index, **kwargs)
            for index, letter in enumerate(config.mtp_pattern)
        )
        # The published names put the ends of the block inside its first and last layer.
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


class NemotronH(nn.Module):
    """A Nemotron-H language model.

    Args:
        config: its sizes.
        device, dtype: of its parameters; A_log, D, dt_bias and the routers are at least float32.
            Values are unset until :meth:`reset_parameters` or a checkpoint fills them
            (:func:`build` and ``from_pretrained`` do).
    """

    def __init__(
        self,
        config: NemotronHConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.config = config
        self.backbone = Backbone(config, **kwargs)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, **kwargs)
        self.mtp = MTP(config, **kwargs) if config.mtp_pattern else None

    def forward(self, tokens: torch.Tensor, **context) -> torch.Tensor:
        """Logits (B, T, V) of the next token at every position; arguments as :meth:`hidden`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and context.get("state") is None):
            return self.lm_head(self.hidden(tokens, **context))

    def hidden(
        self,
        tokens: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        state: State | None = None,
        slots: torch.Tensor | None = None,
        decode: bool = False,
    ) -> torch.Tensor:
        """Hidden states after the final norm, which ``lm_head`` turns into logits.

        Args:
            tokens: (B, T) int64 or int32. Every row is a sequence.
            cu_seqlens: (n + 1,) int32 bounds of n sequences packed into the one row of tokens.
                Nothing crosses a bound.
            state: continue these sequences from what the state holds, and write them to it
                (:meth:`new_state`); without gradients.
            slots: (B,) or (n,) int32, the state's slot of each sequence; None: 0, 1, 2, ...
                Negative: padding, which touches no slot.
            decode: take T <= draft_tokens + 1 tokens per row through the recurrent kernels;
                ``state.accept`` must follow. Otherwise the chunked kernels, and all tokens stay.

        Returns:
            (B, T, H) in the model's dtype.
        """
        check_tensor("NemotronH", "tokens", tokens, shape=(None, None), dims="(B, T)",
                     dtypes=INTEGERS)  # fmt: skip
        with torch.set_grad_enabled(torch.is_grad_enabled() and state is None):
            run = self._run(tokens, cu_seqlens, state, slots, decode, mtp=False)
            hidden = self.backbone(tokens, run)
            run.commit()
        return hidden

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
        further on, it looks one token further ahead each time.

        Args:
            hidden: (B, T, H) from :meth:`hidden` or from this function.
            next_tokens: (B, T), for each position the token after those ``hidden`` has seen.
            cu_seqlens, state, slots, decode: as :meth:`hidden`. The block has its own length in
                the state; in decode it moves only by ``state.advance_mtp``.

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

    def _run(self, tokens, cu_seqlens, state, slots, decode, *, mtp: bool) -> Run:
        if state is None:
            check("NemotronH", slots is None and not decode, "`slots` and `decode` need a `state`")
            return Packed(self.config, cu_seqlens)
        if decode:
            check("NemotronH", cu_seqlens is None, "`cu_seqlens` excludes `decode`")
            return Decode(self.config, state, tokens, slots, mtp=mtp)
        return Prefill(self.config, state, tokens, cu_seqlens, slots, mtp=mtp)

    def new_state(
        self,
        slots: int,
        max_length: int,
        *,
        draft_tokens: int = 0,
        dtype: torch.dtype | None = None,
        ssm_dtype: torch.dtype | None = None,
    ) -> State:
        """Room for ``slots`` sequences of up to ``max_length`` tokens; see :class:`State`.

        ``dtype`` (convolution and key-value cache) defaults to the model's, ``ssm_dtype`` to the
        config's ``mamba_ssm_cache_dtype``.
        """
        weight = self.lm_head.weight
        return State(
            self.config,
            slots,
            max_length,
            draft_tokens=draft_tokens,
            dtype=dtype or weight.dtype,
            ssm_dtype=ssm_dtype,
            device=weight.device,
        )

    def fsdp_units(self) -> list[nn.Module]:
        """The modules to shard one by one: every layer, and the MTP block as a whole."""
        return [*self.backbone.layers, *([] if self.mtp is None else [self.mtp])]

    def routers(self) -> Iterator[Router]:
        """The routers of all mixture-of-experts layers, in order."""
        return (module for module in self.modules() if isinstance(module, Router))

    @property
    def expert_counts(self) -> torch.Tensor:
        """(routers, experts) int64: tokens per expert seen in training mode since last zeroed."""
        counts = [router.expert_counts for router in self.routers()]
        return torch.stack(counts) if counts else torch.zeros(0, 0, dtype=torch.int64)

    def reset_parameters(self) -> None:
        """Fill every parameter and buffer with its initial value; see :mod:`.init`."""
        reset_parameters(self)


def build(
    name_or_config: str | NemotronHConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> NemotronH:
    """A freshly initialised model of a variant (see ``list_variants``) or configuration.

    ``device="meta"`` gives the shapes without memory or values.
    """
    model = NemotronH(find_config(name_or_config), device=device, dtype=dtype)
    if model.lm_head.weight.device.type != "meta":
        model.reset_parameters()
    return model
