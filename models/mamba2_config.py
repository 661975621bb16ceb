"""Mamba2Config: the config.json of a plain Mamba-2 model, ``mamba2`` in transformers.

It is a Nemotron-H whose layers are all Mamba-2, with other field names and with three options that
are fixed in Nemotron-H.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemokernels.models.config import NemotronHConfig
from nemokernels.models.fields import (
    MAX_LAYERS,
    ConfigError,
    check_fixed,
    check_object,
    check_type,
    show,
)

__all__ = ["Mamba2Config"]

# Required sizes: name in the file -> our name.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "state_size": "ssm_state_size",
    "n_groups": "n_groups",
}
_OPTIONS = (
    "conv_kernel", "use_conv_bias", "use_bias", "expand", "chunk_size", "time_step_limit",
    "time_step_min", "time_step_max", "time_step_floor", "layer_norm_epsilon", "initializer_range",
    "rescale_prenorm_residual", "residual_in_fp32", "tie_word_embeddings",
)  # fmt: skip
_FIXED = {"model_type": "mamba2", "hidden_act": "silu"}


@dataclass(frozen=True)
class Mamba2Config(NemotronHConfig):
    """Sizes and constants of one Mamba-2 model; ``expand`` times the width is heads x head_dim.

    ``use_bias`` gives the two projections a bias; ``residual_in_fp32`` keeps the sum of the layers
    in float32. ``extra`` keeps the fields of the file that are not interpreted here.

    Raises:
        ConfigError: a field is missing, has the wrong type or value, or two fields disagree.
    """

    expand: int = 2
    chunk_size: int = 256
    initializer_range: float = 0.1
    rescale_prenorm_residual: bool = False
    use_bias: bool = False
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = False

    model_type = "mamba2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.pattern) != {"M"}:
            raise ConfigError(f"`hybrid_override_pattern` of a mamba2 is {show(self.pattern)}")
        if self.hidden_size * self.expand != self.d_inner:
            raise ConfigError(
                f"`num_heads` x `head_dim` is {self.d_inner}, but `hidden_size` x `expand` is "
                f"{self.hidden_size * self.expand}"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Mamba2Config:
        """Read the fields of a config.json."""
        check_object(data)
        check_fixed(data, _FIXED)
        left = {name: value for name, value in data.items() if name not in _FIXED}
        for name in (*_SIZES, "num_hidden_layers"):
            if left.get(name) is None:
                raise ConfigError(f"`{name}` is missing")
            check_type(name, left[name], "int")
        layers = left.pop("num_hidden_layers")
        if layers > MAX_LAYERS:
            raise ConfigError(f"`num_hidden_layers` is {layers}, at most {MAX_LAYERS}")
        own = {ours: left.pop(name) for name, ours in _SIZES.items()}
        own |= {name: left.pop(name) for name in _OPTIONS if name in left}
        return cls(hybrid_override_pattern="M" * layers, **own, extra=left)

    def to_dict(self) -> dict[str, object]:
        """The fields of a config.json that transformers and :meth:`from_dict` read."""
        return {
            "architectures": ["Mamba2ForCausalLM"],
            **_FIXED,
            **self.extra,
            **{name: getattr(self, ours) for name, ours in _SIZES.items()},
            **{name: getattr(self, name) for name in _OPTIONS},
            "num_hidden_layers": len(self.pattern),
            "time_step_limit": list(self.time_step_limit),
        }
