"""Functions the Triton kernels share. Imported by ``kernel.py`` files only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels._triton import cdiv


@triton.jit
def offset64(index, stride):
    """``index * stride`` in 64 bits, for every offset along an axis that may be long.

    In Triton both factors have 32 bits where they fit, and so would their product.
    """
    return tl.cast(index, tl.int64) * stride


@triton.jit
def row_offset(row, stride, ROWS: tl.constexpr):
    """Offset of a row. ROWS divides the stride, which the product tells the compiler (a hint by
    tl.multiple_of does not): see _triton.row_divisor."""
    return offset64(row, stride // ROWS) * ROWS


@triton.jit
def multiple_of(n, UNIT: tl.constexpr):
    """n, which UNIT divides and which is not specialised: as in row_offset, the product tells."""
    return n // UNIT * UNIT


@triton.jit
def offset_in_row(i, j, strides):
    """Offset of element [i, j], which broadcast, of a row, from the strides of its first axes."""
    return offset64(i, strides[0]) + offset64(j, strides[1])


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); 0 and 1 at the infinities."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def squared_relu(x):
    """max(x, 0)**2; NaN stays."""
    x = tl.where(x < 0.0, 0.0, x)
    return x * x


@triton.jit
def softplus(x):
    """log(1 + exp(x)), accurate to the last digits of float32 for any x.

    max(x, 0) + log1p(u) with u = exp(-|x|) <= 1, and log1p(u) = 2 atanh(s) with s = u / (2 + u).
    As s <= 1/3, seven terms of the series leave 1.4e-8. The hardware's log2 has an absolute error
    of 2**-22, far too much for log(1 + u) when u is small. Above 20, torch's threshold, the result
    is x.
    """
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    t = s * s
    series = 1.0 / 11.0 + t * (1.0 / 13.0)
    series = 1.0 / 9.0 + t * series
    series = 1.0 / 7.0 + t * series
    series = 1.0 / 5.0 + t * series
    series = 1.0 / 3.0 + t * series
    log1p = 2.0 * (s + s * t * series)
    return tl.where(x > 0.0, x, 0.0) + log1p


@triton.jit
def raise_amax(amax_ptr, x):
    """amax = max(amax, |x|), in place, for a float32 tile x (rows, columns). NaN does not count.

    Non-negative floats are ordered like their bits, and a maximum of integers does not depend on
    the order of the atomics.
    """
    magnitude = tl.where(x == x, tl.abs(x), 0.0)
    largest = tl.max(tl.max(magnitude, 1), 0)
    bits_ptr = amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.atomic_max(bits_ptr, largest.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def to_fp8(x, largest, dtype: tl.constexpr):
    """float32 to the FP8 format with this largest value: saturating, to nearest even; NaN stays."""
    x = tl.where(x > largest, largest, x)
    x = tl.where(x < -largest, -largest, x)
    return x.to(dtype)


@triton.jit
def e4m3_value(code):
    """The float32 of E4M3 codes (int32, 0 to 255), exactly and on any architecture."""
    magnitude = code & 0x7F
    value = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, value)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(code > 127, -value, value)


@triton.jit(do_not_specialize=["T", "S"])
def clear_outside_kernel(
    x_ptr, bounds_ptr, T, S, width, stride, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    outside = (t < tl.load(bounds_ptr)) | (t >= tl.load(bounds_ptr + S))
    outside &= t < T
    if tl.max(outside.to(tl.int32), 0) > 0:
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            at = offset64(t, stride)[:, None] + column[None, :]
            zero = tl.zeros((BLOCK_T, BLOCK), x_ptr.dtype.element_ty)
            tl.store(x_ptr + at, zero, mask=outside[:, None] & (column < width)[None, :])


def clear_outside(x: torch.Tensor, bounds: torch.Tensor) -> None:
    """Zero the tokens of x (1, T, ...) before the first of ``bounds`` and from the last one on.

    A token's elements are adjacent. Kernels that walk packed sequences visit no others: this costs
    a launch where clearing all of x first would cost a pass over it.
    """
    tokens, width = x.shape[1], x[0, 0].numel() if x.shape[1] else 0
    if width:
        clear_outside_kernel[(cdiv(tokens, 16),)](
            x, bounds, tokens, bounds.shape[0] - 1, width, x.stride(1), BLOCK_T=16, BLOCK=256,
            num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def column_sum_kernel(
    partial_ptr, out_ptr, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        at = offset64(row, width)[:, None] + column[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=column < width)


def column_sum(partial: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Sum of ``partial`` (rows, width), contiguous float32, over its rows, in a fixed order.

    The second step of every gradient that is summed over rows; in the first step each program
    leaves one row. The result is written to ``out`` (``width`` elements, contiguous) and returned.
    """
    rows, width = partial.shape
    if width:
        grid = (cdiv(width, 32),)
        column_sum_kernel[grid](partial, out, rows, width, BLOCK_ROWS=32, BLOCK=32, num_warps=4)
    return out
