"""Checkpoints whose quantised layers stay quantised in memory."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_quantized_checkpoints import EXPERT, INPUT, LINEAR, SHAPES, mixed, plain, quantise, write

from nemokernels import moe_experts, moe_route, testing, untile_nvfp4
from nemokernels.models import CheckpointError, exact, from_pretrained, generate, save_pretrained
from nemokernels.models.kept import KeptExperts, NVFP4Linear, keep
from nemokernels.models.linear import Linear

TOKENS = torch.arange(21).reshape(1, 21) % 48
EXPERTS = [module for module in LINEAR if ".experts." in module]
OTHERS = [INPUT, "backbone.layers.2.mixer.q_proj", "backbone.layers.3.mixer.down_proj", "lm_head"]


def folder_of(tmp_path, layers, **changes):
    """A checkpoint with these layers quantised, at the size of trained weights."""
    values = plain()
    for module, algorithm in layers.items():
        quantise(values, module, algorithm)
        scale = f"{module}.weight_scale" + "_2" * (algorithm != "FP8")
        values[scale] = values[scale] / 16
    return write(tmp_path / "a", values | changes, mixed(layers))


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
def test_nvfp4_logits_are_those_of_the_dequantised_model(tmp_path, algorithm):
    layers = dict.fromkeys(EXPERTS + OTHERS, algorithm)
    folder = folder_of(tmp_path, layers)
    models = {
        (kept, dtype): from_pretrained(folder, keep_quantized=kept, dtype=dtype)
        for kept in (False, True) for dtype in (torch.bfloat16, torch.float64)
    }  # fmt: skip
    with torch.no_grad():
        logits = {key: model(TOKENS) for key, model in models.items()}
    wide = logits[False, torch.float64]
    torch.testing.assert_close(logits[True, torch.float64], wide, rtol=1e-9, atol=1e-9)
    testing.assert_matches(logits[True, torch.bfloat16], wide, logits[False, torch.bfloat16])
    model = models[True, torch.bfloat16]
    assert model.quantization.kept == frozenset(layers) and not model.training
    assert isinstance(model.lm_head, NVFP4Linear)
    assert isinstance(model.backbone.layers[1].mixer.experts, KeptExperts)
    assert not any(p.requires_grad for p in model.parameters())
    same = models[False, torch.bfloat16].lm_head.weight
    assert torch.equal(model.lm_head.weight, same) and model.lm_head.weight.dtype == torch.bfloat16


def test_four_and_a_half_bits_per_weight(tmp_path):
    """Of those whose columns fill tiles of 64; a cast of the model leaves them alone."""
    layers = dict.fromkeys(OTHERS, "NVFP4")
    model = from_pretrained(folder_of(tmp_path, layers), keep_quantized=True)
    model.half()
    held = {n: m for n, m in model.named_modules() if isinstance(m, NVFP4Linear)}
    assert held.keys() == layers.keys()
    for name, module in held.items():
        rows, columns = SHAPES[f"{name}.weight"]
        padded = -(-rows // 16) * 16 * -(-columns // 64) * 64
        size = sum(b.nbytes for b in module.buffers())
        assert size == padded * 4.5 / 8 + 4, name
        assert module.tiled_global_scale.dtype == torch.float32
        assert not list(module.parameters())


def test_generation_and_exact_mode(tmp_path):
    layers = dict.fromkeys(EXPERTS + OTHERS, "NVFP4")
    model = from_pretrained(folder_of(tmp_path, layers), keep_quantized=True, dtype=torch.float32)
    prompts = [[5, 6, 7], [8, 9]]
    plain_tokens = generate(model, prompts, max_new_tokens=6).tokens
    with exact():
        assert generate(model, prompts, max_new_tokens=6, speculate=2).tokens == plain_tokens


def test_fp8_experts(tmp_path):
    """W8A8: the layer is that of moe_experts with the checkpoint's own parts; the rest is dense."""
    largest = "backbone.layers.1.mixer.experts.1.up_proj.input_scale"
    changes = {largest: torch.tensor(3.5)}
    folder = folder_of(tmp_path, dict.fromkeys([*EXPERTS, INPUT], "FP8"), **changes)
    kept, wide = (from_pretrained(folder, keep_quantized=k) for k in (True, False))
    assert kept.quantization.kept == frozenset(EXPERTS)
    held, dense = (m.backbone.layers[1].mixer.experts for m in (kept, wide))
    up, down = held.up_proj, held.down_proj
    scales = kept.quantization.input_scales
    for e in (0, 1):
        name = f"backbone.layers.1.mixer.experts.{e}"
        assert down.input_scale[e] == torch.tensor(scales[f"{name}.down_proj"])
        for q, leaf in ((up, "up_proj"), (down, "down_proj")):
            value = (q.values[e].float() * q.scale[e]).bfloat16()
            assert torch.equal(value, getattr(dense, leaf)[e])
    assert up.input_scale == 3.5
    mixer, x = kept.backbone.layers[1].mixer, torch.randn(9, 16).bfloat16()
    kept.half()
    assert mixer.experts.up_proj.values.dtype == torch.float8_e4m3fn
    with torch.no_grad():
        assert kept(TOKENS).isfinite().all()
        route = moe_route(torch.randn(9, 2), top_k=1)
        assert torch.equal(moe_experts(x, up, down, route),
                           moe_experts(x, held.up_proj, held.down_proj, route))  # fmt: skip


