"""The Triton kernels of nvfp4, interpreted: every bit is the reference's."""

import pytest
import torch
import triton
import triton.language as tl

from nemokernels._philox import philox4x32
from nemokernels.ops.nvfp4 import kernel, op, ref

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL = op.Config("triton", 16, 32, 1)
SEED = torch.tensor(-5)


def same(got, want):
    for i, (a, b) in enumerate(zip(got, want)):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous(), i
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), i


def corners(rows, columns, dtype=F32):
    """Magnitudes over many binades; a zero block, negative zeros, subnormals, ties."""
    binades = torch.exp2(torch.randint(-24, 4, (rows, columns // 16, 1)))
    x = torch.randn(rows, columns) * binades.expand(-1, -1, 16).reshape(rows, columns)
    x[0, :16], x[1, :4] = 0, -0.0
    x[2, :16] = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]).repeat(2) * 448
    if dtype != BF16:  # whose subnormals the interpreter flushes
        x[3, 3], x[4, :16] = 1e-42, 1e-40
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("amax", [None, 2688.0, 1e-3, 0.0, torch.inf, 1e-38, 1e-44])
def test_every_bit_of_nearest(dtype, block_rows, amax):
    x = corners(48, 80, dtype)
    given = None if amax is None else torch.tensor([amax])
    want = ref.quantize(x, given, block_rows, None)
    same(kernel.quantize(x, given, block_rows, None, 0, False, SMALL), want)


def test_block_scales_at_ties():
    """Where the order of operations decides: the product of S and 1/6 is formed first."""
    e4m3 = lambda x: x.to(torch.float8_e4m3fn).float()  # noqa: E731
    amax, tie = torch.rand(512) + 1, 17 + 2 * (torch.arange(512) % 8)  # sixteenths
    encode = 2688 / amax
    factor = encode * (1 / 6)
    peak = tie / 16 / factor
    other = e4m3(peak * (encode / 6)) != e4m3(peak * factor)
    assert other.sum() > 5
    x = peak[:, None].repeat(1, 16)
    same(kernel.quantize(x, amax, 1, None, 0, False, SMALL), ref.quantize(x, amax, 1, None))


@pytest.mark.parametrize("dtype", [F32])
@pytest.mark.parametrize("config", [SMALL, op.Config("triton", 32, 16, 1)])
@pytest.mark.parametrize("stream", [0, 1])
def test_every_bit_of_stochastic_rounding(dtype, config, stream):
    """The grid has no influence."""
    x = corners(37, 48, dtype)
    want = ref.quantize(x, None, 1, SEED, stream)
    same(kernel.quantize(x, None, 1, SEED, stream, False, config), want)


@triton.jit
def noise_kernel(out_ptr, seed_ptr, first_row, blocks):
    row, block = first_row + tl.arange(0, 4), tl.arange(0, 2)
    noise = kernel._noise(tl.load(seed_ptr), 1, row, block, blocks, 4, 2)
    at = tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out_ptr + at, noise.reshape((4, 32)).to(tl.int32))


def test_noise_is_counted_in_64_bits():
    """Rows of a tensor of more than 2**36 elements: the draw's number has a high word."""
    first, blocks = (1 << 20) + 3, 1 << 14
    got = torch.empty(4, 32, dtype=torch.int32)
    noise_kernel[(1,)](got, SEED, first, blocks)
    draws = (torch.arange(first, first + 4)[:, None] * blocks + torch.arange(2)).reshape(-1)
    words = torch.stack(philox4x32(SEED, draws, 1), -1)[..., None]
    want = (words >> torch.tensor([0, 8, 16, 24]) & 255).reshape(4, 32)
    assert torch.equal(got.long(), want)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("amax", [None, 3.7, 0.0])
def test_every_bit_of_the_export(dtype, amax):
    x = corners(16, 64, dtype)
    given = None if amax is None else torch.tensor(amax)
    got = kernel.quantize(x, given, 1, None, 0, False, SMALL, export=True)
    same(got, ref.quantize_weight(x, given))


@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity(value, export):
    x = torch.randn(32, 48)
    x[5, 20] = value
    for amax in (None, torch.tensor(4.0), torch.tensor(torch.nan)):
        got = kernel.quantize(x, amax, 1, None, 0, False, SMALL, export)
        want = ref.quantize_weight(x, amax) if export else ref.quantize(x, amax, 1, None)
        same(got, want)
    if not export:
        got = kernel.quantize(x, None, 16, SEED, 0, False, SMALL)
        same(got, ref.quantize(x, None, 16, SEED))


