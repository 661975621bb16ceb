"""Norms that emit FP8 for the layers that alone read them: the same bits as without."""

import copy

import families
import fp8_models
import hybrids
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemokernels.models import (
    Fp8Linear,
    Fp8Recipe,
    convert_to_fp8,
    exact,
    fp8_report,
    generate,
    held_fp8_weights,
    update_fp8,
)

OPS = torch.ops.nemokernels
HYBRID = dict(fp8_models.SIZES, moe_shared_expert_intermediate_size=48)
MODELS = {
    "hybrid": lambda: hybrids.model("M*E-M", dtype=torch.float32, **HYBRID),
    "bfloat16": lambda: hybrids.model("M*-", dtype=torch.bfloat16, **HYBRID),
    "mamba2": lambda: families.model(
        "mamba2", dtype=torch.bfloat16, num_heads=16, head_dim=4, residual_in_fp32=True
    ),
    "llama": lambda: families.model(
        "llama", dtype=torch.float32, head_dim=16, intermediate_size=64
    ),
    "nemotron": lambda: families.model("nemotron", dtype=torch.float32, intermediate_size=64),
    "mamba": lambda: families.model("mamba", dtype=torch.float32),
    "hymba": lambda: families.model("hymba", dtype=torch.float32, intermediate_size=32),
}
# Of each model the layers whose input a norm quantises, and those that quantise their own.
BY_NORM = {
    "hybrid": {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "3.mixer.up_proj"},
    "bfloat16": {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "up_proj"},
    "mamba2": {"in_proj", "out_proj"},
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "nemotron": set(),  # LayerNorm
    "mamba": {"in_proj"},
    "hymba": {"in_proj", "gate_proj", "up_proj"},
}


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2]
        self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def converted(name, recipe=None):
    recipe = recipe or Fp8Recipe(amax_history_len=3)
    return convert_to_fp8(MODELS[name]().train(), recipe)


def unfused(monkeypatch):
    monkeypatch.setattr(Fp8Linear, "input_scale", lambda layer: None)


