"""Triton kernels of FP8 quantisation and scaling, and the launchers of the products.

The products themselves are the vendor's (``torch._scaled_mm``): its FP8 tensor cores take both
operands contiguous along the summed axis, which is what the transposed codes are for.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import multiple_of, offset64, raise_amax, squared_relu, to_fp8
from nemokernels._triton import cdiv, contiguous, divisor
from nemokernels.ops.fp8 import ref

FLOAT_MAX = tl.constexpr(ref.FLOAT_MAX)


@triton.jit
def store_inverse(inverse_ptr, scale):
    """The first program stores 1 / scale, NaN for a scale without meaning."""
    if tl.program_id(0) == 0:
        inverse = tl.div_rn(1.0, scale)
        valid = (scale > 0.0) & (scale <= FLOAT_MAX)
        tl.store(inverse_ptr, tl.where(valid, inverse, float("nan")))


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x_ptr,
    scale_ptr,
    amax_ptr,
    q_ptr,
    q_t_ptr,
    inverse_ptr,
    rows,
    width,
    stride_row,
    stride_column,
    LARGEST: tl.constexpr,
    SQUARED_RELU: tl.constexpr,
    ROWS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A tile of x (rows, width). Without ROWS and TRANSPOSE only the amax is wanted. UNIT divides
    # the rows, along which the transposed codes are stored in vectors.
    rows = multiple_of(rows, UNIT)
    program = tl.program_id(0)
    across = tl.cdiv(width, BLOCK)
    row = program // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program % across * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    x_at = offset64(row, stride_row)[:, None] + offset64(column, stride_column)[None, :]
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if SQUARED_RELU:
        x = squared_relu(x).to(x_ptr.dtype.element_ty).to(tl.float32)
    raise_amax(amax_ptr, x)
    if ROWS or TRANSPOSE:
        scale = tl.load(scale_ptr)
        store_inverse(inverse_ptr, scale)
        q = to_fp8(x * scale, LARGEST, q_ptr.dtype.element_ty)
        if ROWS:
            tl.store(q_ptr + offset64(row, width)[:, None] + column[None, :], q, mask=mask)
        if TRANSPOSE:
            q_t_at = offset64(column, rows)[:, None] + row[None, :]
            tl.store(q_t_ptr + q_t_at, tl.trans(q), mask=tl.trans(mask))


@triton.jit
def current_scale_kernel(amax_ptr, scale_ptr, LARGEST: tl.constexpr):
    amax = tl.load(amax_ptr)
    scale = tl.minimum(tl.div_rn(LARGEST, amax), FLOAT_MAX)
    tl.store(scale_ptr, tl.where((amax > 0.0) & (amax <= FLOAT_MAX), scale, 1.0))


@triton.jit
def dequantize_kernel(q_ptr, scale_inv_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    # ``elements`` stays specialised: a mask needs its divisor for vectors, which is that of the
    # width, whatever the rows.
    at = offset64(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
    q = tl.load(q_ptr + at, mask=at < elements).to(tl.float32)
    y = q * tl.load(scale_inv_ptr)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < elements)


@triton.jit
def update_kernel(
    table_ptr,
    top_ptr,
    amax_ptr,
    length,
    MOST_RECENT: tl.constexpr,
    HAS_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One column of one history. Its row of the table: address of the scale, of the history's first
    # element, and how many elements lie between the history's rows.
    column = tl.program_id(0)
    entry = table_ptr + 3 * column
    scale_ptr = tl.load(entry).to(tl.pointer_type(tl.float32))
    history_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    stride = tl.load(entry + 2)
    row = tl.arange(0, BLOCK)
    later = tl.load(history_ptr + offset64(row + 1, stride), mask=row + 1 < length, other=0.0)
    current = tl.load(history_ptr)
    if HAS_AMAX:
        reduced = tl.load(amax_ptr + column)
        current = tl.where(reduced != 0.0, reduced, current)
    if MOST_RECENT:
        maximum = current
    else:
        seen = tl.where(row + 1 < length, later, current)
        seen = tl.where(seen == seen, seen, 0.0)  # NaN is not seen
        maximum = tl.where(current != 0.0, tl.max(seen, 0), 0.0)
    scale = tl.load(scale_ptr)
    known = (maximum > 0.0) & (maximum <= FLOAT_MAX)
    scale = tl.where(known, tl.div_rn(tl.load(top_ptr + column), maximum), scale)
    tl.store(scale_ptr, tl.where(tl.abs(scale) == float("inf"), FLOAT_MAX, scale))

    tl.debug_barrier()  # every row is read before one is written
    value = tl.where(row + 1 < length, later, current)
    value = tl.where(row == 0, 0.0, value)
    if current != 0.0:
        tl.store(history_ptr + offset64(row, stride), value, mask=row < length)


def quantize(x, scale, amax, dtype, squared_relu, rows, transpose, config):
    """As ref.quantize."""
    q = x.new_empty(x.shape if rows else (0,), dtype=dtype)
    flat = (math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() else (1, 1)
    q_t = x.new_empty(flat[::-1] if transpose else (0, 0), dtype=dtype)
    inverse = x.new_empty((), dtype=torch.float32)
    if not x.numel():
        valid = (scale > 0) & scale.isfinite()
        inverse.copy_(torch.where(valid, scale.reciprocal(), torch.nan).reshape(()))
    else:
        _quantize(x.reshape(flat), scale, amax, q, q_t, inverse, dtype, squared_relu, rows,
                  transpose, config)  # fmt: skip
    return q, q_t, inverse


def _quantize(x, scale, amax, q, q_t, inverse, dtype, squared_relu, rows, transpose, config):
    height, width = x.shape
    grid = (cdiv(height, config.rows) * cdiv(width, config.columns),)
    quantize_kernel[grid](
        x, scale, amax, q, q_t, inverse, height, width, x.stride(0), x.stride(1),
        LARGEST=ref.largest(dtype), SQUARED_RELU=squared_relu, ROWS=rows, TRANSPOSE=transpose,
        UNIT=divisor(height) if transpose else 1, BLOCK_ROWS=config.rows, BLOCK=config.columns,
        num_warps=config.num_warps,
    )  # fmt: skip


def current_scale(x, dtype, squared_relu, config):
    """As ref.current_scale."""
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    scale = torch.empty_like(amax)
    if x.numel():
        rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)
        _quantize(rows, None, amax, None, None, None, dtype, squared_relu, False, False, config)
    current_scale_kernel[(1,)](amax, scale, LARGEST=ref.largest(dtype), num_warps=1)
    return scale


def dequantize(codes, scale_inv, format, dtype, config):
    """As ref.dequantize."""
    y = codes.new_empty(codes.shape, dtype=dtype)
    block = config.rows * config.columns
    if elements := codes.numel():
        dequantize_kernel[(cdiv(elements, block),)](
            codes.contiguous().view(format), scale_inv, y, elements, BLOCK=block,
            num_warps=config.num_warps,
        )  # fmt: skip
    return y


def update(scales, histories, amax, tops, most_recent, config):
    """As ref.delayed_scaling_update, for all tensors in one launch."""
    table, top = _table(
        scales[0].device,
        tuple((s.data_ptr(), s.stride(0), s.numel()) for s in scales),
        tuple((h.data_ptr(), *h.stride()) for h in histories),
        tuple(tops),
    )
    length, columns = histories[0].shape[0], top.numel()
    if columns:
        update_kernel[(columns,)](
            table, top, contiguous(amax), length,
            MOST_RECENT=most_recent, HAS_AMAX=amax is not None,
            BLOCK=_triton.next_power_of_2(length), num_warps=4 if length > 128 else 1,
        )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _table(device: torch.device, scales: tuple, histories: tuple, tops: tuple):
    """What update_kernel reads, on the device: made once, as the state stays where it is."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "delayed_scaling_update: call it once with these tensors before capturing a CUDA graph"
        )
    rows, top = [], []
    for (scale, stride, count), (history, row, column), value in zip(scales, histories, tops):
        for i in range(count):
            rows.append((scale + 4 * i * stride, history + 4 * i * column, row))
            top.append(value)
    table = torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(rows), 3)
    return table, torch.tensor(top, dtype=torch.float32, device=device)


