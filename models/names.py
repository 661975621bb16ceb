"""Names, shapes and dtypes of the tensors in a published checkpoint.

H hidden size, V vocabulary, E experts. The model in memory has the same module names, and the same
tensor names except for the experts'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from nemokernels.models.config import NemotronHConfig
from nemokernels.models.decoder_config import DecoderConfig
from nemokernels.models.gpt_config import GPTConfig
from nemokernels.models.hymba_config import HymbaConfig
from nemokernels.models.mamba2_config import Mamba2Config
from nemokernels.models.mamba_config import MambaConfig
from nemokernels.models.reward_config import RewardConfig
from nemokernels.models.vl_config import PREFIX, SHUFFLE, NemotronVLConfig

Shapes = Iterator[tuple[str, tuple[int, ...]]]

# These are at least float32 in memory, whatever the model's dtype.
WIDE_LEAVES = ("A_log", "D", "dt_bias", "gate.weight", "gate.e_score_correction_bias")

_EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<index>\d+)\.(?P<leaf>up_proj|down_proj)\.weight")
_LINEAR = re.compile(
    r"(?:(?:language_model\.)?lm_head|mlp1\.[13]|.*\.(?:in_proj|out_proj|[qkvo]_proj|up_proj|gate_proj|down_proj"
    r"|fc[12]_latent_proj|eh_proj|attn\.qkv|attn\.proj|mlp\.fc[12]))"
)


class Layout(NamedTuple):
    """The prefixes of a family's tensor names."""

    trunk: str
    embeddings: str  # name below the trunk
    trunks: tuple[str, ...]  # accepted when reading, the published one first; "" is no prefix
    beside: tuple[str, ...]  # of the names outside the trunk
    kept: tuple[str, ...] = ()  # carried along, any shape: names, or prefixes ending in a dot

    def keeps(self, name: str) -> bool:
        """Whether a tensor of this name is carried along unread."""
        return any(name == one or one[-1] == "." and name.startswith(one) for one in self.kept)


_NEMOTRON_H = Layout(
    "backbone.", "embeddings.weight", ("backbone.", "model."), ("lm_head.", "mtp.")
)
_DECODER = Layout("model.", "embed_tokens.weight", ("model.",), ("lm_head.",))
_GPT = Layout("transformer.", "word_embeddings.weight", ("transformer.", ""), ())
# Images arrive normalised and their summary is not used. So the encoder's copy of the normalisation
# constants and its list of summary tokens are carried along unread.
_VL = Layout(
    "language_model.backbone.",
    "embeddings.weight",
    ("language_model.backbone.", "language_model.model."),
    ("language_model.lm_head.", "vision_model.", "mlp1."),
    ("vision_model.radio_model.input_conditioner.", "vision_model.radio_model.summary_idxs"),
)


