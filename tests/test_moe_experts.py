import itertools

import pytest
import torch
from allocations import kept_beside

from nemokernels import (
    FP8Experts,
    NVFP4Experts,
    Route,
    moe_experts,
    moe_route,
    quantize_nvfp4_weight,
    swizzle_nvfp4,
    testing,
    tile_nvfp4,
)
from nemokernels.ops.moe_experts import ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 4, 2), (1, 1, 1), (1, 8, 3), (7, 5, 2), (33, 16, 4)]  # tokens, experts, top_k


def make(tokens, experts, top_k, dtype=torch.float64, width=10, hidden=7):
    """x, up, down and a route over ``experts`` experts, the first of which is never chosen."""
    x = torch.randn(tokens, width, dtype=dtype)
    up = torch.randn(experts, hidden, width, dtype=dtype) / width**0.5
    down = torch.randn(experts, width, hidden, dtype=dtype) / hidden**0.5
    logits = torch.randn(tokens, experts, dtype=torch.promote_types(dtype, torch.float32))
    if top_k < experts:
        logits[:, 0] = -torch.inf
    return x, up, down, moe_route(logits, top_k=top_k, scale=2.5)


def by_token(x, up, down, weights, experts):
    """One token and one slot at a time, rounding to x's dtype after every operation."""
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t], dtype=weights[t].dtype)
        for w, e in zip(weights[t], experts[t].tolist()):
            h = (up[e] @ x[t]).clamp(min=0)
            total = total + w * (down[e] @ (h * h))
        rows.append(total.to(x.dtype))
    return torch.stack(rows) if rows else x.new_zeros(x.shape)


def call(x, up, down, weights, route):
    return moe_experts(x, up, down, route._replace(weights=weights))


