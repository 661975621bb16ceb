"""The Triton kernels of rms_norm on a GPU."""

import on_gpu
import pytest
import torch

from nemokernels import rms_norm, use_backend

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("rms_norm", "triton"):
        yield


def problem(rows, width, dtype, wider=None):
    x, residual, dy, dtotal = torch.randn(4, rows, width).to(dtype)
    weight = torch.randn(width).to(wider or dtype)
    return x, weight, residual.to(wider or dtype), dy, dtotal.to(wider or dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 128, 2688, 4096, 4480, 5120, 8192, 18432])
def test_against_the_reference(width, dtype):
    for rows in (1, 300):
        x, weight, _, dy, _ = problem(rows, width, dtype)
        on_gpu.compare(lambda x, w: rms_norm(x, w, eps=1e-5), [x, weight], [dy])


@pytest.mark.parametrize("dtype, wider", [(d, w) for d in DTYPES for w in (d, torch.float32)])
@pytest.mark.parametrize("width", [33, 2688, 8192, 18432])
def test_with_a_residual(width, dtype, wider):
    x, weight, residual, dy, dtotal = problem(65, width, dtype, wider)

    def fn(x, weight, residual):
        return rms_norm(x, weight, residual=residual, eps=1e-5)

    on_gpu.compare(fn, [x, weight, residual], [dy, dtotal])


def test_repeats_and_graphs_have_the_same_bits():
    x, weight, residual, dy, dtotal = on_gpu.to("cuda", problem(3000, 2688, torch.bfloat16))
    ops = torch.ops.nemokernels

    def run():
        y, total, rstd = ops.add_rms_norm(x, residual, weight, 1e-5)
        return y, total, *ops.add_rms_norm_backward(dy, dtotal, total, weight, rstd, None)

    first = run()
    assert on_gpu.same_bits(first, run())
    assert on_gpu.same_bits(first, on_gpu.replay(run))


def test_strides():
    x, weight, *_ = on_gpu.to("cuda", problem(64, 96, torch.bfloat16))
    want = rms_norm(x, weight)
    for view in (x.mT.contiguous().mT, torch.cat((x, x), 1)[:, :96]):
        assert torch.equal(rms_norm(view, weight), want)


def test_past_two_to_the_31_elements():
    rows, width = (1 << 31) // 4096 + 5, 4096
    x = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    x[-5:] = torch.randn(5, width, device="cuda")
    weight = torch.randn(width, device="cuda")
    y = rms_norm(x, weight)
    assert torch.equal(y[-5:], rms_norm(x[-5:], weight)) and (y[:5] == 0).all()
    rstd = torch.ones(rows, device="cuda")
    backward = torch.ops.nemokernels.rms_norm_backward
    dx, dweight = backward(x, x, weight, rstd)
    last, want = backward(x[-5:], x[-5:], weight, rstd[-5:])
    assert torch.equal(dx[-5:], last) and (dx[:5] == 0).all()
    torch.testing.assert_close(dweight, want)
