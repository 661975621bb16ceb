"""The kernels of w4a16 on a GPU: Triton's and those of csrc, through the public functions."""

import on_gpu
import pytest
import torch

from nemokernels import (
    Route,
    dequantize_nvfp4,
    moe_experts,
    moe_route,
    nvfp4_linear,
    quantize_nvfp4_weight,
    testing,
    tile_nvfp4,
    untile_nvfp4,
    use_backend,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [("csrc", torch.bfloat16), ("csrc", torch.float16)]
CASES = [("triton", dtype) for dtype in DTYPES] + HALVES


def weight_of(*shape):
    weight = torch.randn(shape) / shape[-1] ** 0.5
    amax = weight.abs().amax((1, 2)) if len(shape) == 3 else None
    return tile_nvfp4(quantize_nvfp4_weight(weight, amax=amax))


def move(weight, device):
    return weight._replace(**{name: getattr(weight, name).to(device)
                              for name in ("codes", "scales", "global_scale")})  # fmt: skip


@pytest.mark.parametrize("backend, dtype", CASES)
@pytest.mark.parametrize("rows, width, depth", [
    (1, 16, 16), (7, 33, 80), (64, 1856, 2688), (127, 2688, 1856), (129, 1024, 4096), (0, 16, 16),
])  # fmt: skip
def test_linear(rows, width, depth, backend, dtype):
    weight, x = weight_of(width, depth), torch.randn(rows, depth).to(dtype)
    dy = torch.randn(rows, width).to(dtype)
    with use_backend("w4a16", backend):
        on_gpu.compare(lambda x: nvfp4_linear(x, move(weight, x.device)), [x], [dy])


@pytest.mark.parametrize("backend, dtype", CASES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 127, 129, 700])
@pytest.mark.parametrize("width, hidden", [(48, 80), (1024, 2688), (2688, 1856)])
def test_experts(tokens, width, hidden, backend, dtype):
    x = torch.randn(tokens, width).to(dtype)
    up, down = weight_of(4, hidden, width), weight_of(4, width, hidden)
    logits = torch.randn(tokens, 4)
    logits[:, 0] -= 100
    for route in (moe_route(logits, top_k=2), moe_route(logits - 100 * (logits < 9), top_k=1)):
        low = moe_experts(x, up, down, route)
        exact = moe_experts(x.double(), up, down, route._replace(weights=route.weights.double()))
        with use_backend("w4a16", backend):
            got = moe_experts(x.cuda(), move(up, "cuda"), move(down, "cuda"),
                              Route(*(t.cuda() for t in route)))  # fmt: skip
        testing.assert_matches(got, exact, low)


@pytest.mark.parametrize("backend", ["triton", "csrc"])
def test_many_routings(backend):
    up, down = weight_of(16, 48, 64), weight_of(16, 64, 48)
    gpu = move(up, "cuda"), move(down, "cuda")
    for tokens in range(1, 200, 5):
        x, logits = torch.randn(tokens, 64).bfloat16(), torch.randn(tokens, 16)
        logits *= torch.linspace(0, tokens % 9, 16)
        route = moe_route(logits, top_k=1 + tokens % 5)
        exact = moe_experts(x.double(), up, down, route._replace(weights=route.weights.double()))
        with use_backend("w4a16", backend):
            got = moe_experts(x.cuda(), *gpu, Route(*(t.cuda() for t in route)))
        testing.assert_matches(got, exact, moe_experts(x, up, down, route), f"{tokens} tokens")


@pytest.mark.parametrize("backend", ["triton", "csrc"])
def test_against_the_dequantised_weight(backend):
    """A layer of Nemotron 3 Nano at decode: as good as the product with the weight in bfloat16."""
    weight, x = weight_of(2688, 1856), torch.randn(8, 1856).bfloat16()
    plain = untile_nvfp4(weight)
    exact = x.double() @ dequantize_nvfp4(*plain, dtype=torch.float64).t()
    low = torch.nn.functional.linear(x, dequantize_nvfp4(*plain))
    with use_backend("w4a16", backend):
        testing.assert_matches(nvfp4_linear(x.cuda(), move(weight, "cuda")), exact, low)


@pytest.mark.parametrize("backend", ["triton", "csrc"])
def test_repeats_and_graph(backend):
    x = torch.randn(8, 1024, device="cuda").bfloat16()
    up, down = (move(weight_of(32, *s), "cuda") for s in ((640, 1024), (1024, 640)))
    route = moe_route(torch.randn(8, 32, device="cuda"), top_k=4)
    with use_backend("w4a16", backend):
        run = lambda: (moe_experts(x, up, down, route),)  # noqa: E731
        first = run()
        assert on_gpu.same_bits(first, run()) and on_gpu.same_bits(first, on_gpu.replay(run))


@pytest.mark.parametrize("backend", ["triton", "csrc"])
def test_nan_stays_in_its_token(backend):
    x = torch.randn(9, 64).bfloat16()
    x[4] = torch.nan
    up, down, route = (
        weight_of(3, 48, 64),
        weight_of(3, 64, 48),
        moe_route(torch.randn(9, 3), top_k=2),
    )
    want = moe_experts(x, up, down, route)
    with use_backend("w4a16", backend):
        got = moe_experts(x.cuda(), move(up, "cuda"), move(down, "cuda"),
                          Route(*(t.cuda() for t in route)))  # fmt: skip
    assert torch.equal(got.cpu().isnan(), want.isnan()) and want[4].isnan().all()
