"""The models: configurations, state, checkpoints and generation, the same for every family."""

from nemokernels.models.balance import Balance
from nemokernels.models.build import build
from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.checkpoint import checkpoint_spec, from_pretrained
from nemokernels.models.config import NemotronHConfig
from nemokernels.models.decoder import Decoder
from nemokernels.models.decoder_config import DecoderConfig
from nemokernels.models.elastic import slice_checkpoint, slice_model
from nemokernels.models.families import read_config
from nemokernels.models.fields import ConfigError
from nemokernels.models.files import CheckpointError
from nemokernels.models.fp8 import (
    Fp8Linear,
    Fp8Recipe,
    check_fp8,
    convert_to_fp8,
    fp8_report,
    held_fp8_weights,
    inner_layers,
    is_fp8_state,
    update_fp8,
)
from nemokernels.models.generation import Generation, generate
from nemokernels.models.gpt import GPT
from nemokernels.models.gpt_config import GPTConfig
from nemokernels.models.hymba import Hymba
from nemokernels.models.hymba_config import HymbaConfig
from nemokernels.models.images import Clip, ImageError, load_clip, load_image
from nemokernels.models.init import reset_buffers
from nemokernels.models.linear import exact
from nemokernels.models.mamba2_config import Mamba2Config
from nemokernels.models.mamba_config import MambaConfig
from nemokernels.models.megatron import from_megatron, megatron_shapes
from nemokernels.models.names import TensorSpec
from nemokernels.models.nemotron_h import NemotronH
from nemokernels.models.nemotron_vl import NemotronVL
from nemokernels.models.prompts import VisionPrompt, vision_prompt
from nemokernels.models.quantization import Quantization
from nemokernels.models.reward import RewardModel, attribute_loss, pairwise_loss
from nemokernels.models.reward_config import RewardConfig
from nemokernels.models.saving import save_pretrained
from nemokernels.models.sharding import deferred
from nemokernels.models.state import State
from nemokernels.models.variants import Variant, find_variant, list_variants
from nemokernels.models.vl_config import NemotronVLConfig, VisionConfig

__all__ = [
    "Balance",
    "CausalLM",
    "CheckpointError",
    "Clip",
    "ConfigError",
    "Decoder",
    "DecoderConfig",
    "Fp8Linear",
    "Fp8Recipe",
    "GPT",
    "GPTConfig",
    "Generation",
    "Hymba",
    "HymbaConfig",
    "ImageError",
    "Mamba2Config",
    "MambaConfig",
    "NemotronH",
    "NemotronHConfig",
    "NemotronVL",
    "NemotronVLConfig",
    "Quantization",
    "State",
    "TensorSpec",
    "Variant",
    "VisionConfig",
    "VisionPrompt",
    "attribute_loss",
    "build",
    "check_fp8",
    "checkpoint_spec",
    "convert_to_fp8",
    "deferred",
    "exact",
    "find_variant",
    "fp8_report",
    "from_megatron",
    "from_pretrained",
    "generate",
    "held_fp8_weights",
    "inner_layers",
    "is_fp8_state",
    "list_variants",
    "load_clip",
    "load_image",
    "megatron_shapes",
    "RewardConfig",
    "RewardModel",
    "pairwise_loss",
    "read_config",
    "reset_buffers",
    "save_pretrained",
    "slice_checkpoint",
    "slice_model",
    "update_fp8",
    "vision_prompt",
]
