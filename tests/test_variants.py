"""The table of released models: complete, exact where a count is known, honest where it is not."""

import re

import pytest
import torch

from nemokernels.models import ConfigError, build, find_variant, list_variants, names, variants
from nemokernels.models.variants import find_config

VARIANTS = list_variants()
WHOLE = [v for v in VARIANTS if v.config and not v.part]
# Counted on the model cards, in reports, or from published shapes.
EXACT = {
    "Nemotron 3 Nano 30B-A3B": 31_577_940_288,
    "Nemotron 3.5 Lightning 30B-A3B": 32_913_266_240,
    "Nemotron 3 Super 120B-A12B": 123_611_033_088,
    "Nemotron 3 Ultra 550B-A55B": 560_524_603_904,
    "Nemotron 3 Nano 4B": 3_973_556_832,
    "Nemotron-H 4B": 4_489_223_040,
    "Nemotron-H 8B": 8_100_852_736,
    "Nemotron-H 47B": 46_791_554_816,
    "Nemotron-H 56B": 56_324_350_464,
    "Nemotron-Nano-9B-v2": 8_888_227_328,
    "Nemotron-Nano-12B-v2": 12_310_001_152,
    "Llama-3.1-Nemotron-Nano-8B-v1": 8_030_261_248,
    "Llama-3.1-Nemotron-Nano-4B-v1.1": 4_512_746_496,
    "Llama-3.3-Nemotron-Super-49B-v1": 49_867_145_216,
    "Llama-3.1-Nemotron-Ultra-253B-v1": 253_401_268_224,
    "Nemotron-4 15B": 15_628_775_424,
    "Nemotron-4 340B Base": 341_029_195_776,
    "Nemotron-4 340B Instruct": 341_029_195_776,
    "Minitron 4B": 4_190_509_056,
    "Minitron 8B": 8_271_699_968,
    "Mistral-NeMo-Minitron-8B": 8_414_105_600,
    "Mamba-2-Hybrid 8B": 8_654_517_248,
    "Mamba-2 8B": 8_236_999_680,
    "Transformer 8B": 8_540_135_424,
    "BLOOM-176B": 176_247_271_424,
    "BLOOM-560m": 559_214_592,
    "MT-NLG 530B": 529_600_819_200,
}


# Values for what is not public: any that build a model; where a size is stated, ones that give it.
GIVEN = {
    "Nemotron-Nano-V2-VL 12B": dict(num_prefix_tokens=10),
    "Nemotron-4 340B Reward": dict(reward_head={"head": "head", "outputs": 5}),
    "Mamba-1 8B": dict(num_hidden_layers=56, state_size=16, time_step_rank=256, expand=2,
                       conv_kernel=4, use_conv_bias=True, use_bias=False, residual_in_fp32=True,
                       layer_norm_epsilon=1e-5),
    "Hymba-1.5B": dict(vocab_size=32001, qk_head_dim=64, v_head_dim=128, rope_theta=1e4,
                       tie_word_embeddings=True),
    "MT-NLG 530B": dict(hidden_act="gelu", layer_norm_epsilon=1e-5),
}  # fmt: skip


def elements(model):
    return sum(tensor.numel() for tensor in model.state_dict().values())


def test_all_released_models_are_there():
    assert len(VARIANTS) == len({v.name for v in VARIANTS}) == 35
    families = {v.family for v in VARIANTS}
    assert families == {
        "nemotron-3", "nemotron-h", "nemotron-nano-v2", "nemotron-elastic", "llama-nemotron",
        "nemotron-4", "minitron", "mamba-study-8b", "hymba", "bloom", "mt-nlg",
    }  # fmt: skip


def test_an_entry_has_a_configuration_or_says_why_not():
    for v in VARIANTS:
        assert (v.config is None) == bool(v.missing), v.name
        assert not (v.arguments and v.reason), v.name
        assert all(isinstance(text, str) and text for text in v.unknown), v.name


def test_exact_counts_are_the_published_ones():
    assert {v.name: v.parameters for v in VARIANTS if v.name in EXACT} == EXACT


@pytest.mark.parametrize("variant", WHOLE, ids=lambda v: v.name)
def test_built_counts(variant):
    """On meta; equal to the exact count, and within the rounding of what its makers state."""
    model = build(variant.name, device="meta", dtype=torch.bfloat16)
    count, tensors = elements(model), model.state_dict()
    stacks = sum(len(t) - 1 for name, t in tensors.items() if names.is_stack(name))
    assert (count, len(tensors) + stacks) == (variant.parameters, variant.tensors)
    assert all(tensor.is_meta for tensor in tensors.values())
    nested = variant.family == "nemotron-elastic"  # named after a size class; see the next test
    assert variant.name in EXACT or nested or rounds_to(count, variant.published)


