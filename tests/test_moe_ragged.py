"""Experts of tokens that have any number of slots each."""

import pytest
import torch
from allocations import kept_beside
from test_moe_experts import by_token as by_regular_token
from test_moe_experts import make as make_regular

from nemokernels import (
    FP8Experts,
    RaggedRoute,
    moe_experts,
    moe_route,
    quantize_nvfp4_weight,
    ragged_route,
    swizzle_nvfp4,
    testing,
    tile_nvfp4,
)
from nemokernels.ops.moe_experts import op, ref
from nemokernels.ops.nvfp4_gemm import NVFP4Experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 4), (1, 1), (1, 8), (7, 5), (33, 16)]  # tokens, experts


def make(tokens, experts, dtype=torch.float64, width=10, hidden=7):
    """x, up, down, and a route with the expert of each slot: token t has t % 4 slots, if there are
    as many experts; the first one is never chosen if there are others."""
    x = torch.randn(tokens, width, dtype=dtype)
    up = torch.randn(experts, hidden, width, dtype=dtype) / width**0.5
    down = torch.randn(experts, width, hidden, dtype=dtype) / hidden**0.5
    scores = torch.rand(tokens, experts)
    scores[:, 0] -= 1
    most = max(experts - 1, 1)
    chosen = [row[: min(t % 4, most)] for t, row in enumerate(scores.argsort(1, descending=True))]
    starts = torch.tensor([0, *map(len, chosen)]).cumsum(0).int()
    numbers = torch.cat([*chosen, torch.empty(0, dtype=torch.int64)]).int()
    weights = torch.rand(len(numbers), dtype=torch.promote_types(dtype, torch.float32))
    return x, up, down, ragged_route(weights, numbers, starts, num_experts=experts), numbers


def by_token(x, up, down, weights, numbers, starts):
    counts = starts.diff().tolist()
    return by_regular_token(x, up, down, weights.split(counts), numbers.split(counts))


def call(x, up, down, weights, route):
    return moe_experts(x, up, down, route._replace(weights=weights))