def product(
    x, weight, bias, x8, x8_t, x_inverse, w8, w8_t, w_inverse, dy_scale, dy_amax, main_grad,
    grad_dtype, squared_relu, layer, config,
):  # fmt: skip
    """As ref.product, accumulated fast: the tensor core's own registers, without promotion."""
    dtype = x.dtype if bias is None else torch.float32
    a, b = ref.as_rows(x8), w8
    y = _scaled_mm(a, ref.E4M3, b, ref.E4M3, x_inverse, w_inverse, dtype, fast=True)
    y = y if bias is None else (y + bias.float()).to(x.dtype)
    return y.reshape(*x.shape[:-1], w8.shape[0])


def product_backward(
    dy, dy8, dy8_t, dy_inverse, x8_t, x_inverse, w8_t, w_inverse, grad_dtype, x_dtype, w_dtype,
    bias_dtype, layer, config,
):  # fmt: skip
    """As ref.product_backward, partial sums promoted to float32 (split accumulation)."""
    dx = dw = db = dy.new_empty((0,))
    if x_dtype is not None:
        dx = _scaled_mm(ref.as_rows(dy8), grad_dtype, w8_t, ref.E4M3, dy_inverse, w_inverse,
                        x_dtype, fast=False)  # fmt: skip
        dx = dx.reshape(*dy.shape[:-1], w8_t.shape[0])
    if w_dtype is not None:
        # The summed axis is the tokens': zeros fill it up to what the tensor cores take.
        pad = -dy8_t.shape[1] % 16
        a, b = (F.pad(t, (0, pad)) if pad else t for t in (dy8_t, x8_t))
        dw = _scaled_mm(a, grad_dtype, b, ref.E4M3, dy_inverse, x_inverse, w_dtype, fast=False)
    if bias_dtype is not None:
        db = ref.as_rows(dy).float().sum(0).to(bias_dtype)
    return dx, dw, db


