"""The Triton kernels of relu2, interpreted, against the reference."""

import pytest
import torch

from nemokernels import testing
from nemokernels.ops.relu2 import kernel, op, ref

CONFIGS = [op.plan(n, "", ("triton",)) for n in (1, 1 << 20)]


def compare(x, dy, config):
    for name, args in (("forward", (x,)), ("backward", (dy, x))):
        got, low = getattr(kernel, name)(*args, config), getattr(ref, name)(*args)
        assert got.dtype == low.dtype and got.is_contiguous()
        testing.assert_matches(got, getattr(ref, name)(*testing.to_double(args)), low, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c.block))
@pytest.mark.parametrize("shape", [(1,), (3, 5, 17), (257,), (0, 4), (2, 2049)])
def test_against_the_reference(shape, config, dtype):
    compare(*torch.randn(2, *shape).to(dtype), config)


def test_strides_and_other_dtypes():
    x, dy = torch.randn(2, 5, 6).half()
    compare(x.mT, dy.mT.float(), CONFIGS[0])
    compare(x[:, ::2], torch.ones(()).expand(5, 3), CONFIGS[0])


def test_extremes():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e30, -1e30, 300.0])
    for dtype in (torch.float32, torch.float16):
        value = x.to(dtype)
        dy = value.flip(0)
        for got, want in (
            (kernel.forward(value, CONFIGS[0]), ref.forward(value)),
            (kernel.backward(dy, value, CONFIGS[0]), ref.backward(dy, value)),
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_plan():
    assert op.plan(5, "", ("triton", "reference")).backend == "triton"
    assert op.plan(5, "got float64", ("triton", "reference")).reason == "got float64"
    with pytest.raises(RuntimeError, match="got float64"):
        op.plan(5, "got float64", ("triton",))
