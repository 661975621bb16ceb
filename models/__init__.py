"""The Nemotron-H family: configurations, the model, its state, checkpoints and generation."""

from nemokernels.models.config import ConfigError, NemotronHConfig
from nemokernels.models.linear import exact
from nemokernels.models.nemotron_h import NemotronH, build
from nemokernels.models.state import State
from nemokernels.models.variants import Variant, list_variants

__all__ = [
    "ConfigError",
    "NemotronH",
    "NemotronHConfig",
    "State",
    "Variant",
    "build",
    "exact",
    "list_variants",
]
