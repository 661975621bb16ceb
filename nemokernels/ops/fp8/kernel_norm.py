"""Triton kernels of the norms that also emit FP8. x is (rows, D), float32 inside.

A program walks its rows twice in blocks of columns, for the statistics and for the result; the
second reading comes from cache. So a program can hold the many rows that a transposed store needs
to fill memory's sectors. y is rounded to its dtype before it is quantised. UNIT divides the rows,
along which the transposed codes are stored in vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import multiple_of, offset64, raise_amax, to_fp8
from nemokernels._triton import as_rows, cdiv, contiguous, divisor, row_stride
from nemokernels.ops.fp8 import ref
from nemokernels.ops.fp8.kernel import store_inverse
from nemokernels.ops.gated_rms_norm.kernel import load_gated, scale_shift
from nemokernels.ops.rms_norm.kernel import load_sum, wide_rstd


@triton.jit
def _emit(
    y, y_ptr, q_ptr, q_t_ptr, scale, largest_seen, row, column, rows, width, mask,
    LARGEST: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    # Stores a tile of y and its codes; returns the largest magnitudes seen so far.
    at = offset64(row, width)[:, None] + column[None, :]
    stored = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, stored, mask=mask)
    y = tl.where(mask, stored.to(tl.float32), 0.0)
    q = to_fp8(y * scale, LARGEST, q_ptr.dtype.element_ty)
    tl.store(q_ptr + at, q, mask=mask)
    if TRANSPOSE:
        q_t_at = offset64(column, rows)[:, None] + row[None, :]
        tl.store(q_t_ptr + q_t_at, tl.trans(q), mask=tl.trans(mask))
    return tl.maximum(largest_seen, tl.where(y == y, tl.abs(y), 0.0))


@triton.jit(do_not_specialize=["rows"])
def rms_norm_fp8_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    scale_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    q_ptr,
    q_t_ptr,
    inverse_ptr,
    amax_ptr,
    rows,
    width,
    eps,
    stride_x_row,
    stride_residual_row,
    LARGEST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = multiple_of(rows, UNIT)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK)
    x_row = offset64(row, stride_x_row)[:, None]
    residual_row = offset64(row, stride_residual_row)[:, None]
    out_row = offset64(row, width)[:, None]
    live = (row < rows)[:, None]
    rstd = wide_rstd(
        x_ptr, residual_ptr, total_ptr, x_row, residual_row, out_row, live, width, eps,
        HAS_RESIDUAL, BLOCK_ROWS, BLOCK,
    )  # fmt: skip
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    scale = tl.load(scale_ptr)
    store_inverse(inverse_ptr, scale)
    seen = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + lane
        at = column[None, :]
        mask = live & (at < width)
        x = load_sum(
            x_ptr, residual_ptr, total_ptr, x_row + at, residual_row + at, out_row + at, mask,
            HAS_RESIDUAL, False,
        )  # fmt: skip
        weight = tl.load(weight_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        seen = _emit(
            x * rstd[:, None] * weight, y_ptr, q_ptr, q_t_ptr, scale, seen, row, column, rows,
            width, mask, LARGEST, TRANSPOSE,
        )  # fmt: skip
    raise_amax(amax_ptr, seen)


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm_fp8_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    scale_ptr,
    y_ptr,
    rstd_ptr,
    q_ptr,
    q_t_ptr,
    inverse_ptr,
    amax_ptr,
    rows,
    groups,
    group_size,
    eps,
    stride_x_row,
    stride_z_row,
    LARGEST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = multiple_of(rows, UNIT)
    group = tl.program_id(0) % groups
    row = tl.program_id(0) // groups * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK)
    width = groups * group_size
    x_row, z_row = offset64(row, stride_x_row)[:, None], offset64(row, stride_z_row)[:, None]
    live = (row < rows)[:, None]
    square = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for start in range(0, group_size, BLOCK):
        at = (group * group_size + start + lane)[None, :]
        mask = live & (start + lane < group_size)[None, :]
        v, _ = load_gated(x_ptr, z_ptr, x_row + at, z_row + at, mask, HAS_Z, NORM_BEFORE_GATE)
        square += v * v
    rstd = tl.rsqrt(tl.sum(square, 1) / group_size + eps)
    tl.store(rstd_ptr + offset64(row, groups) + group, rstd, mask=row < rows)
    scale = tl.load(scale_ptr)
    store_inverse(inverse_ptr, scale)
    seen = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for start in range(0, group_size, BLOCK):
        column = group * group_size + start + lane
        at = column[None, :]
        inside = (start + lane < group_size)[None, :]
        mask = live & inside
        v, gate = load_gated(x_ptr, z_ptr, x_row + at, z_row + at, mask, HAS_Z, NORM_BEFORE_GATE)
        y = scale_shift(v, rstd, weight_ptr, bias_ptr, at, inside, HAS_BIAS)
        seen = _emit(
            gate * y, y_ptr, q_ptr, q_t_ptr, scale, seen, row, column, rows, width, mask, LARGEST,
            TRANSPOSE,
        )  # fmt: skip
    raise_amax(amax_ptr, seen)


def rms_norm(x, residual, weight, scale, eps, dtype, transpose, config):
    """As norm_ref.rms_norm; x has elements."""
    y, outputs = _outputs(x, dtype, transpose)
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    x, residual = as_rows(x), as_rows(residual)
    rows, width = x.shape
    rms_norm_fp8_kernel[(cdiv(rows, config.rows),)](
        x, residual, weight.contiguous(), scale, y, total, rstd, *outputs, rows, width, eps,
        x.stride(0), row_stride(residual), LARGEST=ref.largest(dtype),
        HAS_RESIDUAL=residual is not None, TRANSPOSE=transpose,
        UNIT=divisor(rows) if transpose else 1, BLOCK_ROWS=config.rows, BLOCK=config.columns,
        num_warps=config.num_warps,
    )  # fmt: skip
    return y, total, rstd, *_bytes(outputs)


def gated_rms_norm(
    x, weight, bias, z, scale, eps, group_size, norm_before_gate, dtype, transpose, config
):
    """As norm_ref.gated_rms_norm; x has elements."""
    groups = x.shape[-1] // group_size
    y, outputs = _outputs(x, dtype, transpose)
    rstd = x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
    x, z = as_rows(x), as_rows(z)
    rows = x.shape[0]
    gated_rms_norm_fp8_kernel[(cdiv(rows, config.rows) * groups,)](
        x, weight.contiguous(), contiguous(bias), z, scale, y, rstd,
        *outputs, rows, groups, group_size, eps, x.stride(0), row_stride(z),
        LARGEST=ref.largest(dtype), HAS_BIAS=bias is not None, HAS_Z=z is not None,
        NORM_BEFORE_GATE=norm_before_gate, TRANSPOSE=transpose,
        UNIT=divisor(rows) if transpose else 1, BLOCK_ROWS=config.rows, BLOCK=config.columns,
        num_warps=config.num_warps,
    )  # fmt: skip
    return y, rstd, *_bytes(outputs)


def _outputs(x, dtype, transpose):
    """y, and codes, transposed codes, 1 / scale, amax."""
    flat = (x.shape[-1], x.shape[:-1].numel()) if transpose else (0, 0)
    single = {"dtype": torch.float32, "device": x.device}
    q, q_t = x.new_empty(x.shape, dtype=dtype), x.new_empty(flat, dtype=dtype)
    return x.new_empty(x.shape), (q, q_t, torch.empty((), **single), torch.zeros((), **single))


def _bytes(outputs):
    q, q_t, *rest = outputs
    return q.view(torch.uint8), q_t.view(torch.uint8), *rest


def specialisations():
    """Launches to compile without a GPU: norms of Nemotron 3 Super and Nemotron-H 8B, bfloat16."""
    from nemokernels.ops.fp8.norm_op import plan

    x = torch.empty(16384, 4096, device="meta", dtype=torch.bfloat16)
    zxbcdt = torch.empty(16384, 18560, device="meta", dtype=torch.bfloat16)
    z, v = zxbcdt[:, :8192], torch.empty_like(zxbcdt[:, :8192])
    one = torch.empty((), device="meta")

    def norm(residual, transpose):
        config = plan(4096, transpose, "", ("triton",))
        return lambda: rms_norm(x, residual, x[0], one, 1e-5, ref.E4M3, transpose, config)

    def gated(transpose):
        config = plan(1024, transpose, "", ("triton",))
        return lambda: gated_rms_norm(
            v, v[0], None, z, one, 1e-5, 1024, False, ref.E4M3, transpose, config
        )

    for transpose in (False, True):
        kind = "e4m3 transposed" if transpose else "e4m3"
        yield _triton.Specialisation(f"rms_norm {kind}", norm(None, transpose))
        yield _triton.Specialisation(f"add_rms_norm {kind}", norm(x, transpose))
        yield _triton.Specialisation(f"gated_rms_norm {kind}", gated(transpose))
