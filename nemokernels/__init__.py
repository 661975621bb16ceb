"""nemokernels: fused GPU primitives for NVIDIA's Nemotron models, as differentiable torch ops."""

from nemokernels._backends import backends, use_backend
from nemokernels.ops.attention import attention, attention_with_cache
from nemokernels.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from nemokernels.ops.cross_entropy import linear_cross_entropy
from nemokernels.ops.gated_rms_norm import rmsnorm_fn
from nemokernels.ops.relu2 import relu2
from nemokernels.ops.rms_norm import rms_norm

__version__ = "0.1.0"

__all__ = [
    "attention",
    "attention_with_cache",
    "backends",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "linear_cross_entropy",
    "relu2",
    "rms_norm",
    "rmsnorm_fn",
    "use_backend",
]
