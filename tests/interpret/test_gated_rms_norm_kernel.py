"""The Triton kernels of gated_rms_norm, interpreted, against the reference."""

import itertools

import pytest
import torch

from nemokernels import testing
from nemokernels._triton import RowConfig
from nemokernels.ops.gated_rms_norm import kernel, op, ref

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OPTIONS = [o for o in itertools.product((True, False), repeat=3) if o[1] or not o[2]]


def problem(rows, width, has_bias, has_z, dtype=F32, wider=F32):
    x, z, dy = torch.randn(3, rows, width).to(dtype)
    weight, bias = torch.randn(2, width).to(wider)
    return x, weight, bias if has_bias else None, z if has_z else None, dy


def compare(x, weight, bias, z, dy, group_size, norm_before_gate, configs=None):
    """Both launchers against the reference in float64; returns what they gave."""
    shape = (x.shape[0], x.shape[1] // group_size, group_size)
    plans = configs or [op.plan(*shape, way, "", ("triton",), 2) for way in (False, True)]
    args, options = (x, weight, bias, z), (group_size, norm_before_gate)
    low = ref.forward(*args, 1e-5, *options)
    exact = ref.forward(*testing.to_double(args), 1e-5, *options)
    got = kernel.forward(*args, 1e-5, *options, plans[0])
    args = (dy, *args, low[1])
    low += ref.backward(*args, *options)
    exact += ref.backward(*testing.to_double(args), *options)
    got += kernel.backward(*args, *options, plans[1])
    names = ("y", "rstd", "dx", "dweight", "dbias", "dz")
    for name, a, want, plain in zip(names, got, exact, low):
        assert a.dtype == plain.dtype and a.is_contiguous()
        testing.assert_matches(a, want, plain, name)
    return got


@pytest.mark.parametrize("has_bias, has_z, norm_before_gate", OPTIONS)
@pytest.mark.parametrize("dtype, wider", [(F32, F32), (F16, F32), (BF16, BF16)])
def test_every_combination(has_bias, has_z, norm_before_gate, dtype, wider):
    inputs = problem(9, 36, has_bias, has_z, dtype, wider)
    compare(*inputs, 12, norm_before_gate)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(
    "rows, width, group_size", [(1, 1, 1), (5, 6, 1), (33, 33, 33), (7, 128, 16), (3, 1536, 512)]
)
def test_sizes(rows, width, group_size, norm_before_gate):
    compare(*problem(rows, width, True, True), group_size, norm_before_gate)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 4)])
def test_empty(shape):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    group_size = max(shape[-1] // 2, 1)
    config = op.plan(0, 2, group_size, True, "", ("triton",), 2)
    y, rstd = kernel.forward(x, weight, weight, x, 1e-5, group_size, False, config)
    assert y.shape == shape and rstd.shape == (*shape[:-1], shape[-1] // group_size)
    grads = kernel.backward(x, x, weight, weight, x, rstd, group_size, False, config)
    assert [g.shape for g in grads] == [x.shape, weight.shape, weight.shape, x.shape]
    assert (grads[1] == 0).all() and (grads[2] == 0).all()


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_rows_over_programs(programs):
    config = RowConfig("triton", 2, 16, programs, 1, 2)
    compare(*problem(11, 24, True, True), 12, False, (config, config))


def views(t):
    yield t.transpose(0, 1).contiguous().transpose(0, 1)
    yield t.transpose(1, 2).contiguous().transpose(1, 2)
    yield torch.cat((t, t), -1)[..., : t.shape[-1]]
    yield torch.cat((t[..., :1], t), -1)[..., 1:]


def test_any_strides_give_the_same_bits():
    x, z, dy = torch.randn(3, 2, 3, 18)
    weight, bias = torch.randn(2, 18)
    config = op.plan(6, 3, 6, True, "", ("triton",), 2)

    def run(x, z, dy, weight, bias):
        y, rstd = kernel.forward(x, weight, bias, z, 1e-5, 6, False, config)
        return y, rstd, *kernel.backward(dy, x, weight, bias, z, rstd, 6, False, config)

    want = run(x, z, dy, weight, bias)
    weight, bias = torch.stack((weight, bias), 1).unbind(1)
    for some in zip(views(x), views(z), views(dy)):
        assert all(torch.equal(a, b) for a, b in zip(run(*some, weight, bias), want))


def test_a_nan_stays_in_its_group():
    x, weight, bias, z, dy = problem(4, 24, True, True)
    x[1, 3], z[2, 13] = torch.nan, torch.nan
    config = op.plan(4, 2, 12, False, "", ("triton",), 2)
    y, _ = kernel.forward(x, weight, bias, z, 1e-5, 12, False, config)
    assert y[1, :12].isnan().all() and y[1, 12:].isfinite().all()
    assert y[2, 12:].isnan().all() and y[2, :12].isfinite().all() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_closed_and_open_gates(norm_before_gate):
    x, weight, bias, z, dy = problem(4, 16, True, True)
    z[0], z[1] = -200.0, 200.0
    compare(x, weight, bias, z, dy, 16, norm_before_gate)


def test_plan():
    everywhere = ("triton", "reference")
    h8b = op.plan(32768, 8, 1024, True, "", everywhere, 132)
    assert h8b == RowConfig("triton", 1, 1024, 66, 4, 3)
    assert op.plan(1, 8, 1024, True, "", everywhere, 132).programs == 1
    wide = op.plan(8, 1, 10000, True, "", everywhere, 132)
    assert wide.backend == "reference" and "up to 8192, got 10000" in wide.reason
    assert op.plan(8, 1, 10000, False, "", everywhere, 132).block == 16384
    assert op.plan(8, 1, 8, False, "got float64", everywhere, 132).reason == "got float64"
    with pytest.raises(RuntimeError, match="up to 8192"):
        op.plan(8, 1, 10000, True, "", ("triton",), 132)
