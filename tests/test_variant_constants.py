"""What no count of parameters tells of a released model: the order of its layers, how widths are
split into heads and groups, and the constants of its formulas. A second copy of what is published.
"""

import math

import pytest

from nemokernels.models import DecoderConfig, NemotronHConfig, find_variant, list_variants

ALIKE = ["MEMEM*E" + "MEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME", "M-M-M-M*" + "-M-M-M-M-M*" * 3]
PATTERNS = {
    "Nemotron 3 Nano 30B-A3B": ALIKE[0],
    "Nemotron 3.5 Lightning 30B-A3B": ALIKE[0],
    "Nemotron 3 Nano Omni 30B-A3B Reasoning": ALIKE[0],
    "Star Elastic 30B": ALIKE[0],
    "Nemotron 3 Super 120B-A12B": (
        "MEMEMEM*E" + "MEMEMEM*E" * 2 + "MEMEMEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME"
    ),
    "Nemotron 3 Ultra 550B-A55B": (
        "MEMEMEM*E" + "MEMEM*EMEMEMEM*EMEMEMEM*E" * 3 + "MEMEM*EMEMEMEM*E" + "MEMEMEME"
    ),
    "Nemotron 3 Nano 4B": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
    "Nemotron-H 4B": ALIKE[1] + "-M-M-M-M-M-",
    "Nemotron-H 8B": ALIKE[1] + "-M-M-M-M-M-",
    "Nemotron-H 47B": (
        "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*"
        "-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
    ),
    "Nemotron-H 56B": "M-M-M-M*" + "-M-M-M-M-M*" * 9 + "-M-M-M-M-M-",
    "Nemotron-Nano-9B-v2": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "Nemotron-Nano-12B-v2": "M-M-M-M*" + "-M-M-M-M*" * 5 + "-M-M-M-M-",
    "Nemotron Elastic 12B": "M-M-M-M*" + "-M-M-M-M*" * 5 + "-M-M-M-M-",
    "Mamba-2-Hybrid 8B": "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-",
    "Mamba-2 8B": "M" * 56,
}
# Query heads, key-value heads, their size; Mamba heads, their size, groups, state; chunk; experts
# per token and the factor of their sum.
DENSE = {
    "Nemotron 3 Nano 4B": (40, 8, 128, 96, 80, 8, 128, 256, None, 1.0),
    "Nemotron-H 4B": (32, 8, 128, 112, 64, 8, 128, 128, None, 1.0),
    "Nemotron-H 8B": (32, 8, 128, 128, 64, 8, 128, 128, None, 1.0),
    "Nemotron-H 47B": (64, 8, 128, 256, 64, 8, 256, 128, None, 1.0),
    "Nemotron-H 56B": (64, 8, 128, 256, 64, 8, 256, 128, None, 1.0),
    "Nemotron-Nano-9B-v2": (40, 8, 128, 128, 80, 8, 128, 128, None, 1.0),
    "Nemotron-Nano-12B-v2": (40, 8, 128, 128, 80, 8, 128, 128, None, 1.0),
    "Nemotron Elastic 12B": (40, 8, 128, 128, 80, 8, 128, 128, None, 1.0),
    "Mamba-2-Hybrid 8B": (32, 8, 128, 128, 64, 8, 128, 128, None, 1.0),
    "Mamba-2 8B": (None, None, None, 128, 64, 8, 128, 128, None, 1.0),
}
NANO = (32, 2, 128, 64, 64, 8, 128, 128, 6, 2.5)
HYBRIDS = {
    **DENSE,
    **{name: NANO for name, pattern in PATTERNS.items() if pattern == ALIKE[0]},
    "Nemotron 3 Super 120B-A12B": (32, 2, 128, 128, 64, 8, 128, 128, 22, 5.0),
    "Nemotron 3 Ultra 550B-A55B": (64, 2, 128, 256, 64, 8, 128, 128, 22, 5.0),
}
# Query heads, their size; base of the rotation, rotated part; factor of Llama 3's scaling.
DECODERS = {
    "Llama-3.1-Nemotron-Nano-8B-v1": (32, 128, 500_000, 1.0, 8.0),
    "Llama-3.1-Nemotron-Nano-4B-v1.1": (32, 128, 500_000, 1.0, 8.0),
    "Llama-3.3-Nemotron-Super-49B-v1": (64, 128, 500_000, 1.0, 8.0),
    "Llama-3.1-Nemotron-Ultra-253B-v1": (128, 128, 500_000, 1.0, 16.0),
    "Nemotron-4 15B": (48, 128, 10_000, 0.5, None),
    "Nemotron-4 340B Base": (96, 192, 10_000, 0.5, None),
    "Nemotron-4 340B Instruct": (96, 192, 10_000, 0.5, None),
    "Minitron 4B": (24, 128, 10_000, 0.5, None),
    "Minitron 8B": (48, 128, 10_000, 0.5, None),
    "Mistral-NeMo-Minitron-8B": (32, 128, 1_000_000, 1.0, None),
    "Transformer 8B": (32, 128, 10_000, 0.5, None),
}


