"""nemokernels: fused GPU primitives for NVIDIA's Nemotron models, as differentiable torch ops."""

from nemokernels._backends import backends, use_backend
from nemokernels.ops.rms_norm import rms_norm

__version__ = "0.1.0"

__all__ = [
    "backends",
    "rms_norm",
    "use_backend",
]
