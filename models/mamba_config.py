"""MambaConfig: the checked config.json of a Mamba-1 model, ``mamba`` in transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from nemokernels.models.fields import (
    MAX_LAYERS,
    ConfigError,
    check_fixed,
    check_object,
    check_scan,
    check_type,
    show,
)

__all__ = ["MambaConfig", "Mamba1Sizes"]

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "state_size")
_FIXED = {"model_type": "mamba", "hidden_act": "silu"}


class Mamba1Sizes:
    """Sizes that follow from the fields of a configuration with Mamba-1 layers.

    In a :class:`State`, a Mamba-1 layer is one head of width ``d_inner``.
    """

    mamba_num_heads = 1
    mamba_ssm_cache_dtype = "float32"
    mtp_pattern = ""

    @property
    def d_inner(self) -> int:
        return self.expand * self.hidden_size

    mamba_head_dim = conv_dim = d_inner

    @property
    def ssm_state_size(self) -> int:
        return self.state_size

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep a convolution window and an SSM state: all."""
        return tuple(range(self.num_hidden_layers))


def check_mamba1(config) -> None:
    """Raise ConfigError unless the sizes of Mamba-1 layers fit together."""
    for spec in dataclasses.fields(config):
        if spec.type in ("int", "int | None", "float", "bool", "str"):
            check_type(spec.name, getattr(config, spec.name), spec.type)
    if config.num_hidden_layers > MAX_LAYERS:
        raise ConfigError(
            f"`num_hidden_layers` is {config.num_hidden_layers}, at most {MAX_LAYERS}"
        )
    check_scan(config)


@dataclass(frozen=True)
class MambaConfig(Mamba1Sizes):
    """Sizes and constants of one Mamba-1 model. Field names are those of its config.json.

    ``use_bias`` gives the two outer projections a bias; ``residual_in_fp32`` keeps the sum of the
    layers in float32. ``extra`` keeps the fields of the file that are not interpreted here.

    Raises:
        ConfigError: a field is missing, has the wrong type or value, or two fields disagree.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    state_size: int
    time_step_rank: int
    expand: int = 2
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.1
    rescale_prenorm_residual: bool = False
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)

    model_type = "mamba"

    def __post_init__(self) -> None:
        check_mamba1(self)

    @property
    def pattern(self) -> str:
        """One letter per layer: m Mamba-1."""
        return "m" * self.num_hidden_layers

    @property
    def layers(self) -> tuple[MambaConfig, ...]:
        """Every layer's configuration: this one."""
        return (self,) * self.num_hidden_layers

    @property
    def kv_heads(self) -> dict[int, int]:
        """Attention layer -> its key-value heads: there are none."""
        return {}

    @property
    def depth(self) -> int:
        """How many mixers write into the residual stream."""
        return self.num_hidden_layers

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> MambaConfig:
        """Read the fields of a config.json."""
        check_object(data)
        check_fixed(data, _FIXED)
        left = {name: value for name, value in data.items() if name not in _FIXED}
        for name in _NEEDED:
            if left.get(name) is None:
                raise ConfigError(f"`{name}` is missing")
            check_type(name, left[name], "int")
        if left.get("time_step_rank", "auto") == "auto":
            left["time_step_rank"] = -(-left["hidden_size"] // 16)
        known = [spec.name for spec in dataclasses.fields(cls) if spec.name != "extra"]
        config = cls(**{name: left.pop(name) for name in known if name in left}, extra=left)
        inner = left.get("intermediate_size", config.d_inner)
        if inner != config.d_inner:
            raise ConfigError(
                f"`intermediate_size` is {show(inner)}, but `hidden_size` x `expand` is "
                f"{config.d_inner}"
            )
        return config

    def to_dict(self) -> dict[str, object]:
        """The fields of a config.json that transformers and :meth:`from_dict` read."""
        own = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        del own["extra"]
        return {"architectures": ["MambaForCausalLM"], **_FIXED, **self.extra, **own}