def train(model, run=None, steps=4, **options):
    """Everything that a few steps show: logits, gradients, scaling state after every update."""
    record, run = {}, model if run is None else run
    for step in range(steps):
        with held_fp8_weights(model):
            for part in range(2):
                logits = run(hybrids.tokens(1, 12, seed=7 * step + part), **options)
                logits.float().square().mean().backward()
                update_fp8(model)
                record[f"{step}.{part}"] = logits.detach()
                record |= {f"{step}.{part}.{n}": b for n, b in fp8_models.state(model).items()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.grad is not None:
                    record[f"{step}.{name}"] = p.grad
                    p.sub_(p.grad, alpha=0.1)
                    p.grad = None
    return record


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_as_without(name, packed, monkeypatch):
    model = converted(name)
    other = copy.deepcopy(model)
    options = {"cu_seqlens": torch.tensor([0, 5, 5, 12]).int()} if packed else {}
    got = train(model, **options)
    by_norm = {r.name for r in fp8_report(model) if r.quantised_by == "norm"}
    ends = tuple(BY_NORM[name])
    assert by_norm == {r.name for r in fp8_report(model) if r.promised and r.name.endswith(ends)}
    assert all(r.quantised_by == "layer" for r in fp8_report(model)
               if r.promised and r.name not in by_norm)  # fmt: skip
    assert not any(r.quantised_by for r in fp8_report(model) if not r.promised)
    unfused(monkeypatch)
    fp8_models.assert_same(got, train(other, **options))
    assert {r.quantised_by for r in fp8_report(other) if r.promised} == {"layer"}
    assert len({got[n].item() for n in got if n.endswith("grad_scale")}) > 3


def test_layers_that_read_one_norm_keep_one_scale():
    model = converted("llama")
    train(model)
    for layer in model.model.layers:
        for readers in (layer.self_attn.readers, layer.mlp.readers):
            states = [reader.fp8_state for reader in readers]
            assert len({s.scale[0].item() for s in states}) == 1 != states[0].scale[0].item()
            assert all(torch.equal(s.amax_history[:, 0], states[0].amax_history[:, 0])
                       for s in states)  # fmt: skip


def test_what_is_read_once():
    """Of the inputs, only those that no norm has emitted are quantised after it."""
    model, tokens = converted("llama"), hybrids.tokens(2, 8)
    with held_fp8_weights(model):
        model(tokens)
        with Calls() as calls:
            model(tokens)
    layers = len(model.model.layers)
    assert calls.count["rms_norm_fp8"] == 2 * layers  # before attention and before the FFN
    assert calls.count["quantize_fp8"] == 2 * layers  # attention's output, and silu(gate) * up
    assert calls.count.get("rms_norm", 0) + calls.count.get("add_rms_norm", 0) == 1  # the last one
    assert calls.count["fp8_product"] == 7 * layers


def test_codes_are_transposed_for_a_weights_gradient_alone():
    seen = []

    class Norms(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "norm_fp8" in func.name():
                seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    model, tokens = converted("bfloat16"), hybrids.tokens(1, 8)
    for mode, weights, want in ((True, True, True), (False, True, False), (True, False, False)):
        for layer in fp8_models.layers(model).values():
            layer.weight.requires_grad_(weights)
        with torch.set_grad_enabled(mode), Norms():
            model(tokens)
        assert len(seen) == 4 and set(seen) == {want}
        seen.clear()
    fp8_models.layers(model)["backbone.layers.1.mixer.v_proj"].weight.requires_grad_()
    with Norms():
        model(tokens).sum().backward()  # one of three readers wants them
    assert seen == [False, False, True, False]


def test_where_a_norm_emits_nothing():
    tokens = hybrids.tokens(1, 8)

    def quantised(model, *contexts):
        model(tokens)
        return {r.quantised_by for r in fp8_report(model) if r.promised}

    assert quantised(converted("bfloat16", Fp8Recipe("current"))) == {"layer"}
    with torch.autocast("cpu", torch.bfloat16):
        assert quantised(converted("hybrid")) == {"layer"}
    with torch.no_grad(), exact():
        assert quantised(converted("bfloat16")) == {"layer"}
    model = MODELS["bfloat16"]()
    convert_to_fp8(model, filter=lambda name, layer: "k_proj" not in name and "head" not in name)
    model(tokens)
    by = {r.name.rpartition(".")[2]: r.quantised_by for r in fp8_report(model)}
    assert by["q_proj"] == by["v_proj"] == "layer" and by["in_proj"] == by["up_proj"] == "norm"
    model = MODELS["llama"]()
    convert_to_fp8(model, filter=lambda name, layer: "up" in name or "down" in name)
    assert quantised(model) == {"layer"}


def test_nothing_is_recorded_without_gradients():
    model = converted("bfloat16")
    before = fp8_models.state(model)
    with torch.no_grad():
        model(hybrids.tokens(1, 8))
    fp8_models.assert_same(fp8_models.state(model), before)


def test_the_whole_model_compiled():
    torch.compiler.reset()
    model = hybrids.model("M*", dtype=torch.bfloat16, **HYBRID).train()
    convert_to_fp8(model, Fp8Recipe(amax_history_len=3))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    with held_fp8_weights(other):
        compiled(hybrids.tokens(1, 12))
    fp8_models.assert_same(train(other, compiled, steps=2), train(model, steps=2))
    reports = [[(r.name, r.quantised_by) for r in fp8_report(m)] for m in (model, other)]
    assert reports[0] == reports[1]


def test_generation(monkeypatch):
    """Prefill and decode, speculative too, of a model that has been trained."""
    model = converted("hybrid")
    train(model, steps=1)
    results = []
    for _ in range(2):
        found = generate(model.eval(), [[1, 2, 3], [4]], max_new_tokens=5)
        results.append((found.tokens, found.logprobs))
        assert {r.quantised_by for r in fp8_report(model) if "in_proj" in r.name} == (
            {"layer"} if len(results) == 2 else {"norm"})  # fmt: skip
        unfused(monkeypatch)
    assert results[0] == results[1]
