"""ModelOpt FP8 and NVFP4 checkpoints: declaration and tensors must agree; loading dequantises."""

import json

import pytest
import torch
from quantized import (
    ATTENTION,
    EXPERT,
    FIELDS,
    INPUT,
    LINEAR,
    SHAPES,
    mixed,
    plain,
    quantise,
    write,
)

from nemokernels.models import CheckpointError, from_pretrained, names, save_pretrained


def held(model, name):
    target, index = names.stacked(name) or (name, None)
    value = model.state_dict()[target]
    return value if index is None else value[index]


def check(model, modules):
    """Right to within the rounding of one float32 product and one cast to bfloat16."""
    for module, want in modules.items():
        got = held(model, f"{module}.weight")
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).abs().le(want.abs() * 2**-8).all(), module


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4", "W4A16_NVFP4"])
@pytest.mark.parametrize("spelling", ["hf_quant_config", "quantization_config", "both"])
def test_uniform(tmp_path, algorithm, spelling):
    values = plain()
    kept = ["lm_head", "backbone.layers.2.mixer.q_proj", "backbone.layers.2.mixer.o_proj"]
    wanted = {module: quantise(values, module, algorithm) for module in LINEAR
              if module not in kept and not module.startswith("mtp")}  # fmt: skip
    rest = {name: v for name, v in values.items() if name in SHAPES}
    declared = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": 16,
                "exclude_modules": [*kept, "mtp*", "backbone.layers.0.mixer.conv1d"]}  # fmt: skip
    inner = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": [*kept, "mtp*"],
             "config_groups": {"group_0": {"targets": ["Linear"]}}}  # fmt: skip
    model = from_pretrained(write(
        tmp_path / "a", values, declared if spelling != "quantization_config" else None,
        {"quantization_config": inner} if spelling != "hf_quant_config" else None,
    ))  # fmt: skip
    check(model, wanted)
    assert model.quantization.layers == dict.fromkeys(wanted, algorithm)
    scales = {n.removesuffix(".input_scale"): v.item() for n, v in values.items()
              if n.endswith("input_scale")}  # fmt: skip
    assert model.quantization.input_scales == scales and model.quantization.kv_scales == {}
    for name, value in rest.items():
        if name.removesuffix(".weight") not in wanted:
            assert torch.equal(held(model, name), value.to(held(model, name).dtype)), name


def test_mixed_per_layer_with_kv_scales(tmp_path):
    values = plain()
    layers = {INPUT: "FP8", EXPERT: "NVFP4", "lm_head": "W4A16_NVFP4", ATTENTION: "FP8"}
    wanted = {module: quantise(values, module, how) for module, how in layers.items()}
    values |= {f"{ATTENTION}.k_scale": torch.tensor(0.25),
               "backbone.layers.2.mixer.v_proj.v_scale": torch.tensor([0.5])}  # fmt: skip
    folder = write(tmp_path / "a", values, mixed(layers, exclude_modules=["mtp*"]))
    model = from_pretrained(folder)
    check(model, wanted)
    assert model.quantization.layers == layers
    assert model.quantization.kv_scales == {
        ATTENTION: 0.25, "backbone.layers.2.mixer.v_proj": 0.5
    }  # fmt: skip
    other = EXPERT.replace("experts.1", "experts.0")
    assert torch.equal(held(model, f"{other}.weight"), values[f"{other}.weight"])
    save_pretrained(model, tmp_path / "b")
    again = from_pretrained(tmp_path / "b")
    assert again.quantization is None and "quantization_config" not in again.config.to_dict()
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())


def test_a_wider_model_is_dequantised_without_rounding(tmp_path):
    values = plain()
    layers = {INPUT: "FP8", EXPERT: "NVFP4"}
    wanted = {module: quantise(values, module, how) for module, how in layers.items()}
    folder = write(tmp_path / "a", values, mixed(layers))
    model = from_pretrained(folder, dtype=torch.float64)
    for module, want in wanted.items():
        torch.testing.assert_close(held(model, f"{module}.weight"), want, rtol=1e-12, atol=0)
    save_pretrained(model, tmp_path / "b")
    again = from_pretrained(tmp_path / "b", dtype=torch.float64)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())


def test_other_prefixes_in_the_lists(tmp_path):
    values = plain()
    wanted = {INPUT: quantise(values, INPUT, "FP8")}
    renamed = {"language_model." + name: value for name, value in values.items()}
    folder = tmp_path / "a"
    write(folder, renamed, mixed({f"language_model.{INPUT}": "FP8"}))
    (folder / "config.json").write_text(json.dumps({"llm_config": FIELDS}))
    check(from_pretrained(folder), wanted)


def test_nvfp4_without_activation_scales_is_w4a16(tmp_path):
    values = plain()
    quantise(values, EXPERT, "W4A16_NVFP4")
    model = from_pretrained(write(tmp_path / "a", values, mixed({EXPERT: "NVFP4"})))
    assert model.quantization.layers == {EXPERT: "W4A16_NVFP4"}


@pytest.mark.parametrize("algorithm", ["FP8", "MIXED_PRECISION"])
def test_a_declaration_without_lists_leaves_it_to_the_tensors(tmp_path, algorithm):
    values = plain()
    wanted = {INPUT: quantise(values, INPUT, "FP8")}
    declared = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}
    check(from_pretrained(write(tmp_path / "a", values, declared)), wanted)


def spoil(name, change):
    return lambda values: values.update({name: change(values[name])})


