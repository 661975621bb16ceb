"""The kernels of moe_route and moe_experts on a GPU."""

import dataclasses

import on_gpu
import pytest
import torch
from scores import spread

from nemokernels import (
    Route,
    balance_loss,
    moe_experts,
    moe_route,
    ragged_route,
    testing,
    use_backend,
)
from nemokernels.ops.moe_experts import native, op
from nemokernels.ops.moe_experts import ref as experts_ref
from nemokernels.ops.moe_route import ref

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("moe_route", "triton"), use_backend("moe_experts", "triton"):
        yield


@pytest.mark.parametrize("backend, tokens", [
    *((name, tokens) for tokens in (0, 1, 7, 64) for name in ("csrc", "triton")),
    ("triton", 1000), ("triton", 16384)])  # fmt: skip
@pytest.mark.parametrize(
    "experts, top_k, n_group, topk_group",
    [(128, 6, 1, 1), (512, 22, 1, 1), (256, 8, 8, 4), (15, 3, 5, 2)],
)
def test_route(backend, tokens, experts, top_k, n_group, topk_group):
    logits, dweights = spread(tokens, experts), torch.randn(tokens, top_k)
    bias = torch.linspace(0, 1e-5, experts)

    def fn(logits):
        bias_here = bias.to(logits.device)
        return tuple(moe_route(logits, top_k=top_k, correction_bias=bias_here, n_group=n_group,
                               topk_group=topk_group, scale=2.5))  # fmt: skip

    with use_backend("moe_route", backend):
        for got, want in zip(fn(logits.cuda())[1:], fn(logits)[1:]):
            assert torch.equal(got.cpu(), want)
        if tokens:
            on_gpu.compare(fn, [logits], [dweights])


def test_routes_of_both_backends_in_a_graph():
    """Time and again, as a race between the blocks of a cluster may not show at once."""
    for tokens, experts, top_k in ((64, 512, 22), (341, 128, 6), (1, 128, 6)):
        logits = spread(tokens, experts).cuda()
        run = lambda: tuple(moe_route(logits, top_k=top_k))  # noqa: B023, E731
        want = run()
        with use_backend("moe_route", "csrc"):
            for _ in range(100):
                assert on_gpu.same_bits(want[1:], run()[1:])
            first = run()
            assert on_gpu.same_bits(first, on_gpu.replay(run))


def test_route_of_equal_scores_and_nan():
    logits = torch.randint(0, 3, (200, 128)).float()
    logits[5, 7] = torch.nan
    got, want = moe_route(logits.cuda(), top_k=6), moe_route(logits, top_k=6)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.cpu(), b, equal_nan=True)


def test_balance_loss():
    bounds = torch.tensor([0, 300, 301, 1000])
    on_gpu.compare(lambda x: balance_loss(x, top_k=6, cu_seqlens=bounds.to(x.device)),
                   [spread(1010, 128)], [torch.ones(())])  # fmt: skip


def problem(tokens, experts, top_k, width, hidden, dtype, skew=0.0):
    x, dy = torch.randn(2, tokens, width).to(dtype)
    up = (torch.randn(experts, hidden, width) / width**0.5).to(dtype)
    down = (torch.randn(experts, width, hidden) / hidden**0.5).to(dtype)
    logits = torch.randn(tokens, experts) + torch.linspace(-skew, 0, experts)
    return x, up, down, moe_route(logits, top_k=top_k), dy


def check(x, up, down, route, dy):
    def fn(x, up, down, weights):
        rest = (t.to(x.device) for t in route[1:])
        return moe_experts(x, up, down, Route(weights, *rest))

    for backend in backends(up, down):
        with use_backend("moe_experts", backend):
            on_gpu.compare(fn, [x, up, down, route.weights], [dy])


