"""Triton kernels of gated_rms_norm. x is (rows, D), D = groups * group_size; float32 inside.

A program holds a few rows of one group, so every element is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import column_sum, offset64, sigmoid
from nemokernels._triton import as_rows, cdiv, contiguous, row_stride


@triton.jit
def load_gated(
    x_ptr, z_ptr, x_at, z_at, mask, HAS_Z: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr
):  # fmt: skip
    # What is normalised, and the factor of the result: x silu(z) and 1, or x and silu(z).
    v = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    gate = 1.0
    if HAS_Z:
        z = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
        gate = z * sigmoid(z)
        if not NORM_BEFORE_GATE:
            v *= gate
            gate = 1.0
    return v, gate


@triton.jit
def scale_shift(v, rstd, weight_ptr, bias_ptr, column, inside, HAS_BIAS: tl.constexpr):
    # v * rstd * weight + bias. column and inside broadcast against a row.
    y = v * rstd[:, None] * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    groups,
    group_size,
    eps,
    stride_x_row,
    stride_z_row,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) % groups
    row = tl.program_id(0) // groups * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK)
    inside = lane < group_size
    column = group * group_size + lane
    mask = (row < rows)[:, None] & inside[None, :]
    x_at = offset64(row, stride_x_row)[:, None] + column[None, :]
    z_at = offset64(row, stride_z_row)[:, None] + column[None, :]
    v, gate = load_gated(x_ptr, z_ptr, x_at, z_at, mask, HAS_Z, NORM_BEFORE_GATE)
    rstd = tl.rsqrt(tl.sum(v * v, 1) / group_size + eps)
    y = gate * scale_shift(v, rstd, weight_ptr, bias_ptr, column, inside, HAS_BIAS)
    y_at = offset64(row, groups * group_size)[:, None] + column[None, :]
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + offset64(row, groups) + group, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    rstd_ptr,
    dx_ptr,
    dz_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    groups,
    group_size,
    stride_dy_row,
    stride_x_row,
    stride_z_row,
    stride_dz_row,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Per group, each program takes every programs-th block of rows and leaves one row of partial
    # dweight and dbias.
    group = tl.program_id(0) % groups
    program = tl.program_id(0) // groups
    programs = tl.num_programs(0) // groups
    lane = tl.arange(0, BLOCK)
    inside = lane < group_size
    column = group * group_size + lane
    width = groups * group_size
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        dbias = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    for block in tl.range(program, blocks, programs, num_stages=STAGES):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        x_at = offset64(row, stride_x_row)[:, None] + column[None, :]
        dy_at = offset64(row, stride_dy_row)[:, None] + column[None, :]
        out_at = offset64(row, width)[:, None] + column[None, :]
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offset64(row, groups) + group, mask=row < rows, other=0.0)
        rstd = rstd[:, None]
        v = x
        if HAS_Z:
            z_at = offset64(row, stride_z_row)[:, None] + column[None, :]
            z = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
            sig = sigmoid(z)
            gate = z * sig
            if not NORM_BEFORE_GATE:
                v = x * gate
        xhat = v * rstd
        if HAS_Z and NORM_BEFORE_GATE:
            affine = xhat * weight
            if HAS_BIAS:
                affine += bias
            dgate = g * affine
            g *= gate
        dweight += g * xhat
        if HAS_BIAS:
            dbias += g
        dxhat = g * weight
        projection = tl.sum(xhat * dxhat, 1)[:, None] / group_size
        dx = (dxhat - xhat * projection) * rstd
        if HAS_Z:
            if not NORM_BEFORE_GATE:
                dgate = dx * x
                dx *= gate
            dz = dgate * (sig * (1.0 + z * (1.0 - sig)))
            dz_at = offset64(row, stride_dz_row)[:, None] + column[None, :]
            tl.store(dz_ptr + dz_at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + out_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    at = offset64(program, width) + column
    tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=inside)
    if HAS_BIAS:
        tl.store(dbias_ptr + at, tl.sum(dbias, 0), mask=inside)


def forward(x, weight, bias, z, eps, group_size, norm_before_gate, config):
    """As ref.forward."""
    groups = x.shape[-1] // group_size
    y = x.new_empty(x.shape)
    rstd = x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
    x, z = as_rows(x), as_rows(z)
    rows = x.shape[0]
    if rows and groups:
        gated_rms_norm_forward_kernel[(cdiv(rows, config.rows) * groups,)](
            x, contiguous(weight), contiguous(bias), z, y, rstd, rows, groups, group_size, eps,
            x.stride(0), row_stride(z), HAS_BIAS=bias is not None, HAS_Z=z is not None,
            NORM_BEFORE_GATE=norm_before_gate, BLOCK_ROWS=config.rows, BLOCK=config.block,
            num_warps=config.num_warps,
        )  # fmt: skip
    return y, rstd


def backward(dy, x, weight, bias, z, rstd, group_size, norm_before_gate, config, dz=None):
    """As ref.backward; ``dz``, if given, is written to: a tensor whose rows may lie apart."""
    width, groups = x.shape[-1], x.shape[-1] // group_size
    dx = x.new_empty(x.shape)
    if dz is None:
        dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    dbias = x.new_zeros(0) if bias is None else bias.new_zeros(bias.shape)
    dweight = weight.new_zeros(weight.shape)
    if not x.numel():
        return dx, dweight, dbias, dz
    dy, x, z = as_rows(dy), as_rows(x), as_rows(z)
    dz_rows = dz if z is None else dz.view(z.shape)
    rows = x.shape[0]
    programs = min(config.programs, cdiv(rows, config.rows))
    partial = x.new_empty(1 if bias is None else 2, programs, width, dtype=torch.float32)
    gated_rms_norm_backward_kernel[(programs * groups,)](
        dy, x, contiguous(weight), contiguous(bias), z, rstd.contiguous(), dx, dz_rows, partial[0],
        partial[-1], rows, groups, group_size, dy.stride(0), x.stride(0), row_stride(z),
        dz_rows.stride(0), HAS_BIAS=bias is not None, HAS_Z=z is not None,
        NORM_BEFORE_GATE=norm_before_gate, BLOCK_ROWS=config.rows, BLOCK=config.block,
        STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    column_sum(partial[0], dweight)
    if bias is not None:
        column_sum(partial[1], dbias)
    return dx, dweight, dbias, dz


def specialisations():
    """Launches to compile without a GPU: the layouts of the models, bfloat16, the H100's plan."""
    from nemokernels.ops.gated_rms_norm.op import plan

    def launch(width, groups, way, norm_before_gate=False, bias=False):
        size = width // groups
        config = plan(8192, groups, size, way == "backward", "", ("triton",), 132)
        zxbcdt = torch.empty(8192, 2 * width + 2176, device="meta", dtype=torch.bfloat16)
        z, x = zxbcdt[:, :width], torch.empty_like(zxbcdt[:, :width])
        weight, rstd = x[0], torch.empty(8192, groups, device="meta")
        b = weight if bias else None
        if way == "forward":
            return lambda: forward(x, weight, b, z, 1e-5, size, norm_before_gate, config)
        return lambda: backward(x, x, weight, b, z, rstd, size, norm_before_gate, config)

    for way in ("forward", "backward"):
        for width, groups in ((4096, 8), (8192, 8), (16384, 8)):
            yield _triton.Specialisation(f"{width} by {groups} {way}", launch(width, groups, way))
        yield _triton.Specialisation(f"norm first, bias {way}", launch(8192, 1, way, True, True))
