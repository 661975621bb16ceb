"""GPTConfig: the checked config.json of a decoder like GPT-3: BLOOM and MT-NLG.

Both have LayerNorms and linear layers with biases, an FFN four times as wide as the model, one
key-value head per query head and a head tied to the embeddings. They differ in the fields of
:data:`FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from nemokernels.models.activations import ACTIVATIONS
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

__all__ = ["GPTConfig"]


class Family(NamedTuple):
    """What a ``model_type`` implies without a field of its own."""

    architecture: str | None  # transformers' class, if it has one
    alibi: bool  # positions as a bias of the scores, and a norm after the embeddings; or learned
    activation: str | None  # None: the file must say


FAMILIES = {
    "bloom": Family("BloomForCausalLM", alibi=True, activation="gelu_pytorch_tanh"),
    "mt-nlg": Family(None, alibi=False, activation=None),
}

_ALIASES = {
    "n_embed": "hidden_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
_NEEDED = ("vocab_size", "hidden_size", "n_layer", "n_head", "layer_norm_epsilon", "hidden_act")
# No released model has another value. It would change the result, so it is refused.
_FIXED = {
    "tie_word_embeddings": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0,
    "hidden_dropout": 0,
}


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and constants of one GPT, named as in BLOOM's config.json.

    ``max_position_embeddings`` is the number of learned positions; None with ALiBi. ``extra`` keeps
    the fields of the file that are not interpreted here.

    Raises:
        ConfigError: a field is missing, has the wrong type or value, or two fields disagree.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    n_layer: int
    n_head: int
    layer_norm_epsilon: float
    hidden_act: str
    max_position_embeddings: int | None = None
    initializer_range: float = 0.02
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)

    mamba_layers = ()
    mtp_pattern = ""
    rescale_prenorm_residual = True

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            if spec.name != "extra":
                check_type(spec.name, getattr(self, spec.name), spec.type)
        if self.model_type not in FAMILIES:
            raise ConfigError(
                f"`model_type` is {show(self.model_type)}, expected one of {', '.join(FAMILIES)}"
            )
        if self.n_layer > MAX_LAYERS:
            raise ConfigError(f"`n_layer` is {self.n_layer}, at most {MAX_LAYERS}")
        check_divides(self, "hidden_size", "n_head")
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"`hidden_act` is {show(self.hidden_act)}, expected one of {', '.join(ACTIVATIONS)}"
            )
        if not self.family.alibi and self.max_position_embeddings is None:
            raise ConfigError("`max_position_embeddings` is missing")

    @property
    def family(self) -> Family:
        """What the ``model_type`` implies."""
        return FAMILIES[self.model_type]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_head

    @property
    def intermediate_size(self) -> int:
        """Width of the FFN."""
        return 4 * self.hidden_size

    @property
    def kv_heads(self) -> dict[int, int]:
        """Layer -> key-value heads."""
        return dict.fromkeys(range(self.n_layer), self.n_head)

    @property
    def depth(self) -> int:
        """How many attentions and FFNs write into the residual stream."""
        return 2 * self.n_layer

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> GPTConfig:
        """Read the fields of a config.json, in any of its spellings."""
        check_object(data)
        known = [spec.name for spec in dataclasses.fields(cls) if spec.name != "extra"]
        read = {*known, *_ALIASES, *_FIXED}
        left = {k: value for k, value in data.items() if value is not None or k not in read}
        check_fixed(left, _FIXED)
        rename(left, _ALIASES)
        model_type = left.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise ConfigError(
                f"`model_type` is {show(model_type)}, expected one of {', '.join(FAMILIES)}"
            )
        if family.activation is not None:
            check_fixed(left, {"hidden_act": family.activation})
            left["hidden_act"] = family.activation
        if family.alibi:  # a length in the file is the training's and sizes nothing
            known.remove("max_position_embeddings")
        for name in _NEEDED:
            if name not in left:
                raise ConfigError(f"`{name}` is missing")
        return cls(**{name: left.pop(name) for name in known if name in left}, extra=left)

    def to_dict(self) -> dict[str, object]:
        """The fields of a config.json that transformers, vLLM and :meth:`from_dict` read."""
        own = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        del own["extra"]
        architecture = self.family.architecture
        return {
            **({"architectures": [architecture]} if architecture else {}),
            **self.extra,
            **{name: value for name, value in own.items() if value is not None},
        }
