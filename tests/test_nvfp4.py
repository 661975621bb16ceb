import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

from nemokernels import (
    dequantize_nvfp4,
    pack_e2m1,
    quantize_nvfp4,
    quantize_nvfp4_pair,
    quantize_nvfp4_weight,
    swizzle_scales,
    unpack_e2m1,
    unswizzle_scales,
)
from nemokernels.ops.nvfp4 import ref

F32 = np.float32
FLOAT_MAX = np.finfo(np.float32).max
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn


def numpy_blocks(x, block_rows):
    """Largest magnitude per block, one Python loop per block."""
    rows, k = x.shape
    out = np.zeros((rows, k // 16), F32)
    for i, j in itertools.product(range(0, rows, block_rows), range(k // 16)):
        out[i : i + block_rows, j] = np.abs(x[i : i + block_rows, 16 * j : 16 * j + 16]).max()
    return out


def numpy_quantize(x, amax=None, block_rows=1):
    """NVFP4 of a float32 matrix by numpy arithmetic and the rounding of ml_dtypes."""
    x = x.astype(F32)
    with np.errstate(all="ignore"):
        amax = F32(np.abs(x).max(initial=0)) if amax is None else F32(amax)
        encode = min(F32(2688) / amax, FLOAT_MAX) if amax else F32(1)
        encode = F32(1) if encode == 0 else encode
        factor = F32(encode * (F32(1) / F32(6)))
        wanted = np.minimum(numpy_blocks(x, block_rows) * factor, F32(448))
        scale = wanted.astype(E4M3)
        inverse = np.minimum(F32(1) / (scale.astype(F32) * (F32(1) / encode)), FLOAT_MAX)
        scaled = np.clip(x * np.repeat(inverse, 16, 1), F32(-6), F32(6))
    return scaled.astype(E2M1).view(np.uint8), scale.view(np.uint8), amax / F32(2688)


def numpy_quantize_weight(x, amax=None):
    """ModelOpt's export: divide, clamp, one for zero blocks, no negative zero."""
    x = x.astype(F32)
    with np.errstate(all="ignore"):
        amax = F32(np.abs(x).max(initial=0)) if amax is None else F32(amax)
        scale_2 = amax / F32(2688)
        wanted = numpy_blocks(x, 1) / (F32(6) * scale_2)
        wanted = np.where((wanted == 0) | np.isnan(wanted), F32(1), wanted)
        scale = np.clip(wanted, F32(2**-9), F32(448)).astype(E4M3)
        scaled = x / np.repeat(scale.astype(F32) * scale_2, 16, 1)
        scaled = np.clip(np.nan_to_num(scaled, nan=0.0) + F32(0), F32(-6), F32(6))
    return scaled.astype(E2M1).view(np.uint8), scale.view(np.uint8), scale_2


def assert_same(q, want):
    assert np.array_equal(unpack_e2m1(q.codes).numpy(), want[0])
    assert np.array_equal(q.scales.view(torch.uint8).numpy(), want[1])
    assert np.array_equal(q.global_scale.numpy().reshape(()), np.asarray(want[2]))


def wide_range(rows, k, dtype=torch.float32):
    """Blocks whose magnitudes span many binades, so that block scales hit every corner."""
    x = torch.randn(rows, k) * torch.exp2(torch.randint(-24, 4, (rows, k // 16, 1))).expand(
        rows, k // 16, 16
    ).reshape(rows, k)
    x[0, :16] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("amax", [None, 3.7, 1e4, 1e-3, 0.0, np.inf])
def test_bit_exact_against_numpy(dtype, block_rows, amax):
    for x in (torch.randn(48, 80).to(dtype), wide_range(32, 2048, dtype)):
        given = None if amax is None else torch.tensor([amax])
        got = quantize_nvfp4(x, amax=given, block_rows=block_rows)
        assert_same(got, numpy_quantize(x.float().numpy(), amax, block_rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amax", [None, 3.7, 1e-3])
def test_weight_export_bit_exact_against_numpy(dtype, amax):
    for x in (torch.randn(48, 80).to(dtype), wide_range(32, 2048, dtype)):
        given = None if amax is None else torch.tensor(amax)
        assert_same(quantize_nvfp4_weight(x, amax=given), numpy_quantize_weight(
            x.float().numpy(), amax))  # fmt: skip


def test_every_bfloat16_rounds_as_ml_dtypes():
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert (ref.round_e2m1(x[x.isnan()].float()) == 7).all()
    x = x[~x.isnan()].float()
    want = np.clip(x.numpy(), F32(-6), F32(6)).astype(E2M1).view(np.uint8)
    assert np.array_equal(ref.round_e2m1(x).numpy(), want)


def test_ties_and_their_neighbours():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], F32)
    values = np.concatenate([ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(9))])
    got = ref.round_e2m1(torch.from_numpy(np.concatenate([values, -values]))).numpy()
    want = [0, 2, 2, 4, 4, 6, 6, *range(7), *range(1, 8)]
    assert got.tolist() == want + [8 + c for c in want]


def test_every_code_and_scale_decodes():
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    q = pack_e2m1(codes), scales.view(torch.float8_e4m3fn), torch.tensor(0.37)
    values = codes.numpy().view(E2M1).astype(np.float64)
    want = values * scales.numpy().view(E4M3).astype(np.float64) * np.float64(F32(0.37))
    exact = dequantize_nvfp4(*q, dtype=torch.float64).numpy()
    np.testing.assert_allclose(exact, want, rtol=1e-15)
    step = scales.numpy().view(E4M3).astype(F32) * F32(0.37)
    want = torch.from_numpy(values.astype(F32) * step)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = dequantize_nvfp4(*q, dtype=dtype)
        assert torch.equal(got.nan_to_num(nan=-7), want.to(dtype).nan_to_num(nan=-7))


def test_every_code_survives_a_round_trip():
    """x = code value * 448 has amax 2688: S is 1, the block scale 448, and nothing is lost."""
    x = torch.tensor(ref.VALUES).repeat(2, 3) * 448
    q = quantize_nvfp4(x)
    assert unpack_e2m1(q.codes).reshape(-1, 16).tolist() == [list(range(16))] * 6
    assert torch.equal(dequantize_nvfp4(*q, dtype=torch.float32), x)
    q = quantize_nvfp4_weight(x)
    assert torch.equal(dequantize_nvfp4(*q, dtype=torch.float32), x)
    assert unpack_e2m1(q.codes)[0, 8] == 0  # no negative zero in checkpoints


def test_error_is_within_half_a_step():
    """Around the largest codes a step is a third of the block's maximum; e4m3 costs 1/16 more."""
    x = torch.randn(64, 256)
    error = (dequantize_nvfp4(*quantize_nvfp4(x), dtype=torch.float32) - x).abs()
    bound = x.unflatten(-1, (16, 16)).abs().amax(-1).repeat_interleave(16, -1) / 6 * (1 + 1 / 16)
    assert (error <= bound).all()


def test_pack_puts_the_even_element_low():
    assert pack_e2m1(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [0x21, 0x0F]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_e2m1(unpack_e2m1(every)), every)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-38, 3.4e38])
@pytest.mark.parametrize("block_rows", [1, 16])
def test_extreme_tensors(value, block_rows):
    x = torch.full((16, 32), value)
    x[:, 16:] = 0
    got = quantize_nvfp4(x, block_rows=block_rows)
    assert_same(got, numpy_quantize(x.numpy(), None, block_rows))
    assert dequantize_nvfp4(*got, dtype=torch.float32).isfinite().all()
    assert_same(quantize_nvfp4_weight(x), numpy_quantize_weight(x.numpy()))


def test_blocks_too_small_for_a_scale():
    """Far below amax the block scale rounds to 0: training drops the block, export keeps 2**-9."""
    x = torch.cat([torch.full((1, 16), 2688.0), torch.full((1, 16), 2.0**-12)], 1)
    q, exported = quantize_nvfp4(x), quantize_nvfp4_weight(x)
    assert q.scales.float().tolist() == [[448.0, 0.0]]
    assert not dequantize_nvfp4(*q)[0, 16:].any() and (q.codes[0, 8:] == 0x77).all()
    assert exported.scales.float().tolist() == [[448.0, 2.0**-9]]


def test_zero_tensor():
    q, exported = quantize_nvfp4(torch.zeros(2, 32)), quantize_nvfp4_weight(torch.zeros(2, 32))
    assert not q.codes.any() and not q.scales.float().any() and q.global_scale == 0
    assert not exported.codes.any() and (exported.scales.float() == 1).all()
    assert exported.global_scale == 0 and not dequantize_nvfp4(*exported).any()


@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_nvfp4_weight])
def test_nan_stays_in_its_block(quantize):
    x = torch.randn(4, 48)
    x[2, 20] = 0.0
    clean = quantize(x)
    x[2, 20] = torch.nan
    q = quantize(x)
    wide, want = (dequantize_nvfp4(*t, dtype=torch.float32) for t in (q, clean))
    assert wide[2, 16:32].isnan().all() and (q.codes[2, 8:16] == 0x77).all()
    wide[2, 16:32] = want[2, 16:32]
    assert torch.equal(wide, want) and q.global_scale == clean.global_scale
    tile = quantize_nvfp4(x.repeat(4, 1)[:16], block_rows=16)
    lost = dequantize_nvfp4(*tile).isnan()
    assert lost[:, 16:32].all() and not lost[:, :16].any() and not lost[:, 32:].any()


@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_nvfp4_weight])
def test_infinity_is_never_a_plausible_number(quantize):
    x = torch.randn(2, 32)
    x[0, 3] = -torch.inf
    assert not dequantize_nvfp4(*quantize(x), dtype=torch.float32).isfinite().any()
    q = quantize(x, amax=torch.tensor(4.0))
    assert (q.scales.view(torch.uint8)[1] == quantize(x[1:], amax=torch.tensor(4.0)).scales.view(
        torch.uint8)).all()  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 0), (16,), (1, 16), (2, 3, 5, 32)])
