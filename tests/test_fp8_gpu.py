"""The FP8 kernels and products on a GPU."""

import fp8_models
import hybrids
import on_gpu
import pytest
import torch

from nemokernels import (
    current_scale,
    delayed_scaling_update,
    dequantize_fp8,
    fp8_linear,
    fp8_products,
    gated_rms_norm_fp8,
    quantize_fp8,
    rms_norm_fp8,
    use_backend,
)
from nemokernels.models import check_fp8, fp8_report, update_fp8

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("fp8", "triton"):
        yield


def every_bfloat16():
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same(got, want):
    for a, b in zip(got, want, strict=True):
        a, b = a.cpu().float(), b.float()
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 17), (300, 2688), (4097, 129), (0, 4)])
def test_bits_of_the_reference(shape, format, dtype):
    x, scale = (torch.randn(shape) * 8).to(dtype), torch.tensor([13.7])
    for relu2 in (False, True):
        for transpose in (False, True):
            options = dict(format=format, transpose=transpose, squared_relu=relu2)
            same(quantize_fp8(x.cuda(), scale.cuda(), **options),
                 quantize_fp8(x, scale, **options))  # fmt: skip
    same([current_scale(x.cuda(), format=format)], [current_scale(x, format=format)])


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_every_bfloat16_and_every_code(format):
    x = every_bfloat16()
    for value in (1.0, 0.37, 1e30, 1e-30):
        scale = torch.tensor([value])
        same(quantize_fp8(x.cuda(), scale.cuda(), format=format),
             quantize_fp8(x, scale, format=format))  # fmt: skip
    kind = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[format]
    codes, scale_inv = torch.arange(256).byte().view(kind), torch.tensor([0.0123])
    for dtype in DTYPES:
        same([dequantize_fp8(codes.cuda(), scale_inv.cuda(), dtype=dtype)],
             [dequantize_fp8(codes, scale_inv, dtype=dtype)])  # fmt: skip


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_update(algorithm):
    state = [(torch.rand(n), torch.rand(length, n)) for n, length in ((3, 1024), (1, 1024))]
    copy = on_gpu.to("cuda", [(s.clone(), h.clone()) for s, h in state])
    for step in range(5):
        for (_, a), (_, b) in zip(state, copy):
            a[0] = torch.tensor([0.0, torch.inf, float(step)])[: a.shape[1]]
            b[0] = a[0].cuda()
        for some in (state, copy):
            delayed_scaling_update(*zip(*some), format=["e4m3", "e5m2"], algorithm=algorithm)
        same(sum(map(list, copy), []), sum(map(list, state), []))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 37, 256])
@pytest.mark.parametrize("relu2", [False, True])
def test_linear(relu2, tokens, dtype):
    """Fast accumulation keeps about 13 bits of a sum, more than a 16-bit result shows."""
    x, weight = torch.randn(tokens, 2688).to(dtype), (torch.randn(1856, 2688) / 50).to(dtype)
    dy = torch.randn(tokens, 1856).to(dtype)

    def fn(x, weight):
        return fp8_linear(x, weight, squared_relu=relu2, layer="gpu")

    on_gpu.compare(fn, [x, weight], [dy])
    assert set(fp8_products("gpu").values()) == {"scaled_mm"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("width", [33, 2688, 4096, 18432])
def test_norms(width, transpose, dtype):
    """The norm against its reference, the codes against those of the y that came out."""
    x, other, dy = torch.randn(3, 65, width).to(dtype)
    weight, scale = torch.randn(width).to(dtype), torch.tensor([37.0])
    emitted = []

    def norm(x, weight, residual):
        normed = rms_norm_fp8(x, weight, scale.to(x.device), residual=residual,
                              transpose=transpose)  # fmt: skip
        emitted.append(normed)
        return normed.y, normed.total

    def gated(x, weight, z):
        normed = gated_rms_norm_fp8(x, weight, scale.to(x.device), z=z, group_size=width // 3,
                                    norm_before_gate=False, transpose=transpose)  # fmt: skip
        emitted.append(normed)
        return normed.y

    on_gpu.compare(norm, [x, weight, other], [dy, other])
    if width % 3 == 0:
        on_gpu.compare(gated, [x, weight, other], [dy])
    for y, _, codes, amax in [e for e in emitted if e.y.is_cuda]:
        want = quantize_fp8(y.detach(), scale.cuda(), transpose=transpose)
        assert torch.equal(codes.codes, want[0].view(torch.uint8)) and amax == want[1]
        if transpose:
            assert torch.equal(codes.transposed, want[2].view(torch.uint8))


def test_a_model_runs_in_fp8():
    """A step of a converted model: every product in FP8, every input by the norm that can."""
    model = fp8_models.hybrid("M*-").bfloat16().cuda()
    for seed in range(3):
        loss = model(hybrids.tokens(2, 24, seed=seed).cuda()).float().square().mean()
        loss.backward()
        update_fp8(model)
    check_fp8(model)
    own = {r.name.rpartition(".")[2] for r in fp8_report(model) if r.quantised_by == "layer"}
    assert own == {"o_proj", "down_proj"}
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_a_bad_scale_is_nan():
    x, weight = torch.ones(16, 32, device="cuda"), torch.ones(16, 32, device="cuda")
    for value in (0.0, -1.0, torch.inf, torch.nan):
        assert fp8_linear(x, weight, x_scale=torch.tensor([value], device="cuda")).isnan().all()


def test_a_step_in_a_graph():
    x, dy = torch.randn(256, 64, device="cuda").bfloat16(), torch.randn(256, 32, device="cuda")
    weight = torch.randn(32, 64, device="cuda").bfloat16().requires_grad_()
    scale, history = torch.ones(3, device="cuda"), torch.zeros(16, 3, device="cuda")

    def step():
        slots = dict(zip(("x_amax", "w_amax", "dy_amax"), history[0]))
        scales = dict(zip(("x_scale", "w_scale", "dy_scale"), scale))
        y = fp8_linear(x, weight, **scales, **slots)
        (dw,) = torch.autograd.grad(y, weight, dy.bfloat16())
        delayed_scaling_update(scale, history)
        return y, dw

    first = step()
    for _ in range(2):
        last = step()
    scale.fill_(1), history.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for want in (first, last):
        graph.replay()
        assert on_gpu.same_bits(out, want)


def test_past_two_to_the_31_elements():
    x = torch.zeros((1 << 31) // 4096 + 5, 4096, device="cuda", dtype=torch.bfloat16)
    x[-1] = 3.0
    q, amax, q_t = quantize_fp8(x, torch.ones(1, device="cuda"), transpose=True)
    assert amax == 3.0 and (q[-1].float() == 3).all() and (q_t[:, -1].float() == 3).all()
    assert not q[:-1].view(torch.uint8).any()