@pytest.mark.parametrize("layers", [
    {m: "NVFP4" if "experts.0" in m else "FP8" for m in EXPERTS},
    {m: "NVFP4" for m in EXPERTS if "down_proj" in m},
    {},
])  # fmt: skip
def test_mixed_experts_are_dequantised(tmp_path, layers):
    folder = folder_of(tmp_path, layers)
    kept, plain_model = (from_pretrained(folder, keep_quantized=k) for k in (True, False))
    assert not kept.quantization.kept
    for name, value in plain_model.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value)


@pytest.mark.parametrize("scale", [None, torch.tensor(0.0)])
def test_fp8_experts_without_activation_scales_are_dequantised(tmp_path, scale):
    values = plain()
    for module in EXPERTS:
        quantise(values, module, "FP8")
    values[f"{EXPERT}.input_scale"] = scale
    if scale is None:
        del values[f"{EXPERT}.input_scale"]
    folder = write(tmp_path / "a", values, mixed(dict.fromkeys(EXPERTS, "FP8")))
    kept = from_pretrained(folder, keep_quantized=True).quantization.kept
    assert kept == frozenset(m for m in EXPERTS if m.startswith("mtp"))


def test_a_layer_with_a_bias_is_dequantised():
    model = torch.nn.ModuleDict({"up_proj": Linear(16, 16, bias=True)})
    source = SimpleNamespace(target="up_proj.weight", algorithm="NVFP4")
    assert keep(model, [source], None, torch.device("cpu"), torch.float32) == (set(), set())
    assert isinstance(model["up_proj"], Linear)


def test_a_model_that_is_not_quantised_loads_as_ever(tmp_path):
    model = from_pretrained(write(tmp_path / "a", plain()), keep_quantized=True)
    assert model.quantization is None
    save_pretrained(model, tmp_path / "b")


def test_refused(tmp_path):
    layers = {INPUT: "NVFP4"}
    model = from_pretrained(folder_of(tmp_path, layers), keep_quantized=True)
    with pytest.raises(ValueError, match="keeps quantised layers; load it without"):
        save_pretrained(model, tmp_path / "b")


@pytest.mark.parametrize(
    "options", [{}, dict(keep_quantized=True), dict(keep_quantized=True, activations="nvfp4")]
)
@pytest.mark.parametrize("module", [INPUT, EXPERT])
def test_a_negative_block_scale_is_refused(tmp_path, module, options):
    rows, columns = SHAPES[f"{module}.weight"]
    scales = torch.ones(rows, columns // 16)
    scales[rows // 2, 0] = -1
    changes = {f"{module}.weight_scale": scales.to(torch.float8_e4m3fn)}
    folder = folder_of(tmp_path, dict.fromkeys([INPUT, *EXPERTS], "NVFP4"), **changes)
    message = f"{folder}: {module}.weight_scale: holds a negative block scale"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder, **options)


def test_experts_are_kept_byte_for_byte(tmp_path):
    folder = folder_of(tmp_path, dict.fromkeys(EXPERTS, "NVFP4"))
    held = from_pretrained(folder, keep_quantized=True).backbone.layers[1].mixer.experts
    values = load_file(folder / "model.safetensors")
    for leaf in ("up_proj", "down_proj"):
        back = untile_nvfp4(getattr(held, leaf))
        for e in (0, 1):
            name = f"backbone.layers.1.mixer.experts.{e}.{leaf}"
            for part, stored in zip(back, ("weight", "weight_scale", "weight_scale_2")):
                want = values[f"{name}.{stored}"]
                assert torch.equal(part[e].view(-1).view(torch.uint8),
                                   want.view(-1).view(torch.uint8))  # fmt: skip
