"""The Nemotron-H family: configurations, the model, its state, checkpoints and generation."""

from nemokernels.models.checkpoint import checkpoint_spec, from_pretrained
from nemokernels.models.config import ConfigError, NemotronHConfig
from nemokernels.models.files import CheckpointError
from nemokernels.models.generation import Generation, generate
from nemokernels.models.linear import exact
from nemokernels.models.names import TensorSpec
from nemokernels.models.nemotron_h import NemotronH, build
from nemokernels.models.quantization import Quantization
from nemokernels.models.saving import save_pretrained
from nemokernels.models.state import State
from nemokernels.models.variants import Variant, list_variants

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Generation",
    "NemotronH",
    "NemotronHConfig",
    "Quantization",
    "State",
    "TensorSpec",
    "Variant",
    "build",
    "checkpoint_spec",
    "exact",
    "from_pretrained",
    "generate",
    "list_variants",
    "save_pretrained",
]