class TensorSpec(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def is_wide(name: str) -> bool:
    """Whether the tensor of this name is at least float32 in memory."""
    return name.endswith(tuple("." + leaf for leaf in WIDE_LEAVES))


def published_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """Dtype in a newly written file: the model's, but float32 for correction biases."""
    return torch.float32 if name.endswith(".e_score_correction_bias") else model_dtype


def is_linear(module: str) -> bool:
    """Whether the module of this name is a linear layer, the only kind that is ever quantised."""
    return _LINEAR.fullmatch(module) is not None


def stacked(name: str) -> tuple[str, int] | None:
    """``...experts.3.up_proj.weight`` -> (``...experts.up_proj``, 3); None for all other names."""
    match = _EXPERT.fullmatch(name)
    return (f"{match['stack']}.{match['leaf']}", int(match["index"])) if match else None


def is_stack(name: str) -> bool:
    """Whether this is the in-memory name of a stack of experts."""
    return name.endswith((".experts.up_proj", ".experts.down_proj"))


def layout(config) -> Layout:
    """The prefixes of this configuration's tensor names."""
    if isinstance(config, RewardConfig):
        return layout(config.backbone)._replace(beside=(f"{config.head}.",))
    return _FAMILIES[type(config)][0]


def tensor_shapes(config) -> Shapes:
    """Name and shape of every stored tensor, in order of the layers."""
    if isinstance(config, RewardConfig):
        return _reward_shapes(config)
    return _FAMILIES[type(config)][1](config)


def _reward_shapes(config: RewardConfig) -> Shapes:
    for name, shape in tensor_shapes(config.backbone):
        if name != "lm_head.weight":
            yield name, shape
    yield f"{config.head}.weight", (config.outputs, config.hidden_size)
    if config.bias:
        yield f"{config.head}.bias", (config.outputs,)


def element_count(config) -> int:
    """How many elements all stored tensors have together."""
    return sum(math.prod(shape) for _, shape in tensor_shapes(config))


def _decoder_shapes(config: DecoderConfig) -> Shapes:
    H, V = config.hidden_size, config.vocab_size
    inner = config.num_attention_heads * config.head_dim
    norm = ("weight", "bias") if config.family.layer_norm else ("weight",)
    ffn = ("gate", "up") if config.family.gated else ("up",)
    yield "model.embed_tokens.weight", (V, H)
    for index, block in enumerate(config.blocks):
        prefix = f"model.layers.{index}"
        if block.kv_heads is not None:
            kv = block.kv_heads * config.head_dim
            yield from ((f"{prefix}.input_layernorm.{leaf}", (H,)) for leaf in norm)
            for leaf, shape in zip("qkvo", ((inner, H), (kv, H), (kv, H), (H, inner))):
                yield f"{prefix}.self_attn.{leaf}_proj.weight", shape
        if block.ffn is not None:
            yield from ((f"{prefix}.post_attention_layernorm.{leaf}", (H,)) for leaf in norm)
            yield from ((f"{prefix}.mlp.{leaf}_proj.weight", (block.ffn, H)) for leaf in ffn)
            yield f"{prefix}.mlp.down_proj.weight", (H, block.ffn)
    yield from ((f"model.norm.{leaf}", (H,)) for leaf in norm)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (V, H)


def _gpt_shapes(config: GPTConfig) -> Shapes:
    H, inner = config.hidden_size, config.intermediate_size

    def norm(name: str) -> Shapes:
        yield f"transformer.{name}.weight", (H,)
        yield f"transformer.{name}.bias", (H,)

    def linear(name: str, outputs: int, inputs: int) -> Shapes:
        yield f"transformer.{name}.weight", (outputs, inputs)
        yield f"transformer.{name}.bias", (outputs,)

    yield "transformer.word_embeddings.weight", (config.vocab_size, H)
    if config.family.alibi:
        yield from norm("word_embeddings_layernorm")
    else:
        yield "transformer.position_embeddings.weight", (config.max_position_embeddings, H)
    for index in range(config.n_layer):
        yield from norm(f"h.{index}.input_layernorm")
        yield from linear(f"h.{index}.self_attention.query_key_value", 3 * H, H)
        yield from linear(f"h.{index}.self_attention.dense", H, H)
        yield from norm(f"h.{index}.post_attention_layernorm")
        yield from linear(f"h.{index}.mlp.dense_h_to_4h", inner, H)
        yield from linear(f"h.{index}.mlp.dense_4h_to_h", H, inner)
    yield from norm("ln_f")


def _hybrid_shapes(config: NemotronHConfig | MambaConfig) -> Shapes:
    H, V = config.hidden_size, config.vocab_size
    yield "backbone.embeddings.weight", (V, H)
    for index, letter in enumerate(config.pattern):
        yield f"backbone.layers.{index}.norm.weight", (H,)
        yield from _mixer(config.layers[index], letter, f"backbone.layers.{index}.mixer")
    yield "backbone.norm_f.weight", (H,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (V, H)
    last = len(config.mtp_pattern) - 1
    for index, letter in enumerate(config.mtp_pattern):
        prefix = f"mtp.layers.{index}"
        if index == 0:
            yield f"{prefix}.enorm.weight", (H,)
            yield f"{prefix}.hnorm.weight", (H,)
            yield f"{prefix}.eh_proj.weight", (H, 2 * H)
        yield f"{prefix}.norm.weight", (H,)
        own = config.layers[len(config.pattern) + index]
        yield from _mixer(own, letter, f"{prefix}.mixer")
        if index == last:
            yield f"{prefix}.final_layernorm.weight", (H,)


def _mixer(config: NemotronHConfig | MambaConfig, letter: str, prefix: str) -> Shapes:
    H = config.hidden_size
    if letter == "M":
        heads = config.mamba_num_heads
        inner, channels = config.d_inner, config.conv_dim
        yield f"{prefix}.in_proj.weight", (inner + channels + heads, H)
        if config.use_bias:
            yield f"{prefix}.in_proj.bias", (inner + channels + heads,)
        yield f"{prefix}.conv1d.weight", (channels, 1, config.conv_kernel)
        if config.use_conv_bias:
            yield f"{prefix}.conv1d.bias", (channels,)
        for leaf in ("A_log", "D", "dt_bias"):
            yield f"{prefix}.{leaf}", (heads,)
        yield f"{prefix}.norm.weight", (inner,)
        yield f"{prefix}.out_proj.weight", (H, inner)
        if config.use_bias:
            yield f"{prefix}.out_proj.bias", (H,)
    elif letter == "m":
        yield from _selective_scan(config, prefix)
        for leaf, shape in (("in", (2 * config.d_inner, H)), ("out", (H, config.d_inner))):
            yield f"{prefix}.{leaf}_proj.weight", shape
            if config.use_bias:
                yield f"{prefix}.{leaf}_proj.bias", shape[:1]
    elif letter == "*":
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        for leaf, shape in zip("qkvo", ((q, H), (kv, H), (kv, H), (H, q))):
            yield f"{prefix}.{leaf}_proj.weight", shape
    elif letter == "-":
        yield from _mlp(prefix, H, config.intermediate_size)
    else:
        E, latent = config.n_routed_experts, config.moe_latent_size
        yield f"{prefix}.gate.weight", (E, H)
        yield f"{prefix}.gate.e_score_correction_bias", (E,)
        for expert in range(E):
            yield from _mlp(f"{prefix}.experts.{expert}", latent or H, config.moe_intermediate_size)
        shared = config.moe_shared_expert_intermediate_size
        yield from _mlp(f"{prefix}.shared_experts", H, shared)
        if latent is not None:
            yield f"{prefix}.fc1_latent_proj.weight", (latent, H)
            yield f"{prefix}.fc2_latent_proj.weight", (H, latent)


def _selective_scan(config: MambaConfig | HymbaConfig, prefix: str) -> Shapes:
    inner, state, rank = config.d_inner, config.state_size, config.time_step_rank
    yield f"{prefix}.conv1d.weight", (inner, 1, config.conv_kernel)
    if config.use_conv_bias:
        yield f"{prefix}.conv1d.bias", (inner,)
    yield f"{prefix}.x_proj.weight", (rank + 2 * state, inner)
    yield f"{prefix}.dt_proj.weight", (inner, rank)
    yield f"{prefix}.dt_proj.bias", (inner,)
    yield f"{prefix}.A_log", (inner, state)
    yield f"{prefix}.D", (inner,)


def _mlp(prefix: str, width: int, inner: int) -> Shapes:
    yield f"{prefix}.up_proj.weight", (inner, width)
    yield f"{prefix}.down_proj.weight", (width, inner)


def _hymba_shapes(config: HymbaConfig) -> Shapes:
    H, V, inner, F = (
        config.hidden_size, config.vocab_size, config.d_inner, config.intermediate_size
    )  # fmt: skip
    queries = config.num_attention_heads * config.qk_head_dim
    keys = config.num_key_value_heads * (config.qk_head_dim + config.v_head_dim)
    yield "model.embed_tokens.weight", (V, H)
    yield "model.meta_tokens", (config.meta_tokens, H)
    for index, source in enumerate(config.sources):
        prefix = f"model.layers.{index}"
        rows = queries + keys * (source == index) + 2 * inner
        yield f"{prefix}.input_layernorm.weight", (H,)
        yield f"{prefix}.mixer.in_proj.weight", (rows, H)
        yield from _selective_scan(config, f"{prefix}.mixer.mamba")
        for leaf, size in (("dt", config.time_step_rank), ("B", config.state_size),
                           ("C", config.state_size)):  # fmt: skip
            yield f"{prefix}.mixer.mamba.{leaf}_layernorm.weight", (size,)
        yield f"{prefix}.mixer.pre_avg_layernorm1.weight", (inner,)
        yield f"{prefix}.mixer.pre_avg_layernorm2.weight", (inner,)
        yield f"{prefix}.mixer.out_proj.weight", (H, inner)
        yield f"{prefix}.pre_ffn_layernorm.weight", (H,)
        for leaf, shape in (("gate", (F, H)), ("up", (F, H)), ("down", (H, F))):
            yield f"{prefix}.mlp.{leaf}_proj.weight", shape
    yield "model.norm.weight", (H,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (V, H)


def _vl_shapes(config: NemotronVLConfig) -> Shapes:
    for name, shape in _hybrid_shapes(config.llm_config):
        yield f"language_model.{name}", shape
    v = config.vision_config
    v.check_known()
    W, F = v.hidden_size, v.intermediate_size
    yield f"{PREFIX}embedder.weight", (W, 3 * v.patch_size**2)
    yield f"{PREFIX}pos_embed", (1, v.grid_size**2, W)
    yield f"{PREFIX}cls_token.token", (v.num_prefix_tokens, W)
    for index in range(v.num_hidden_layers):
        prefix = f"vision_model.radio_model.model.blocks.{index}"
        for leaf, shape in (("norm1", (W,)), ("attn.qkv", (3 * W, W)), ("attn.proj", (W, W)),
                            ("norm2", (W,)), ("mlp.fc1", (F, W)), ("mlp.fc2", (W, F))):  # fmt: skip
            yield f"{prefix}.{leaf}.weight", shape
            yield f"{prefix}.{leaf}.bias", shape[:1]
    width, inner = SHUFFLE**2 * W, config.projector_hidden_size
    yield "mlp1.0.weight", (width,)
    yield "mlp1.1.weight", (inner, width)
    yield "mlp1.3.weight", (config.llm_config.hidden_size, inner)


_FAMILIES = {
    NemotronHConfig: (_NEMOTRON_H, _hybrid_shapes),
    HymbaConfig: (_DECODER, _hymba_shapes),
    MambaConfig: (_NEMOTRON_H, _hybrid_shapes),
    Mamba2Config: (_NEMOTRON_H, _hybrid_shapes),
    DecoderConfig: (_DECODER, _decoder_shapes),
    GPTConfig: (_GPT, _gpt_shapes),
    NemotronVLConfig: (_VL, _vl_shapes),
}
