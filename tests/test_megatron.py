"""From Megatron-LM's names to a model: every value, the grouping of q, k and v, bad input."""

import hybrids
import pytest
import torch
from test_checkpoint import stored_bytes

from nemokernels.models import (
    CheckpointError,
    from_megatron,
    from_pretrained,
    megatron_shapes,
    save_pretrained,
)

PATTERN = "M-*-M"


def megatron(model):
    """The model's tensors under Megatron's names, written from its description."""
    given, ours = {}, model.state_dict()
    for name, tensor in ours.items():
        name = name.replace("backbone.layers", "decoder.layers")
        if "mixer.q_proj" in name:
            q, k, v = (ours[f"backbone.layers.2.mixer.{leaf}_proj.weight"] for leaf in "qkv")
            rows = []
            for group in range(2):  # two query heads of 12 channels share a key and a value
                rows += [q[24 * group : 24 * (group + 1)], k[12 * group : 12 * (group + 1)]]
                rows += [v[12 * group : 12 * (group + 1)]]
            name, tensor = "decoder.layers.2.self_attention.linear_qkv.weight", torch.cat(rows)
        if "k_proj" in name or "v_proj" in name:
            continue
        for old, new in (
            ("backbone.embeddings", "embedding.word_embeddings"),
            ("backbone.norm_f", "decoder.final_norm"),
            ("lm_head", "output_layer"),
            ("2.norm.", "2.self_attention.linear_qkv.layer_norm_"),
            ("2.mixer.o_proj", "2.self_attention.linear_proj"),
            ("1.norm.", "1.mlp.linear_fc1.layer_norm_"),
            ("3.norm.", "3.mlp.linear_fc1.layer_norm_"),
            ("mixer.up_proj", "mlp.linear_fc1"),
            ("mixer.down_proj", "mlp.linear_fc2"),
        ):
            name = name.replace(old, new)
        given[name] = tensor
    return given


@pytest.fixture
def model():
    return hybrids.model(PATTERN, mlp_hidden_act="gelu", dtype=torch.bfloat16)


@pytest.mark.parametrize("fused", [False, True])
def test_every_value_arrives(model, fused, tmp_path):
    given = {**megatron(model), "decoder.layers.1.mlp.linear_fc1._extra_state": None}
    if fused:
        for layer in (0, 4):
            tensor = given.pop(f"decoder.layers.{layer}.norm.weight")
            given[f"decoder.layers.{layer}.mixer.in_proj.layer_norm_weight"] = tensor
    made = from_megatron(model.config, given)
    assert not made.training and made.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name
        assert made.state_dict()[name].dtype == value.dtype, name
    tokens = hybrids.tokens(2, 9)
    assert torch.equal(made(tokens), model(tokens))
    save_pretrained(made, tmp_path / "model")
    again = from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(again[name], v) for name, v in made.state_dict().items())
    assert stored_bytes(tmp_path / "model")["backbone.layers.0.mixer.A_log"][0] == torch.float32


def test_narrow_values_are_wide_in_memory_and_narrow_again_in_the_file(model, tmp_path):
    given = {name: tensor.bfloat16() for name, tensor in megatron(model).items()}
    made = from_megatron(model.config, given)
    for leaf in ("A_log", "D", "dt_bias"):
        held = made.state_dict()[f"backbone.layers.0.mixer.{leaf}"]
        assert held.dtype == torch.float32
        assert torch.equal(held, given[f"decoder.layers.0.mixer.{leaf}"].float())
    save_pretrained(made, tmp_path / "model")
    assert {value[0] for value in stored_bytes(tmp_path / "model").values()} == {torch.bfloat16}


def test_shapes_of_the_study():
    shapes = megatron_shapes("Mamba-2-Hybrid 8B")
    assert len(shapes) == 24 * 9 + 28 * 3 + 4 * 3 + 3
    assert shapes["decoder.layers.10.self_attention.linear_qkv.weight"] == (6144, 4096)
    assert shapes["decoder.layers.0.mixer.in_proj.weight"] == (18560, 4096)
    assert shapes["decoder.layers.0.norm.weight"] == (4096,)
    assert shapes["decoder.layers.1.mlp.linear_fc1.weight"] == (16384, 4096)
    assert shapes["output_layer.weight"] == shapes["embedding.word_embeddings.weight"]
    pure = megatron_shapes("nvidia/mamba2-8b-3t-4k")
    assert len(pure) == 56 * 9 + 3 and pure["decoder.final_norm.weight"] == (4096,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("output_layer.weight"), "output_layer.weight: missing"),
        (lambda g: g.update({"decoder.layers.5.norm.weight": torch.ones(32)}),
         "decoder.layers.5.norm.weight: unexpected"),
        (lambda g: g.update({"decoder.layers.0.mixer.in_proj.layer_norm_weight": torch.ones(32)}),
         "decoder.layers.0.norm.weight: given in both spellings"),
        (lambda g: g.update({"embedding.word_embeddings.weight": torch.ones(128, 32)}),
         r"embedding.word_embeddings.weight: has shape \(128, 32\), expected \(96, 32\)"),
        (lambda g: g.update({"decoder.layers.0.mixer.D": torch.ones(6, dtype=torch.int32)}),
         "decoder.layers.0.mixer.D: is torch.int32, expected a floating dtype"),
        (lambda g: g.update({"decoder.layers.0.mixer.D": None}),
         "decoder.layers.0.mixer.D: is no tensor"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(model, change, message):
    given = megatron(model)
    change(given)
    with pytest.raises(CheckpointError, match=message):
        from_megatron(model.config, given)


@pytest.mark.parametrize(
    "other",
    ["bigscience/bloom-560m", "Nemotron 3 Nano 30B-A3B", hybrids.config("M*", "*-")],
    ids=["bloom", "experts", "mtp"],
)
def test_other_models_are_refused(other):
    with pytest.raises(ValueError, match="must be a nemotron_h of Mamba-2, attention and MLP"):
        megatron_shapes(other)
