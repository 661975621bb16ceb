"""Models whose linear layers run in FP8: conversion, held weights, state, report."""

import hybrids
import pytest
import torch
from fp8_models import SIZES, assert_same, blocks, hybrid, layers, state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nemokernels import fp8_linear, relu2
from nemokernels.models import (
    Fp8Recipe,
    check_fp8,
    convert_to_fp8,
    exact,
    fp8_report,
    held_fp8_weights,
    inner_layers,
    update_fp8,
)
from nemokernels.models.linear import Linear


@pytest.mark.parametrize("grad_format", ["e5m2", "e4m3"])
def test_every_product_takes_its_own_scale_and_format(grad_format):
    layer = blocks(Fp8Recipe(grad_format=grad_format), count=1)[0].mlp.up_proj
    x, dy = torch.randn(5, 16, requires_grad=True), torch.randn(5, 32)
    scales = [torch.tensor(s) for s in (2.0, 30.0, 7.0)]
    layer.fp8_state.scale.copy_(torch.stack(scales[:2]))
    layer.fp8_state.grad_scale.fill_(scales[2])
    grads = torch.autograd.grad(layer(x), (x, layer.weight), dy)
    names = ("x_scale", "w_scale", "dy_scale")
    y = fp8_linear(x, layer.weight, grad_format=grad_format, **dict(zip(names, scales)))
    for a, b in zip(grads, torch.autograd.grad(y, (x, layer.weight), dy)):
        assert torch.equal(a, b)


def test_held_weights_are_cast_once():
    model, other = blocks(), blocks()
    other.load_state_dict(model.state_dict())
    x, dy = torch.randn(2, 6, 16)

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.nemokernels.quantize_fp8.default and args[0].dim() == 2:
                self.count += args[0].shape in ((32, 16), (16, 32))
            return func(*args, **(kwargs or {}))

    x, dy = x[None], dy[None]  # three axes: the casts of two axes are the weights'
    for m, hold, casts in ((model, False, 12), (other, True, 4)):
        with held_fp8_weights(m if hold else nn.Module()), Casts() as mode:
            for _ in range(3):
                m(x).backward(dy)
        assert mode.count == casts
        update_fp8(m)
    assert_same(state(model), state(other))
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a.grad, b.grad)
    assert all(layer.held is None for layer in layers(other).values())


def test_a_weight_that_changes_while_held_is_noticed():
    model, x = blocks(), torch.randn(3, 16)
    with held_fp8_weights(model):
        model(x)
        with torch.no_grad():
            model[0].mlp.up_proj.weight.mul_(2)
        with pytest.raises(RuntimeError, match="up_proj: the weight was changed while"):
            model(x)
    model(x)


def test_nothing_is_recorded_without_gradients():
    model, x = blocks(), torch.randn(3, 16)
    before = state(model)
    for mode in (True, False):
        with torch.no_grad(), held_fp8_weights(model.train(mode)):
            model(x)
            held = [layer.held is not None for layer in layers(model).values()]
            assert all(held) == any(held) == (not mode)
    update_fp8(model)
    assert_same(state(model), before)