@pytest.mark.parametrize("size", SIZES)
def test_fp64_equals_a_token_loop(size):
    *args, route, numbers = make(*size)
    want = by_token(*args, route.weights, numbers, route.starts)
    torch.testing.assert_close(moe_experts(*args, route), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_gradcheck(size):
    *args, route, _ = make(*size, width=4, hidden=3)
    args = [t.detach().requires_grad_() for t in (*args, route.weights)]
    assert torch.autograd.gradcheck(lambda *a: call(*a, route), args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision(dtype):
    *args, route, numbers = make(65, 12, dtype, width=48, hidden=40)
    tensors, dy = [*args, route.weights], torch.randn(65, 48).to(dtype)
    plain = lambda *a: by_token(*a, numbers, route.starts)  # noqa: E731
    out, got = testing.gradients(lambda *a: call(*a, route), tensors, [dy])
    low_out, low = testing.gradients(plain, tensors, [dy])
    exact_out, exact = testing.gradients(plain, testing.to_double(tensors), [dy.double()])
    names = ("y", "dx", "dup", "ddown", "dweights")
    for g, w, p, name in zip(out + got, exact_out + exact, low_out + low, names):
        assert g.dtype == p.dtype
        testing.assert_matches(g, w, p, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_as_many_slots_each_have_the_bits_of_a_route(dtype):
    x, up, down, route = make_regular(17, 6, 3, dtype)
    starts = torch.arange(18, dtype=torch.int32) * 3
    ragged = ragged_route(route.weights.flatten(), route.experts.flatten(), starts, num_experts=6)
    assert torch.equal(ragged.order, route.order) and torch.equal(ragged.offsets, route.offsets)
    tensors = [x, up, down]
    want = testing.gradients(lambda *a: call(*a, route), [*tensors, route.weights])
    got = testing.gradients(lambda *a: call(*a, ragged), [*tensors, ragged.weights])
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        assert torch.equal(a.flatten(), b.flatten()) and a.any()


def test_absent_slots_are_those_of_weight_zero():
    """Half of a route's experts live elsewhere; its other half sums to the same bits."""
    x, up, down, route = make_regular(17, 6, 2)
    here = route.experts < 3
    starts = torch.cat([torch.zeros(1), here.sum(1).cumsum(0)]).int()
    mine = ragged_route(route.weights[here], route.experts[here], starts, num_experts=3)
    want = moe_experts(x, up, down, route._replace(weights=route.weights * here))
    got = moe_experts(x, up[:3], down[:3], mine)
    assert torch.equal(got, want) and 0 in starts.diff() and got.any()
    exact = by_regular_token(x, up, down, route.weights * here, route.experts)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_slots_are_summed_in_order():
    slots = torch.tensor([1e8, 1.0, -1e8, 1e8, -1e8, 1.0, 3.0])[:, None]
    starts = torch.tensor([0, 3, 3, 6, 7], dtype=torch.int32)
    for weights in (torch.ones(7), None):
        assert ref.ragged_sum(slots, weights, starts).tolist() == [[0.0], [0.0], [1.0], [3.0]]


def test_nothing_of_tokens_without_slots_and_experts_without_rows():
    *args, route, numbers = make(9, 5)
    (y,), (dx, dup, ddown, _) = testing.gradients(
        lambda *a: call(*a, route), [*args, route.weights]
    )
    without, idle = route.starts.diff() == 0, numbers.long().bincount(minlength=5) == 0
    assert without.sum() == 3 and idle[0]
    for rows in (y, dx):
        assert not rows[without].any() and rows[~without].any(1).all()
    for grads in (dup, ddown):
        assert not grads[idle].any() and grads[~idle].flatten(1).any(1).all()


def test_a_nan_stays_in_its_token():
    x, up, down, route, _ = make(12, 4, torch.float32)
    tensors, rest = [up, down, route.weights], [t for t in range(12) if t != 6]
    bad = x.index_fill(0, torch.tensor(6), torch.nan)
    (clean,), clean_grads = testing.gradients(lambda *a: call(*a, route), [x, *tensors])
    (out,), grads = testing.gradients(lambda *a: call(*a, route), [bad, *tensors])
    assert torch.equal(out[rest], clean[rest]) and out[6].isnan().all()
    assert torch.equal(grads[0][rest], clean_grads[0][rest]) and grads[0][6].isnan().all()
    slots = torch.arange(route.starts[6], route.starts[7])
    assert grads[3].isnan().nonzero()[:, 0].tolist() == slots.tolist()


def test_any_strides():
    x, up, down, route, _ = make(8, 4, torch.float32)
    strided = RaggedRoute(*(torch.stack([t, t], -1)[..., 0] for t in route))
    assert not any(t.is_contiguous() for t in strided)
    tensors = [x, up, down]
    want = testing.gradients(lambda *a: call(*a, route), [*tensors, route.weights])
    got = testing.gradients(lambda *a: call(*a, strided._replace(weights=strided.weights)),
                            [*tensors, route.weights])  # fmt: skip
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        assert torch.equal(a, b)


def test_keeps_no_more_than_input_hidden_and_routing():
    x, up, down, route, numbers = make(12, 5, torch.float32)
    leaves = [t.requires_grad_() for t in (x, up, down, route.weights)]
    kept = kept_beside((*leaves, *route), lambda: call(*leaves, route))
    assert kept == len(numbers) * up.shape[1] * 4


def test_opcheck():
    x, up, down, route, _ = make(6, 4, torch.float32)
    args = [t.requires_grad_() for t in (x, up, down, route.weights)]
    args += [route.offsets, route.order, route.starts]
    torch.library.opcheck(op.moe_experts, args)
    args = [t.detach() for t in args]
    hidden = op.moe_experts(*args)[1]
    torch.library.opcheck(op.moe_experts_backward, (torch.randn_like(x), *args, hidden))


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weights=[1.0]), TypeError, "`weights` must be a torch.Tensor"),
        (dict(weights=torch.ones(3, 1)), ValueError, r"`weights` has shape \(3, 1\), expected"),
        (dict(weights=torch.ones(3).half()), TypeError, "`weights` is torch.float16"),
        (dict(experts=i32(0, 1)), ValueError, r"`experts` has shape \(2,\), expected \(R,\)"),
        (dict(experts=torch.zeros(3)), TypeError, "`experts` is torch.float32"),
        (dict(starts=i32(0, 3).long()), TypeError, "`starts` is torch.int64"),
        (dict(starts=i32()), ValueError, "`starts` is empty"),
        (dict(num_experts=0), ValueError, "`num_experts` must be at least 1, got 0"),
    ],
)
def test_bad_slots(change, error, message):
    args = dict(weights=torch.ones(3), experts=i32(0, 1, 1), starts=i32(0, 1, 3), num_experts=2)
    with pytest.raises(error, match="ragged_route: " + message):
        ragged_route(**args | change)


