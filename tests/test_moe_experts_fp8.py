"""Experts with weights and activations in FP8."""

import pytest
import torch

from nemokernels import FP8Experts, moe_experts, moe_route, quantize_fp8, testing

E4M3 = torch.float8_e4m3fn


def route_of(tokens, experts, top_k):
    logits = torch.randn(tokens, experts)
    if top_k < experts:
        logits[:, 0] = -torch.inf
    return moe_route(logits, top_k=top_k, scale=2.5)


def quantised(weight, input_scale, per_row=False):
    axes = (2,) if per_row else (1, 2)
    scale = weight.abs().amax(axes).clamp(min=1e-6) / 448
    wide = scale if per_row else scale[:, None]
    return FP8Experts((weight / wide[..., None]).to(E4M3), scale, input_scale)


def make(experts=5, width=48, hidden=80, per_row=False):
    up = torch.randn(experts, hidden, width) / width**0.5
    down = torch.randn(experts, width, hidden) / hidden**0.5
    return (quantised(up, torch.tensor(4 / 448), per_row),
            quantised(down, torch.rand(experts) / 100 + 0.02, per_row))  # fmt: skip


def wide(matrix):
    scale = matrix.scale.double().reshape(matrix.values.shape[0], -1, 1)
    return matrix.values.double() * scale


def by_token(x8, x_scale, up, down, route):
    """One token and one slot at a time in float64, but for the rounding of the hidden layer."""
    out = torch.zeros(x8.shape, dtype=torch.float64)
    x = x8.double() * x_scale.double().reshape(-1, 1)
    for t in range(x.shape[0]):
        for w, e in zip(route.weights[t].double(), route.experts[t].long()):
            scale = down.input_scale[e]
            h = (wide(up)[e] @ x[t]).relu().square() * (1 / scale)
            h = h.float().clamp(max=448).to(E4M3).double() * scale.double()
            out[t] += w * (wide(down)[e] @ h)
    return out


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 30])
def test_equals_a_token_loop(tokens, per_row):
    (up, down), route = make(per_row=per_row), route_of(tokens, 5, 2)
    x = torch.randn(tokens, 48, dtype=torch.float64)
    route64 = route._replace(weights=route.weights.double())
    x8 = quantize_fp8(x, 1 / up.input_scale)[0]
    got = moe_experts(x, up, down, route64)
    want = by_token(x8, up.input_scale, up, down, route)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype):
    (up, down), route = make(), route_of(30, 5, 2)
    x = torch.randn(30, 48).to(dtype)
    x8 = quantize_fp8(x, 1 / up.input_scale)[0]
    exact = by_token(x8, up.input_scale, up, down, route)
    got = moe_experts(x, up, down, route)
    assert got.dtype == dtype
    testing.assert_matches(got, exact, exact.to(dtype))


def test_x_in_fp8_with_a_scale_per_token():
    (up, down), route = make(per_row=True), route_of(9, 5, 2)
    x8, scale = (torch.randn(9, 48) * 20).to(E4M3), torch.rand(9) / 10
    got = moe_experts(x8, up._replace(input_scale=scale), down, route)
    assert got.dtype == torch.bfloat16
    exact = by_token(x8, scale, up, down, route)
    testing.assert_matches(got, exact, exact.bfloat16())
    exact = by_token(x8, up.input_scale, up, down, route)
    testing.assert_matches(moe_experts(x8, up, down, route), exact, exact.bfloat16())


def test_saturates_and_keeps_nan():
    (up, down), route = make(), route_of(6, 5, 2)
    x = torch.randn(6, 48)
    clean = moe_experts(x, up, down, route)
    big = moe_experts(x * 1e6, up, down._replace(input_scale=torch.full((5,), 1e-6)), route)
    assert big.isfinite().all()
    x[2, 3] = torch.nan
    got = moe_experts(x, up, down, route)
    assert got[2].isnan().all() and torch.equal(got[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_autocast_and_gradient():
    (up, down), route = make(), route_of(6, 5, 2)
    x = torch.randn(6, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe_experts(x.detach(), up, down, route).dtype == torch.bfloat16
        assert moe_experts(x.detach().to(E4M3), up, down, route).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`x` requires a gradient; experts in FP8 have none"):
        moe_experts(x, up, down, route)


X, (UP, DOWN), R = torch.ones(2, 32), make(3, 32, 16), moe_route(torch.zeros(2, 3), top_k=2)
SCALE = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=X.int()), TypeError, "`x` is torch.int32"),
        (dict(x=X[:, :16]), ValueError, r"`up.values` has shape \(3, 16, 32\)"),
        (dict(up=UP._replace(values=UP.values.float())), TypeError, "`up.values` is torch.float32"),
        (dict(down=DOWN.values), TypeError, "`down` must be FP8Experts like `up`, got Tensor"),
        (dict(down=UP), ValueError, r"`down.values` has shape \(3, 16, 32\), expected \(E, X, F\)"),
        (dict(up=UP._replace(scale=SCALE[:2])), ValueError, "`up.scale` has shape"),
        (dict(up=UP._replace(scale=SCALE.half())), TypeError, "`up.scale` is torch.float16"),
        (dict(down=DOWN._replace(scale=SCALE.requires_grad_())), ValueError, "requires a gradient"),
        (dict(up=UP._replace(input_scale=torch.ones(2))), ValueError, "`up.input_scale` has shape"),
        (dict(down=DOWN._replace(input_scale=torch.ones(()))), ValueError, "`down.input_scale`"),
        (
            dict(down=DOWN._replace(input_scale=None)),
            TypeError,
            "`down.input_scale` must be a torc",
        ),
        (dict(route=(1, 2)), TypeError, "`route` must be a Route"),
        (dict(route=R._replace(offsets=R.offsets[:2])), ValueError, "`route.offsets` has shape"),
    ],
)
def test_bad_input(change, error, message):
    args = {"x": X, "up": UP, "down": DOWN, "route": R} | change
    with pytest.raises(error, match="moe_experts: " + message if message[0] == "`" else message):
        moe_experts(**args)
