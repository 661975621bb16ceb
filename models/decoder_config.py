"""DecoderConfig: the checked config.json of a decoder with rotary embeddings.

``llama``, ``mistral``, ``nemotron`` (Nemotron-4, Minitron) and ``nemotron-nas`` (Llama-Nemotron
Super and Ultra). They differ in the fields of :data:`FAMILIES` and in how a block's sizes are
written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from nemokernels.models.fields import (
    MAX_LAYERS,
    ConfigError,
    check_divides,
    check_fixed,
    check_object,
    check_type,
    rename,
    show,
)

__all__ = ["Block", "DecoderConfig", "Llama3Scaling"]


class Family(NamedTuple):
    """What a ``model_type`` implies without a field of its own."""

    architecture: str
    norm_field: str
    layer_norm: bool = False  # LayerNorm with weights stored minus one; RMSNorm otherwise
    gated: bool = True  # SwiGLU; squared ReLU otherwise
    rotary: float = 1.0  # rotated part of a head, if the file does not say
    initializer_range: float = 0.02
    sliding_window: int | None = None  # where the file does not say


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "rms_norm_eps"),
    "mistral": Family("MistralForCausalLM", "rms_norm_eps", sliding_window=4096),
    "nemotron": Family(
        "NemotronForCausalLM", "norm_eps", layer_norm=True, gated=False, rotary=0.5,
        initializer_range=0.0134,
    ),
    "nemotron-nas": Family("DeciLMForCausalLM", "rms_norm_eps"),
}  # fmt: skip

_ALIASES = {
    "kv_channels": "head_dim",
    "rope_percent": "partial_rotary_factor",
    "rope_percentage": "partial_rotary_factor",
    "layer_norm_eps": "norm_eps",
    "rms_norm_eps": "norm_eps",
}
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "norm_eps")
_ROPE = ("rope_scaling", "rope_parameters")
# No released model has another value. It would change the result, so it is refused.
_FIXED = {
    "sliding_window": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "hidden_dropout": 0,
}
MULTIPLE = 256  # widths computed from ffn_mult are rounded up to it


class Block(NamedTuple):
    """One layer: its key-value heads and the width of its FFN; None where a part is absent."""

    kv_heads: int | None
    ffn: int | None


@dataclass(frozen=True)
class Llama3Scaling:
    """Scaling of the rotary frequencies as in Llama 3.1; names as in config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of one decoder with rotary embeddings, named as in its config.json.

    ``block_configs`` is ``nemotron-nas``'s list with one entry per layer; in the other families all
    layers have ``num_key_value_heads`` and ``intermediate_size``. ``blocks`` gives the sizes in
    either case. ``extra`` keeps the fields of the file that are not interpreted here.

    Raises:
        ConfigError: a field is missing, has the wrong type or value, or two fields disagree.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    norm_eps: float
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    block_configs: tuple[Mapping[str, object], ...] | None = field(default=None, hash=False)
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)

    mamba_layers = ()
    mtp_pattern = ""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            if spec.name not in ("block_configs", "rope_scaling", "extra"):
                check_type(spec.name, getattr(self, spec.name), spec.type)
        if self.model_type not in FAMILIES:
            raise ConfigError(
                f"`model_type` is {show(self.model_type)}, expected one of {', '.join(FAMILIES)}"
            )
        _check_layers(self)
        _check_rope(self)

    @property
    def family(self) -> Family:
        """What the ``model_type`` implies."""
        return FAMILIES[self.model_type]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The sizes of every layer."""
        if self.block_configs is None:
            block = Block(self.num_key_value_heads, self.intermediate_size)
            return (block,) * self.num_hidden_layers
        return tuple(
            Block(
                _part(self, index, entry, "attention", "n_heads_in_group"),
                _part(self, index, entry, "ffn", "ffn_mult"),
            )
            for index, entry in enumerate(self.block_configs)
        )

    @property
    def kv_heads(self) -> dict[int, int]:
        """Attention layer -> its key-value heads."""
        heads = enumerate(block.kv_heads for block in self.blocks)
        return {index: count for index, count in heads if count is not None}

    @property
    def depth(self) -> int:
        """How many attentions and FFNs write into the residual stream."""
        return sum(part is not None for block in self.blocks for part in block)

    @property
    def rotary_dim(self) -> int:
        """How many of a head's first channels are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> DecoderConfig:
        """Read the fields of a config.json, in any of its spellings."""
        check_object(data)
        known = [spec.name for spec in dataclasses.fields(cls) if spec.name != "extra"]
        read = {*known, *_ALIASES, *_FIXED, *_ROPE, "layer_types"}
        left = {k: value for k, value in data.items() if value is not None or k not in read}
        model_type = left.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise ConfigError(
                f"`model_type` is {show(model_type)}, expected one of {', '.join(FAMILIES)}"
            )
        windowed = {} if "sliding_window" in data else {"sliding_window": family.sliding_window}
        act = {"hidden_act": "silu" if family.gated else "relu2"}
        check_fixed({**windowed, **left}, {**_FIXED, **act})
        kinds = left.get("layer_types", ["full_attention"])
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise ConfigError(f"`layer_types` is {show(kinds)}; only full_attention is supported")
        rename(left, _ALIASES)
        _read_rope(left)
        left.setdefault("partial_rotary_factor", family.rotary)
        left.setdefault("initializer_range", family.initializer_range)
        for name in _NEEDED:
            if name not in left:
                name = family.norm_field if name == "norm_eps" else name
                raise ConfigError(f"`{name}` is missing")
        if "head_dim" not in left:
            for name in ("hidden_size", "num_attention_heads"):
                check_type(name, left[name], "int")
            left["head_dim"], rest = divmod(left["hidden_size"], left["num_attention_heads"])
            if rest:
                raise ConfigError("`head_dim` is missing and the heads do not divide the width")
        blocks = left.get("block_configs")
        if blocks is None and model_type != "nemotron-nas":
            left.setdefault("num_key_value_heads", left["num_attention_heads"])
        elif isinstance(blocks, (list, tuple)):
            left["block_configs"] = tuple(blocks)
        return cls(**{name: left.pop(name) for name in known if name in left}, extra=left)

    def to_dict(self) -> dict[str, object]:
        """The fields of a config.json that transformers, vLLM and :meth:`from_dict` read."""
        own = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        del own["extra"]
        own[self.family.norm_field] = own.pop("norm_eps")
        if self.rope_scaling is not None:
            own["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        if self.block_configs is not None:
            own["block_configs"] = list(self.block_configs)
        # transformers gives Mistral a window unless the file says that there is none.
        window = {"sliding_window": None} if self.family.sliding_window else {}
        return {
            "architectures": [self.family.architecture],
            "hidden_act": "silu" if self.family.gated else "relu2",
            **window,
            **self.extra,
            **{name: value for name, value in own.items() if value is not None},
        }


def _read_rope(left: dict[str, object]) -> None:
    """Read either spelling: ``rope_theta`` and ``rope_scaling``, or transformers 5's one object."""
    found: dict[str, object] = {}
    for name in _ROPE:
        if name in left:
            check_object(left[name], name)
            found |= {key: value for key, value in left.pop(name).items() if value is not None}
    rename(found, {"type": "rope_type"})
    kind = found.pop("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ConfigError(
            f"`rope_scaling` is of type {show(kind)}; only default and llama3 are supported"
        )
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in found:
            value = found.pop(name)
            if left.setdefault(name, value) != value:
                raise ConfigError(f"`{name}` is {show(left[name])} and {show(value)}")
    known = [spec.name for spec in dataclasses.fields(Llama3Scaling)] if kind == "llama3" else []
    if set(found) != set(known):
        expected = ", ".join(known) or "no more"
        raise ConfigError(f"`rope_scaling` has {show(sorted(found))}, expected {expected}")
    if kind == "llama3":
        left["rope_scaling"] = Llama3Scaling(**found)


def _check_rope(config: DecoderConfig) -> None:
    if not config.rope_theta > 0:
        raise ConfigError(f"`rope_theta` must be above 0, got {show(config.rope_theta)}")
    if not 0 < config.partial_rotary_factor <= 1 or config.rotary_dim % 2:
        raise ConfigError(
            f"`partial_rotary_factor` {show(config.partial_rotary_factor)} of `head_dim` "
            f"{config.head_dim} must be an even number of channels"
        )
    if config.rope_scaling is None:
        return
    for spec in dataclasses.fields(Llama3Scaling):
        value = getattr(config.rope_scaling, spec.name)
        check_type(spec.name, value, spec.type)
        if not value > 0:
            raise ConfigError(f"`{spec.name}` must be above 0, got {show(value)}")
    if not config.rope_scaling.low_freq_factor < config.rope_scaling.high_freq_factor:
        raise ConfigError("`low_freq_factor` must be below `high_freq_factor`")


def _check_layers(config: DecoderConfig) -> None:
    layers = config.num_hidden_layers
    if layers > MAX_LAYERS:
        raise ConfigError(f"`num_hidden_layers` is {layers}, at most {MAX_LAYERS}")
    if (config.block_configs is None) == (config.model_type == "nemotron-nas"):
        raise ConfigError("`block_configs` is what nemotron-nas, and nothing else, has")
    if config.block_configs is None:
        for name in ("num_key_value_heads", "intermediate_size"):
            if getattr(config, name) is None:
                raise ConfigError(f"`{name}` is missing")
        check_divides(config, "num_attention_heads", "num_key_value_heads")
    elif not isinstance(config.block_configs, tuple):
        raise ConfigError(f"`block_configs` must be a list, got {show(config.block_configs)}")
    elif len(config.block_configs) != layers:
        raise ConfigError(
            f"`num_hidden_layers` is {layers} but `block_configs` has {len(config.block_configs)}"
        )
    if not config.depth:
        raise ConfigError("`block_configs` has neither attention nor FFN in any layer")


def _part(config: DecoderConfig, index: int, entry: object, part: str, size: str) -> int | None:
    """Key-value heads of a block's attention, or the width of its FFN; None if it is a no-op."""
    where = f"block_configs[{index}]"
    check_object(entry, where)
    if unknown := set(entry) - {"attention", "ffn"}:
        raise ConfigError(f"`{where}` holds {show(sorted(map(str, unknown)))}, expected "
                          "attention and ffn")  # fmt: skip
    where, fields = f"{where}.{part}", entry.get(part)
    check_object(fields, where)
    for name in sorted(set(fields) - {size, "no_op"}):
        # replace_with_linear, windows, sinks, sparsity, other mixers: no released model has any.
        if fields[name] is not None and fields[name] is not False:
            raise ConfigError(
                f"`{where}.{name}` is {show(fields[name])}; only null and false are supported"
            )
    no_op = fields.get("no_op", False)
    check_type(f"{where}.no_op", no_op, "bool")
    if no_op:
        return None
    value = fields.get(size)
    if part == "attention":
        check_type(f"{where}.{size}", value, "int")
        if config.num_attention_heads % value:
            raise ConfigError(
                f"`{where}.{size}` is {value}, which does not divide `num_attention_heads` "
                f"{config.num_attention_heads}"
            )
        return config.num_attention_heads // value
    check_type(f"{where}.{size}", value, "float")
    width = -(-int(2 * value * config.hidden_size / 3) // MULTIPLE) * MULTIPLE
    check_type(f"{where}.{size}: the width", width, "int")
    return width
