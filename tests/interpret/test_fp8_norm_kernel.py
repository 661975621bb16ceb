"""The Triton kernels of the norms that also emit FP8, interpreted."""

import pytest
import torch

from nemokernels import testing
from nemokernels.ops.fp8 import kernel_norm, norm_op, norm_ref, ref

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SCALE = torch.tensor([37.0])
SMALL = {False: norm_op.Config("triton", 2, 16, 4), True: norm_op.Config("triton", 8, 16, 4)}


def compare(name, args, config):
    """Norm outputs against the reference in float64, codes against those of the kernel's own y."""
    transpose, dtype = args[-1], args[-2]
    got, low = getattr(kernel_norm, name)(*args, config), getattr(norm_ref, name)(*args)
    exact = getattr(norm_ref, name)(*testing.to_double(args))
    for i, (a, want, plain) in enumerate(zip(got[:-4], exact, low)):
        assert a.dtype == plain.dtype and a.is_contiguous()
        testing.assert_matches(a, want, plain, f"{name} output {i}")
    amax = torch.zeros(())
    q, q_t, inverse = ref.quantize(got[0], SCALE, amax, dtype, False, True, transpose)
    want = q.view(torch.uint8), q_t.contiguous().view(torch.uint8), inverse, amax
    for a, b in zip(got[-4:], want, strict=True):
        assert torch.equal(a, b)
    return got


@pytest.mark.parametrize("dtype, wider", [(F32, F32), (F16, F16), (BF16, F32)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 33), (34, 7), (2, 150)])
def test_rms_norm(rows, width, transpose, dtype, wider):
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(wider)
    for config in (norm_op.plan(width, transpose, "", ("triton",)), SMALL[transpose]):
        for residual in (None, torch.randn(rows, width).to(wider)):
            args = (x, residual, weight, SCALE, 1e-5, ref.E4M3, transpose)
            got = compare("rms_norm", args, config)
            if residual is not None:
                assert torch.equal(got[1], norm_ref.rms_norm(*args)[1])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("rows, groups, size", [(1, 1, 1), (3, 2, 20), (34, 1, 5)])
def test_gated_rms_norm(rows, groups, size, before, transpose, dtype):
    x, z = torch.randn(2, rows, groups * size).to(dtype)
    weight, bias = torch.randn(2, groups * size)
    for config in (norm_op.plan(size, transpose, "", ("triton",)), SMALL[transpose]):
        for b, gate in ((None, z), (bias, z), (bias, None)):
            args = (x, weight, b, gate, SCALE, 1e-5, size, before, ref.E5M2, transpose)
            compare("gated_rms_norm", args, config)


def test_a_nan_stays_in_its_row():
    x, weight = torch.randn(5, 24), torch.randn(24)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    for transpose in (False, True):
        got = compare("rms_norm", (x, None, weight, SCALE, 1e-5, ref.E4M3, transpose),
                      SMALL[transpose])  # fmt: skip
        assert got[0][[0, 3, 4]].isfinite().all() and got[-1].isfinite()


@pytest.mark.parametrize("transpose", [False, True])
def test_any_strides_give_the_same_bits(transpose):
    x, z = torch.randn(2, 3, 4, 24)
    weight, config = torch.randn(24), SMALL[transpose]

    def run(x, z, weight):
        tail = (SCALE, 1e-5, ref.E4M3, transpose, config)
        plain = kernel_norm.rms_norm(x, z, weight, *tail)
        tail = (SCALE, 1e-5, 8, False, ref.E4M3, transpose, config)
        return *plain, *kernel_norm.gated_rms_norm(x, weight, None, z, *tail)

    want = run(x, z, weight)
    wide = torch.cat((z, z), -1)
    for a, b in ((x.mT.contiguous().mT, wide[..., :24]), (wide[..., 24:] * 0 + x, z)):
        got = run(a, b, torch.stack((weight, weight), 1)[:, 0])
        assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_plan():
    both = ("triton", "reference")
    assert norm_op.plan(4096, False, "", both) == norm_op.Config("triton", 1, 4096, 8)
    assert norm_op.plan(4096, True, "", both) == norm_op.Config("triton", 32, 128, 8)
    for width in range(1, 9000, 13):
        for transpose in (False, True):
            config = norm_op.plan(width, transpose, "", both)
            assert config.columns & (config.columns - 1) == 0 == config.rows & (config.rows - 1)
            assert config.rows * config.columns <= 4096
    assert norm_op.plan(8, True, "got float64", both).reason == "got float64"
    with pytest.raises(RuntimeError, match="got float64"):
        norm_op.plan(8, True, "got float64", ("triton",))
