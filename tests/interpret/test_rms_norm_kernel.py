"""The Triton kernels of rms_norm, interpreted, against the reference."""

import pytest
import torch

from nemokernels import testing
from nemokernels._triton import RowConfig
from nemokernels.ops.rms_norm import kernel, op, ref

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDE = {False: RowConfig("triton", 1, 16, 4, 8, 1), True: RowConfig("triton", 2, 16, 3, 8, 1)}


def config_of(rows, width, backward):
    return op.plan(rows, width, backward, "", ("triton",), 2)


def compare(name, args, config):
    """A launcher against the reference in float64; returns what it gave."""
    function = getattr(ref, name)
    got, low = getattr(kernel, name)(*args, config), function(*args)
    exact = function(*testing.to_double(args))
    for i, (a, want, plain) in enumerate(zip(got, exact, low)):
        assert a.dtype == plain.dtype and a.is_contiguous()
        testing.assert_matches(a, want, plain, f"{name} output {i}")
    return got


def everything(x, residual, weight, dy, configs):
    forward, backward = configs
    y, rstd = compare("forward", (x, weight, 1e-5), forward)
    compare("backward", (dy, x, weight, rstd), backward)
    _, total, rstd = compare("add_forward", (x, residual, weight, 1e-5), forward)
    assert torch.equal(total, ref.add_forward(x, residual, weight, 1e-5)[1])
    compare(
        "add_backward",
        (dy, residual, total, weight, rstd, None if x.dtype == residual.dtype else x.dtype),
        backward,
    )
    return y


@pytest.mark.parametrize("dtype, wider", [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32)])
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 7), (7, 64), (37, 33), (1, 2688)])
def test_against_the_reference(rows, width, dtype, wider):
    x, dy = torch.randn(2, rows, width).to(dtype)
    residual, weight = torch.randn(rows, width).to(wider), torch.randn(width).to(wider)
    everything(x, residual, weight, dy, [config_of(rows, width, way) for way in (False, True)])


@pytest.mark.parametrize("dtype, wider", [(F32, F32), (BF16, BF16), (F16, F32)])
@pytest.mark.parametrize("width", [17, 40])
def test_rows_wider_than_a_block(width, dtype, wider):
    x, dy = torch.randn(2, 5, width).to(dtype)
    residual, weight = torch.randn(5, width).to(wider), torch.randn(width).to(wider)
    everything(x, residual, weight, dy, (WIDE[False], WIDE[True]))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 4)])
def test_empty(shape):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    for configs in ([config_of(0, shape[-1], way) for way in (False, True)], WIDE.values()):
        forward, backward = configs
        y, rstd = kernel.forward(x, weight, 1e-5, forward)
        assert y.shape == shape and rstd.shape == shape[:-1]
        dx, dweight = kernel.backward(x, x, weight, rstd, backward)
        assert dx.shape == shape and dweight.shape == weight.shape and (dweight == 0).all()


def views(t):
    yield t.transpose(0, 1).contiguous().transpose(0, 1)
    yield t.transpose(1, 2).contiguous().transpose(1, 2)
    yield torch.cat((t, t), -1)[..., : t.shape[-1]]
    yield torch.cat((t[..., :1], t), -1)[..., 1:]


@pytest.mark.parametrize("wide", [False, True])
def test_any_strides_give_the_same_bits(wide):
    x, residual, dy = torch.randn(3, 2, 3, 18)
    weight = torch.randn(18)
    forward, backward = WIDE.values() if wide else (config_of(6, 18, w) for w in (False, True))

    def run(x, residual, dy, weight):
        y, total, rstd = kernel.add_forward(x, residual, weight, 1e-5, forward)
        alone = kernel.forward(x, weight, 1e-5, forward)
        grads = kernel.add_backward(dy, residual, total, weight, rstd, None, backward)
        return y, total, rstd, *alone, *grads, *kernel.backward(dy, x, weight, rstd, backward)

    want = run(x, residual, dy, weight)
    for some in zip(views(x), views(residual), list(views(dy))[::-1]):
        got = run(*some, torch.stack((weight, weight), 1)[:, 0])
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_gradient_without_a_row_of_its_own():
    """dy as autograd hands it over: one element, expanded."""
    x, weight = torch.randn(6, 24), torch.randn(24)
    dy = torch.ones(()).expand(6, 24)
    _, rstd = ref.forward(x, weight, 1e-5)
    compare("backward", (dy, x, weight, rstd), config_of(6, 24, True))


@pytest.mark.parametrize("wide", [False, True])
def test_the_sum_is_normalised_as_it_is_stored(wide):
    x, residual = torch.randn(2, 3, 24).bfloat16()
    weight = torch.randn(24)
    config = WIDE[False] if wide else config_of(3, 24, False)
    y, total, rstd = kernel.add_forward(x, residual, weight, 1e-5, config)
    alone = kernel.forward(total, weight, 1e-5, config)
    assert torch.equal(y, alone[0]) and torch.equal(rstd, alone[1])


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_rows_over_programs(programs):
    x, dy = torch.randn(2, 11, 40)
    weight = torch.randn(40)
    _, rstd = ref.forward(x, weight, 1e-5)
    compare("backward", (dy, x, weight, rstd), RowConfig("triton", 2, 64, programs, 4, 2))


def test_a_nan_stays_in_its_row():
    x, weight = torch.randn(4, 40), torch.randn(40)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    for config in (WIDE[False], config_of(4, 40, False)):
        y, _ = compare("forward", (x, weight, 1e-5), config)
        assert y[[0, 3]].isfinite().all()


def test_plan():
    everywhere = ("triton", "reference")
    assert op.plan(8, 4096, False, "", everywhere, 132) == RowConfig("triton", 1, 4096, 8, 4, 2)
    assert op.plan(32768, 8192, True, "", everywhere, 132).programs == 132
    assert op.plan(32768, 128, False, "", everywhere, 132).rows == 16
    for width in range(1, 20000, 7):
        for backward in (False, True):
            config = op.plan(5, width, backward, "", everywhere, 132)
            assert config.block & (config.block - 1) == 0
            assert width <= config.block or config.block == 4096
    float64 = op.plan(8, 8, False, "got float64", everywhere, 132)
    assert float64 == RowConfig("reference", reason="got float64")
    with pytest.raises(RuntimeError, match="got float64"):
        op.plan(8, 8, False, "got float64", ("triton",), 132)
