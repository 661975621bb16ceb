"""The memory a model takes, against sums done by hand, and the command that prints it."""

import fnmatch
import json

import hybrids
import pytest

from nemokernels.models import find_variant, list_variants, names, read_config
from nemokernels.models.memory import (
    PRECISIONS,
    Memory,
    _algorithm,
    gpus_needed,
    memory,
    precision_of,
)
from nemokernels.models.variants import Precision
from nemokernels.train import cli

BF16 = Precision((), "bf16")


def test_one_small_hybrid_by_hand():
    """M*E: vocabulary 96, width 32, 6 heads of 8, 2 groups of 16 states, 8 experts."""
    mamba = 32 * (48 + 112 + 6) + 112 * 4 + 112 + 3 * 6 + 48 + 32 * 48
    attention = 32 * 12 * (4 + 2 + 2 + 4)
    moe = 8 * 32 + 8 * 2 * 24 * 32 + 2 * 40 * 32
    elements = 2 * 96 * 32 + 4 * 32 + mamba + attention + moe
    need = memory(hybrids.config("M*E"), BF16, context=10, batch=3)
    assert need.weights == {"BF16": 2 * elements + 4 * 8}  # correction biases in float32
    assert need.kv_token == 2 * 2 * 12 * 2 and need.kv == 10 * need.kv_token
    assert need.state == 4 * 6 * 8 * 16 + 2 * 112 * 4
    assert need.total == 2 * elements + 32 + 3 * (need.kv + need.state)


def test_quantised_layers_by_hand():
    """- : up (56, 32) and down (32, 56); 56 columns are no whole blocks of 16."""
    config = hybrids.config("-")
    fp8 = memory(config, Precision((("*.up_proj", "FP8"),), "fp8"), context=1, batch=1)
    rest = 2 * 96 * 32 + 2 * 32
    assert fp8.weights == {"BF16": 2 * (rest + 32 * 56), "FP8": 56 * 32 + 4 + 4}
    for algorithm, scalars in (("NVFP4", 8), ("W4A16_NVFP4", 4)):
        rules = (("lm_head", "BF16"), ("*", algorithm))
        need = memory(config, Precision(rules, "bf16"), context=1, batch=1)
        assert need.weights == {
            "BF16": 2 * (rest + 32 * 56),
            algorithm: 56 * 32 // 2 + 56 * 32 // 16 + scalars,
        }


def test_routers_embeddings_and_convolutions_are_never_quantised():
    config = hybrids.config("ME", "*E", moe_latent_size=16)
    everything = memory(config, Precision((("*", "FP8"),), "fp8"), context=1, batch=1)
    linear = [shape for name, shape in names.tensor_shapes(config)
              if names.is_linear(name.removesuffix(".weight"))]  # fmt: skip
    assert everything.weights["FP8"] == sum(a * b + 8 for a, b in linear)


