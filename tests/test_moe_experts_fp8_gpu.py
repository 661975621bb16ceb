"""Experts in FP8 on a GPU, through the public function."""

import pytest
import torch
from test_moe_experts_fp8 import make, route_of, wide

from nemokernels import Route, moe_experts, quantize_fp8, testing, use_backend

pytestmark = pytest.mark.gpu


def move(matrix):
    return type(matrix)(*(t.cuda() for t in matrix))


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("moe_experts", "triton"):
        yield


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 127, 129, 900])
@pytest.mark.parametrize("width, hidden", [(48, 80), (1024, 2688), (2688, 1856)])
def test_against_the_reference(tokens, width, hidden, per_row):
    """The oracle does not round the hidden layer: a sum on the border of two codes may go either
    way, and the rounding sets the budget."""
    (up, down), route = make(4, width, hidden, per_row), route_of(tokens, 4, 2)
    x = torch.randn(tokens, width).bfloat16()
    x8 = quantize_fp8(x, 1 / up.input_scale)[0].double() * up.input_scale.double()
    exact = moe_experts(x8, wide(up), wide(down),
                        route._replace(weights=route.weights.double()))  # fmt: skip
    got = moe_experts(x.cuda(), move(up), move(down), Route(*(t.cuda() for t in route)))
    assert got.dtype == torch.bfloat16
    testing.assert_matches(got, exact, moe_experts(x, up, down, route))


def test_nan_saturation_and_repeats():
    (up, down), route = make(4, 48, 80), route_of(64, 4, 2)
    x = torch.randn(64, 48).bfloat16()
    x[3], x[5] = torch.nan, 1e6
    args = x.cuda(), move(up), move(down), Route(*(t.cuda() for t in route))
    got, again = moe_experts(*args), moe_experts(*args)
    want = moe_experts(x, up, down, route)
    assert torch.equal(got.cpu().isnan(), want.isnan()) and want[3].isnan().all()
    assert torch.equal(got.nan_to_num(), again.nan_to_num()) and want[5].isfinite().all()
