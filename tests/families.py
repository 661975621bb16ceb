"""Small models of every family but nemotron_h, with every tensor drawn at random."""

import json

import hybrids
import torch

from nemokernels.models import build, save_pretrained
from nemokernels.models.families import parse_config

SIZES = dict(vocab_size=96, hidden_size=32, num_attention_heads=4, head_dim=12, rope_theta=100.0)
UNIFORM = dict(SIZES, num_hidden_layers=3, num_key_value_heads=2, intermediate_size=56)
# Of the six frequencies of a head, some are kept, some divided and some interpolated.
SCALING = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)  # fmt: skip


def block(kv_group=None, ffn=None):
    """One entry of block_configs; None makes a part a no-op."""
    attention = {"no_op": False, "n_heads_in_group": kv_group, "replace_with_linear": False}
    if kv_group is None:
        attention = {"no_op": True, "n_heads_in_group": None, "replace_with_linear": False}
    return {
        "attention": {**attention, "window_length": None, "num_sink_tokens": None},
        "ffn": {"no_op": ffn is None, "ffn_mult": ffn, "replace_with_linear": False},
    }


# Six heads: the slopes of the last two are not those of a power of two.
GPT = dict(vocab_size=96, hidden_size=48, n_layer=3, n_head=6, layer_norm_epsilon=1e-3)

# 2 * mult * 32 / 3 rounded up: 256 from 0.5, 12.0 and 12.01 straddle it.
BLOCKS = [block(2, 0.5), block(None, 12.0), block(None, None), block(1, None), block(4, 12.01)]
FIELDS = {
    "llama": dict(UNIFORM, model_type="llama", rope_scaling=SCALING, rms_norm_eps=1e-3),
    "mistral": dict(UNIFORM, model_type="mistral", sliding_window=None, rms_norm_eps=1e-3),
    "nemotron": dict(UNIFORM, model_type="nemotron", head_dim=16, norm_eps=1e-3),
    "nemotron-nas": dict(SIZES, model_type="nemotron-nas", num_hidden_layers=5,
                         block_configs=BLOCKS, rope_scaling=SCALING, rms_norm_eps=1e-3),
    "bloom": dict(GPT, model_type="bloom"),
    "mt-nlg": dict(GPT, model_type="mt-nlg", hidden_act="gelu", max_position_embeddings=64),
    "mamba2": dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_heads=4, head_dim=16,
                   state_size=16, n_groups=2, chunk_size=8, layer_norm_epsilon=1e-3,
                   initializer_range=0.02, model_type="mamba2"),
    # Windowed layers that share their keys, one alone, and a global one; a window of three.
    "hymba": dict(vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, qk_head_dim=8, v_head_dim=16, intermediate_size=24,
                  state_size=4, time_step_rank=3, meta_tokens=5, sliding_window=3,
                  global_attn_layers=[0], kv_reuse_groups=[[1, 2]], rope_theta=100.0,
                  tie_word_embeddings=False, model_type="hymba"),
    "mamba": dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, state_size=4,
                  time_step_rank=3, layer_norm_epsilon=1e-3, initializer_range=0.02,
                  tie_word_embeddings=False, model_type="mamba"),
}  # fmt: skip
FAMILIES = list(FIELDS)
DECODERS = ["llama", "mistral", "nemotron", "nemotron-nas"]


def config(family, **changes):
    fields = {**FIELDS[family], **changes}
    return parse_config({key: value for key, value in fields.items() if value is not ...})


def redraw(family, named):
    """New random values; nemotron's norms, whose weights are stored minus one, around zero."""
    named = sorted(named)
    hybrids.redraw(named)
    with torch.no_grad():
        for name, tensor in named if family == "nemotron" else ():
            if name.endswith("norm.weight"):
                tensor.sub_(1)


def model(family, seed=0, dtype=None, **changes):
    torch.manual_seed(seed)
    made = build(config(family, **changes), dtype=dtype)
    redraw(family, made.state_dict().items())
    return made.eval()


def save_with_other_fields(name, folder, change):
    """Save the model ``name``, then change fields of its config.json."""
    built = model(name)
    save_pretrained(built, folder)
    fields = {**built.config.to_dict(), **change}
    (folder / "config.json").write_text(json.dumps(fields))