@pytest.mark.parametrize("size", SIZES)
def test_fp64_equals_a_token_loop(size):
    x, up, down, route = make(*size)
    want = by_token(x, up, down, route.weights, route.experts)
    torch.testing.assert_close(moe_experts(x, up, down, route), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_gradcheck(size):
    x, up, down, route = make(*size, width=4, hidden=3)
    args = [t.detach().requires_grad_() for t in (x, up, down, route.weights)]
    assert torch.autograd.gradcheck(lambda *a: call(*a, route), args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision(dtype):
    x, up, down, route = make(65, 12, 3, dtype, width=48, hidden=40)
    tensors, dy = [x, up, down, route.weights], torch.randn(65, 48).to(dtype)
    out, got = testing.gradients(lambda *a: call(*a, route), tensors, [dy])
    plain = lambda *a: by_token(*a, route.experts)  # noqa: E731
    low_out, low = testing.gradients(plain, tensors, [dy])
    exact_out, exact = testing.gradients(plain, testing.to_double(tensors), [dy.double()])
    testing.assert_matches(out[0], exact_out[0], low_out[0])
    for g, w, p, name in zip(got, exact, low, ("dx", "dup", "ddown", "dweights")):
        assert g.dtype == p.dtype
        testing.assert_matches(g, w, p, name)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_cast_points(dtype):
    """Small integers make every wide sum exact, so that the stated roundings decide each bit."""
    x, up, down, route = make(9, 5, 2)
    x, up, down = (torch.randint_like(t, -3, 4).to(dtype) for t in (x, up, down))
    weights = torch.randint(4, 8, (9, 2)) / 8
    dy = torch.randint(-1, 2, (9, 10)).to(dtype)
    args = (x, up, down, weights, route.offsets, route.order, None)
    y, hidden = ref.forward(*args)
    got = ref.backward(dy, *args, hidden)
    cast = lambda t: t.to(dtype).float()  # noqa: E731
    total, dx, dweights = torch.zeros(9, 10), torch.zeros(9, 10), torch.zeros(9, 2)
    dup, ddown = torch.zeros(up.shape), torch.zeros(down.shape)
    for t, j in itertools.product(range(9), range(2)):
        e, w = route.experts[t, j], weights[t, j]
        h = cast((up[e].float() @ x[t].float()).clamp(min=0).square())
        g = down[e].float().T @ dy[t].float()
        da = cast(2 * h.sqrt() * (w * g))
        total[t] += w * cast(down[e].float() @ h)
        dx[t] += cast(up[e].float().T @ da)
        dweights[t, j] = h @ g
        dup[e] += da[:, None] * x[t].float()
        ddown[e] += dy[t].float()[:, None] * cast(w * h)
    assert torch.equal(y, total.to(dtype))
    for out, want, name in zip(got, (dx, dup, ddown, dweights), ("dx", "dup", "ddown", "dweights")):
        assert torch.equal(out, want.to(out.dtype)), name


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_hidden_is_rounded_once(dtype):
    """Not before the square: the products are exact and wider than the dtype."""
    x, up, down, route = make(30, 5, 1)
    x = (torch.randint(-255, 256, x.shape) / 32).to(dtype)
    up = torch.randint(-3, 4, up.shape).to(dtype)
    _, hidden = ref.forward(x, up, down.to(dtype), route.weights, route.offsets, route.order, None)
    wide = torch.einsum("tfx,tx->tf", up.float()[route.experts[:, 0]], x.float()).relu()
    twice, once = wide.to(dtype).square(), wide.square().to(dtype)
    assert not torch.equal(once, twice)
    assert torch.equal(hidden, once[route.order.long()])


def test_slots_are_summed_in_order():
    """1e8 + 1 - 1e8 in float32 is 0, 1e8 - 1e8 + 1 is 1: the order of the slots decides."""
    slots = torch.tensor([[1e8, 1.0, -1e8], [1e8, -1e8, 1.0]])[..., None]
    assert ref.slot_sum(slots, torch.ones(2, 3)).tolist() == [[0.0], [1.0]]
    assert ref.slot_sum(slots, None).tolist() == [[0.0], [1.0]]


def test_experts_without_tokens_have_zero_gradient():
    x, up, down, route = make(3, 9, 2)
    _, (_, dup, ddown, _) = testing.gradients(
        lambda *a: call(*a, route), [x, up, down, route.weights]
    )
    idle = route.counts == 0
    assert idle[0] and idle.sum() >= 2
    assert not dup[idle].any() and not ddown[idle].any()
    assert dup[~idle].flatten(1).any(1).all() and ddown[~idle].flatten(1).any(1).all()


def test_thousand_routings():
    """Loads of any shape, all tokens to one expert among them, against every expert's result."""
    for i in range(1000):
        tokens = (0, 1, 7, 127, 129)[i % 5] if i % 3 == 0 else int(torch.randint(1, 30, ()))
        experts = int(torch.randint(1, 12, ()))
        top_k = int(torch.randint(1, experts + 1, ()))
        logits = torch.randn(tokens, experts, dtype=torch.float64)
        logits += (i % 10) * torch.randn(experts)  # most tokens to a few
        if i % 7 == 0:
            logits[:, experts // 2] += 100
            top_k = 1
        route = moe_route(logits, top_k=top_k)
        x = torch.randn(tokens, 4, dtype=torch.float64)
        up, down = (torch.randn(experts, *s, dtype=torch.float64) for s in ((3, 4), (4, 3)))
        every = torch.einsum("exf,etf->etx", down, (x @ up.mT).relu().square())
        share = torch.zeros_like(logits).scatter_(1, route.experts.long(), route.weights)
        want = torch.einsum("te,etx->tx", share, every)
        torch.testing.assert_close(moe_experts(x, up, down, route), want, rtol=1e-10, atol=1e-10)
        assert torch.equal(route.counts, (share > 0).sum(0, dtype=torch.int32))


def test_no_tokens():
    x, up, down, route = make(0, 4, 2)
    out, grads = testing.gradients(lambda *a: call(*a, route), [x, up, down, route.weights])
    assert out[0].shape == (0, 10) and grads[3].shape == (0, 2)
    assert not grads[1].any() and not grads[2].any()


def test_keeps_no_more_than_input_hidden_and_routing():
    """For the backward, beside the parameters: no row of x is kept twice."""
    x, up, down, route = make(12, 4, 3, torch.float32)
    leaves = [t.requires_grad_() for t in (x, up, down, route.weights)]
    kept = kept_beside((*leaves, *route), lambda: call(*leaves, route))
    assert kept == 12 * 3 * up.shape[1] * 4


def test_nan_token_does_not_spread():
    x, up, down, route = make(12, 4, 2, torch.float32)
    args, rest = [x, up, down, route.weights], [t for t in range(12) if t != 5]
    clean, clean_grads = testing.gradients(lambda *a: call(*a, route), args)
    bad = x.clone()
    bad[5] = torch.nan
    out, grads = testing.gradients(lambda *a: call(*a, route), [bad, *args[1:]])
    assert torch.equal(out[0][rest], clean[0][rest]) and out[0][5].isnan().all()
    for got, want in ((grads[0], clean_grads[0]), (grads[3], clean_grads[3])):
        assert torch.equal(got[rest], want[rest]) and got[5].isnan().all()


def test_nan_weight_stays_in_its_token():
    x, up, down, route = make(6, 4, 2, torch.float32)
    clean = moe_experts(x, up, down, route)
    route.weights[2, 1] = torch.nan
    out = moe_experts(x, up, down, route)
    assert out[2].isnan().all() and torch.equal(out[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e6])
def test_extreme_tokens_stay_finite(scale):
    x, up, down, route = make(5, 4, 2, torch.float32)
    out, grads = testing.gradients(lambda *a: call(*a, route), [x * scale, up, down, route.weights])
    assert all(t.isfinite().all() for t in (*out, *grads))


def test_any_strides():
    x, up, down, route = make(8, 4, 2, torch.float32)
    want = moe_experts(x, up, down, route)
    spread = torch.stack([x, x], -1)[..., 0]
    up_t, down_t = up.mT.contiguous().mT, torch.cat([down, down], -1)[..., :7]
    strided = Route(*(torch.stack([t, t], -1)[..., 0] for t in route))
    assert not any(t.is_contiguous() for t in (spread, up_t, down_t, *strided))
    torch.testing.assert_close(moe_experts(spread, up_t, down_t, strided), want)
    dy = torch.randn(10, 8).T
    plain, views = (x, up, down, route.weights), (spread, up_t, down_t, strided.weights)
    for t in (*plain, *views):
        t.requires_grad_()
    wanted = torch.autograd.grad(call(*plain, route), plain, dy.contiguous())
    got = torch.autograd.grad(call(*views, strided), views, dy)
    for g, w in zip(got, wanted):
        torch.testing.assert_close(g, w)


def test_equals_transformers():
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    from transformers import NemotronHConfig

    config = NemotronHConfig(
        hybrid_override_pattern="E*", num_hidden_layers=2, hidden_size=10, n_routed_experts=6,
        num_experts_per_tok=3, moe_intermediate_size=7, moe_latent_size=None,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = modeling.NemotronHExperts(config).double()
    x, up, down, route = make(20, 6, 3)
    with torch.no_grad():
        theirs.up_proj.copy_(up)
        theirs.down_proj.copy_(down)
        want = theirs(x, route.experts.long(), route.weights)
    torch.testing.assert_close(moe_experts(x, up, down, route), want, rtol=1e-12, atol=1e-12)


def test_autocast_takes_parameters_of_another_dtype():
    x, up, down, route = make(8, 4, 2, torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_experts(x, up, down, route)
    assert torch.equal(y, moe_experts(x.bfloat16(), up.bfloat16(), down.bfloat16(), route))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and y.dtype == torch.bfloat16


X, UP, DOWN, ROUTE = torch.ones(2, 4), torch.ones(3, 5, 4), torch.ones(3, 4, 5), None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "`x` must be a torch.Tensor"),
        (dict(x=X.int()), TypeError, "`x` is torch.int32"),
        (dict(x=X[None]), ValueError, r"`x` has shape \(1, 2, 4\), expected \(T, X\)"),
        (dict(up=UP.mT), ValueError, r"`up` has shape \(3, 4, 5\), expected \(E, F, X\)"),
        (dict(up=UP.bfloat16()), TypeError, "`up` is torch.bfloat16, expected one of float32"),
        (dict(down=DOWN.half()), TypeError, "`down` is torch.float16"),
        (dict(down=DOWN[:2]), ValueError, r"`down` has shape .* expected \(E, X, F\)"),
        (dict(down=DOWN.to("meta")), ValueError, "`down` is on meta"),
        (dict(route=(1, 2)), TypeError, "`route` must be a Route, got tuple"),
        (dict(weights=torch.ones(3, 2)), ValueError, r"`route.weights` has shape \(3, 2\)"),
        (dict(weights=torch.ones(2, 0)), ValueError, "`route.weights` has no slots"),
        (dict(weights=torch.ones(2, 2).half()), TypeError, "`route.weights` is torch.float16"),
        (dict(offsets=torch.ones(4).int()), ValueError, r"`route.offsets` has shape \(4,\)"),
        (dict(offsets=torch.ones(3).long()), TypeError, "`route.offsets` is torch.int64"),
        (dict(order=torch.ones(3).int()), ValueError, r"`route.order` has shape \(3,\)"),
    ],
)
def test_bad_input(change, error, message):
    args = {"x": X, "up": UP, "down": DOWN, "route": moe_route(torch.zeros(2, 3), top_k=2)}
    parts = {k: v for k, v in change.items() if k not in args}
    args["route"] = args["route"]._replace(**parts)
    args |= {k: v for k, v in change.items() if k in args}
    with pytest.raises(error, match="moe_experts: " + message):
        moe_experts(**args)


def expert_weights(kind):
    """Of three experts, both of whose matrices are 16 x 16."""
    matrix, one = torch.randn(3, 16, 16), torch.ones(3)
    if kind == "FP8":
        eight = FP8Experts(matrix.to(torch.float8_e4m3fn), one, one)
        return eight._replace(input_scale=one[:1]), eight
    four = quantize_nvfp4_weight(matrix, amax=matrix.abs().amax((1, 2)))
    if kind == "W4A4":
        both = NVFP4Experts(*swizzle_nvfp4(four), one)
        return both._replace(input_scale=one[:1]), both
    return (tile_nvfp4(four),) * 2 if kind == "W4A16" else (matrix, matrix)


@pytest.mark.parametrize("kind", ["unquantised", "FP8", "W4A16", "W4A4"])
@pytest.mark.parametrize("part, values, message", [
    ("offsets", [1, 9, 4], "`route.offsets` must not decrease and end at 4, got "),
    ("offsets", [1, 2, 3], "`route.offsets` must not decrease and end at 4, got "),
    ("offsets", [-1, 2, 4], "`route.offsets` must not decrease and end at 4, got "),
    ("order", [0, 1, 2, 4], "`route.order` has slots outside 0 to 3"),
    ("order", [0, -1, 2, 3], "`route.order` has slots outside 0 to 3"),
    ("order", [0, 2, 2, 3], "`route.order` holds a slot twice, expected each once"),
])  # fmt: skip
def test_a_route_that_is_none_is_refused(kind, part, values, message):
    route = moe_route(torch.zeros(2, 3), top_k=2)
    route = route._replace(**{part: torch.tensor(values, dtype=torch.int32)})
    with pytest.raises(ValueError, match="moe_experts: " + message):
        moe_experts(torch.ones(2, 16), *expert_weights(kind), route)
