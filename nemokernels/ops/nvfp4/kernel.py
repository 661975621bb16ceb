"""Triton kernels of nvfp4: tensor maxima, quantisation, the Hadamard transform, dequantisation.

A program reads one tile of x once and quantises it along its columns, along its rows after
transposing it in registers, or both. All arithmetic is the reference's, operation by operation in
float32 with correctly rounded division, so that the bits are its bits. E4M3 and E2M1 are rounded
with integer and float32 operations rather than conversions, which differ between architectures.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import e4m3_value, multiple_of, offset64, raise_amax
from nemokernels._triton import cdiv
from nemokernels.ops.nvfp4.ref import SIGNS

NEGATIVE = tl.constexpr(sum(1 << i for i, sign in enumerate(SIGNS) if sign < 0))
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _e4m3_code(v):
    # Nearest even, of v in [0, 448] or NaN. Below 2**-6 the spacing is 2**-9, as it is at 2**14.
    bits = v.to(tl.int32, bitcast=True)
    code = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120 << 23)) >> 20
    small = (v + 16384.0).to(tl.int32, bitcast=True) & 15
    code = tl.where(v < 0.015625, small, code)
    return tl.where(v != v, 0x7F, code)


@triton.jit
def _e2m1_code(x, noise, NOISE: tl.constexpr):
    # Counts steps of the spacing at |x|: .5 below 2, 1 below 4, else 2.
    size = tl.abs(x)
    size = tl.where(size < 6.0, size, 6.0)
    middle, high = size >= 2.0, size >= 4.0
    per_step = tl.where(high, 0.5, tl.where(middle, 1.0, 2.0))
    if NOISE:
        step = tl.where(high, 0.0078125, tl.where(middle, 0.00390625, 0.001953125))
        count = ((size + noise.to(tl.float32) * step) * per_step).to(tl.int32)
    else:
        count = (size * per_step + 8388608.0).to(tl.int32, bitcast=True) & 7
    code = count + tl.where(high, 4, tl.where(middle, 2, 0))
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(x != x, 7, code | sign)


@triton.jit
def _noise(seed, stream, row, block, blocks, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    # (ROWS, BLOCKS, 16) bytes: one draw of four words per block, counted row by row.
    draw = offset64(row, blocks)[:, None] + block[None, :]
    low, high = draw.to(tl.uint32), (draw >> 32).to(tl.uint32)
    third = tl.full((ROWS, BLOCKS), stream, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, third, third * 0, 10)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape((ROWS, BLOCKS, 4, 1))
    shift = (tl.arange(0, 4) * 8).to(tl.uint32)
    noise = (words >> shift[None, None, None, :]) & 255
    return noise.reshape((ROWS, BLOCKS, 16))


@triton.jit
def _butterflies(x, GROUPS: tl.constexpr):
    # (GROUPS, 16) times H / 4. Each round combines neighbours and turns the index by one bit.
    for _ in tl.static_range(4):
        a, b = tl.split(x.reshape((GROUPS, 8, 2)))
        x = tl.trans(tl.join(a + b, a - b), (0, 2, 1)).reshape((GROUPS, 16))
    return x * 0.25


@triton.jit
def _signs():
    return tl.where((NEGATIVE >> tl.arange(0, 16)) & 1 != 0, -1.0, 1.0)[None, :]


@triton.jit
def _hadamard(x, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # Along the columns, rounded to dtype, in float32.
    GROUPS: tl.constexpr = ROWS * COLUMNS // 16
    x = _butterflies(x.reshape((GROUPS, 16)) * _signs(), GROUPS)
    return x.to(dtype).to(tl.float32).reshape((ROWS, COLUMNS))


@triton.jit
def _load(x_ptr, row, column, rows, columns, stride):
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = offset64(row, stride)[:, None] + column[None, :]
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def nvfp4_amax_kernel(
    x_ptr,
    amax_ptr,
    amax_t_ptr,
    rows,
    columns,
    stride,
    ROWWISE: tl.constexpr,
    HADAMARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Raises amax by one tile, and amax_t by its transformed transpose.
    tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    x = _load(x_ptr, row, column, rows, columns, stride)
    if ROWWISE:
        raise_amax(amax_ptr, x)
    if HADAMARD:
        x = _hadamard(tl.trans(x), x_ptr.dtype.element_ty, COLUMNS, ROWS)
        raise_amax(amax_t_ptr, x)


@triton.jit
def _quantize(
    x,
    row,
    first_column,
    rows,
    columns,
    amax_ptr,
    rows_per_amax,
    seed_ptr,
    stream,
    codes_ptr,
    scales_ptr,
    global_ptr,
    matrix_rows,
    EXPORT: tl.constexpr,
    NOISE: tl.constexpr,
    SQUARE: tl.constexpr,
    SWIZZLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # One tile (ROWS, COLUMNS) in blocks along its columns; the tile begins at `first_column`.
    # rows_per_amax and matrix_rows are None where all rows have one amax, or are one matrix.
    BLOCKS: tl.constexpr = COLUMNS // 16
    block = first_column // 16 + tl.arange(0, BLOCKS)
    inside = row < rows
    group = row // rows_per_amax if rows_per_amax is not None else row * 0
    amax = tl.load(amax_ptr + group, mask=inside, other=1.0)
    top = tl.full((ROWS,), 2688.0, tl.float32)
    one = tl.full((ROWS, BLOCKS), 1.0, tl.float32)
    x = x.reshape((ROWS, BLOCKS, 16))
    # As integers, so that a NaN is the largest.
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    if SQUARE:
        of_tile = tl.max(peak.reshape((ROWS // 16, 16, BLOCKS)), 1)
        peak = tl.broadcast_to(of_tile[:, None, :], (ROWS // 16, 16, BLOCKS))
        peak = peak.reshape((ROWS, BLOCKS))
    peak = peak.to(tl.float32, bitcast=True)
    scale_2 = tl.div_rn(amax, top)
    if EXPORT:
        g = tl.broadcast_to(scale_2[:, None], (ROWS, BLOCKS))
        wanted = tl.div_rn(peak, 6.0 * g)
        zero = (wanted == 0.0) | ((g == 0.0) & (wanted != wanted))
        wanted = tl.where(wanted < 0.001953125, 0.001953125, wanted)
        wanted = tl.where(wanted > 448.0, 448.0, wanted)
        scale = _e4m3_code(tl.where(zero, 1.0, wanted))
        step = tl.broadcast_to((e4m3_value(scale) * g)[:, :, None], (ROWS, BLOCKS, 16))
        scaled = tl.where(x == 0.0, 0.0, tl.div_rn(x, step))
    else:
        encode = tl.div_rn(top, amax)
        encode = tl.where(encode > FLOAT_MAX, FLOAT_MAX, encode)
        encode = tl.where((amax == 0.0) | (encode == 0.0), 1.0, encode)
        wanted = peak * (encode * (1.0 / 6.0))[:, None]
        scale = _e4m3_code(tl.where(wanted > 448.0, 448.0, wanted))
        decode = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), encode)
        inverse = tl.div_rn(one, e4m3_value(scale) * decode[:, None])
        inverse = tl.where(inverse > FLOAT_MAX, FLOAT_MAX, inverse)
        scaled = x * inverse[:, :, None]
    noise = scale
    if NOISE:
        noise = _noise(tl.load(seed_ptr), stream, row, block, columns // 16, ROWS, BLOCKS)
    codes = _e2m1_code(scaled, noise, NOISE)
    low, high = tl.split(codes.reshape((ROWS, COLUMNS // 2, 2)))
    byte = first_column // 2 + tl.arange(0, COLUMNS // 2)
    at = offset64(row, columns // 2)[:, None] + byte[None, :]
    mask = inside[:, None] & (byte < columns // 2)[None, :]
    tl.store(codes_ptr + at, (low | high << 4).to(tl.uint8), mask=mask)
    if SWIZZLED:
        tiles = tl.cdiv(columns // 16, 4)
        r, band = row, row // 128
        if matrix_rows is not None:
            r = row % matrix_rows
            band = offset64(row // matrix_rows, tl.cdiv(matrix_rows, 128)) + r // 128
        in_tile = r % 32 * 16 + r % 128 // 32 * 4
        at = (offset64(band, tiles)[:, None] + (block // 4)[None, :]) * 512
        at += in_tile[:, None] + (block % 4)[None, :]
    else:
        at = offset64(row, columns // 16)[:, None] + block[None, :]
    mask = inside[:, None] & (block < columns // 16)[None, :]
    tl.store(scales_ptr + at, scale.to(tl.uint8), mask=mask)
    first = row % rows_per_amax if rows_per_amax is not None else row
    tl.store(global_ptr + group, scale_2, mask=inside & (first == 0) & (first_column == 0))


@triton.jit(do_not_specialize=["rows", "matrix_rows"])
def nvfp4_quantize_kernel(
    x_ptr,
    rows,
    columns,
    stride,
    seed_ptr,
    stream,
    amax_ptr,
    rows_per_amax,
    codes_ptr,
    scales_ptr,
    global_ptr,
    matrix_rows,
    amax_t_ptr,
    rows_per_amax_t,
    codes_t_ptr,
    scales_t_ptr,
    global_t_ptr,
    EXPORT: tl.constexpr,
    NOISE: tl.constexpr,
    SQUARE: tl.constexpr,
    SWIZZLED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HADAMARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if TRANSPOSED:
        rows = multiple_of(rows, 16)  # blocks of 16 lie along them
    tiles = tl.cdiv(columns, COLUMNS)
    first_row = tl.program_id(0) // tiles * ROWS
    first_column = tl.program_id(0) % tiles * COLUMNS
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    x = _load(x_ptr, row, column, rows, columns, stride)
    _quantize(x, row, first_column, rows, columns, amax_ptr, rows_per_amax, seed_ptr, stream,
              codes_ptr, scales_ptr, global_ptr, matrix_rows, EXPORT, NOISE, SQUARE, SWIZZLED,
              ROWS, COLUMNS)  # fmt: skip
    if TRANSPOSED:
        x = tl.trans(x)
        if HADAMARD:
            x = _hadamard(x, x_ptr.dtype.element_ty, COLUMNS, ROWS)
        _quantize(x, column, first_row, columns, rows, amax_t_ptr, rows_per_amax_t, seed_ptr,
                  stream + 1, codes_t_ptr, scales_t_ptr, global_t_ptr, None, EXPORT, NOISE,
                  SQUARE, SWIZZLED, COLUMNS, ROWS)  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "blocks_per_global"])
def nvfp4_dequantize_kernel(
    codes_ptr,
    scales_ptr,
    global_ptr,
    out_ptr,
    blocks,
    blocks_per_global,
    BLOCK: tl.constexpr,
):
    # BLOCK blocks of 16, as they lie in memory.
    block = offset64(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
    inside = block < blocks
    scale = e4m3_value(tl.load(scales_ptr + block, mask=inside, other=0).to(tl.int32))
    step = scale * tl.load(global_ptr + block // blocks_per_global, mask=inside, other=0.0)
    byte = tl.arange(0, 8)
    at = (block * 8)[:, None] + byte[None, :]
    packed = tl.load(codes_ptr + at, mask=inside[:, None], other=0).to(tl.int32)
    codes = tl.join(packed & 15, packed >> 4).reshape((BLOCK, 16))
    # Exponent and leading bit of the significand in place, 2**-126 too small; times 2**126.
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    at = (block * 16)[:, None] + tl.arange(0, 16)[None, :]
    out = (value * step[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=inside[:, None])


@triton.jit(do_not_specialize=["groups"])
def hadamard16_kernel(x_ptr, out_ptr, groups, BACKWARD: tl.constexpr, GROUPS: tl.constexpr):
    group = offset64(tl.program_id(0), GROUPS) + tl.arange(0, GROUPS)
    at = (group * 16)[:, None] + tl.arange(0, 16)[None, :]
    mask = (group < groups)[:, None]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        x = _butterflies(x, GROUPS) * _signs()
    else:
        x = _butterflies(x * _signs(), GROUPS)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=mask)


def quantize(x, amax, block_rows, seed, stream, swizzled, config, export=False):
    """As ref.quantize of something that is not empty; with ``export`` as ref.quantize_weight."""
    rows = _matrix(x)
    if amax is None:
        amax = _amax(rows, True, False, config)[0]
    out = _Target(x.shape, amax, swizzled)
    _launch(rows, seed, stream, out, None, config, EXPORT=export, SQUARE=block_rows == 16,
            SWIZZLED=swizzled, HADAMARD=False)  # fmt: skip
    return out.tensors


def quantize_pair(x, amax, amax_t, block_rows, hadamard, seed, swizzled, config):
    """As ref.quantize_pair of a matrix that is not empty."""
    rows = _matrix(x)
    missing = (amax is None, amax_t is None and hadamard)
    if any(missing):
        found, found_t = _amax(rows, *missing, config)
        amax = found if amax is None else amax
        amax_t = found_t if missing[1] else amax_t
    amax_t = amax if amax_t is None else amax_t
    out, out_t = _Target(x.shape, amax, swizzled), _Target(x.mT.shape, amax_t, swizzled)
    _launch(rows, seed, 0, out, out_t, config, EXPORT=False, SQUARE=block_rows == 16,
            SWIZZLED=swizzled, HADAMARD=hadamard)  # fmt: skip
    return *out.tensors, *out_t.tensors


class _Target:
    """Where one orientation goes: its outputs, its amax and how many rows share an entry of it."""

    def __init__(self, shape, amax, swizzled):
        *leading, columns = shape
        self.matrix_rows = leading[-1] if swizzled and len(leading) > 1 else None
        rows = shape.numel() // columns
        self.amax, self.rows_per_amax = amax.contiguous(), None
        if amax.numel() > 1:
            self.rows_per_amax = rows // amax.numel()
        codes = amax.new_empty((*leading, columns // 2), dtype=torch.uint8)
        blocks = columns // 16
        if swizzled:
            padded = (*leading[:-1], cdiv(leading[-1], 128) * 128, cdiv(blocks, 4) * 4)
            scales = amax.new_zeros(padded, dtype=torch.uint8)
        else:
            scales = amax.new_empty((*leading, blocks), dtype=torch.uint8)
        self.tensors = codes, scales, amax.new_empty(amax.shape)


def _launch(rows, seed, stream, out, out_t, config, **constants):
    turned = out if out_t is None else out_t
    grid = (cdiv(rows.shape[0], config.rows) * cdiv(rows.shape[1], config.columns),)
    nvfp4_quantize_kernel[grid](
        rows, *rows.shape, rows.stride(0), seed, stream, out.amax, out.rows_per_amax,
        *out.tensors, out.matrix_rows, turned.amax, turned.rows_per_amax, *turned.tensors,
        NOISE=seed is not None, TRANSPOSED=out_t is not None, ROWS=config.rows,
        COLUMNS=config.columns, num_warps=config.num_warps, **constants,
    )  # fmt: skip


def _amax(rows, rowwise, hadamard, config):
    """max |x| over what is not NaN, of x and of its transformed transpose; each () float32."""
    count = cdiv(rows.shape[0], config.rows) * cdiv(rows.shape[1], config.columns)
    amax, amax_t = torch.zeros(2, dtype=torch.float32, device=rows.device)
    nvfp4_amax_kernel[(count,)](
        rows, amax, amax_t, *rows.shape, rows.stride(0), ROWWISE=rowwise, HADAMARD=hadamard,
        ROWS=config.rows, COLUMNS=config.columns, num_warps=config.num_warps,
    )  # fmt: skip
    return amax, amax_t


def dequantize(codes, scales, scale_2, dtype):
    """As ref.dequantize, to a dtype other than float64."""
    out = codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 2), dtype=dtype)
    if blocks := scales.numel():
        each = blocks // max(scale_2.numel(), 1)
        nvfp4_dequantize_kernel[(cdiv(blocks, 128),)](
            codes.contiguous(), scales.contiguous(), scale_2.contiguous(), out, blocks, each,
            BLOCK=128, num_warps=4,
        )  # fmt: skip
    return out


def hadamard16(x, backward=False):
    """As ref.hadamard16 or ref.hadamard16_backward."""
    out = x.new_empty(x.shape)
    if groups := x.numel() // 16:
        hadamard16_kernel[(cdiv(groups, 128),)](
            x.contiguous(), out, groups, BACKWARD=backward, GROUPS=128, num_warps=4
        )
    return out


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, columns) with neighbouring columns."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def specialisations():
    """Launches to compile without a GPU: an activation of Nemotron 3 Nano, bfloat16."""
    from nemokernels.ops.nvfp4.op import plan

    x = torch.empty(16384, 2688, device="meta", dtype=torch.bfloat16)
    amax = torch.empty(1, device="meta")
    seed = torch.empty((), device="meta", dtype=torch.int64)
    pair, single = (plan(t, "", ("triton",)) for t in (True, False))
    for label, launch in (
        ("rows", lambda: quantize(x, amax, 1, None, 0, False, single)),
        ("rows swizzled, amax", lambda: quantize(x, None, 1, None, 0, True, single)),
        ("rows stochastic", lambda: quantize(x, amax, 1, seed, 0, False, single)),
        ("export", lambda: quantize(x, amax, 1, None, 0, False, single, export=True)),
        ("activation", lambda: quantize_pair(x, amax, amax, 1, True, None, False, pair)),
        ("gradient", lambda: quantize_pair(x, amax, amax, 1, True, seed, False, pair)),
        ("gradient, amax", lambda: quantize_pair(x, None, None, 1, True, seed, True, pair)),
        ("weight", lambda: quantize_pair(x, amax, None, 16, False, None, False, pair)),
    ):
        yield _triton.Specialisation(label, launch)
    codes, scales = x[:, :1344].to(torch.uint8), x[:, :168].to(torch.uint8)
    yield _triton.Specialisation("decode", lambda: dequantize(codes, scales, amax, x.dtype))
    yield _triton.Specialisation("hadamard", lambda: hadamard16(x))
    yield _triton.Specialisation("hadamard backward", lambda: hadamard16(x, backward=True))