def _scaled_mm(a, a_format, b, b_format, a_inverse, b_inverse, dtype, *, fast):
    """a (M, K) times b (N, K) transposed, codes as bytes, over both scales."""
    if not (a.numel() and b.numel()):
        return torch.zeros(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    return torch._scaled_mm(
        a.view(a_format), b.view(b_format).t(), a_inverse.reshape(()), b_inverse.reshape(()),
        out_dtype=dtype, use_fast_accum=fast,
    )  # fmt: skip


def specialisations():
    """Launches to compile without a GPU: Nemotron-H 8B's activations, bfloat16."""
    from nemokernels.ops.fp8 import kernel_norm
    from nemokernels.ops.fp8.op import plan

    yield from kernel_norm.specialisations()

    meta = {"device": "meta"}
    x = torch.empty(16384, 4096, dtype=torch.bfloat16, **meta)
    one = torch.empty((), **meta)

    def cast(dtype, squared_relu, rows, transpose):
        config = plan(transpose, "", ("triton",))
        return lambda: quantize(x, one, one, dtype, squared_relu, rows, transpose, config)

    yield _triton.Specialisation("e4m3", cast(ref.E4M3, False, True, False))
    yield _triton.Specialisation("e4m3 transposed", cast(ref.E4M3, False, True, True))
    yield _triton.Specialisation("e5m2 transposed", cast(ref.E5M2, False, True, True))
    yield _triton.Specialisation("e5m2 transposed only", cast(ref.E5M2, False, False, True))
    yield _triton.Specialisation("relu2 e4m3 transposed", cast(ref.E4M3, True, True, True))
    flat = plan(False, "", ("triton",))
    yield _triton.Specialisation("current scale", lambda: current_scale(x, ref.E4M3, False, flat))
    codes = x.to(torch.uint8)
    yield _triton.Specialisation(
        "dequantize", lambda: dequantize(codes, one, ref.E4M3, torch.bfloat16, flat)
    )
    scales, histories = [torch.empty(3, **meta)], [torch.empty(1024, 3, **meta)]
    yield _triton.Specialisation(
        "update", lambda: update(scales, histories, torch.empty(3, **meta), [448.0], False, flat)
    )