def test_one_reduction_and_one_update_for_the_whole_model(monkeypatch):
    model, updates, reduced = blocks(count=3), [], []
    model(torch.randn(3, 16)).sum().backward()

    class Updates(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.nemokernels.delayed_scaling_update.default:
                updates.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    def all_reduce(amax, op, group):
        assert op is torch.distributed.ReduceOp.MAX and group == "ours"
        reduced.append(amax.numel())
        amax.mul_(2)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    want = {n: 2 * b[0] for n, b in state(model).items() if n.endswith("history")}
    with Updates():
        update_fp8(model, "ours")
    assert updates == [2 * 6] and reduced == [3 * 6]
    after = state(model)
    assert all(torch.equal(after[name][-1], value) for name, value in want.items())


def test_an_unused_layer_keeps_its_state():
    model = blocks()
    model(torch.randn(3, 16)).sum().backward()
    update_fp8(model)
    before = state(model)
    model[0](torch.randn(3, 16)).sum().backward()
    update_fp8(model)
    after = state(model)
    for name in before:
        if "scale" not in name:
            assert torch.equal(before[name], after[name]) == name.startswith("1."), name


def test_the_mlp_never_stores_its_activation():
    model, x = blocks(count=1)[0].mlp, torch.randn(5, 16)
    up, down = model.up_proj, model.down_proj
    h = fp8_linear(x, up.weight, x_scale=torch.ones(()), w_scale=torch.ones(()))
    want = fp8_linear(relu2(h), down.weight, x_scale=torch.ones(()), w_scale=torch.ones(()))
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    with Calls():
        got = model(x)
    assert torch.equal(got, want)
    assert torch.ops.nemokernels.relu2.default not in called


def test_main_gradients():
    model = blocks(Fp8Recipe("current"), dtype=torch.bfloat16)
    x, dy = torch.randn(2, 6, 16).bfloat16()
    model(x).backward(dy)
    plain = {n: p.grad for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad, p.main_grad = None, torch.zeros(p.shape)
    for _ in range(2):
        model(x).backward(dy)
    for name, p in model.named_parameters():
        if ".norm." in name:
            continue
        assert p.grad is None
        assert torch.equal((p.main_grad / 2).bfloat16(), plain[name]), name
        assert not torch.equal(p.main_grad.bfloat16().float(), p.main_grad)


def test_state_is_plain_float32_tensors():
    model = blocks(Fp8Recipe(amax_history_len=3), dtype=torch.bfloat16)
    model(torch.randn(3, 16).bfloat16()).sum().backward()
    update_fp8(model)
    saved = model.state_dict()
    assert all(isinstance(v, torch.Tensor) for v in saved.values())
    assert saved["0.mlp.up_proj.fp8_state.amax_history"].shape == (3, 2)
    other = blocks(Fp8Recipe(amax_history_len=3), dtype=torch.bfloat16)
    other.load_state_dict(saved)
    assert_same(state(other), state(model))
    for cast in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        assert_same(state(cast(other)), state(model))
    with pytest.raises(RuntimeError, match="fp8_state.scale"):
        blocks(Fp8Recipe("current")).load_state_dict(saved)


def test_initial_values_of_a_converted_model():
    model = hybrid()
    model(hybrids.tokens(1, 8)).sum().backward()
    update_fp8(model)
    model.reset_parameters()
    for name, buffer in model.named_buffers():
        if ".fp8_state." in name:
            assert (buffer == (1 if name.endswith("scale") else 0)).all(), name


def test_report_and_check():
    model = hybrid("M*-EM", hidden_size=32, moe_shared_expert_intermediate_size=40)
    report = {layer.name: layer for layer in fp8_report(model)}
    assert {n for n, layer in report.items() if layer.promised} == set(layers(model))
    assert report["lm_head"].reason == "the filter leaves it out"
    assert (
        "40 x 32 are not multiples"
        in report["backbone.layers.3.mixer.shared_experts.up_proj"].reason
    )
    assert "gradient" in report["backbone.layers.3.mixer.experts"].reason
    linear = {n for n, m in model.named_modules() if isinstance(m, Linear)}
    assert linear | {"backbone.layers.3.mixer.experts"} == set(report)
    with pytest.raises(RuntimeError, match=r"out_proj: forward, dgrad, wgrad has not run"):
        check_fp8(model)
    loss = model(hybrids.tokens(1, 8)).sum()
    with pytest.raises(RuntimeError, match=r"q_proj: dgrad, wgrad has not run"):
        check_fp8(model)
    loss.backward()
    check_fp8(model)
    products = {"forward": "reference", "dgrad": "reference", "wgrad": "reference"}
    assert all(layer.products == products for layer in fp8_report(model) if layer.promised)
    with pytest.raises(RuntimeError, match="has not run"):
        check_fp8(hybrid())


def test_ends_and_filters():
    model = hybrid("-*-*-", hidden_size=32)
    assert len(layers(model)) == 14
    plain = hybrids.model("-*-*-", dtype=torch.float32, **SIZES)
    names = set(layers(convert_to_fp8(plain, filter=inner_layers(plain, 2))))
    assert names == {f"backbone.layers.2.mixer.{leaf}_proj" for leaf in ("up", "down")}
    plain = hybrids.model("-*-", mtp="*-", dtype=torch.float32, **SIZES)
    assert not [n for n in layers(convert_to_fp8(plain)) if n.startswith("mtp")]
    plain = hybrids.model("-", dtype=torch.float32, **SIZES)
    convert_to_fp8(plain, filter=lambda name, module: name == "lm_head")
    assert set(layers(plain)) == {"lm_head"}


def test_exact_mode():
    """Rows do not depend on their batch; under current scaling they would."""
    model, x = blocks(), torch.randn(4, 16)
    with torch.no_grad(), exact():
        whole = model(x)
        assert torch.equal(whole, torch.cat([model(row) for row in x.split(1)]))
        with pytest.raises(RuntimeError, match="exact mode: current FP8 scaling"):
            blocks(Fp8Recipe("current"))(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Fp8Recipe("dynamic"), "`scaling` is 'dynamic'"),
        (lambda: Fp8Recipe(grad_format="hybrid"), "`grad_format` is 'hybrid'"),
        (lambda: Fp8Recipe(amax_algorithm="mean"), "`amax_algorithm` is 'mean'"),
        (lambda: Fp8Recipe(amax_history_len=0), "`amax_history_len` is 0"),
        (lambda: convert_to_fp8(blocks(), None, lambda *a: True), "converted already"),
        (lambda: convert_to_fp8(nn.Linear(16, 16), None, lambda *a: True), "it has none"),
        (lambda: convert_to_fp8(Linear(16, 16), None, lambda *a: False), "the filter leaves it"),
        (lambda: convert_to_fp8(nn.Sequential(Linear(8, 16)), None, lambda *a: True), "16 x 8 are"),
        (lambda: inner_layers(hybrids.model("--"), 1), "`ends` is 1, which leaves none of 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