def test_every_rounding():
    """All bfloat16 values under a block scale of 448, and the noise at every fraction."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(BF16)
    x = every.float().reshape(-1, 16)
    amax = torch.tensor(2688.0)
    same(kernel.quantize(x, amax, 1, None, 0, False, op.Config("triton", 256, 16, 1)),
         ref.quantize(x, amax, 1, None))  # fmt: skip
    x = torch.rand(256, 16) * 2688
    x[:, 0] = 2688
    same(kernel.quantize(x, amax, 1, SEED, 0, False, op.Config("triton", 64, 16, 1)),
         ref.quantize(x, amax, 1, SEED))  # fmt: skip


@pytest.mark.parametrize("shape, amax_axes", [((3, 32, 48), 1), ((3, 32, 48), 2), ((16,), 0),
                                              ((5, 16), 1), ((2, 3, 16, 32), 1)])  # fmt: skip
def test_amax_per_leading_index_and_swizzled_scales(shape, amax_axes):
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    amax = x.abs().amax(tuple(range(amax_axes, len(shape))))
    for swizzled in (False, True)[: len(shape)]:
        want = ref.quantize(x, amax, 1, None, 0, swizzled)
        same(kernel.quantize(x, amax, 1, None, 0, swizzled, SMALL), want)
        want = ref.quantize_weight(x, amax)
        same(kernel.quantize(x, amax, 1, None, 0, False, SMALL, export=True), want)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("hadamard, block_rows", [(False, 1), (True, 1), (False, 16)])
def test_both_orientations(dtype, seed, hadamard, block_rows):
    x = corners(144 if hadamard else 48, 48, dtype)
    nine, seven = torch.tensor(9.0), torch.tensor([7.0])
    for amax, amax_t, swizzled in ((None, None, True), (nine, None, False), (None, seven, False)):
        args = (x, amax, amax_t, block_rows, hadamard, seed, swizzled)
        got = kernel.quantize_pair(*args, op.Config("triton", 64, 32, 1))
        same(got, ref.quantize_pair(*args))


def test_pair_with_nan_and_rows_of_amax():
    x = torch.randn(32, 64)
    x[3, 17] = torch.nan
    amax = x.nan_to_num().abs().amax(1)
    args = (x, amax, torch.arange(64) / 7 + 1, 1, True, SEED, False)
    same(kernel.quantize_pair(*args, SMALL), ref.quantize_pair(*args))


def test_strides():
    x = torch.randn(48, 64)
    want = ref.quantize_pair(x, None, None, 1, True, None, False)
    for view in (x.t().contiguous().t(), torch.cat((x, x), 1)[:, :64]):
        same(kernel.quantize_pair(view, None, None, 1, True, None, False, SMALL), want)
    deep = torch.randn(16, 3, 32).permute(2, 1, 0)
    same(kernel.quantize(deep, None, 1, SEED, 0, False, SMALL), ref.quantize(deep, None, 1, SEED))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("size", [1, 130])
def test_dequantize(dtype, size):
    codes = torch.randint(0, 256, (3, size, 16), dtype=torch.uint8)
    scales = (torch.arange(6 * size) * 7 % 256).to(torch.uint8).reshape(3, size, 2)
    for scale_2 in (torch.tensor(0.37), torch.rand(3) + 0.1):
        got = kernel.dequantize(codes, scales, scale_2, dtype)
        want = ref.dequantize(codes, scales, scale_2, dtype)
        assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any() == (size > 18)
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", [(16,), (3, 5, 48), (300, 16), (0, 32), (4, 0)])
def test_hadamard(dtype, shape):
    x = torch.randn(shape).to(dtype)
    same([kernel.hadamard16(x)], [ref.hadamard16(x)])
    same([kernel.hadamard16(x, backward=True)], [ref.hadamard16_backward(x)])


def test_plan():
    assert op.plan(True, "", ("triton", "reference")).rows == 64
    assert "got torch.float64" in op.plan(True, "got torch.float64", ("triton", "reference")).reason
    with pytest.raises(RuntimeError, match="nvfp4: no backend"):
        op.plan(False, "", ())