def backends(up, down):
    """Which take these experts here."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    return ("triton", "csrc") if hopper and not native.refusal(up, down) else ("triton",)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 4, 2, 64, 64), (7, 8, 3, 10, 7), (127, 6, 2, 264, 136),
                                  (129, 3, 3, 64, 328), (700, 4, 2, 264, 136)])  # fmt: skip
def test_experts(size, dtype):
    check(*problem(*size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 129, 700])
def test_any_number_of_slots(tokens, dtype):
    """The slots of every second expert, as a rank of two sees them."""
    x, up, down, route, dy = problem(tokens, 8, 3, 264, 136, dtype)
    here = route.experts % 2 == 0
    starts = torch.cat([torch.zeros(1), here.sum(1).cumsum(0)]).int()
    experts = route.experts[here] // 2

    def fn(x, up, down, weights):
        integers = (t.to(x.device) for t in (experts, starts))
        return moe_experts(x, up, down, ragged_route(weights, *integers, num_experts=4))

    for backend in backends(up, down):
        with use_backend("moe_experts", backend):
            on_gpu.compare(fn, [x, up[::2], down[::2], route.weights[here]], [dy])


@pytest.mark.parametrize("shape", [(2688, 1856), (1024, 2688), (2048, 5120)])
@pytest.mark.parametrize("tokens", [3, 100, 300])
def test_widths_of_the_models(tokens, shape):
    check(*problem(tokens, 4, 2, *shape, torch.bfloat16))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    "size", [(7, 8, 3, 48, 80), (300, 4, 2, 272, 144), (500, 3, 2, 2688, 1856)]
)
def test_experts_in_fp8(size, per_row):
    tokens, experts, top_k, width, hidden = size
    byte = lambda *s: torch.randn(s).to(torch.float8_e4m3fn).view(torch.uint8)  # noqa: E731
    rand = lambda *s: torch.rand(s) + 0.5  # noqa: E731
    rows = (
        ((tokens,), (experts, hidden), (experts, width)) if per_row else ((1,), *2 * ((experts,),))
    )
    x_scale, up_scale, down_scale = (rand(*s) for s in rows)
    route = moe_route(torch.randn(tokens, experts), top_k=top_k)
    args = (byte(tokens, width), x_scale, byte(experts, hidden, width), up_scale / width**0.5,
            rand(experts) / 9, byte(experts, width, hidden), down_scale / hidden**0.5,
            route.weights, route.offsets, route.order)  # fmt: skip
    low = experts_ref.forward_fp8(*args, torch.bfloat16)
    exact = experts_ref.forward_fp8(*testing.to_double(args), torch.float64)
    there = on_gpu.to("cuda", args)
    for backend in backends(there[2], there[5]):
        with use_backend("moe_experts", backend):
            got = torch.ops.nemokernels.moe_experts_fp8(*there, torch.bfloat16)
        testing.assert_matches(got, exact, low, backend)


def test_random_routings():
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        tokens, experts = torch.randint(1, 200, (2,), generator=generator).tolist()
        top_k = 1 + tokens % min(experts, 5)
        check(*problem(tokens, experts, top_k, 72, 40, torch.bfloat16, skew=tokens % 9))


def test_loads():
    """Tokens per expert, exactly."""
    loads = torch.tensor([0, 1, 7, 127, 129, 0])
    x, up, down, _, dy = problem(264, 6, 1, 72, 40, torch.bfloat16)
    chosen = torch.arange(6).repeat_interleave(loads)[torch.randperm(264)]
    route = moe_route(20.0 * torch.nn.functional.one_hot(chosen, 6).float(), top_k=1)
    assert torch.equal(route.counts.long(), loads)
    check(x, up, down, route, dy)


def test_all_to_one_expert():
    x, up, down, route, dy = problem(300, 5, 1, 64, 72, torch.bfloat16, skew=200.0)
    assert route.counts[4] == 300
    check(x, up, down, route, dy)


def test_a_nan_stays_in_its_token():
    x, up, down, route, dy = problem(300, 4, 2, 72, 40, torch.bfloat16)
    x[3] = torch.nan
    check(x, up, down, route, dy)


@pytest.mark.parametrize("tokens", [8, 1000, 16384])
def test_repeats_and_graphs_have_the_same_bits(tokens):
    x, dy = torch.randn(2, tokens, 1024, device="cuda").bfloat16()
    up = torch.randn(32, 640, 1024, device="cuda").bfloat16() / 32
    down = torch.randn(32, 1024, 640, device="cuda").bfloat16() / 32
    logits = torch.randn(tokens, 32, device="cuda")
    dweights = torch.randn(tokens, 4, device="cuda")
    ops = torch.ops.nemokernels

    def run():
        route = ops.moe_route(logits, None, 4, 1, 1, True, 1.0)
        args = (x, up, down, route[0], *route[3:], None)
        y, hidden = ops.moe_experts(*args)
        grads = ops.moe_experts_backward(dy, *args, hidden)
        return *route, y, hidden, *grads, ops.moe_route_backward(dweights, logits, route[1],
                                                                 True, 1.0)  # fmt: skip

    for backend in backends(up, down):
        with use_backend("moe_experts", backend):
            first = run()
            assert on_gpu.same_bits(first, run())
            assert on_gpu.same_bits(first, on_gpu.replay(run))


def test_real_layer():
    """nano3's layer at 1024 tokens: a few tokens and experts against the reference."""
    x = torch.randn(1024, 2688, device="cuda").bfloat16()
    up = torch.randn(128, 1856, 2688, device="cuda").bfloat16() / 52
    down = torch.randn(128, 2688, 1856, device="cuda").bfloat16() / 43
    route = moe_route(torch.randn(1024, 128, device="cuda"), top_k=6)
    results = {}
    for backend in backends(up, down):
        with use_backend("moe_experts", backend):
            results[backend] = moe_experts(x, up, down, route)
    for t in (0, 511, 1023):
        chosen = route.experts[t].long()
        args = [x[t : t + 1], up[chosen], down[chosen], route.weights[t : t + 1]]
        args = [a.cpu() for a in args]
        alone = Route(args[3], *ref_of_one_token())
        low = moe_experts(*args[:3], alone)
        exact = moe_experts(*(a.double() for a in args[:3]),
                            alone._replace(weights=args[3].double()))  # fmt: skip
        for backend, y in results.items():
            testing.assert_matches(y[t : t + 1], exact, low, f"token {t} by {backend}")