X, UP, DOWN = torch.ones(2, 4), torch.ones(3, 5, 4), torch.ones(3, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weights=torch.ones(3, 1)), ValueError, r"`route.weights` has shape \(3, 1\)"),
        (dict(weights=torch.ones(2)), ValueError, r"`route.order` has shape \(3,\), expected"),
        (dict(starts=i32(0, 3)), ValueError, r"`route.starts` has shape \(2,\), expected \(T \+ 1"),
        (dict(starts=i32(0, 1, 3).long()), TypeError, "`route.starts` is torch.int64"),
        (dict(starts=i32(0, 2, 1)), ValueError, "`route.starts` must not decrease from 0 to 3"),
        (dict(starts=i32(1, 2, 3)), ValueError, "`route.starts` must not decrease from 0 to 3"),
        (dict(starts=i32(0, 4, 3)), ValueError, "`route.starts` must not decrease from 0 to 3"),
        (dict(offsets=i32(1, 3)), ValueError, r"`route.offsets` has shape \(2,\)"),
        (dict(order=i32(0, 1, 3)), ValueError, "`route.order` has slots outside 0 to 2"),
    ],
)
def test_a_route_that_is_none_is_refused(change, error, message):
    route = ragged_route(torch.ones(3), i32(0, 1, 1), i32(0, 1, 3), num_experts=3)
    with pytest.raises(error, match="moe_experts: " + message):
        moe_experts(X, UP, DOWN, route._replace(**change))


def test_slots_without_tokens_are_refused():
    route = ragged_route(torch.ones(3), i32(0, 1, 1), i32(3), num_experts=3)
    with pytest.raises(ValueError, match="moe_experts: `x` has no tokens, `route` 3 slots"):
        moe_experts(X[:0], UP, DOWN, route)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_experts_out_of_range_are_refused(wrong):
    route = ragged_route(torch.ones(3), i32(0, wrong, 1), i32(0, 1, 3), num_experts=3)
    with pytest.raises(ValueError, match="`route.offsets` must not decrease and end at 3"):
        moe_experts(X, UP, DOWN, route)


def test_quantised_experts_refuse_it():
    route = ragged_route(torch.ones(3), i32(0, 1, 1), i32(0, 1, 3), num_experts=3)
    w, scale = torch.ones(3, 32, 32), torch.ones(3)
    codes = quantize_nvfp4_weight(w)
    for matrix in (
        FP8Experts(w.to(torch.float8_e4m3fn), scale, scale),
        tile_nvfp4(codes),
        NVFP4Experts(*swizzle_nvfp4(codes), scale),
    ):
        with pytest.raises(ValueError, match="`route` is ragged, which quantised experts do not"):
            moe_experts(torch.ones(2, 32), matrix, matrix, route)


def test_routes_of_both_kinds_sort_alike():
    route = moe_route(torch.randn(9, 5), top_k=2)
    starts = torch.arange(10, dtype=torch.int32) * 2
    other = ragged_route(route.weights.flatten(), route.experts.flatten(), starts, num_experts=5)
    assert torch.equal(other.order, route.order) and torch.equal(other.offsets, route.offsets)
