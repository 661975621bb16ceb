"""NemotronHConfig: a checked config.json, under the names that the file uses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from nemokernels.models.activations import ACTIVATIONS
from nemokernels.models.blocks import (
    BLOCKS,
    MTP_BLOCKS,
    block_types,
    check_blocks,
    layer_configs,
)
from nemokernels.models.fields import (
    MAX_LAYERS,
    ConfigError,
    check_divides,
    check_fixed,
    check_object,
    check_scan,
    check_type,
    rename,
    show,
)

__all__ = ["ConfigError", "NemotronHConfig"]

# Layers have three spellings: the published string of one letter per layer, the published list of
# words, and the words that transformers 5 writes when it saves.
WORDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_LETTERS = {"mamba": "M", "attention": "*", **{word: letter for letter, word in WORDS.items()}}
_TYPES, _MTP_TYPES = f"{BLOCKS}.block_type", f"{MTP_BLOCKS}.block_type"
_PATTERN_KEYS = ("hybrid_override_pattern", "layers_block_type", "layer_types", _TYPES)
_MTP_KEYS = ("mtp_hybrid_override_pattern", "mtp_layers_block_type", _MTP_TYPES)
_ALIASES = {
    "attention_head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "norm_eps": "layer_norm_epsilon",
}

# The sizes that a layer of each kind needs.
_NEEDED = {
    "M": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "-": ("intermediate_size",),
    "E": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
          "moe_shared_expert_intermediate_size"),
}  # fmt: skip

# Options of the architecture that all released models set alike. Another value would change the
# result, so it is refused and not ignored.
_FIXED = {
    "tie_word_embeddings": False,
    "use_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "mamba_proj_bias": False,
    "mamba_hidden_act": "silu",
    "residual_in_fp32": False,
    "sliding_window": None,
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "n_shared_experts": 1,
}

_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class NemotronHConfig:
    """Sizes and constants of one Nemotron-H model. Field names are those of its config.json.

    Sizes of layer kinds that the pattern does not contain may be None. ``block_configs`` and
    ``mtp_block_configs`` give single layers sizes of their own, see :mod:`.blocks`. ``extra`` keeps
    the fields of the file that are not interpreted here, so that saving loses none.

    Raises:
        ConfigError: a field is missing, has the wrong type or value, or two fields disagree.
    """

    vocab_size: int
    hidden_size: int
    hybrid_override_pattern: str
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    mlp_hidden_act: str = "relu2"
    mamba_num_heads: int | None = None
    mamba_head_dim: int | None = None
    ssm_state_size: int | None = None
    n_groups: int | None = None
    conv_kernel: int = 4
    use_conv_bias: bool = True
    chunk_size: int = 128
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    mamba_ssm_cache_dtype: str = "float32"
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    num_nextn_predict_layers: int = 0
    mtp_hybrid_override_pattern: str = ""
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    block_configs: tuple[Mapping[str, object], ...] | None = field(default=None, hash=False)
    mtp_block_configs: tuple[Mapping[str, object], ...] | None = field(default=None, hash=False)
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)

    use_bias = residual_in_fp32 = tie_word_embeddings = False

    def __post_init__(self) -> None:
        limits = tuple(math.inf if v > _FLOAT32_MAX else v for v in _limits(self.time_step_limit))
        object.__setattr__(self, "time_step_limit", limits)
        for spec in dataclasses.fields(self):
            if spec.name not in ("extra", "time_step_limit", BLOCKS, MTP_BLOCKS):
                check_type(spec.name, getattr(self, spec.name), spec.type)
        _check(self)
        check_blocks(self)
        assert self.layers  # made here, so that a mistake in a layer shows at once

    @property
    def model_type(self) -> str:
        return "nemotron_h" if self.block_configs is None else "nemotron_h_puzzle"

    @cached_property
    def layers(self) -> tuple[NemotronHConfig, ...]:
        """Every layer's configuration: this one, or a copy with the layer's own sizes.

        The MTP block's layers follow the trunk's.
        """
        return layer_configs(self)

    @property
    def pattern(self) -> str:
        """One letter per layer: M Mamba-2, * attention, - MLP, E mixture of experts."""
        return self.hybrid_override_pattern

    @property
    def mtp_pattern(self) -> str:
        """The layers of the multi-token-prediction block, or ``""`` without one.

        The block is stored once and applied once per predicted token.
        """
        return self.mtp_hybrid_override_pattern if self.num_nextn_predict_layers else ""

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep a convolution window and an SSM state."""
        return tuple(index for index, letter in enumerate(self.pattern) if letter == "M")

    @property
    def kv_heads(self) -> dict[int, int]:
        """Attention layer -> its key-value heads. The MTP block's layers follow the trunk's."""
        letters = enumerate(self.pattern + self.mtp_pattern)
        return {index: self.num_key_value_heads for index, letter in letters if letter == "*"}

    @property
    def depth(self) -> int:
        """How many mixers write into the residual stream, without those of the MTP block."""
        return len(self.pattern)

    @property
    def d_inner(self) -> int:
        """Width of a Mamba layer. The file's ``expand`` is not used."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> NemotronHConfig:
        """Read the fields of a config.json, in any of its spellings."""
        check_object(data)
        left = dict(data)
        check_fixed(left, _FIXED)
        rename(left, _ALIASES)
        _read_blocks(left)
        pattern = _pattern(left, _PATTERN_KEYS)
        if pattern is None:
            raise ConfigError(
                f"`{_PATTERN_KEYS[0]}` is missing (or {', '.join(_PATTERN_KEYS[1:])})"
            )
        layers = left.pop("num_hidden_layers", None)
        if layers is not None and layers != len(pattern):
            raise ConfigError(
                f"`num_hidden_layers` is {show(layers)} but {len(pattern)} are listed"
            )
        mtp = _pattern(left, _MTP_KEYS)
        left["hybrid_override_pattern"] = pattern
        # transformers writes the block's default layers into files of models that have none.
        left["mtp_hybrid_override_pattern"] = (
            ("*E" if mtp is None else mtp) if left.get("num_nextn_predict_layers", 0) else ""
        )
        known = [spec.name for spec in dataclasses.fields(cls) if spec.name != "extra"]
        for name in ("vocab_size", "hidden_size"):
            if name not in left:
                raise ConfigError(f"`{name}` is missing")
        return cls(**{name: left.pop(name) for name in known if name in left}, extra=left)

    def to_dict(self) -> dict[str, object]:
        """The fields of a config.json that transformers, vLLM and :meth:`from_dict` read."""
        own = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        own = {name: value for name, value in own.items() if value is not None and name != "extra"}
        own["time_step_limit"] = list(self.time_step_limit)
        if not self.mtp_pattern:
            del own["mtp_hybrid_override_pattern"]
        for name in (BLOCKS, MTP_BLOCKS):
            if name in own:
                own[name] = [dict(entry) for entry in own[name]]
        puzzle = "" if self.block_configs is None else "Puzzle"
        return {
            "architectures": [f"NemotronH{puzzle}ForCausalLM"],
            "model_type": self.model_type,
            **self.extra,
            "num_hidden_layers": len(self.pattern),
            **own,
        }


def _read_blocks(left: dict[str, object]) -> None:
    """Turn lists of blocks into tuples; their ``block_type``s also spell the pattern."""
    model_type, puzzle = left.get("model_type", "nemotron_h"), left.get(BLOCKS) is not None
    if model_type != ("nemotron_h_puzzle" if puzzle else "nemotron_h"):
        raise ConfigError(
            f"`model_type` is {show(model_type)}; nemotron_h has no `{BLOCKS}`, "
            "nemotron_h_puzzle has them"
        )
    for name, spelling in ((BLOCKS, _TYPES), (MTP_BLOCKS, _MTP_TYPES)):
        if left.get(name) is None:
            left.pop(name, None)
        else:
            left[spelling] = block_types(name, left[name])
            left[name] = tuple(left[name])
    if not left.get("num_nextn_predict_layers", 0):
        left.pop(MTP_BLOCKS, None)


def _pattern(data: dict[str, object], names: tuple[str, ...]) -> str | None:
    """Remove every spelling of a list of layers from ``data``; they must agree."""
    found = {name: _letters(name, data.pop(name)) for name in names if data.get(name) is not None}
    for name in names:
        data.pop(name, None)
    if len(set(found.values())) > 1:
        raise ConfigError("; ".join(f"`{name}` says {show(p)}" for name, p in found.items()))
    return next(iter(found.values()), None)


def _letters(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
        raise ConfigError(f"`{name}` must be a string or a list of words, got {show(value)}")
    wrong = next((word for word in value if word not in _LETTERS), None)
    if wrong is not None:
        raise ConfigError(f"`{name}` holds {show(wrong)}, expected one of {', '.join(_LETTERS)}")
    return "".join(_LETTERS[word] for word in value)


def _limits(value: object) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ConfigError(f"`time_step_limit` must be [low, high], got {show(value)}")
    low, high = (_number(v) for v in value)
    if low is None or high is None or not 0 <= low <= high:
        raise ConfigError(f"`time_step_limit` must be 0 <= low <= high, got {show(value)}")
    return low, high


def _number(value: object) -> float | None:
    # JSON has no infinity: files hold Infinity, "inf", or {"__float__": "Infinity"}.
    if isinstance(value, Mapping):
        value = value.get("__float__")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _check(config: NemotronHConfig) -> None:
    for name, pattern, allowed in (
        ("hybrid_override_pattern", config.pattern, "M*-E"),
        # Only the trunk keeps a recurrent state for a drafted chain.
        ("mtp_hybrid_override_pattern", config.mtp_pattern, "*-E"),
    ):
        if set(pattern) - set(allowed):
            raise ConfigError(f"`{name}` may hold {allowed!r}, got {show(pattern)}")
        if len(pattern) > MAX_LAYERS:
            raise ConfigError(f"`{name}` has {len(pattern)} layers, at most {MAX_LAYERS}")
    if not config.pattern:
        raise ConfigError("`hybrid_override_pattern` is empty")
    if config.num_nextn_predict_layers and not config.mtp_pattern:
        raise ConfigError("`mtp_hybrid_override_pattern` is empty")
    used = set(config.pattern + config.mtp_pattern)
    for letter in sorted(used):
        for name in _NEEDED[letter]:
            if getattr(config, name) is None and config.block_configs is None:
                raise ConfigError(f"`{name}` is missing; the pattern has {letter!r} layers")
    if config.mlp_hidden_act not in ACTIVATIONS:
        raise ConfigError(
            f"`mlp_hidden_act` is {show(config.mlp_hidden_act)}, expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    if "M" in used:
        _check_mamba(config)
    if "*" in used:
        check_divides(config, "num_attention_heads", "num_key_value_heads")
    if "E" in used:
        _check_experts(config)


def _check_mamba(config: NemotronHConfig) -> None:
    check_divides(config, "mamba_num_heads", "n_groups")
    check_scan(config)
    if config.mamba_ssm_cache_dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            "`mamba_ssm_cache_dtype` must be float32, bfloat16 or float16, got "
            f"{show(config.mamba_ssm_cache_dtype)}"
        )


def _check_experts(config: NemotronHConfig) -> None:
    check_fixed({"mlp_hidden_act": config.mlp_hidden_act}, {"mlp_hidden_act": "relu2"})
    if config.block_configs is not None:
        return  # every layer's own configuration is checked by itself
    check_divides(config, "n_routed_experts", "n_group")
    if config.topk_group > config.n_group:
        raise ConfigError(f"`topk_group` {config.topk_group} exceeds {config.n_group} groups")
    choice = config.n_routed_experts // config.n_group * config.topk_group
    if config.num_experts_per_tok > choice:
        raise ConfigError(
            f"`num_experts_per_tok` is {config.num_experts_per_tok}, but a token chooses among "
            f"{choice} experts"
        )
