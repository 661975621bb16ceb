"""From a configuration to its model."""

from __future__ import annotations

import torch

from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.config import NemotronHConfig
from nemokernels.models.decoder import Decoder
from nemokernels.models.decoder_config import DecoderConfig
from nemokernels.models.families import Config
from nemokernels.models.gpt import GPT
from nemokernels.models.gpt_config import GPTConfig
from nemokernels.models.hymba import Hymba
from nemokernels.models.hymba_config import HymbaConfig
from nemokernels.models.mamba2_config import Mamba2Config
from nemokernels.models.mamba_config import MambaConfig
from nemokernels.models.nemotron_h import NemotronH
from nemokernels.models.nemotron_vl import NemotronVL
from nemokernels.models.reward import RewardModel
from nemokernels.models.reward_config import RewardConfig
from nemokernels.models.variants import find_config
from nemokernels.models.vl_config import NemotronVLConfig

__all__ = ["build"]

MODELS: dict[type[Config], type[CausalLM]] = {
    NemotronHConfig: NemotronH,
    HymbaConfig: Hymba,
    MambaConfig: NemotronH,
    Mamba2Config: NemotronH,
    DecoderConfig: Decoder,
    GPTConfig: GPT,
    NemotronVLConfig: NemotronVL,
}


def build(
    name_or_config: str | Config,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **arguments: object,
) -> CausalLM:
    """A freshly initialised model of a variant (see ``list_variants``) or configuration.

    ``device="meta"`` gives the shapes without memory or values. ``arguments`` are the fields of its
    config.json that a variant needs because they are not public (``Variant.arguments``).
    """
    config = find_config(name_or_config, **arguments)
    model = _make(config, device=device, dtype=dtype)
    if model.lm_head.weight.device.type != "meta":
        model.reset_parameters()
    return model


def _make(config: Config, **kwargs) -> CausalLM:
    if isinstance(config, RewardConfig):
        return RewardModel(config, _make(config.backbone, **kwargs))
    return MODELS[type(config)](config, **kwargs)
