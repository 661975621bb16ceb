"""Routers in training: the auxiliary loss, and counts that a recomputed forward leaves alone."""

import functools
import math
from types import SimpleNamespace

import hybrids
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nemokernels import balance_loss
from nemokernels.models import exact, streams
from nemokernels.models.balance import Balance, carrying


def test_a_carried_loss_is_added_to_what_is_differentiated():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = carrying(x * 2, (x**3).sum())
    assert torch.equal(y, x * 2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 + 3 * x.detach() ** 2)


@pytest.mark.parametrize("tokens", [0, 1, 12, 17])
def test_loss_is_the_mean_over_the_sequences_of_a_step(tokens):
    logits = torch.randn(tokens, 6, dtype=torch.float64)
    parts = [balance_loss(part, top_k=2, coefficient=0.3) for part in logits.split(6) if len(part)]
    got = Balance(0.3, 6, 5).loss(logits, 2)
    torch.testing.assert_close(got, sum(parts, torch.zeros((), dtype=torch.float64)) / 5)


def layer(balance=None):
    mixer = hybrids.model("E", moe_latent_size=16, dtype=torch.float64).backbone.layers[0].mixer
    mixer.gate.balance = balance
    return mixer.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_multiplies_in_float32_forward_and_backward(dtype):
    """Its weight is not rounded to the dtype of x; both gradients are, once each, to their own."""
    gate = hybrids.model("E", moe_latent_size=16).to(dtype).backbone.layers[0].mixer.gate
    weight = torch.randn_like(gate.weight)
    gate.weight.data.copy_(weight)
    x = torch.randn(50, 32).to(dtype).requires_grad_()
    logits, dlogits = gate(x), torch.randn(50, len(weight))
    wide = x.detach().float()
    assert logits.dtype == torch.float32 and torch.equal(logits, wide @ weight.mT)
    assert not torch.equal(logits, wide @ weight.to(dtype).float().mT)
    logits.backward(dlogits)
    assert gate.weight.grad.dtype == torch.float32 and x.grad.dtype == dtype
    torch.testing.assert_close(gate.weight.grad, dlogits.mT @ wide, rtol=1e-5, atol=1e-5)
    assert torch.equal(x.grad, (dlogits @ weight).to(dtype))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_nothing_twice_and_changes_no_gradient(reentrant):
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    results = []
    for again in (False, True):
        mixer, leaf = layer(Balance(0.1, 9, 2)), x.clone().requires_grad_()
        run = functools.partial(checkpoint, mixer, use_reentrant=reentrant) if again else mixer
        run(leaf, None).square().sum().backward()
        grads = {name: p.grad for name, p in mixer.named_parameters()}
        results.append({"x": leaf.grad, "counts": mixer.gate.expert_counts, **grads})
    assert int(results[0]["counts"].sum()) == 2 * 9 * 3
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_the_router_is_pulled_in_training_only():
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    grads = []
    for balance, train in ((None, True), (Balance(0.1, 9, 2), True), (Balance(0.1, 9, 2), False)):
        mixer = layer(balance).train(train)
        mixer(x, None).square().sum().backward()
        grads.append(mixer.gate.weight.grad)
    weight = layer().gate.weight.detach().requires_grad_()
    logits = torch.nn.functional.linear(x, weight)
    balance_loss(logits, top_k=3, coefficient=0.1).backward()
    torch.testing.assert_close(grads[1], grads[0] + weight.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(grads[2], grads[0]) and weight.grad.abs().max() > 1e-6


def test_a_layer_compiles_to_one_graph():
    mixer, x = layer(Balance(0.1, 9, 2)), torch.randn(2, 9, 32, dtype=torch.float64)
    want = mixer(x, None)
    got = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x, None)
    torch.testing.assert_close(got, want)
    assert int(mixer.gate.expert_counts.sum()) == 2 * 2 * 9 * 3


def test_a_second_stream_is_for_few_rows_on_a_gpu_and_not_for_exact_mode():
    def pays(device, *shape):
        x = SimpleNamespace(is_cuda=device == "cuda", shape=shape, numel=lambda: math.prod(shape))
        return streams.pays(x)

    assert pays("cuda", 1, streams.ROWS, 8) and pays("cuda", 0, 4, 8)
    assert not pays("cuda", 2, streams.ROWS, 8) and not pays("cpu", 1, 4, 8)
    with exact():
        assert not pays("cuda", 1, 4, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_shared_expert_on_its_own_stream_changes_no_bit(captured, monkeypatch):
    mixer = layer().float().cuda()
    x = torch.randn(2, 9, 32, device="cuda", requires_grad=True)
    assert streams.pays(x)

    def step():
        mixer.zero_grad()
        y = mixer(x, None)
        grads = torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])
        return [y, *grads]

    if captured:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
    else:
        got = step()
    monkeypatch.setattr(streams, "ROWS", 0)
    assert not streams.pays(x)
    for a, b in zip(got, step()):
        assert torch.equal(a, b)
