"""The Triton kernels of gated_rms_norm on a GPU."""

import on_gpu
import pytest
import torch

from nemokernels import rmsnorm_fn, use_backend

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("gated_rms_norm", "triton"):
        yield


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, groups", [(7, 1), (48, 3), (4096, 8), (8192, 8), (16384, 8),
                                           (5120, 1), (8192, 1)])  # fmt: skip
def test_against_the_reference(width, groups, dtype, norm_before_gate):
    for rows, bias in ((1, False), (150, True)):
        x, dy = torch.randn(2, rows, width).to(dtype)
        wide = torch.randn(rows, 2 * width + 64).to(dtype)
        parameters = [torch.randn(width).to(dtype) for _ in range(1 + bias)]

        def fn(x, wide, weight, bias=None, width=width):
            return rmsnorm_fn(x, weight, bias, wide[:, 64 : 64 + width], 1e-5, width // groups,
                              norm_before_gate)  # fmt: skip

        on_gpu.compare(fn, [x, wide, *parameters], [dy])


def test_without_a_gate():
    x, dy = torch.randn(2, 50, 96).bfloat16()
    weight = torch.randn(96)
    on_gpu.compare(lambda x, w: rmsnorm_fn(x, w, group_size=32), [x, weight], [dy])


def test_repeats_and_graphs_have_the_same_bits():
    x, dy, z = torch.randn(3, 5000, 4096, device="cuda").bfloat16()
    weight = torch.randn(4096, device="cuda")
    ops = torch.ops.nemokernels

    def run():
        y, rstd = ops.gated_rms_norm(x, weight, weight, z, 1e-5, 512, False)
        grads = ops.gated_rms_norm_backward(dy, x, weight, weight, z, rstd, 512, False)
        return y, rstd, *grads

    first = run()
    assert on_gpu.same_bits(first, run())
    assert on_gpu.same_bits(first, on_gpu.replay(run))


def test_past_two_to_the_31_elements():
    rows, width = (1 << 31) // 4096 + 5, 4096
    x = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    x[-5:] = torch.randn(5, width, device="cuda")
    weight = torch.randn(width, device="cuda")
    y = rmsnorm_fn(x, weight, z=x, group_size=512, norm_before_gate=False)
    last = rmsnorm_fn(x[-5:], weight, z=x[-5:], group_size=512, norm_before_gate=False)
    assert torch.equal(y[-5:], last) and (y[:5] == 0).all()
    rstd = torch.ones(rows, 8, device="cuda")
    backward = torch.ops.nemokernels.gated_rms_norm_backward
    dx, dweight, _, dz = backward(x, x, weight, None, x, rstd, 512, False)
    short = backward(x[-5:], x[-5:], weight, None, x[-5:], rstd[-5:], 512, False)
    assert torch.equal(dx[-5:], short[0]) and torch.equal(dz[-5:], short[3])
    assert (dx[:5] == 0).all() and (dz[:5] == 0).all()
    torch.testing.assert_close(dweight, short[1])
