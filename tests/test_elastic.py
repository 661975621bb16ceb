"""Slicing checkpoint folders: the same bits as slicing the model, tensor by tensor, or nothing."""

import json

import hybrids
import pytest
import torch
from quantized import ATTENTION, FIELDS, LINEAR, SHAPES, mixed, plain, quantise, write
from safetensors.torch import load_file, save_file

from nemokernels.models import (
    CheckpointError,
    ConfigError,
    RewardModel,
    elastic,
    from_pretrained,
    save_pretrained,
    saving,
    slice_checkpoint,
    slice_model,
)
from nemokernels.train import cli

WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "n_routed_experts": 1,
          "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 32}  # fmt: skip


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("shards", [False, True])
def test_folder_and_model_are_sliced_alike(tmp_path, shards):
    limit = 20_000 if shards else 10**9
    model = hybrids.model("M*-EM*E", "*E", dtype=torch.bfloat16, moe_latent_size=16)
    save_pretrained(model, tmp_path / "whole", max_shard_bytes=limit)
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    (tmp_path / "whole" / "notes.txt").write_text("not copied")
    widths = {**WIDTHS, "n_routed_experts": 5, "mamba_num_heads": 4, "mamba_head_dim": 3,
              "moe_latent_size": 7, "layers": [0, 2, 3, 5, 6],
              "moe_intermediate_size": {"3": 11, "8": 9}}  # fmt: skip
    slice_checkpoint(tmp_path / "whole", tmp_path / "part", widths, max_shard_bytes=limit)
    part = from_pretrained(tmp_path / "part")
    assert same(part, slice_model(from_pretrained(tmp_path / "whole"), widths))
    assert part.config.pattern == "M-E*E" and part.config.mtp_pattern == "*E"
    files = {path.name for path in (tmp_path / "part").iterdir()}
    tensors = {name for name in files if name.endswith(".safetensors")}
    assert (len(tensors) > 1) == shards
    index = {"model.safetensors.index.json"} if shards else set()
    assert files - tensors == {"config.json", "tokenizer.json"} | index
    assert json.loads((tmp_path / "part" / "config.json").read_text())["dtype"] == "bfloat16"
    slice_checkpoint(tmp_path / "part", tmp_path / "same", {})
    assert same(part, from_pretrained(tmp_path / "same"))


def test_names_and_stacks_as_transformers_5_has_them_in_memory(tmp_path):
    model = hybrids.model("ME*", "E", dtype=torch.float32)
    save_pretrained(model, tmp_path / "whole")
    values = {
        name.replace("backbone.", "model."): value.clone()
        for name, value in model.state_dict().items()
    }
    save_file(values, tmp_path / "whole" / "model.safetensors")
    widths = {"hidden_size": 20, "n_routed_experts": {"1": 5}, "moe_intermediate_size": 10}
    slice_checkpoint(tmp_path / "whole", tmp_path / "part", widths)
    assert same(from_pretrained(tmp_path / "part"), slice_model(model, widths))


def test_no_more_than_a_shard_is_read_before_it_is_written(tmp_path, monkeypatch):
    save_pretrained(hybrids.model("M*-E", dtype=torch.bfloat16), tmp_path / "whole")
    held, most, read, save = 0, 0, elastic._read, saving.save_file

    def counted(*args):
        nonlocal held, most
        value = read(*args)
        held += value.nbytes
        most = max(most, held)
        return value

    def saved(*args, **kwargs):
        nonlocal held
        held = 0
        return save(*args, **kwargs)

    monkeypatch.setattr(elastic, "_read", counted)
    monkeypatch.setattr(saving, "save_file", saved)
    slice_checkpoint(tmp_path / "whole", tmp_path / "part", WIDTHS | {"n_routed_experts": 4},
                     max_shard_bytes=9000)  # fmt: skip
    assert 0 < most <= 9000


