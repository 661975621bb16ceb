"""Decoder checkpoints: what is stored must be what the configuration says."""

import json

import families
import pytest
import torch
from safetensors.torch import save_file

from nemokernels.models import CheckpointError, from_pretrained, names

SHAPES = {f: dict(names.tensor_shapes(families.config(f))) for f in families.DECODERS}


def write(folder, family, values, **changes):
    folder.mkdir()
    fields = {**families.FIELDS[family], **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(values, folder / "model.safetensors")
    return folder


def plain(family):
    return {name: torch.randn(shape).bfloat16() for name, shape in SHAPES[family].items()}


ABSENT = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", lambda v: v.pop("model.layers.1.mlp.gate_proj.weight"), "gate_proj.weight: miss"),
        ("llama", lambda v: v.pop("model.embed_tokens.weight"), "embed_tokens.weight: missing"),
        ("nemotron", lambda v: v.pop("model.norm.bias"), "model.norm.bias: missing"),
        ("llama", lambda v: v.update({"model.norm.bias": torch.zeros(32)}),
         "model.norm.bias: unexpected"),
        ("llama", lambda v: v.update({"backbone.norm.weight": torch.zeros(32)}),
         "backbone.norm.weight: unexpected"),
        ("mistral", lambda v: v.update({"model.layers.3.input_layernorm.weight": torch.ones(32)}),
         "layers.3.input_layernorm.weight: unexpected"),
        ("nemotron-nas", lambda v: v.update({ABSENT: torch.zeros(48, 32)}), f"{ABSENT}: unexpect"),
        ("nemotron-nas",
         lambda v: v.update({"model.layers.2.post_attention_layernorm.weight": torch.ones(32)}),
         "layers.2.post_attention_layernorm.weight: unexpected"),
        ("nemotron-nas",
         lambda v: v.update({"model.layers.3.self_attn.k_proj.weight": torch.zeros(24, 32)}),
         r"layers.3.self_attn.k_proj.weight: .* shape \(24, 32\), expected \(48, 32\)"),
        ("nemotron-nas",
         lambda v: v.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(512, 32).bfloat16()}),
         r"layers.4.mlp.up_proj.weight: .* shape \(512, 32\), expected \(256, 32\)"),
        ("llama", lambda v: v.update({"lm_head.weight": torch.zeros(96, 32)}),
         "lm_head.weight: .* stores torch.float32, expected torch.bfloat16"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(family, change, message, tmp_path):
    values = plain(family)
    change(values)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(write(tmp_path / "a", family, values))


def test_a_tied_head_is_not_stored(tmp_path):
    values = plain("llama")
    with pytest.raises(CheckpointError, match="lm_head.weight: unexpected"):
        from_pretrained(write(tmp_path / "a", "llama", values, tie_word_embeddings=True))
    del values["lm_head.weight"]
    with pytest.raises(CheckpointError, match="lm_head.weight: missing"):
        from_pretrained(write(tmp_path / "b", "llama", values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="gru"), "config.json: `model_type` is 'gru', expected one of"),
        (dict(model_type="nemotron_h"), "nemotron_h has no `block_configs`"),
        (dict(num_hidden_layers=6), "`num_hidden_layers` is 6 but `block_configs` has 5"),
        (dict(block_configs=[families.block(2, 1e6)] * 5), "the width` must be from 1"),
    ],
)
def test_a_wrong_configuration_is_a_checkpoint_error(change, message, tmp_path):
    values = plain("nemotron-nas")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(write(tmp_path / "a", "nemotron-nas", values, **change))


@pytest.mark.parametrize("family", ["llama", "nemotron-nas"])
def test_fp8_is_dequantised(family, tmp_path):
    """All linear layers but the head, with scales for activations and the cache."""
    values, want = plain(family), {}
    for name in [n for n in values if n.endswith("_proj.weight")]:
        codes, scale = values[name].to(torch.float8_e4m3fn), torch.rand(()) + 0.5
        module = name.removesuffix(".weight")
        values |= {name: codes, f"{module}.weight_scale": scale,
                   f"{module}.input_scale": torch.rand(()) + 0.5}  # fmt: skip
        want[name] = (codes.float() * scale).bfloat16()
        if module.endswith(("k_proj", "v_proj")):
            leaf = f"{module}.{module[-6]}_scale"
            values[leaf] = torch.rand(()) + 0.5
    folder = write(tmp_path / "a", family, values)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
                    "exclude_modules": ["lm_head"]}  # fmt: skip
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    model = from_pretrained(folder)
    for name, value in want.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert len(model.quantization.layers) == len(want)
    assert set(model.quantization.kv_scales) == {
        n.removesuffix(".weight") for n in want if n.endswith(("k_proj.weight", "v_proj.weight"))
    }
