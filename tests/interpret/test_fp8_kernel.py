"""The Triton kernels of FP8, interpreted: the same bits as the reference.

The conversion to 8 bits itself is the device's instruction; here it is torch's (see conftest).
"""

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from nemokernels.ops.fp8 import kernel, op, ref

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CONFIGS = [op.plan(transpose, "", ("triton",)) for transpose in (False, True)]
FORMATS = [ref.E4M3, ref.E5M2]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        a, b = a.float(), b.float()
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def compare(x, scale, dtype, relu2=False, rows=True, transpose=True, config=None, amax=0.0):
    slots = torch.full((2, 1), amax)
    args = (dtype, relu2, rows, transpose)
    want = ref.quantize(x, torch.tensor([scale]), slots[0], *args)
    got = kernel.quantize(x, torch.tensor([scale]), slots[1], *args, config or CONFIGS[transpose])
    same(got, tree_map(torch.Tensor.contiguous, want))
    assert slots[0] == slots[1]
    return slots[1].item()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 17), (65, 129), (64, 128), (300, 2), (1, 300)])
def test_quantize(shape, format, dtype):
    x = (torch.randn(shape) * 8).to(dtype)
    for config in CONFIGS:
        compare(x, 13.7, format, config=config)


@pytest.mark.parametrize("rows, transpose", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("relu2", [False, True])
def test_each_output_is_optional(rows, transpose, relu2):
    x = torch.randn(5, 70).bfloat16()
    assert compare(x, 100.0, ref.E4M3, relu2, rows, transpose) > 0


def test_a_slot_is_raised_never_lowered():
    x = torch.randn(70, 5)
    assert compare(x, 1.0, ref.E4M3, amax=1e6) == 1e6
    assert compare(x, 1.0, ref.E4M3, amax=1e-6) == x.abs().amax()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("relu2", [False, True])
def test_every_bfloat16(format, relu2):
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(BF16).reshape(256, 256)
    for scale in (1.0, 0.37, 1e30, 1e-30):
        assert compare(x, scale, format, relu2) == torch.inf
    kept = torch.where(x.isinf(), 0.0, x)
    assert compare(kept, 1.0, format) == torch.finfo(BF16).max


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.inf, -torch.inf, torch.nan])
def test_a_scale_without_meaning_shows(scale):
    for x in (torch.ones(2, 3), torch.ones(0, 3)):
        for quantize, rest in ((ref.quantize, ()), (kernel.quantize, (CONFIGS[1],))):
            *_, inverse = quantize(x, torch.tensor([scale]), torch.zeros(1), ref.E4M3, False, True,
                                   True, *rest)  # fmt: skip
            assert inverse.isnan()


def test_strides_and_empty():
    x = torch.randn(6, 10).half()
    for view in (x.mT, x[:, ::2], x[::2, 1:], torch.ones(()).expand(3, 4), x[:0], x[:, :0]):
        compare(view, 3.0, ref.E4M3)
    compare(torch.randn(2, 3, 4).transpose(0, 1), 3.0, ref.E5M2)


def test_any_amax_is_exact():
    """The largest element in any tile, of either sign."""
    for place in ((0, 0), (99, 299), (64, 128), (63, 127)):
        for value in (-7.0, 7.0):
            x = torch.rand(100, 300)
            x[place] = value
            assert compare(x, 1.0, ref.E4M3) == 7.0


def test_a_tile_of_nothing_but_nan_has_no_amax():
    for config in CONFIGS:
        x = torch.full((2 * config.rows, config.columns), torch.nan)
        assert compare(x, 1.0, ref.E4M3, config=config) == 0
        x[-1, -1] = 2.0
        assert compare(x, 1.0, ref.E4M3, config=config) == 2


@pytest.mark.parametrize("format", FORMATS)
def test_current_scale(format):
    nan, inf = torch.nan, torch.inf
    rows = ([0.3, -2.5, 1.0], [0.0], [], [1.0, inf], [nan, nan], [nan, 2.5], [1e-40], [3e38])
    for x in (*map(torch.tensor, rows), torch.randn(70, 300).bfloat16(), torch.tensor(-3.0)):
        for relu2 in (False, True):
            got = kernel.current_scale(x, format, relu2, CONFIGS[0])
            assert torch.equal(got, ref.current_scale(x, format, relu2))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("format", FORMATS)
