"""Triton kernels of rms_norm and add_rms_norm. Rows are (rows, D); arithmetic in float32.

Every element is read once and written once where a row fits the registers of one program; wider
rows are read a second time, from cache in the forward and in dx, from memory in dweight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import column_sum, offset64
from nemokernels._triton import as_rows, cdiv, row_stride


@triton.jit
def load_sum(
    x_ptr, residual_ptr, total_ptr, x_at, residual_at, total_at, mask,
    HAS_RESIDUAL: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    # x, or x + residual as it is stored, which is done on the way.
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        if STORE:
            tl.store(total_ptr + total_at, total, mask=mask)
        x = total.to(tl.float32)
    return x


@triton.jit
def wide_rstd(
    x_ptr, residual_ptr, total_ptr, x_row, residual_row, out_row, live, width, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 1 / rms of rows read in blocks of columns; stores x + residual.
    square = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        at = (start + tl.arange(0, BLOCK))[None, :]
        x = load_sum(
            x_ptr, residual_ptr, total_ptr, x_row + at, residual_row + at, out_row + at,
            live & (at < width), HAS_RESIDUAL, True,
        )  # fmt: skip
        square += x * x
    return tl.rsqrt(tl.sum(square, 1) / width + eps)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    rows,
    width,
    eps,
    stride_x_row,
    stride_residual_row,
    HAS_RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    x_row = offset64(row, stride_x_row)[:, None]
    residual_row = offset64(row, stride_residual_row)[:, None]
    out_row = offset64(row, width)[:, None]
    live = (row < rows)[:, None]
    if WIDE:
        rstd = wide_rstd(
            x_ptr, residual_ptr, total_ptr, x_row, residual_row, out_row, live, width, eps,
            HAS_RESIDUAL, BLOCK_ROWS, BLOCK,
        )  # fmt: skip
        for start in range(0, width, BLOCK):
            at = (start + column)[None, :]
            mask = live & (at < width)
            x = load_sum(
                x_ptr, residual_ptr, total_ptr, x_row + at, residual_row + at, out_row + at, mask,
                HAS_RESIDUAL, False,
            )  # fmt: skip
            weight = tl.load(weight_ptr + at, mask=at < width, other=0.0).to(tl.float32)
            y = x * rstd[:, None] * weight
            tl.store(y_ptr + out_row + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        at = column[None, :]
        mask = live & (at < width)
        x = load_sum(
            x_ptr, residual_ptr, total_ptr, x_row + at, residual_row + at, out_row + at, mask,
            HAS_RESIDUAL, True,
        )  # fmt: skip
        weight = tl.load(weight_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
        y = x * rstd[:, None] * weight
        tl.store(y_ptr + out_row + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _store_gradients(
    dx, dx_ptr, dresidual_ptr, dtotal_ptr, out_at, dtotal_at, mask,
    HAS_RESIDUAL: tl.constexpr, HAS_DX: tl.constexpr,
):  # fmt: skip
    if HAS_RESIDUAL:
        dx += tl.load(dtotal_ptr + dtotal_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dresidual_ptr + out_at, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if HAS_DX:
        tl.store(dx_ptr + out_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    partial_ptr,
    rows,
    width,
    stride_dy_row,
    stride_dtotal_row,
    stride_x_row,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Each program takes every programs-th block of rows and leaves one row of partial dweight.
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < width
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    for block in tl.range(program, blocks, tl.num_programs(0), num_stages=STAGES):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & inside
        x = tl.load(x_ptr + offset64(row, stride_x_row)[:, None] + at, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + offset64(row, stride_dy_row)[:, None] + at, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        dy = dy.to(tl.float32)
        xhat = x.to(tl.float32) * rstd
        dxhat = dy * weight
        projection = tl.sum(xhat * dxhat, 1)[:, None] / width
        dx = rstd * (dxhat - xhat * projection)
        dweight += dy * xhat
        _store_gradients(
            dx, dx_ptr, dresidual_ptr, dtotal_ptr, offset64(row, width)[:, None] + at,
            offset64(row, stride_dtotal_row)[:, None] + at, mask, HAS_RESIDUAL, HAS_DX,
        )  # fmt: skip
    partial_at = offset64(program, width) + tl.arange(0, BLOCK)
    tl.store(partial_ptr + partial_at, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK) < width)


@triton.jit
def rms_norm_dx_wide_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    width,
    stride_dy_row,
    stride_dtotal_row,
    stride_x_row,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    x_row, dy_row = x_ptr + offset64(row, stride_x_row), dy_ptr + offset64(row, stride_dy_row)
    rstd = tl.load(rstd_ptr + row)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + column
        x = tl.load(x_row + at, mask=at < width, other=0.0).to(tl.float32)
        dy = tl.load(dy_row + at, mask=at < width, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        product += x * rstd * (dy * weight)
    projection = tl.sum(product, 0) / width
    for start in range(0, width, BLOCK):
        at = start + column
        x = tl.load(x_row + at, mask=at < width, other=0.0).to(tl.float32)
        dy = tl.load(dy_row + at, mask=at < width, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        dx = rstd * (dy * weight - x * rstd * projection)
        _store_gradients(
            dx, dx_ptr, dresidual_ptr, dtotal_ptr, offset64(row, width) + at,
            offset64(row, stride_dtotal_row) + at, at < width, HAS_RESIDUAL, HAS_DX,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def rms_norm_dweight_wide_kernel(
    dy_ptr,
    x_ptr,
    rstd_ptr,
    partial_ptr,
    rows,
    width,
    stride_dy_row,
    stride_x_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Program (p, c) sums every programs-th block of rows over the columns of block c.
    program = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (at < width)[None, :]
        x_at = offset64(row, stride_x_row)[:, None] + at[None, :]
        dy_at = offset64(row, stride_dy_row)[:, None] + at[None, :]
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        dweight += dy * (x * rstd[:, None])
    partial_at = offset64(program, width) + at
    tl.store(partial_ptr + partial_at, tl.sum(dweight, 0), mask=at < width)


def forward(x, weight, eps, config):
    """As ref.forward."""
    y, _, rstd = _forward(x, None, weight, eps, config)
    return y, rstd


def add_forward(x, residual, weight, eps, config):
    """As ref.add_forward."""
    return _forward(x, residual, weight, eps, config)


def backward(dy, x, weight, rstd, config):
    """As ref.backward."""
    dx = x.new_empty(x.shape)
    dweight = _backward(dy, None, x, weight, rstd, dx, None, config)
    return dx, dweight


def add_backward(dy, dtotal, total, weight, rstd, x_dtype, config):
    """As ref.add_backward."""
    dresidual = total.new_empty(total.shape)
    dx = total.new_empty(0 if x_dtype is None else total.shape, dtype=x_dtype)
    wanted = None if x_dtype is None else dx
    dweight = _backward(dy, dtotal, total, weight, rstd, wanted, dresidual, config)
    return dx, dresidual, dweight


def _forward(x, residual, weight, eps, config):
    y = x.new_empty(x.shape)
    total = None if residual is None else residual.new_empty(residual.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    x, residual = as_rows(x), as_rows(residual)
    rows, width = x.shape
    if rows:
        rms_norm_forward_kernel[(cdiv(rows, config.rows),)](
            x, residual, weight.contiguous(), y, total, rstd, rows, width, eps, x.stride(0),
            row_stride(residual), HAS_RESIDUAL=residual is not None,
            WIDE=width > config.block, BLOCK_ROWS=config.rows, BLOCK=config.block,
            num_warps=config.num_warps,
        )  # fmt: skip
    return y, total, rstd


def _backward(dy, dtotal, x, weight, rstd, dx, dresidual, config):
    x, dy, dtotal = as_rows(x), as_rows(dy), as_rows(dtotal)
    rows, width = x.shape
    if not rows:
        return weight.new_zeros(weight.shape)
    programs = min(config.programs, cdiv(rows, config.rows))
    partial = x.new_empty(programs, width, dtype=torch.float32)
    dtotal_stride = row_stride(dtotal)
    flags = dict(HAS_RESIDUAL=dtotal is not None, HAS_DX=dx is not None)
    weight, rstd = weight.contiguous(), rstd.contiguous()
    if width <= config.block:
        rms_norm_backward_kernel[(programs,)](
            dy, dtotal, x, weight, rstd, dx, dresidual, partial, rows, width, dy.stride(0),
            dtotal_stride, x.stride(0), **flags, BLOCK_ROWS=config.rows, BLOCK=config.block,
            STAGES=config.num_stages, num_warps=config.num_warps,
        )  # fmt: skip
    else:
        rms_norm_dx_wide_kernel[(rows,)](
            dy, dtotal, x, weight, rstd, dx, dresidual, width, dy.stride(0), dtotal_stride,
            x.stride(0), **flags, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip
        rms_norm_dweight_wide_kernel[(programs, cdiv(width, 256))](
            dy, x, rstd, partial, rows, width, dy.stride(0), x.stride(0), BLOCK_ROWS=config.rows,
            BLOCK=256, num_warps=4,
        )  # fmt: skip
    return column_sum(partial, weight.new_empty(weight.shape))


def specialisations():
    """Launches to compile without a GPU: Nemotron's widths, bfloat16, the H100's plan."""
    from nemokernels.ops.rms_norm.op import plan

    def launch(width, way, residual_dtype=None):
        x = torch.empty(32768, width, device="meta", dtype=torch.bfloat16)
        weight, rstd = x[0], torch.empty(32768, device="meta")
        config = plan(32768, width, way == "backward", "", ("triton",), 132)
        if residual_dtype is None:
            both = {"forward": (x, weight, 1e-5), "backward": (x, x, weight, rstd)}
            run = {"forward": forward, "backward": backward}[way]
        else:
            residual = x.to(residual_dtype)
            both = {
                "forward": (x, residual, weight, 1e-5),
                "backward": (
                    x,
                    residual,
                    residual,
                    weight,
                    rstd,
                    None if x.dtype == residual_dtype else x.dtype,
                ),
            }
            run = {"forward": add_forward, "backward": add_backward}[way]
        return lambda: run(*both[way], config)

    for way in ("forward", "backward"):
        for width in (2688, 4096, 8192, 18432):
            yield _triton.Specialisation(f"{width} {way}", launch(width, way))
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            yield _triton.Specialisation(f"4096 add {name} {way}", launch(4096, way, dtype))
