"""Models whose NVFP4 layers quantise their activations too (W4A4), by the checkpoint's scales."""

import pytest
import quantized
import torch
from quantized import mixed, plain, quantise, write

from nemokernels import (
    NVFP4,
    NVFP4Experts,
    _backends,
    dequantize_nvfp4,
    moe_experts,
    nvfp4_linear,
    quantize_nvfp4,
    swizzle_nvfp4,
    testing,
)
from nemokernels.models import (
    CheckpointError,
    NemotronHConfig,
    exact,
    from_pretrained,
    generate,
    kept,
    names,
)
from nemokernels.ops.nvfp4_gemm import op as nvfp4_gemm

TOKENS = torch.arange(21).reshape(1, 21) % 48
FIELDS = quantized.FIELDS | dict(  # sizes that the products take
    hidden_size=64, moe_latent_size=32, mamba_num_heads=8, intermediate_size=64,
    moe_shared_expert_intermediate_size=96,
)  # fmt: skip
SHAPES = dict(names.tensor_shapes(NemotronHConfig.from_dict(FIELDS)))
LINEAR = [n.removesuffix(".weight") for n in SHAPES
          if n.endswith(".weight") and names.is_linear(n.removesuffix(".weight"))]  # fmt: skip
EXPERTS = [module for module in LINEAR if ".experts." in module]
UP, DOWN = "backbone.layers.3.mixer.up_proj", "backbone.layers.3.mixer.down_proj"


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setattr(quantized, "FIELDS", FIELDS)
    monkeypatch.setattr(quantized, "SHAPES", SHAPES)


def folder_of(tmp_path, layers, name="a", **changes):
    """A checkpoint with these layers quantised, its scales as those of trained layers."""
    values = plain()
    for module, algorithm in layers.items():
        quantise(values, module, algorithm)
        if algorithm != "FP8":
            values[f"{module}.weight_scale_2"] /= 16
            if algorithm == "NVFP4":
                values[f"{module}.input_scale"] /= 500
    values = {k: v for k, v in (values | changes).items() if v is not None}
    return write(tmp_path / name, values, mixed(layers)), values


def stored(values, module):
    return NVFP4(*(values[f"{module}.{leaf}"] for leaf in ("weight", "weight_scale",
                                                           "weight_scale_2")))  # fmt: skip


def load(folder, **options):
    return from_pretrained(folder, keep_quantized=True, activations="nvfp4", **options)


def seen(model, kind):
    """(input, output) of every layer of a kind in one forward, by its name."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, kind):

            def note(_, args, out, name=name):
                found[name] = (*args, out)

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        logits = model(TOKENS)
    assert logits.isfinite().all()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_layer_multiplies_quantised_activations(tmp_path, dtype):
    """x under the checkpoint's static scale and the weight, both decoded, in float64."""
    folder, values = folder_of(tmp_path, dict.fromkeys(LINEAR, "NVFP4"))
    model = load(folder, dtype=dtype)
    assert model.quantization.w4a4 == model.quantization.kept == frozenset(LINEAR)
    layers = seen(model, kept.W4A4Linear)
    assert set(layers) >= {UP, DOWN, "lm_head", "backbone.layers.0.mixer.in_proj"}
    for name, (x, *act, y) in layers.items():
        x = act[0](x) if act else x
        q = quantize_nvfp4(x, amax=2688 * values[f"{name}.input_scale"])
        wide = (dequantize_nvfp4(*part, dtype=torch.float64) for part in (q, stored(values, name)))
        want = next(wide) @ next(wide).mT
        testing.assert_matches(y, want, want.bfloat16().to(dtype), name)
        assert y.dtype == dtype and y.any()
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, dequantize_nvfp4(*stored(values, name), dtype=dtype))


def test_experts_are_those_of_the_op(tmp_path):
    """x has one scale for all experts, the largest; each hidden layer that of its expert."""
    folder, values = folder_of(tmp_path, dict.fromkeys(EXPERTS, "NVFP4"))
    model = load(folder)
    name = "backbone.layers.1.mixer.experts"

    def matrices(leaf):
        parts = [stored(values, f"{name}.{e}.{leaf}") for e in (0, 1)]
        scales = torch.stack([values[f"{name}.{e}.{leaf}.input_scale"] for e in (0, 1)])
        whole = NVFP4(*(torch.stack(part) for part in zip(*parts)))
        return NVFP4Experts(*swizzle_nvfp4(whole), scales.amax() if leaf == "up_proj" else scales)

    up, down = matrices("up_proj"), matrices("down_proj")
    assert len(set(down.input_scale.tolist())) == 2
    held = model.get_submodule(name)
    for got, want in ((held.up_proj, up), (held.down_proj, down)):
        assert isinstance(got, NVFP4Experts)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, want))
    (x, route, y) = seen(model, kept.KeptExperts)[name]
    assert torch.equal(y, moe_experts(x, up, down, route)) and y.any()
    model.half()  # a cast leaves what is held alone
    assert held.up_proj.scales.dtype == torch.float8_e4m3fn
    assert held.down_proj.input_scale.dtype == torch.float32


