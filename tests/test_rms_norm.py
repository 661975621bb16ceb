import pytest
import torch

from nemokernels import rms_norm, testing
from nemokernels.ops.rms_norm import ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x, weight, residual=None, eps=1e-5):
    """A second formula, from the definition: divide by the root of the mean square."""
    s = x if residual is None else x + residual
    return s / (s.pow(2).sum(-1, keepdim=True) / s.shape[-1] + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 5, 63), (2, 0, 7), (4, 500)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_fp64_equals_definition(shape, with_residual):
    x = torch.randn(shape, dtype=torch.float64)
    residual = torch.randn_like(x) if with_residual else None
    weight = torch.randn(shape[-1], dtype=torch.float64)
    out = rms_norm(x, weight, residual=residual)
    y = out[0] if with_residual else out
    torch.testing.assert_close(y, plain(x, weight, residual), rtol=1e-13, atol=1e-13)
    if with_residual:
        assert torch.equal(out[1], x + residual)


@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(with_residual):
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    extra = (residual,) if with_residual else ()
    fn = lambda x, w, *r: rms_norm(x, w, residual=r[0] if r else None)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (x, weight, *extra))


def test_fp32_forward():
    x, weight = torch.randn(64, 96), torch.randn(96)
    testing.assert_matches(
        rms_norm(x, weight), plain(x.double(), weight.double()), plain(x, weight)
    )


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_rounds_once(dtype):
    """Rounding only at the end: equal to the float64 result rounded, up to one ulp."""
    x, weight = torch.randn(64, 96).to(dtype), torch.randn(96).to(dtype)
    exact = plain(x.double(), weight.double())
    error = (rms_norm(x, weight).double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_in_low_precision(dtype):
    x, weight, dy = torch.randn(33, 96).to(dtype), torch.randn(96).to(dtype), torch.randn(33, 96)
    _, got = testing.gradients(rms_norm, [x, weight], [dy.to(dtype)])
    _, want = testing.gradients(plain, [x.double(), weight.double()], [dy.to(dtype).double()])
    for g, w, name in zip(got, want, ("dx", "dweight")):
        testing.assert_matches(g, w, w.to(dtype), name)


def test_residual_keeps_its_own_dtype():
    x, residual = torch.randn(4, 32).bfloat16(), torch.randn(4, 32)
    y, total = rms_norm(x, torch.ones(32), residual=residual)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)


def test_any_strides():
    x = torch.randn(5, 7, 16).permute(1, 0, 2)
    wide = torch.randn(7, 5, 32)[..., ::2]
    weight = torch.randn(32)[::2]
    for view in (x, wide, wide.expand(3, 7, 5, 16)):
        assert torch.equal(rms_norm(view, weight), rms_norm(view.contiguous(), weight.contiguous()))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e18])
def test_extreme_rows_stay_finite(scale):
    x = torch.full((3, 8), scale, dtype=torch.float32, requires_grad=True)
    rms_norm(x, torch.ones(8)).sum().backward()
    assert x.grad.isfinite().all()


def test_nan_row_does_not_spread():
    x = torch.randn(4, 16)
    clean = rms_norm(x, torch.ones(16))
    x[2] = torch.nan
    out = rms_norm(x, torch.ones(16))
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]]) and out[2].isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "`x` must be a torch.Tensor"),
        (dict(x=torch.ones(2, 8, dtype=torch.int32)), TypeError, "`x` is torch.int32"),
        (dict(x=torch.tensor(1.0)), ValueError, "`x` needs at least one axis"),
        (dict(weight=torch.ones(7)), ValueError, r"`weight` has shape \(7,\), expected \(D,\)"),
        (dict(weight=torch.ones(8, device="meta")), ValueError, "`weight` is on meta"),
        (dict(residual=torch.ones(3, 8)), ValueError, "`residual` has shape"),
        (dict(eps=-1.0), ValueError, "`eps` must not be negative"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        rms_norm(**{"x": torch.ones(2, 8), "weight": torch.ones(8), **change})


def test_reference_saves_what_backward_needs():
    x, weight = torch.randn(3, 8), torch.randn(8)
    y, rstd = ref.forward(x, weight, 1e-5)
    assert rstd.shape == (3,) and rstd.dtype == torch.float32 and y.dtype == x.dtype
