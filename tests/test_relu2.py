import pytest
import torch

from nemokernels import relu2, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x):
    """A second formula: x * |x| where x is positive, else zero."""
    return torch.where(x > 0, x * x.abs(), x * 0)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (5, 7), (3, 2, 63)])
def test_fp64_equals_definition(shape):
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(relu2(x), plain(x).abs())


def test_gradcheck():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu2, (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_round_once(dtype):
    x, dy = torch.randn(33, 65).to(dtype), torch.randn(33, 65).to(dtype)
    out, grad = testing.gradients(relu2, [x], [dy])
    wide, wide_dy = x.double(), dy.double()
    # In float32 the product itself rounds; below it every product is exact before the one cast.
    exact = plain(wide)
    assert torch.equal(out[0], exact.to(dtype))
    slope = 2 * wide.clamp(min=0) * wide_dy
    testing.assert_matches(grad[0], slope, slope.to(dtype), "dx")


def test_gradient_at_zero_and_below_is_zero():
    x = torch.tensor([-3.0, -0.0, 0.0, 1e-30], requires_grad=True)
    relu2(x).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 0.0, pytest.approx(2e-30)]


def test_any_strides():
    wide = torch.randn(6, 5, 32)
    for view in (wide.permute(2, 0, 1), wide[..., ::3], wide[:, :1].expand(6, 4, 32)):
        y = relu2(view)
        assert y.is_contiguous() and torch.equal(y, relu2(view.contiguous()))


def test_non_finite_values_stay_where_they_are():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0])
    y = relu2(x)
    assert y[0].isnan() and y[1:].tolist() == [torch.inf, 0.0, 4.0]
    limit = torch.tensor([255.75, 256.0], dtype=torch.float16)
    assert relu2(limit).isfinite().tolist() == [True, False]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], "relu2: `x` must be a torch.Tensor, got list"),
        (torch.ones(2, dtype=torch.int64), "relu2: `x` is torch.int64, expected one of float32"),
        (torch.ones(2, dtype=torch.complex64), "relu2: `x` is torch.complex64"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(TypeError, match=message):
        relu2(x)