def test_off_by_default_and_only_where_there_are_scales(tmp_path):
    layers = dict.fromkeys(LINEAR, "NVFP4") | {UP: "W4A16_NVFP4", "lm_head": "FP8"}
    layers |= {m: "W4A16_NVFP4" for m in EXPERTS if m.startswith("mtp")}
    zero = {f"{DOWN}.input_scale": torch.tensor(0.0)}
    folder, values = folder_of(tmp_path, layers, **zero)
    wide = from_pretrained(folder, keep_quantized=True).quantization
    assert wide.kept == frozenset(LINEAR) - {"lm_head"} and not wide.w4a4
    model = load(folder)
    some = {UP, DOWN, *(m for m in EXPERTS if m.startswith("mtp"))}
    assert model.quantization.kept == wide.kept
    assert model.quantization.w4a4 == wide.kept - some
    (x, y) = seen(model, kept.NVFP4Linear)[UP]
    assert torch.equal(y, nvfp4_linear(x, stored(values, UP)))


def test_one_expert_without_a_scale_keeps_all_of_its_layer_from_it(tmp_path):
    name = "backbone.layers.1.mixer.experts.1.down_proj"
    layers = dict.fromkeys(EXPERTS, "NVFP4") | {name: "W4A16_NVFP4"}
    record = load(folder_of(tmp_path, layers)[0]).quantization
    assert record.kept == frozenset(EXPERTS)
    assert record.w4a4 == frozenset(m for m in EXPERTS if m.startswith("mtp"))


@pytest.mark.parametrize("change", [dict(moe_latent_size=16), dict(moe_intermediate_size=48)])
def test_sizes_that_the_products_do_not_take_keep_wide_activations(tmp_path, monkeypatch, change):
    fields = FIELDS | change
    monkeypatch.setattr(quantized, "FIELDS", fields)
    shapes = dict(names.tensor_shapes(NemotronHConfig.from_dict(fields)))
    monkeypatch.setattr(quantized, "SHAPES", shapes)
    folder, _ = folder_of(tmp_path, dict.fromkeys([*EXPERTS, UP], "NVFP4"))
    record = load(folder).quantization
    assert record.kept == {*EXPERTS, UP} and record.w4a4 == {UP}


def test_generation_and_exact_mode(tmp_path):
    model = load(folder_of(tmp_path, dict.fromkeys(LINEAR, "NVFP4"))[0], dtype=torch.float32)
    prompts = [[5, 6, 7], [8, 9]]
    plain_tokens = generate(model, prompts, max_new_tokens=6).tokens
    with exact():
        assert generate(model, prompts, max_new_tokens=6, speculate=2).tokens == plain_tokens


def test_refused(tmp_path, monkeypatch):
    folder, _ = folder_of(tmp_path, {UP: "W4A16_NVFP4", DOWN: "FP8"})
    with pytest.raises(CheckpointError, match="but no layer in NVFP4 has an activation scale"):
        load(folder)
    with pytest.raises(CheckpointError, match="but no layer in NVFP4 has an activation scale"):
        load(write(tmp_path / "b", plain()))
    with pytest.raises(ValueError, match="`activations` is 'fp8', expected None or 'nvfp4'"):
        from_pretrained(folder, keep_quantized=True, activations="fp8")
    with pytest.raises(ValueError, match="which needs keep_quantized=True"):
        from_pretrained(folder, activations="nvfp4")
    reason = "NVFP4 products need compute capability 10.x or 12.x, this device has 9.0"
    monkeypatch.setattr(_backends, "usable", lambda family, device: ("reference",))
    monkeypatch.setattr(_backends, "backends", lambda device: {
        "nvfp4_gemm": {"chosen": "reference", "rejected": {"csrc": reason}}})  # fmt: skip
    with pytest.raises(RuntimeError, match=f"which cuda:0 does not multiply: {reason}"):
        load(folder, device="cuda:0")


def test_sizes_are_those_of_the_op():
    assert (kept.K_UNIT, kept.N_UNIT) == (nvfp4_gemm.K_UNIT, nvfp4_gemm.N_UNIT)


def test_a_device_that_has_proved_itself_is_taken(monkeypatch):
    asked = []
    monkeypatch.setattr(_backends, "usable", lambda family, device: asked.append(family) or (
        "csrc", "reference"))  # fmt: skip
    kept.check_activations("load", "nvfp4", True, torch.device("cuda", 0))
    assert asked == ["nvfp4_gemm"]