CONTRADICTIONS = {
    "undeclared": (lambda v: None, None, "neither hf_quant_config.json nor"),
    "not listed": (lambda v: None, mixed({EXPERT: "NVFP4"}), f"{INPUT}: stored as FP8"),
    "listed but plain": (
        lambda v: None, mixed({INPUT: "FP8", EXPERT: "NVFP4", "lm_head": "FP8"}),
        "lm_head: stored as an unquantised weight, which contradicts",
    ),
    "other algorithm": (
        lambda v: None, mixed({INPUT: "NVFP4", EXPERT: "NVFP4"}), f"{INPUT}: stored as FP8",
    ),
    "excluded": (
        lambda v: None, mixed({INPUT: "FP8", EXPERT: "NVFP4"}, exclude_modules=["*.0.*"]),
        f"{INPUT}: stored as FP8",
    ),
    "activation scale in W4A16": (
        lambda v: None, mixed({INPUT: "FP8", EXPERT: "W4A16_NVFP4"}), f"{EXPERT}: stored as NVFP4",
    ),
    "no scale": (lambda v: v.pop(f"{INPUT}.weight_scale"), ..., f"{INPUT}.weight_scale: missing"),
    "no block scale": (
        lambda v: v.pop(f"{EXPERT}.weight_scale"), ..., f"{EXPERT}.weight_scale: missing",
    ),
    "no second scale": (
        lambda v: v.pop(f"{EXPERT}.weight_scale_2"), ..., f"{EXPERT}.weight_scale_2: missing",
    ),
    "second scale in FP8": (
        lambda v: v.update({f"{INPUT}.weight_scale_2": torch.ones(())}), ...,
        f"{INPUT}.weight_scale_2: a scale without",
    ),
    "float64 scale": (spoil(f"{INPUT}.weight_scale", torch.Tensor.double), ..., "torch.float64"),
    "scale per row": (
        spoil(f"{INPUT}.weight_scale", lambda s: s.expand(5).contiguous()), ..., "shape (5,)",
    ),
    "nan scale": (spoil(f"{INPUT}.weight_scale", lambda s: s * torch.nan), ..., "is nan, expected"),
    "negative scale": (spoil(f"{EXPERT}.weight_scale_2", lambda s: -s), ..., "expected a finite"),
    "nan activation scale": (
        spoil(f"{INPUT}.input_scale", lambda s: s * torch.inf), ..., "input_scale: is inf",
    ),
    "block scales in bf16": (
        spoil(f"{EXPERT}.weight_scale", torch.Tensor.bfloat16), ..., "torch.bfloat16",
    ),
    "block scales of 8": (
        spoil(f"{EXPERT}.weight_scale", lambda s: s.repeat(1, 2)), ..., "expected (16, 2)",
    ),
    "unpacked codes": (
        spoil(f"{EXPERT}.weight", lambda w: w.repeat(1, 2)), ..., "expected (16, 16)",
    ),
    "transposed fp8": (spoil(f"{INPUT}.weight", lambda w: w.mT.contiguous()), ..., "stores shape"),
    "KV scale undeclared": (
        lambda v: v.update({f"{ATTENTION}.k_scale": torch.ones(())}),
        mixed({INPUT: "FP8", EXPERT: "NVFP4"}, kv_cache_quant_algo=None), "k_scale: a scale",
    ),
    "v scale on k": (
        lambda v: v.update({f"{ATTENTION}.v_scale": torch.ones(())}), ..., "v_scale: a scale",
    ),
    "other method": (lambda v: None, {"quant_method": "bitsandbytes"}, "`quant_method`"),
    "other algorithms": (lambda v: None, {"quant_algo": "W4A8_AWQ"}, "`quant_algo` is 'W4A8_AWQ'"),
    "no algorithm": (lambda v: None, {}, "`quant_algo` is None"),
    "layer algorithm": (lambda v: None, mixed({INPUT: "MXFP8"}), "`quant_algo` is 'MXFP8'"),
    "group of 32": (lambda v: None, {"quant_algo": "NVFP4", "group_size": 32}, "`group_size` is"),
    "NVFP4 cache": (
        lambda v: None, {"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "KV cache in",
    ),
    "layers not a map": (
        lambda v: None, {"quant_algo": "FP8", "quantized_layers": [INPUT]}, "`quantized_layers`",
    ),
    "excludes not a list": (
        lambda v: None, {"quant_algo": "FP8", "exclude_modules": "lm_head"}, "excluded modules",
    ),
    "too many wildcards": (
        lambda v: None, {"quant_algo": "FP8", "exclude_modules": [f"{i}*" for i in range(1001)]},
        "1001 wildcards",
    ),
    "not an object": (lambda v: None, [1], "must be an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_named(tmp_path, case):
    change, declared, message = CONTRADICTIONS[case]
    values = plain()
    quantise(values, INPUT, "FP8")
    quantise(values, EXPERT, "NVFP4")
    change(values)
    declared = mixed({INPUT: "FP8", EXPERT: "NVFP4"}) if declared is ... else declared
    with pytest.raises(CheckpointError) as error:
        from_pretrained(write(tmp_path / "a", values, declared))
    assert message in str(error.value) and str(tmp_path / "a") in str(error.value)


def test_declarations_that_disagree(tmp_path):
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    with pytest.raises(CheckpointError, match="name different algorithms"):
        from_pretrained(write(tmp_path / "a", plain(), {"quant_algo": "FP8"}, config))


def test_hostile_wildcards_are_fast(tmp_path):
    """Patterns made to backtrack: matching stays linear enough to answer at once."""
    values = plain()
    quantise(values, INPUT, "FP8")
    patterns = ["*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*b" + str(i) for i in range(900)]
    declared = mixed({INPUT: "FP8"}, exclude_modules=patterns)
    assert from_pretrained(write(tmp_path / "a", values, declared)).quantization
