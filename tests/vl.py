"""A small vision-language model: two blocks of vision, three layers of language."""

import dataclasses

import tiny
import torch

from nemokernels.models import NemotronVLConfig, build
from nemokernels.train.data import Batch

IMAGE = 325  # the image token's id; the small tokenizer makes none above 319
TOKENS = 4  # of a tile
CONFIG = {
    "model_type": "NemotronH_Nano_VL_V2",
    "force_image_size": 32,
    "patch_size": 8,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "vit_hidden_size": 24,
    "projector_hidden_size": 40,
    "norm_mean": [0.48, 0.46, 0.41],
    "norm_std": [0.27, 0.26, 0.28],
    "img_context_token_id": IMAGE,
    "vision_config": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 32,
        "num_prefix_tokens": 5,
        "grid_size": 16,
        "version": "radio_v2.5-h",
    },
    "llm_config": {
        "model_type": "nemotron_h",
        "vocab_size": 330,
        "hidden_size": 48,
        "hybrid_override_pattern": "M*-",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "eos_token_id": 2,
    },
}


def config(**changes):
    return NemotronVLConfig.from_dict({**CONFIG, **changes})


def vision_config(**changes):
    return dataclasses.replace(config().vision_config, **changes)


def redraw(module, seed=1):
    """Random values for every parameter: nothing stays at a one or a zero that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            norm = ("norm" in name or name.endswith("mlp1.0.weight")) and name.endswith("weight")
            wide = parameter.dim() > 1
            value = 1 + 0.3 * noise if norm else noise / parameter.shape[-1] ** 0.5
            parameter.copy_(value if norm or wide else 0.2 * noise)


def model(seed=0, dtype=None, **changes):
    """With the language model's own initial values, which keep its recurrence stable."""
    torch.manual_seed(seed)
    made = build(config(**changes), dtype=dtype)
    redraw(made.vision_model)
    redraw(made.mlp1)
    return made.eval()


def pixels(*shape, seed=0, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype or torch.float32)


def text(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 320, (length,), generator=generator)


def tokens(*tiles, seed=0):
    """One row: three words, then each number of tiles followed by two words."""
    parts = [text(3, seed)]
    for index, count in enumerate(tiles):
        parts += [torch.full((count * TOKENS,), IMAGE), text(2, seed + index + 1)]
    return torch.cat(parts)[None]


class Captions:
    """The same two rows at every step, one about a picture and one of words alone."""

    def __init__(self):
        self.corpus = tiny.batches(tiny.settings()).corpus  # what a run is known by
        self.rows = [(tokens(1), pixels(1, 3, 32, 32)), (tokens(), pixels(0, 3, 32, 32))]

    def at(self, step, shard, shards):
        rows, seen = zip(*self.rows[shard::shards])
        bounds = torch.tensor([0, *(row.shape[1] for row in rows)], dtype=torch.int32)
        return Batch(torch.cat(rows, 1), bounds.cumsum(0, dtype=torch.int32), torch.cat(seen))
