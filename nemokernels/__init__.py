"""nemokernels: fused GPU primitives for NVIDIA's Nemotron models, as differentiable torch ops."""

from nemokernels._backends import backends, use_backend
from nemokernels.ops.gated_rms_norm import rmsnorm_fn
from nemokernels.ops.relu2 import relu2
from nemokernels.ops.rms_norm import rms_norm

__version__ = "0.1.0"

__all__ = [
    "backends",
    "relu2",
    "rms_norm",
    "rmsnorm_fn",
    "use_backend",
]
