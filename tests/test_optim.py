import math

import pytest
import torch

from nemokernels.train.optim import adamw, clip_gradients, decays
from nemokernels.train.schedule import wsd

RUN = dict(steps=100, warmup=10, decay=30, peak=2.0, floor=0.5)


def test_wsd_shape():
    rates = [wsd(step, **RUN) for step in range(100)]
    assert rates[0] == pytest.approx(0.5 + 1.5 / 10)
    assert rates[9] == rates[10] == rates[69] == 2.0
    assert all(a < b for a, b in zip(rates[:9], rates[1:10]))
    assert all(a > b for a, b in zip(rates[69:], rates[70:]))
    assert rates[99] == 0.5


def test_wsd_decays_by_minus_sqrt():
    for step in range(70, 100):
        r = (step + 1 - 70) / 30
        assert wsd(step, **RUN) == pytest.approx(0.5 + (1 - math.sqrt(r)) * 1.5)


def test_wsd_without_decay_or_warmup():
    flat = dict(steps=5, warmup=0, decay=0, peak=1.0, floor=0.0)
    assert [wsd(s, **flat) for s in range(5)] == [1.0] * 5


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.mixer.in_proj.weight", (4, 4), True),
        ("layers.0.mixer.conv1d.weight", (4, 1, 4), True),
        ("layers.0.mixer.experts.up_proj", (2, 4, 4), True),
        ("layers.0.mixer.A_log", (4,), False),
        ("layers.0.mixer.D", (4, 2), False),
        ("layers.0.mixer.dt_bias", (4,), False),
        ("layers.0.norm.weight", (4,), False),
        ("layers.0.mixer.conv1d.bias", (4,), False),
    ],
)
def test_what_decays(name, shape, expected):
    assert decays(name, torch.empty(shape)) is expected


def test_decay_reaches_only_matrices():
    named = [("w.weight", torch.nn.Parameter(torch.ones(2, 2))),
             ("norm.weight", torch.nn.Parameter(torch.ones(2)))]  # fmt: skip
    optimizer = adamw(named, lr=0.1, weight_decay=0.5)
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(named[0][1], torch.full((2, 2), 0.95)) and (named[1][1] == 1).all()


def test_clip_scales_all_gradients_to_the_norm():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((2, 2), 1.0)
    assert clip_gradients(parameters, 1.0) == pytest.approx(4.0)
    total = sum(p.grad.square().sum() for p in parameters).sqrt()
    assert total == pytest.approx(1.0)
    assert clip_gradients(parameters, 10.0) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_stops_before_the_optimizer(bad):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, bad, 1.0])
    with pytest.raises(FloatingPointError, match="optimizer step was not taken"):
        clip_gradients([parameter], 1.0)
    assert parameter.grad[0] == 1.0