def test_dequantize(format, dtype):
    codes = torch.arange(256).byte().reshape(2, 128).mT
    scale_inv = torch.tensor([0.0123])
    got = kernel.dequantize(codes, scale_inv, format, dtype, CONFIGS[0])
    same([got], [ref.dequantize(codes, scale_inv, format, dtype).contiguous()])
    assert kernel.dequantize(codes[:0], scale_inv, format, dtype, CONFIGS[0]).shape == (0, 2)


@pytest.mark.parametrize("most_recent", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 16])
def test_update(length, most_recent):
    """Several tensors and steps, with every maximum that has a rule of its own."""
    odd = torch.tensor([0.0, torch.nan, torch.inf, 1e-45, 1e-36, 3e38, 448.0, 1.0])
    state = [
        (torch.ones(3), torch.zeros(length, 6)[:, ::2]),
        (torch.ones(2), torch.zeros(length, 2)),
    ]
    copy = [(s.clone(), h.clone()) for s, h in state]
    tops = [448.0, 57344.0 / 4]
    for step in range(12):
        reduced = odd[torch.randint(8, (5,))] if step % 3 else None
        for (_, a), (_, b) in zip(state, copy):
            a[0] = b[0] = odd[torch.randint(8, (a.shape[1],))]
        kernel.update(*zip(*state), reduced, tops, most_recent, CONFIGS[0])
        ref.delayed_scaling_update(*zip(*copy), reduced, tops, most_recent)
        for pair, want in zip(state, copy):
            for a, b in zip(pair, want):
                assert np.array_equal(a.numpy(), b.numpy(), equal_nan=True), step


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("tokens", [1, 16, 37, 0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products(tokens, with_bias, dtype):
    """Where torch's scaled_mm runs on the CPU; on codes and scales that leave its sums exact."""
    x, weight = torch.randint(-8, 9, (tokens, 48)), torch.randint(-8, 9, (32, 48))
    dy, bias = torch.randint(-8, 9, (tokens, 32)), torch.randn(32) if with_bias else None
    tensors = [t.to(dtype) for t in (x, weight, dy)]
    two = torch.tensor([2.0])
    x8, w8 = (op.cast(t, two, None, ref.E4M3, transpose=True) for t in tensors[:2])
    dy8 = op.cast(tensors[2], two, None, ref.E5M2, transpose=True)
    config = op.plan_product(32, 48, "", ("triton",))
    forward = (*tensors[:2], bias, *x8, *w8, None, None, None, ref.E5M2, False, "")
    kinds = (dtype, F32, bias.dtype if with_bias else None)
    backward = (tensors[2], *dy8, *x8[1:], *w8[1:], ref.E5M2, *kinds, "")
    same([kernel.product(*forward, config)], [ref.product(*forward)])
    same(kernel.product_backward(*backward, config), ref.product_backward(*backward))


def test_products_get_the_sizes_that_the_device_takes(monkeypatch):
    """Multiples of 16 along the summed axis and across the second operand, for any tokens."""

    def scaled_mm(a, b, *scales, **options):
        assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0
        assert a.stride() == (a.shape[1], 1) and b.stride() == (1, b.shape[0])
        forward = a.dtype == ref.E4M3
        assert options["use_fast_accum"] == forward
        return multiply(a, b, *scales, **options)

    multiply = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    test_products(37, False, BF16)
    test_products(1, True, F32)


def test_plan():
    both = ("triton", "reference")
    assert op.plan(True, "", both).backend == op.plan(False, "", both).backend == "triton"
    assert op.plan_product(32, 48, "", both) == op.Config("scaled_mm")
    for n, k in ((33, 48), (32, 40)):
        config = op.plan_product(n, k, "", both)
        assert config.backend == "reference" and f"multiples of 16, got {n} x {k}" in config.reason
    with pytest.raises(RuntimeError, match="multiples of 16"):
        op.plan_product(33, 48, "", ("triton",))
    with pytest.raises(RuntimeError, match="got float64"):
        op.plan(False, "got float64", ("triton",))
