"""FP8 over steps of training: scales against the formulas, recomputation, compilation."""

import copy
import functools

import hybrids
import numpy as np
import pytest
import torch
from fp8_models import assert_same, blocks, hybrid, layers, state
from test_fp8 import step_by_step
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from nemokernels import fp8_linear, relu2
from nemokernels.models import Fp8Recipe, held_fp8_weights, update_fp8

LIMITS = {"e4m3": 448.0, "e5m2": 57344.0}


def amax(x):
    values = np.abs(x.detach().float().numpy()).ravel()
    values = values[~np.isnan(values)]
    return np.float32(values.max()) if values.size else np.float32(0)


INJECTED = {5: 0.0, 9: torch.inf, 13: torch.nan, 17: 0.0, 21: torch.inf, 30: torch.nan, 31: 1e30}


@pytest.mark.parametrize("algorithm, length, margin, grad_format",
                         [("max", 4, 0.0, "e5m2"), ("most_recent", 3, 1.0, "e4m3"),
                          ("max", 1, 2.0, "e5m2")])  # fmt: skip
def test_scales_of_fifty_steps_follow_the_formulas(algorithm, length, margin, grad_format):
    """Inputs, and in other steps gradients, are replaced by zeros, infinities and NaN.

    The expected scales come from the tensors that the layers saw, one tensor and one row at a time.
    """
    recipe = Fp8Recipe("delayed", grad_format, margin, length, algorithm)
    model = hybrid(recipe=recipe)
    step, seen, want, emitted = 0, {}, {}, {}
    for name, layer in layers(model).items():
        want[name] = [(np.ones(2, np.float32), np.zeros((length, 2), np.float32)),
                      (np.ones(1, np.float32), np.zeros((length, 1), np.float32))]  # fmt: skip

        def before(layer, args, name=name):
            x = getattr(args[0], "y", args[0])  # as its norm has emitted it
            if step in INJECTED and step % 2 and "up_proj" in name:
                x = x * 0 + INJECTED[step]
                args = (x, *args[1:])
            seen[name] = [x, layer.weight.detach().clone()]
            return args

        def after(layer, args, y, name=name):
            (x_scale, w_scale), _ = want[name][0]
            squared = args[1:] == (relu2,)
            plain = fp8_linear(seen[name][0], layer.weight, x_scale=torch.tensor(x_scale),
                               w_scale=torch.tensor(w_scale), squared_relu=squared)  # fmt: skip
            assert torch.equal(y.nan_to_num(), plain.nan_to_num()), (step, name)
            if squared:
                seen[name][0] = relu2(args[0])
            emitted[name] = layer.quantised_by == "norm"

            def gradient(dy):
                if step in INJECTED and (step % 2 == 0 or step == 31) and "q_proj" in name:
                    dy = torch.full_like(dy, INJECTED[step])
                seen[name].append(dy)
                return dy

            y.register_hook(gradient)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    skipped = 0
    for step in range(50):
        logits = model(hybrids.tokens(2, 12, seed=step))
        logits.square().mean().backward()
        update_fp8(model)
        for name, layer in layers(model).items():
            x, w, dy = map(amax, seen[name])
            formats = ("e4m3", grad_format)
            for i, (maxima, format) in enumerate(zip(([x, w], [dy]), formats)):
                scale, history = want[name][i]
                history[0] = maxima
                want[name][i] = step_by_step(scale, history, None, LIMITS[format], margin,
                                             algorithm)  # fmt: skip
            s = layer.fp8_state
            got = [(s.scale, s.amax_history), (s.grad_scale, s.grad_amax_history)]
            for (scale, history), (want_scale, want_history) in zip(got, want[name]):
                assert np.array_equal(scale.numpy(), want_scale), (step, name)
                assert np.array_equal(history.numpy(), want_history), (step, name)
        if all(p.grad.isfinite().all() for p in model.parameters()):
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad(set_to_none=False)
    own = {name for name in emitted if not emitted[name]}
    assert own == {f"backbone.layers.{name}_proj" for name in ("1.mixer.o", "2.mixer.down")}
    assert skipped == 2  # of NaN; what is infinite saturates, and the step is taken


def step_of(model, x, dy, run=None):
    """One step's output, gradients and scaling state."""
    x = x.clone().requires_grad_()
    y = (run or model)(x)
    y.backward(dy)
    update_fp8(model)
    grads = {n: p.grad for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return {"y": y.detach(), "x": x.grad, **grads, **state(model)}


SAVED = [torch.ops.nemokernels.fp8_product.default]


def policy(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTED = {
    "whole": dict(use_reentrant=False),
    "reentrant": dict(use_reentrant=True),
    "selective": dict(
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
    ),
}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
@pytest.mark.parametrize("how", RECOMPUTED)
def test_recomputation_changes_nothing(how, scaling, held):
    plain = blocks(Fp8Recipe(scaling, amax_history_len=3))
    other = copy.deepcopy(plain)

    def recomputed(x):
        for block in other:
            x = checkpoint(block, x, **RECOMPUTED[how])
        return x

    for _ in range(3):
        x, dy = torch.randn(2, 6, 16)
        want = step_of(plain, x, dy)
        if held:
            with held_fp8_weights(other):
                got = step_of(other, x, dy, recomputed)
        else:
            got = step_of(other, x, dy, recomputed)
        assert_same(got, want)
    assert scaling == "current" or want["0.mlp.down_proj.fp8_state.grad_scale"] != 1


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_compiled_whole(scaling, held):
    torch.compiler.reset()
    eager = blocks(Fp8Recipe(scaling, amax_history_len=3), count=1)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, dy = torch.randn(2, 6, 16)
        want = step_of(eager, x, dy)
        if held:
            with held_fp8_weights(other):
                compiled(x)
                got = step_of(other, x, dy, compiled)
        else:
            got = step_of(other, x, dy, compiled)
        assert_same(got, want)


def test_compiled_block_by_block():
    """Each block has graphs of its own; none's backward meets storage another has written."""
    torch.compiler.reset()
    eager = blocks()
    other = copy.deepcopy(eager)
    compiled = nn.Sequential(
        *(torch.compile(b, fullgraph=True, backend="aot_eager") for b in other)
    )
    for _ in range(2):
        x, dy = torch.randn(2, 6, 16)
        assert_same(step_of(other, x, dy, compiled), step_of(eager, x, dy))
