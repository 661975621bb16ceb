"""What every model of the package does: turn tokens into logits, with or without a state.

Shapes: B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nemokernels._checks import check, check_tensor
from nemokernels.models.init import reset_parameters
from nemokernels.models.mixers import Experts, Router
from nemokernels.models.runs import Decode, Packed, Prefill, Run
from nemokernels.models.state import State

__all__ = ["INTEGERS", "CausalLM"]

INTEGERS = (torch.int64, torch.int32)


class CausalLM(nn.Module):
    """A language model: a trunk of layers, a head, and in some families an MTP block.

    A family's class sets ``config``, ``lm_head`` and ``mtp`` (or None) and says what its trunk is:
    a module with ``layers`` that takes ``(tokens, run)``.

    Attributes:
        image_token_id: in a vision-language model, the token whose places images fill; else None.
        kept: tensors of the checkpoint that no computation uses; saving writes them back.
    """

    image_token_id: int | None = None
    kept: Mapping[str, torch.Tensor] = MappingProxyType({})

    @property
    def trunk(self) -> nn.Module:
        """The module that turns tokens into the hidden states after the final norm."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return type(self).__name__

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
        embedded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, which ``lm_head`` turns into logits.

        Args:
            tokens: (B, T) int64 or int32. Every row is a sequence.
            cu_seqlens: (n + 1,) int32 bounds of n sequences packed into the one row of tokens.
                Nothing crosses a bound.
            state: continue the sequences that it holds and update it (:meth:`new_state`); no
                gradients are recorded.
            slots: (B,) or (n,) int32, the state's slot of each sequence; None: 0, 1, 2, ...
                A negative slot marks padding, which touches none.
            decode: run T <= draft_tokens + 1 tokens per row through the recurrent kernels;
                ``state.accept`` must follow. Otherwise the chunked kernels run and all tokens are
                kept.
            embedded: (B, T, H) vectors to use instead of the tokens' embeddings, for models whose
                trunk takes them (:class:`NemotronH`).

        Returns:
            (B, T, H) in the model's dtype.
        """
        check_tensor(self.name, "tokens", tokens, shape=(None, None), dims="(B, T)",
                     dtypes=INTEGERS)  # fmt: skip
        with torch.set_grad_enabled(torch.is_grad_enabled() and state is None):
            run = self._run(tokens, cu_seqlens, state, slots, decode, mtp=False)
            start = () if embedded is None else (embedded,)
            hidden = self.trunk(tokens, run, *start)
            run.commit()
        return hidden

    def _run(self, tokens, cu_seqlens, state, slots, decode, *, mtp: bool) -> Run:
        if state is None:
            check(self.name, slots is None and not decode, "`slots` and `decode` need a `state`")
            return Packed(self.config, cu_seqlens)
        check(self.name, not state.prefix or state.beginning is not None,
              "`state` lacks the meta tokens; make it with the model's new_state")  # fmt: skip
        if decode:
            check(self.name, cu_seqlens is None, "`cu_seqlens` excludes `decode`")
            return Decode(self.config, state, tokens, slots, mtp=mtp)
        return Prefill(self.config, state, tokens, cu_seqlens, slots, mtp=mtp)

    def new_state(
        self,
        slots: int,
        max_length: int,
        *,
        draft_tokens: int = 0,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        ssm_dtype: torch.dtype | None = None,
    ) -> State:
        """Room for ``slots`` sequences of up to ``max_length`` tokens; see :class:`State`.

        ``dtype`` (convolution and key-value cache) defaults to the model's, ``ssm_dtype`` to the
        config's ``mamba_ssm_cache_dtype``, ``kv_dtype`` to ``dtype``. A float8_e4m3fn cache uses
        the scales of the quantised checkpoint, if it had any.
        """
        weight = self.lm_head.weight
        return State(
            self.config,
            slots,
            max_length,
            draft_tokens=draft_tokens,
            dtype=dtype or weight.dtype,
            kv_dtype=kv_dtype,
            kv_scales=self._kv_scales(),
            ssm_dtype=ssm_dtype,
            device=weight.device,
        )

    def _kv_scales(self) -> dict[int, tuple[float, float]]:
        """Attention layer -> scales of its keys and its values, from the checkpoint."""
        quantization = getattr(self, "quantization", None)  # only a loaded model has this attribute
        if quantization is None:
            return {}
        given = quantization.kv_scales
        return {
            module.index: tuple(given.get(f"{name}.{leaf}_proj", 1.0) for leaf in "kv")
            for name, module in self.named_modules()
            if hasattr(module, "k_proj")
        }

    def fsdp_units(self) -> list[nn.Module]:
        """The modules to shard one by one: every layer that has parameters, and the MTP block."""
        units = [*self.trunk.layers, *([] if self.mtp is None else [self.mtp])]
        return [unit for unit in units if any(True for _ in unit.parameters())]

    def routers(self) -> Iterator[Router]:
        """The routers of all mixture-of-experts layers, in order."""
        return (module for module in self.modules() if isinstance(module, Router))

    @property
    def expert_counts(self) -> list[torch.Tensor]:
        """Per router, (experts,) int64: tokens each expert got in training since the last reset."""
        return [router.expert_counts for router in self.routers()]

    def split_experts(self, mesh: DeviceMesh) -> None:
        """Keep only this rank's share of all experts; rows then travel over the 1-D ``mesh``.

        The ranks of the mesh must call the model together, each with tokens of its own. The tensors
        become DTensors, with their names and global shapes unchanged. Call this before
        ``fully_shard``.

        Raises:
            ValueError: the number of experts of some layer is not a multiple of the number of
                ranks.
        """
        for experts in self.experts():
            experts.split(mesh)

    def experts(self) -> Iterator[Experts]:
        """The routed experts of all mixture-of-experts layers, in order."""
        return (module for module in self.modules() if isinstance(module, Experts))

    def reset_parameters(self) -> None:
        """Fill every parameter and buffer with its initial value; see :mod:`.init`."""
        reset_parameters(self)
