"""nemokernels: fused GPU primitives for NVIDIA's Nemotron models, as differentiable torch ops."""

from pathlib import Path

import torch

from nemokernels._backends import backends, use_backend
from nemokernels.ops.attention import attention, attention_with_cache
from nemokernels.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)
from nemokernels.ops.cross_entropy import linear_cross_entropy
from nemokernels.ops.fp8 import (
    Fp8Codes,
    Fp8Normed,
    cast_fp8_weight,
    current_scale,
    delayed_scaling_update,
    dequantize_fp8,
    fp8_linear,
    fp8_products,
    gated_rms_norm_fp8,
    quantize_fp8,
    rms_norm_fp8,
)
from nemokernels.ops.gated_rms_norm import RMSNormGated, rmsnorm_fn
from nemokernels.ops.mamba_step import mamba_step
from nemokernels.ops.moe_experts import FP8Experts, moe_experts
from nemokernels.ops.moe_route import (
    RaggedRoute,
    Route,
    balance_loss,
    moe_route,
    ragged_route,
    update_correction_bias,
)
from nemokernels.ops.mtp_verify import Verdict, mtp_verify
from nemokernels.ops.nvfp4 import (
    NVFP4,
    SwizzledNVFP4,
    dequantize_nvfp4,
    hadamard16,
    pack_e2m1,
    quantize_nvfp4,
    quantize_nvfp4_pair,
    quantize_nvfp4_weight,
    swizzle_nvfp4,
    swizzle_scales,
    unpack_e2m1,
    unswizzle_scales,
)
from nemokernels.ops.nvfp4_gemm import NVFP4Experts
from nemokernels.ops.relu2 import relu2
from nemokernels.ops.rms_norm import rms_norm, rms_norm_fn
from nemokernels.ops.selective_scan import selective_scan_fn, selective_scan_ref
from nemokernels.ops.selective_scan.inner import mamba_inner_fn
from nemokernels.ops.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from nemokernels.ops.state_update import selective_state_update, selective_state_update_ref
from nemokernels.ops.w4a16 import TiledNVFP4, nvfp4_linear, tile_nvfp4, untile_nvfp4
from nemokernels.patch import patch_transformers

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
if not (_HERE / "_csrc").is_dir():  # a source tree: models, train and bench lie beside this folder
    __path__.append(str(_HERE.parent))

__all__ = [
    "FP8Experts",
    "Fp8Codes",
    "Fp8Normed",
    "NVFP4",
    "NVFP4Experts",
    "RMSNormGated",
    "RaggedRoute",
    "Route",
    "SwizzledNVFP4",
    "TiledNVFP4",
    "Verdict",
    "attention",
    "attention_with_cache",
    "backends",
    "balance_loss",
    "cast_fp8_weight",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
    "causal_conv1d_varlen_states_ref",
    "current_scale",
    "delayed_scaling_update",
    "dequantize_fp8",
    "dequantize_nvfp4",
    "fp8_linear",
    "fp8_products",
    "gated_rms_norm_fp8",
    "hadamard16",
    "linear_cross_entropy",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "mamba_step",
    "moe_experts",
    "moe_route",
    "mtp_verify",
    "nvfp4_linear",
    "pack_e2m1",
    "patch_transformers",
    "quantize_fp8",
    "quantize_nvfp4",
    "quantize_nvfp4_pair",
    "quantize_nvfp4_weight",
    "ragged_route",
    "relu2",
    "rms_norm",
    "rms_norm_fn",
    "rms_norm_fp8",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
    "swizzle_nvfp4",
    "swizzle_scales",
    "tile_nvfp4",
    "unpack_e2m1",
    "unswizzle_scales",
    "untile_nvfp4",
    "update_correction_bias",
    "use_backend",
]

# What torch may read back with weights_only=True: tuples of tensors, whose parts functions check.
torch.serialization.add_safe_globals(
    [kind for kind in map(globals().get, __all__)
     if isinstance(kind, type) and issubclass(kind, tuple)]
)  # fmt: skip
