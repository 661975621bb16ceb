"""The kernels of csrc/nvfp4_gemm on a GPU that has block-scaled matrix units."""

import on_gpu
import pytest
import torch

from nemokernels import (
    NVFP4Experts,
    Route,
    SwizzledNVFP4,
    moe_experts,
    moe_route,
    nvfp4_linear,
    quantize_nvfp4,
    quantize_nvfp4_weight,
    swizzle_nvfp4,
    testing,
    use_backend,
)
from nemokernels.ops.nvfp4_gemm import op, ref

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _on_blackwell():
    if why := op.reason(GPU):
        pytest.skip(why)
    with use_backend("nvfp4_gemm", "csrc"):
        yield


def move(operand, device=GPU):
    return type(operand)(*(part.to(device) for part in operand))


def operands(rows, width, depth):
    x = quantize_nvfp4(torch.randn(rows, depth), swizzled=True)
    return x, swizzle_nvfp4(quantize_nvfp4_weight(torch.randn(width, depth) / depth**0.5))


def oracle(x: SwizzledNVFP4, w: SwizzledNVFP4):
    alpha = x.global_scale.double() * w.global_scale.double()
    parts = (t for q in (x, w) for t in (q.codes, q.scales.view(torch.uint8)))
    return ref.product(*parts, alpha)


@pytest.mark.parametrize("rows, width, depth", [
    (1, 8, 32), (7, 40, 96), (64, 1856, 2688), (127, 2688, 1856), (129, 1024, 4096),
    (300, 136, 160), (0, 16, 32),
])  # fmt: skip
def test_linear(rows, width, depth):
    x, w = operands(rows, width, depth)
    got = nvfp4_linear(move(x), move(w))
    testing.assert_matches(got, oracle(x, w), nvfp4_linear(x, w))


def experts(count, width, hidden):
    for shape, top in (((count, hidden, width), [4.0]), ((count, width, hidden), [20.0] * count)):
        w = torch.randn(shape) / shape[-1] ** 0.5
        q = swizzle_nvfp4(quantize_nvfp4_weight(w, amax=w.abs().amax((1, 2))))
        yield NVFP4Experts(*q, torch.tensor(top) / 2688)


@pytest.mark.parametrize("ends", [(131, 131, 200), (0, 1, 2), (128, 256, 300), (0, 0, 7)])
@pytest.mark.parametrize("squared_relu", [False, True])
def test_grouped(ends, squared_relu):
    offsets = torch.tensor(ends, dtype=torch.int32)
    q = quantize_nvfp4(torch.randn(ends[-1], 96))
    w = next(experts(3, 96, 136))
    scales = ref.group_scales(q.scales.view(torch.uint8), offsets)
    args = [q.codes, scales, w.codes, w.scales.view(torch.uint8), w.global_scale * q.global_scale]
    low, exact = (
        ref.grouped_product(*args[:4], args[4].to(dtype), offsets, squared_relu)
        for dtype in (torch.float32, torch.float64)
    )
    got = op.grouped_product(*(t.cuda() for t in (*args, offsets)), squared_relu)
    testing.assert_matches(got, exact, low)


@pytest.mark.parametrize("tokens", [0, 1, 7, 129, 700])
@pytest.mark.parametrize("width, hidden", [(64, 96), (1024, 2688), (2688, 1856)])
def test_experts(tokens, width, hidden):
    up, down = experts(4, width, hidden)
    logits = torch.randn(tokens, 4)
    logits[:, 0] -= 100
    for route in (moe_route(logits, top_k=2), moe_route(logits - 100 * (logits < 9), top_k=1)):
        x = torch.randn(tokens, width).bfloat16()
        low = moe_experts(x, up, down, route)
        exact = moe_experts(x.double(), up, down, route._replace(weights=route.weights.double()))
        got = moe_experts(x.cuda(), move(up), move(down), Route(*(t.cuda() for t in route)))
        testing.assert_matches(got, exact, low)


def test_repeats_and_graph():
    x = torch.randn(80, 1024, device=GPU).bfloat16()
    up, down = (move(e) for e in experts(32, 1024, 640))
    route = moe_route(torch.randn(80, 32, device=GPU), top_k=4)
    run = lambda: (moe_experts(x, up, down, route),)  # noqa: E731
    first = run()
    assert on_gpu.same_bits(first, run()) and on_gpu.same_bits(first, on_gpu.replay(run))


def test_pieces_have_the_same_bits_in_less_memory():
    tokens, experts_, top_k, width, hidden = 4096, 16, 4, 1024, 2688
    up, down = (move(e) for e in experts(experts_, width, hidden))
    route = moe_route(torch.randn(tokens, experts_, device=GPU), top_k=top_k)
    x = torch.randn(tokens, width, device=GPU).bfloat16()
    parts = [p.view(torch.uint8) if p.dtype == torch.float8_e4m3fn else p for p in (*up, *down)]
    args = (x, parts[3], *parts[:3], parts[7], *parts[4:7], route.weights, route.offsets,
            route.order)  # fmt: skip
    found = []
    for most in (2**40, 32 << 20):
        op.by_kernels(*args, slot_bytes=most)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = op.by_kernels(*args, slot_bytes=most)
        found.append((y, torch.cuda.max_memory_allocated() - before))
    (whole, most), (few, least) = found
    assert torch.equal(whole, few) and torch.equal(whole, moe_experts(x, up, down, route))
    # The hidden layer alone took 84 MiB.
    assert least <= most - (48 << 20)


def test_nan_stays_in_its_row():
    x, w = operands(9, 136, 96)
    clean = nvfp4_linear(move(x), move(w))
    x.scales.view(torch.uint8).view(-1)[16 * 4] = 0x7F  # of row 4's first block
    y = nvfp4_linear(move(x), move(w))
    rest = [0, 1, 2, 3, 5, 6, 7, 8]
    assert y[4].isnan().all() and torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("ends", [(900, 3, -7), (-1, -1, -1), (2**30, 0, 5)])
def test_offsets_that_are_none_stay_in_bounds(ends):
    q = quantize_nvfp4(torch.randn(40, 96, device=GPU))
    w = move(next(experts(3, 96, 136)))
    offsets = torch.tensor(ends, dtype=torch.int32, device=GPU)
    scales = torch.zeros(ref.padded_rows(40, 3), 8, dtype=torch.uint8, device=GPU)
    args = (q.codes, scales, w.codes, w.scales.view(torch.uint8), w.global_scale, offsets, False)
    op.grouped_product(*args)
    torch.cuda.synchronize()
