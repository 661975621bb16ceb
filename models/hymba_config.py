"""HymbaConfig: the checked sizes of a Hymba model.

The published config.json was not available in full. Its head sizes, rope_theta, vocabulary and
tying are not known here, nor are its names for the Mamba branch. Where no published name is known,
the field names are this package's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from nemokernels.models.fields import ConfigError, check_divides, check_fixed, check_object, show
from nemokernels.models.mamba_config import Mamba1Sizes, check_mamba1

__all__ = ["HymbaConfig"]

_FIXED = {"model_type": "hymba", "hidden_act": "silu"}
_LISTS = ("global_attn_layers", "kv_reuse_groups")


@dataclass(frozen=True)
class HymbaConfig(Mamba1Sizes):
    """Sizes and constants of one Hymba model.

    Attributes:
        qk_head_dim, v_head_dim: sizes of a head's queries and keys, and of its values. The values
            of all heads together are as wide as the Mamba branch, ``expand * hidden_size``.
        meta_tokens: learned vectors before every sequence, visible to all its tokens.
        sliding_window: keys that a query sees, its own included, the meta tokens not counted.
        global_attn_layers: layers whose attention sees every key.
        kv_reuse_groups: groups of layers that attend to the keys and values of their first one and
            project none of their own. Only with these groups and a gated FFN does the released
            model have the stated 1.52B parameters.
        extra: the fields of the file that are not interpreted here.

    Raises:
        ConfigError: a field is missing, has the wrong type or value, or two fields disagree.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    qk_head_dim: int
    v_head_dim: int
    intermediate_size: int
    state_size: int
    time_step_rank: int
    meta_tokens: int
    sliding_window: int
    global_attn_layers: tuple[int, ...]
    kv_reuse_groups: tuple[tuple[int, ...], ...]
    rope_theta: float
    tie_word_embeddings: bool
    expand: int = 2
    conv_kernel: int = 4
    use_conv_bias: bool = True
    rms_norm_eps: float = 1e-6
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)

    model_type = "hymba"
    rope_scaling = None

    def __post_init__(self) -> None:
        check_mamba1(self)
        check_divides(self, "num_attention_heads", "num_key_value_heads")
        if self.num_attention_heads * self.v_head_dim != self.d_inner:
            raise ConfigError(
                f"`num_attention_heads` x `v_head_dim` is "
                f"{self.num_attention_heads * self.v_head_dim}, but the Mamba branch is "
                f"{self.d_inner} wide"
            )
        if self.qk_head_dim % 2:
            raise ConfigError(f"`qk_head_dim` must be even, got {self.qk_head_dim}")
        if not self.rope_theta > 0:
            raise ConfigError(f"`rope_theta` must be above 0, got {show(self.rope_theta)}")
        _check_layers(self)

    @property
    def kv_heads(self) -> dict[int, int]:
        """Layer that projects keys and values of its own -> its key-value heads."""
        return {i: self.num_key_value_heads for i, own in enumerate(self.sources) if i == own}

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """For every layer, the one whose keys and values it attends to."""
        first = {layer: group[0] for group in self.kv_reuse_groups for layer in group}
        return tuple(first.get(layer, layer) for layer in range(self.num_hidden_layers))

    @property
    def head_dim(self) -> int:
        """Size of a cached key or value; the narrower of the two is padded with zeros."""
        return max(self.qk_head_dim, self.v_head_dim)

    @property
    def rotary_dim(self) -> int:
        """How many channels of a query or key are rotated: all."""
        return self.qk_head_dim

    @property
    def depth(self) -> int:
        """How many projections write into the residual stream."""
        return 2 * self.num_hidden_layers

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> HymbaConfig:
        """Read the fields of a config.json."""
        check_object(data)
        check_fixed(data, _FIXED)
        left = {name: value for name, value in data.items() if name not in _FIXED}
        specs = [spec for spec in dataclasses.fields(cls) if spec.name != "extra"]
        for spec in specs:
            if spec.default is dataclasses.MISSING and left.get(spec.name) is None:
                raise ConfigError(f"`{spec.name}` is missing")
        for name in _LISTS:
            left[name] = _tuples(name, left[name])
        own = {spec.name: left.pop(spec.name) for spec in specs if spec.name in left}
        return cls(**own, extra=left)

    def to_dict(self) -> dict[str, object]:
        """The fields of a config.json that :meth:`from_dict` reads."""
        own = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        del own["extra"]
        own["global_attn_layers"] = list(self.global_attn_layers)
        own["kv_reuse_groups"] = [list(group) for group in self.kv_reuse_groups]
        return {"architectures": ["HymbaForCausalLM"], **_FIXED, **self.extra, **own}


def _tuples(name: str, value: object) -> object:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"`{name}` must be a list, got {show(value)}")
    return tuple(tuple(v) if isinstance(v, list) else v for v in value)


def _check_layers(config: HymbaConfig) -> None:
    for group in config.kv_reuse_groups:
        if not isinstance(group, tuple):
            raise ConfigError(f"`kv_reuse_groups` must hold lists, got {show(group)}")
    shared = [layer for group in config.kv_reuse_groups for layer in group]
    for name, layers in (("global_attn_layers", config.global_attn_layers),
                         ("kv_reuse_groups", shared)):  # fmt: skip
        for layer in layers:
            number = isinstance(layer, int) and not isinstance(layer, bool)
            if not number or not 0 <= layer < config.num_hidden_layers:
                raise ConfigError(
                    f"`{name}` holds {show(layer)}, expected layers below "
                    f"{config.num_hidden_layers}"
                )
        if len(set(layers)) < len(layers):
            raise ConfigError(f"`{name}` repeats a layer: {show(layers)}")
    for group in config.kv_reuse_groups:
        if list(group) != list(range(group[0], group[0] + len(group)) if group else ()):
            raise ConfigError(f"`kv_reuse_groups` holds {show(group)}, expected adjacent layers")
        if len({layer in config.global_attn_layers for layer in group}) > 1:
            raise ConfigError(f"`kv_reuse_groups` holds {show(group)}: windowed and global layers")