def test_cache_precision():
    config = hybrids.config("M*")
    wide = memory(config, BF16, context=7, batch=1)
    narrow = memory(config, Precision((), "fp8", "fp16"), context=7, batch=1)
    assert (narrow.kv, narrow.kv_token) == (wide.kv // 2, wide.kv_token // 2)
    assert narrow.state == wide.state - 2 * 6 * 8 * 16
    half = memory(hybrids.config("M", mamba_ssm_cache_dtype="float16"), BF16, context=1, batch=1)
    assert half.state == narrow.state


def need(name, precision):
    variant = find_variant(name)
    return memory(variant.config, precision_of(variant, precision), context=1000, batch=1)


def test_nano():
    """Six attention layers with two heads of 128; 23 Mamba layers of 64 x 64 x 128."""
    bf16, fp8 = need("Nemotron 3 Nano 30B-A3B", "bf16"), need("Nemotron 3 Nano 30B-A3B", "fp8")
    assert bf16.kv_token == 6 * 2 * 2 * 128 * 2 == 2 * fp8.kv_token
    assert bf16.state == 23 * (64 * 64 * 128 * 4 + 6144 * 4 * 2)
    assert sum(bf16.weights.values()) == 2 * 31_577_940_288 + 2 * 23 * 128


def test_super_has_the_bytes_of_its_card():
    assert need("Nemotron 3 Super 120B-A12B", "bf16").weights == {"BF16": 247_222_108_160}


def test_lightning_quantises_as_many_layers_as_its_configuration_lists():
    variant, counts = find_variant("Nemotron 3.5 Lightning 30B-A3B"), {}
    rules = precision_of(variant, "nvfp4")
    for name, shape in names.tensor_shapes(variant.config):
        how = _algorithm(name, shape, rules)
        counts[how] = counts.get(how, 0) + 1
    assert (counts["W4A16_NVFP4"], counts["FP8"]) == (5935, 46) and rules.assumed is None


def test_ultra_has_the_published_bits_per_element():
    """5.03 with the scales of the activations, which weigh nothing, and whatever else it counts."""
    variant = find_variant("Nemotron 3 Ultra 550B-A55B")
    bits = 8 * sum(need(variant.name, "nvfp4").weights.values()) / variant.parameters
    assert abs(bits - 5.03) < 0.01


def test_released_rules_name_layers_that_exist():
    for variant in list_variants():
        for precision in variant.precisions.values():
            modules = {name.rpartition(".")[0] for name, _ in names.tensor_shapes(variant.config)}
            for pattern, how in precision.rules:
                assert how in ("BF16", "FP8", "NVFP4", "W4A16_NVFP4")
                assert pattern == "*" or fnmatch.filter(modules, pattern), (variant.name, pattern)


def test_assumptions_are_said():
    for precision in ("fp8", "nvfp4"):
        rules = precision_of(find_variant("Nemotron-H 8B"), precision)
        assert precision.upper() in rules.assumed
    assert precision_of(None, "bf16").assumed is None
    assert precision_of(find_variant("Nemotron 3 Nano 30B-A3B"), "nvfp4").assumed is None
    with pytest.raises(ValueError, match="no precision 'int4'; there are bf16, fp8, nvfp4"):
        precision_of(None, "int4")


@pytest.mark.parametrize(
    ("total", "gpu", "reserve", "count"),
    [(72, 80, 0.1, 1), (73, 80, 0.1, 2), (80, 80, 0, 1), (81, 80, 0, 2), (0, 80, 0.5, 1),
     (401, 100, 0.5, 9)],
)  # fmt: skip
def test_gpus(total, gpu, reserve, count):
    assert gpus_needed(total, gpu, reserve=reserve) == count


def test_bad_arguments():
    with pytest.raises(ValueError, match="a GPU must have memory, got 0 bytes"):
        gpus_needed(1, 0)
    with pytest.raises(ValueError, match="`reserve` must be from 0 to below 1, got 1"):
        gpus_needed(1, 1, reserve=1)
    for name in ("context", "batch"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            memory(hybrids.config("M"), BF16, **{"context": 1, "batch": 1, name: 0})


def test_total_counts_every_sequence():
    assert Memory({"BF16": 100, "FP8": 10}, 1, 7, 5, 3).total == 110 + 3 * 12


def run(capsys, *args):
    code = cli.main(["models", *map(str, args)])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_command_lists_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(capsys)
    assert code == 0
    for variant in list_variants():
        assert variant.name in out and (variant.hub_id or "") in out
        assert variant.parameters is None or f"{variant.parameters:,}" in out


def test_command_describes_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    _, out, _ = run(capsys, "Star Elastic 30B")
    assert "31,577,940,288" in out and "widths of the 23B and 12B models" in out
    assert "MEMEM*EMEMEM*" in out
    _, out, _ = run(capsys, "Llama-3_3-Nemotron-Super-49B-v1")
    assert "80 entries" in out
    _, out, _ = run(capsys, "nvidia/Nemotron-Mini-4B-Instruct")
    assert "nvidia/Minitron-4B-Base" in out and "also" in out
    _, out, _ = run(capsys, "MT-NLG 530B")
    assert "to be given │ hidden_act, layer_norm_epsilon" in out and "20480" in out


def test_command_counts_memory(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    name = "NVIDIA-Nemotron-3-Super-120B-A12B-BF16"
    code, out, _ = run(capsys, name, "--memory", "--context", 1000, "--batch", 2)
    assert code == 0 and "2 x 1,000 tokens" in out
    assert "247.22" in out and "9,216" in out and "4,608" in out
    total = (247_222_108_160 + 2 * (9_216_000 + 170_229_760)) / 1e9
    assert f"{total:,.2f}" in out and f"{total * 1e9 / 2**30:,.2f}" in out
    assert "GPUs: H100 (80 GB) │ 4 │ 2 │ 2 │" in out and "GPUs: B200 (192 GB) │ 2 │ 1 │ 1" in out
    assert "fp8 assumes: the MTP block stays in BF16" in out and "GB = 10^9 bytes" in out
    args = ["--precision", "bf16", "--gpu-gb", 24.5, "--reserve", 0]
    code, out, _ = run(capsys, name, "--memory", *args)
    assert "GPUs: 24.5 GB │ 11 │" in out and "fp8" not in out and "H100" not in out


def test_command_reads_a_folder(capsys, monkeypatch, tmp_path):
    """A net whose layers differ, as its config.json says."""
    monkeypatch.setenv("COLUMNS", "160")
    blocks = [{"block_type": "moe", "n_routed_experts": 4}, {"block_type": "mlp"}]
    fields = {**hybrids.FIELDS, "model_type": "nemotron_h_puzzle", "block_configs": blocks}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    config = read_config(path)
    for name in (tmp_path, path):
        code, out, _ = run(capsys, name)
        assert code == 0 and f"{names.element_count(config):,}" in out and "tensors │ 19" in out
    path.write_text(json.dumps({"model_type": "speaks", "text_config": fields}))
    assert f"{names.element_count(config):,}" in run(capsys, tmp_path)[1]
    code, out, _ = run(capsys, tmp_path, "--memory", "--precision", "bf16")
    assert code == 0 and "1 x 8,192 tokens" in out
    assert run(capsys, tmp_path / "absent.json")[0] == 2


def test_command_takes_what_is_not_public(capsys):
    args = ["MT-NLG 530B", "--memory", "--precision", "bf16"]
    code, _, err = run(capsys, *args)
    assert code == 2 and "needs hidden_act, layer_norm_epsilon" in err
    given = ["--given", "hidden_act=gelu", "layer_norm_epsilon=1e-5"]
    code, _, err = run(capsys, *args, *given)
    assert code == 2 and "`context` is 8192, but 2048 positions were learned" in err
    given = ["--context", 2048, *given]
    code, out, _ = run(capsys, *args, *given)
    assert code == 0 and "1,059.20" in out
    assert run(capsys, *args, "--given", "hidden_act")[0] == 2


@pytest.mark.parametrize(
    "args",
    [["no such model"], ["Nemotron-H-8B", "--memory", "--precision", "int4"],
     ["Nemotron-H-8B", "--memory", "--context", 0], ["Nemotron-H-8B", "--memory", "--reserve", 1],
     ["Nemotron-H-8B", "--memory", "--gpu-gb", 0], ["--memory"],
     ["MT-NLG 530B", "--given", "hidden_act=gelu"]],
)  # fmt: skip
def test_command_mistakes(capsys, args):
    code, _, err = run(capsys, *args)
    assert code == 2 and err.startswith("nemokernels: ") and err.count("\n") == 1


def test_all_released_models_have_a_figure_in_every_precision():
    for variant in list_variants():
        if variant.config is not None:
            sizes = [need(variant.name, precision) for precision in PRECISIONS]
            totals = [sum(size.weights.values()) for size in sizes]
            assert totals == sorted(totals, reverse=True) and totals[2] < totals[0]
            assert all(size.total > 0 for size in sizes)