def ref_of_one_token():
    chosen = torch.arange(6)[None]
    counts, offsets, order = ref.group_rows(chosen, 6)
    return chosen.int(), counts, offsets, order


def test_no_copy_of_x_per_slot(monkeypatch):
    """Half of the columns at a time: forward and backward need half of the memory of all slots'
    rows less, and return the same bits."""
    tokens, experts, top_k, width, hidden = 16384, 8, 8, 1024, 2688
    x, dy = torch.randn(2, tokens, width, device="cuda").bfloat16()
    up = torch.randn(experts, hidden, width, device="cuda").bfloat16() / 32
    down = torch.randn(experts, width, hidden, device="cuda").bfloat16() / 32
    route = moe_route(torch.randn(tokens, experts, device="cuda"), top_k=top_k)
    args = (x, up, down, route.weights, route.offsets, route.order, None)
    planned, ops, copy = op._plan, torch.ops.nemokernels, 2 * tokens * top_k * width

    def peak_of(function):
        function()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = function()
        return torch.cuda.max_memory_allocated() - before, out

    def run(most):
        plan = lambda *a, **k: dataclasses.replace(planned(*a, **k), slot_bytes=most)  # noqa: E731
        monkeypatch.setattr(op, "_plan", plan)
        forward, out = peak_of(lambda: ops.moe_experts(*args))
        backward, grads = peak_of(lambda: ops.moe_experts_backward(dy, *args, out[1]))
        return forward, backward, (*out, *grads)

    *whole, bits = run(2**62)
    *halves, same = run(copy // 2)
    assert on_gpu.same_bits(bits, same)
    for most, least in zip(whole, halves):
        assert abs(most - least - copy // 2) < 2**20