@pytest.mark.parametrize("spelling", ["hf_quant_config", "quantization_config"])
@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4", "W4A16_NVFP4"])
def test_quantised_layers_keep_codes_and_scales(tmp_path, algorithm, spelling):
    values = plain()
    layers = {module: algorithm for module in LINEAR if module != "lm_head"}
    for module in layers:
        quantise(values, module, algorithm)
    values[f"{ATTENTION}.k_scale"] = torch.tensor(0.25)
    declared, inner = mixed(layers, exclude_modules=["lm_head"]), None
    if spelling == "quantization_config":
        declared, inner = None, {"quantization_config": {"quant_method": "modelopt", **declared}}
    write(tmp_path / "whole", values, declared, inner)
    widths = {**WIDTHS, "layers": [1, 2, 3]}
    slice_checkpoint(tmp_path / "whole", tmp_path / "part", widths)
    part, whole = from_pretrained(tmp_path / "part"), from_pretrained(tmp_path / "whole")
    assert same(part, slice_model(whole, widths))
    stored = load_file(tmp_path / "part" / "model.safetensors")
    expert, old = "backbone.layers.0.mixer.experts.0.down_proj", "backbone.layers.1.mixer.experts.0"
    packed = 1 if algorithm == "FP8" else 2
    assert torch.equal(stored[f"{expert}.weight"],
                       values[f"{old}.down_proj.weight"][:16, : 16 // packed])  # fmt: skip
    scale = values[f"{old}.down_proj.weight_scale"]
    assert torch.equal(stored[f"{expert}.weight_scale"].float(),
                       scale.float() if algorithm == "FP8" else scale[:16, :1].float())  # fmt: skip
    assert stored["backbone.layers.1.mixer.k_proj.k_scale"] == 0.25
    assert part.quantization.kv_scales == {"backbone.layers.1.mixer.k_proj": 0.25}
    if algorithm != "W4A16_NVFP4":
        assert (
            part.quantization.input_scales[expert]
            == whole.quantization.input_scales[f"{old}.down_proj"]
        )
    file = "hf_quant_config.json" if inner is None else "config.json"
    data = json.loads((tmp_path / "part" / file).read_text())
    data = data["quantization" if inner is None else "quantization_config"]
    assert set(data["quantized_layers"]) == set(part.quantization.layers)
    assert "backbone.layers.0.mixer.experts.1.up_proj" not in data["quantized_layers"]


@pytest.mark.parametrize(
    ("widths", "module"),
    [
        ({"hidden_size": 24}, "backbone.layers.0.mixer.in_proj: columns 0 to 24"),
        ({"mamba_num_heads": 2}, "backbone.layers.0.mixer.out_proj: columns 0 to 8"),
        ({"mamba_head_dim": 4}, "backbone.layers.0.mixer.out_proj: columns 0 to 4"),
        ({"intermediate_size": 40}, "backbone.layers.3.mixer.down_proj: columns 0 to 40"),
        ({"moe_latent_size": 8}, "mtp.layers.1.mixer.experts.1.up_proj: columns 0 to 8"),
        ({"moe_intermediate_size": {"5": 8}}, "mtp.layers.1.mixer.experts.0.down_proj: columns 0"),
    ],
)
def test_nvfp4_is_cut_between_its_blocks_only(tmp_path, widths, module):
    """FP8 has one scale per layer and is cut anywhere."""
    for algorithm in ("NVFP4", "FP8"):
        values = plain()
        for name in LINEAR:
            quantise(values, name, algorithm)
        whole = write(tmp_path / algorithm, values, {"quant_algo": algorithm})
        if algorithm == "NVFP4":
            with pytest.raises(CheckpointError) as error:
                slice_checkpoint(whole, tmp_path / "part", widths)
            assert f"{module}" in str(error.value) and "blocks of 16" in str(error.value)
            assert not (tmp_path / "part").exists()
        else:
            slice_checkpoint(whole, tmp_path / "part", widths)
            assert same(from_pretrained(tmp_path / "part"),
                        slice_model(from_pretrained(whole), widths))  # fmt: skip


def test_blocks_begin_on_their_boundaries_too(tmp_path):
    problems = elastic.Problems(tmp_path)
    elastic._check_blocks("x", ((0, 16), (24, 32)), problems)
    assert problems.found == ["x: columns 24 to 32 are off the boundaries of NVFP4's blocks of 16"]


def test_dtypes_of_the_file_survive_in_memory(tmp_path):
    values = plain()
    name = "backbone.layers.0.mixer.A_log"
    values[name] = values[name].float()
    model = slice_model(from_pretrained(write(tmp_path / "a", values)), {"mamba_num_heads": 2})
    save_pretrained(model, tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors")[name].dtype == torch.float32


def test_a_model_that_keeps_quantised_layers_is_not_sliced(tmp_path):
    values = plain()
    quantise(values, "lm_head", "W4A16_NVFP4")
    whole = write(tmp_path / "a", values, mixed({"lm_head": "W4A16_NVFP4"}))
    model = from_pretrained(whole, keep_quantized=True)
    with pytest.raises(ValueError, match="keeps quantised layers; use `slice_checkpoint`"):
        slice_model(model, {})
    with pytest.raises(ValueError, match="keeps quantised layers"):
        save_pretrained(RewardModel.on(model, "score"), tmp_path / "b")


def test_lists_with_patterns(tmp_path):
    values = plain()
    quantise(values, "backbone.layers.3.mixer.up_proj", "FP8")
    lists = {"exclude_modules": ["backbone.layers.0*", "mtp*", "backbone.layers.*.mixer.q_proj",
                                 "backbone.layers.1.mixer.experts.*"]}  # fmt: skip
    declared = mixed({"backbone.layers.3.mixer.up_proj": "FP8"}, **lists)
    whole = write(tmp_path / "whole", values, declared)
    with pytest.raises(CheckpointError, match="layers.0\\*: a pattern of layer numbers, which ch"):
        slice_checkpoint(whole, tmp_path / "part", {"layers": [1, 2, 3]})
    slice_checkpoint(whole, tmp_path / "part", {"hidden_size": 16})
    lists["exclude_modules"][0] = "backbone.layers.0.mixer.in_proj"
    lists["exclude_modules"][1] = "mtp.layers.0*"
    whole = write(tmp_path / "other", values, mixed({"backbone.layers.3.mixer.up_proj": "FP8"},
                                                    **lists))  # fmt: skip
    slice_checkpoint(whole, tmp_path / "fewer", {"layers": [1, 2, 3]})
    data = json.loads((tmp_path / "fewer" / "hf_quant_config.json").read_text())["quantization"]
    assert data["exclude_modules"] == [
        "mtp.layers.0*", "backbone.layers.*.mixer.q_proj", "backbone.layers.0.mixer.experts.*"
    ]  # fmt: skip
    assert list(data["quantized_layers"]) == ["backbone.layers.2.mixer.up_proj"]


def test_what_is_refused_leaves_nothing(tmp_path):
    whole = write(tmp_path / "whole", plain())
    with pytest.raises(ConfigError, match="wider than the parent's 32"):
        slice_checkpoint(whole, tmp_path / "part", {"hidden_size": 64})
    with pytest.raises(CheckpointError, match="not an empty folder"):
        slice_checkpoint(whole, whole, {})
    write(tmp_path / "vision", plain())
    (tmp_path / "vision" / "config.json").write_text(json.dumps({"llm_config": FIELDS}))
    with pytest.raises(CheckpointError, match="`llm_config` in config.json: only a plain"):
        slice_checkpoint(tmp_path / "vision", tmp_path / "part", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vision", "whole"]


def test_command(tmp_path, capsys):
    write(tmp_path / "whole", plain())
    (tmp_path / "widths.json").write_text(json.dumps(WIDTHS))
    args = ["slice", f"{tmp_path}/whole", "--out", f"{tmp_path}/part", "--widths"]
    assert cli.main([*args, f"{tmp_path}/widths.json"]) == 0
    before, after = (sum(v.numel() for v in from_pretrained(tmp_path / name).state_dict().values())
                     for name in ("whole", "part"))  # fmt: skip
    assert f"{before:,} -> {after:,} parameters" in capsys.readouterr().out
    assert after < before == sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert cli.main([*args, f"{tmp_path}/absent.json"]) == 2
    (tmp_path / "widths.json").write_text('{"depth": 3}')
    assert cli.main(["slice", f"{tmp_path}/whole", "--out", f"{tmp_path}/p2", "--widths",
                     f"{tmp_path}/widths.json"]) == 2  # fmt: skip
    err = capsys.readouterr().err
    assert "absent.json" in err and "`depth` is no axis" in err