def test_shapes(shape):
    x = torch.randn(shape)
    for q in (quantize_nvfp4(x), quantize_nvfp4(x, seed=1), quantize_nvfp4_weight(x)):
        assert q.codes.shape == (*shape[:-1], shape[-1] // 2) and q.codes.dtype == torch.uint8
        assert q.scales.shape == (*shape[:-1], shape[-1] // 16)
        assert q.global_scale.shape == () and dequantize_nvfp4(*q).shape == shape
    rowwise, transposed = quantize_nvfp4_pair(torch.randn(0, 32), hadamard=True)
    assert rowwise.codes.shape == (0, 16) and transposed.codes.shape == (32, 0)
    assert quantize_nvfp4(torch.randn(0, 32), block_rows=16).scales.shape == (0, 2)


def test_any_strides():
    x = torch.randn(32, 3, 64).permute(2, 1, 0)[::2]
    for a, b in zip(quantize_nvfp4(x, seed=3), quantize_nvfp4(x.contiguous(), seed=3)):
        assert a.is_contiguous() and torch.equal(a.view(torch.uint8) if a.dim() else a,
                                                 b.view(torch.uint8) if b.dim() else b)  # fmt: skip


def test_one_amax_per_expert_or_row():
    x = torch.randn(4, 16, 32) * torch.tensor([1.0, 10.0, 0.1, 0.0])[:, None, None]
    amax = x.abs().amax((1, 2))
    for quantize in (quantize_nvfp4, quantize_nvfp4_weight):
        q = quantize(x, amax=amax)
        wide = dequantize_nvfp4(*q, dtype=torch.float32)
        assert q.global_scale.shape == (4,)
        for e in range(4):
            alone = quantize(x[e])
            assert torch.equal(q.codes[e], alone.codes)
            assert torch.equal(wide[e], dequantize_nvfp4(*alone, dtype=torch.float32))
    one = amax[:1].reshape(1, 1, 1, 1)
    q = quantize_nvfp4(x[0], amax=one)
    assert torch.equal(dequantize_nvfp4(*q), dequantize_nvfp4(*quantize_nvfp4(x[0])))
    rows = quantize_nvfp4(x[0], amax=x[0].abs().amax(1))
    assert torch.equal(rows.codes[5], quantize_nvfp4(x[0, 5]).codes)


@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (130, 9), (300, 21), (0, 4), (5, 0)])
def test_swizzle_against_the_byte_formula(shape):
    rows, columns = shape
    scales = torch.randint(1, 127, shape, dtype=torch.uint8)
    got = swizzle_scales(scales)
    padded_rows, padded = -(-rows // 128) * 128, -(-columns // 4) * 4
    assert got.shape == (padded_rows, padded)
    want = np.zeros(padded_rows * padded, np.uint8)
    for r, k in itertools.product(range(rows), range(columns)):
        offset = ((r // 128) * (padded // 4) + k // 4) * 512
        want[offset + (r % 32) * 16 + (r % 128) // 32 * 4 + k % 4] = scales[r, k]
    assert np.array_equal(got.numpy().reshape(-1), want)
    assert torch.equal(unswizzle_scales(got, rows=rows, columns=columns), scales)


def test_swizzle_leaves_experts_apart_and_dtypes_alone():
    scales = torch.randn(3, 140, 6).to(torch.float8_e4m3fn)
    got = swizzle_scales(scales)
    assert got.dtype == scales.dtype
    alone = torch.stack([swizzle_scales(s).view(torch.uint8) for s in scales])
    assert torch.equal(got.view(torch.uint8), alone)
    back = unswizzle_scales(got, rows=140, columns=6)
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))
    strided = swizzle_scales(scales.transpose(0, 1)[:, 1])
    assert torch.equal(strided.view(torch.uint8), alone[1])