def test_every_model_is_in_a_table():
    configs = {v.name: v.config for v in list_variants() if v.config is not None}
    assert {n for n, c in configs.items() if isinstance(c, NemotronHConfig)} == HYBRIDS.keys()
    assert {n for n, c in configs.items() if isinstance(c, DecoderConfig)} == DECODERS.keys()
    assert configs.keys() - HYBRIDS.keys() - DECODERS.keys() == {"BLOOM-176B", "BLOOM-560m"}
    assert HYBRIDS.keys() == PATTERNS.keys()


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids(name):
    c = find_variant(name).config
    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    mamba = (c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size, c.chunk_size)
    assert (*heads, *mamba, c.num_experts_per_tok, c.routed_scaling_factor) == HYBRIDS[name]
    assert c.pattern == PATTERNS[name]
    assert c.mtp_pattern == ("*E" if any(w in name for w in ("3.5", "Super", "Ultra")) else "")
    assert (c.layer_norm_epsilon, c.conv_kernel, c.use_conv_bias) == (1e-5, 4, True)
    assert (c.n_group, c.topk_group, c.norm_topk_prob) == (1, 1, True)
    assert c.mlp_hidden_act == ("gelu" if name == "Mamba-2-Hybrid 8B" else "relu2")
    steps = (c.time_step_min, c.time_step_max, c.time_step_floor)
    assert steps == (0.001, 0.1, 1e-4) and c.time_step_limit == (0, math.inf)
    assert c.mamba_ssm_cache_dtype == "float32"


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name):
    c, s = find_variant(name).config, find_variant(name).config.rope_scaling
    rope = (c.rope_theta, c.partial_rotary_factor, s and s.factor)
    assert (c.num_attention_heads, c.head_dim, *rope) == DECODERS[name]
    kv_heads = set(c.kv_heads.values())
    assert kv_heads == ({32} if name == "Transformer 8B" else {8}) and c.norm_eps == 1e-5
    if s is not None:
        turns = (s.low_freq_factor, s.high_freq_factor, s.original_max_position_embeddings)
        assert turns == (1, 4, 8192)
    plain = name.startswith(("Nemotron-4", "Minitron", "Transformer"))
    assert c.family.layer_norm == plain and c.family.gated != plain


def test_the_others():
    for name, heads in (("BLOOM-176B", 112), ("BLOOM-560m", 16)):
        c = find_variant(name).config
        assert (c.n_head, c.layer_norm_epsilon, c.hidden_act) == (heads, 1e-5, "gelu_pytorch_tanh")
    megatron = find_variant("MT-NLG 530B").fields
    assert (megatron["n_head"], megatron["max_position_embeddings"]) == (128, 2048)
    hymba = find_variant("Hymba-1.5B").fields
    heads = (hymba["num_attention_heads"], hymba["num_key_value_heads"])
    window = (hymba["meta_tokens"], hymba["sliding_window"], hymba["global_attn_layers"])
    assert heads == (25, 5) and window == (128, 1024, [0, 15, 31])
    pairs = [[i, i + 1] for i in (1, 3, 5, 7, 9, 11, 13, 19, 21, 23, 25, 27, 29)]
    assert sorted(hymba["kv_reuse_groups"]) == sorted([*pairs, [16, 17, 18]])
    sees = find_variant("Nemotron-Nano-V2-VL 12B").fields
    assert sees["llm_config"] == find_variant("Nemotron-Nano-12B-v2").fields
    assert (sees["force_image_size"], sees["patch_size"]) == (512, 16)
    reward, base = find_variant("Nemotron-4 340B Reward"), find_variant("Nemotron-4 340B Base")
    assert reward.fields == base.fields