def rounds_to(count, published):
    number, digits, unit = re.fullmatch(r"(\d+\.?(\d*))([BM])", published).groups()
    size = {"B": 1e9, "M": 1e6}[unit]
    return abs(count / size - float(number)) <= 0.5 * 10.0 ** -len(digits)


def test_everything_but_the_searched_net_can_be_built():
    """With what is not public given; Puzzle's sizes are in its own config.json alone."""
    without = {v.name for v in VARIANTS if v.config is None}
    assert without - GIVEN.keys() == {"Nemotron-Labs-3-Puzzle 75B-A9B"}
    assert {v.name for v in VARIANTS if v.arguments} == GIVEN.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_built_with_what_is_not_public(name):
    variant = find_variant(name)
    assert set(variant.arguments) == GIVEN[name].keys()
    count = elements(build(name, device="meta", dtype=torch.bfloat16, **GIVEN[name]))
    if name in EXACT:
        assert count == variant.parameters
    elif name == "Nemotron-4 340B Reward":  # 340B counts the language model's head
        assert count == EXACT["Nemotron-4 340B Base"] - (256_000 - 5) * 18_432
    else:
        assert variant.published is None or rounds_to(count, variant.published)


def test_nested_models_have_the_sizes_of_their_parents():
    assert find_config("Nemotron Elastic 12B") == find_config("Nemotron-Nano-12B-v2")
    assert find_config("Star Elastic 30B") == find_config("Nemotron 3 Nano 30B-A3B")


def test_a_part_says_what_it_is():
    omni = find_variant("nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16")
    assert omni.part.startswith("the language model")
    assert omni.config == find_config("Nemotron 3 Nano 30B-A3B") and omni.parameters is None


@pytest.mark.parametrize(
    "name",
    [
        "Nemotron 3 Super 120B-A12B",
        "nemotron-3-super-120b-a12b",
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
        "NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
    ],
)
def test_names(name):
    assert find_variant(name).parameters == 123_611_033_088


def test_every_name_and_hub_id_means_one_model():
    for variant in VARIANTS:
        ids = [hub_id for hub_id in (variant.hub_id, *variant.other_hub_ids) if hub_id]
        assert all(re.fullmatch(r"[\w-]+/[\w.-]+", hub_id) for hub_id in ids), ids
        for name in (variant.name, *ids, *(hub_id.partition("/")[2].upper() for hub_id in ids)):
            assert [v.name for v in VARIANTS if v.answers_to(name)] == [variant.name]
    assert find_variant("NVIDIA-Nemotron-3-Nano-30B-A3B-FP8") is VARIANTS[0]


def test_what_cannot_be_built_says_why():
    with pytest.raises(ValueError, match="Puzzle 75B-A9B cannot be built: the sizes of its layers"):
        build("Nemotron-Labs-3-Puzzle-75B-A9B")
    with pytest.raises(ValueError, match="no variant ''; `nemokernels models` lists"):
        find_config("")
    with pytest.raises(TypeError, match="variant's name or a configuration, got int"):
        find_config(3)


def test_arguments(monkeypatch):
    fields = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1,
              "intermediate_size": 8, "num_attention_heads": 2, "rms_norm_eps": 1e-5}  # fmt: skip
    entry = {"name": "X", "family": "f", "hub_id": None, "config": fields,
             "arguments": ["vocab_size", "rope_theta"]}  # fmt: skip
    variant = variants._variant(entry)
    assert variant.config is None and variant.missing == "needs vocab_size, rope_theta"
    monkeypatch.setattr(variants, "_table", lambda: (variant,))
    made = build("X", device="meta", vocab_size=10, rope_theta=100.0)
    assert made.lm_head.weight.shape == (10, 32) and made.config.rope_theta == 100
    with pytest.raises(ValueError, match="X needs rope_theta, which are not public"):
        build("X", vocab_size=10)
    with pytest.raises(ValueError, match="X takes no argument eps"):
        build("X", vocab_size=10, rope_theta=1.0, eps=2)
    with pytest.raises(ConfigError, match="`vocab_size` must be of type int"):
        build("X", vocab_size="10", rope_theta=1.0)
    with pytest.raises(TypeError, match="must be a variant's name, got DecoderConfig"):
        build(made.config, vocab_size=10)
