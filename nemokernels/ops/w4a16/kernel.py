"""Triton kernels of w4a16: products with weights in tiled NVFP4, one or one per expert.

The weights are the left operand, so that a handful of tokens fills the narrow side of a tile. Their
codes are widened in registers: E2M1's three magnitude bits become the low exponent bits and the
leading significand bit of a float, which makes the value 2**-126 (2**-14 in float16) too small; the
block scale is multiplied by 2**119 (2**7) first, and the 2**7 that are left join the global scale.
Both factors and their product are exact. Low and high nibbles, elements i and i + 8 of a block, are
two products with the matching columns of x.

Rows past the end of an expert are loaded from row 0: they only reach results that are not stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import e4m3_value, offset64, squared_relu
from nemokernels._triton import aligned, as_rows, cdiv
from nemokernels.ops.moe_experts.kernel import Tiles, slot_sum, tile_of, tile_rows, tiles_of
from nemokernels.ops.moe_experts.passes import at_once, in_passes
from nemokernels.ops.w4a16 import native


@triton.jit
def _widened(code, dtype: tl.constexpr):
    # E2M1 codes 0 to 15, too small by the power of two above.
    if dtype == tl.bfloat16:
        return (((code & 7) << 6) | ((code & 8) << 12)).to(tl.int16).to(dtype, bitcast=True)
    elif dtype == tl.float16:
        return (((code & 7) << 9) | ((code & 8) << 12)).to(tl.int16).to(dtype, bitcast=True)
    else:
        return (((code & 7) << 22) | ((code & 8) << 28)).to(dtype, bitcast=True)


@triton.jit
def _weights(
    codes_ptr,
    scales_ptr,
    tile,
    unit,
    mask,
    dtype: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Rows of tiles (BLOCK_N / 16) by units of 64 columns (BLOCK_K / 64), at the tile's pointers:
    # elements 0 to 7 and elements 8 to 15 of every block, each (BLOCK_N, BLOCK_K / 2).
    HALF: tl.constexpr = BLOCK_K // 2
    row, byte = tl.arange(0, BLOCK_N), tl.arange(0, HALF)
    at = (row % 16 * 32)[:, None] + (byte % 32)[None, :]
    at += (tile * 512)[:, None] + ((unit + byte // 32) * 512)[None, :]
    codes = tl.load(codes_ptr + at, mask=mask[:, None], other=0).to(tl.int32)
    block = tl.arange(0, BLOCK_K // 16)
    at = (row % 16 * 4)[:, None] + (block % 4)[None, :]
    at += (tile * 64)[:, None] + ((unit + block // 4) * 64)[None, :]
    scale = e4m3_value(tl.load(scales_ptr + at, mask=mask[:, None], other=0).to(tl.int32))
    scale = (scale * (128.0 if dtype == tl.float16 else 6.646139978924579e35)).to(dtype)
    scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCK_K // 16, 8))
    scale = scale.reshape((BLOCK_N, HALF))
    return _widened(codes & 15, dtype) * scale, _widened(codes >> 4, dtype) * scale


@triton.jit(do_not_specialize=["rows"])
def w4a16_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    global_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    expert_ptr,
    row_ptr,
    experts,
    first_column,
    columns,
    rows,
    width,
    depth,
    top_k,
    stride_x,
    PART: tl.constexpr,
    GATHER: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One tile of w (width, depth) times rows of x; the result has so many columns (rows of w) from
    # the first one on, a multiple of 16. PART: "plain" has one weight; "up" squares, "slots" puts a
    # row where its slot is. GATHER: x has a row per token.
    blocks_n = tl.cdiv(columns, BLOCK_N)
    block_m, block_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    if PART == "plain":
        expert = 0
        row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < rows
        x_row = tl.where(inside, row, 0)
        slot = row
    else:
        expert, first = tile_of(offsets_ptr, expert_ptr, row_ptr, block_m, experts, BLOCK_M, LANES)
        if expert < 0:
            return
        row, inside, slot = tile_rows(order_ptr, offsets_ptr, first, expert, rows, BLOCK_M)
        x_row = slot // top_k if GATHER else tl.where(inside, row, 0)
    tiles, units = tl.cdiv(width, 16), tl.cdiv(depth, 64)
    out_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n = first_column + out_n
    n_inside = n < tiles * 16
    tile = tl.where(n_inside, n // 16, 0) * units
    codes_ptr += offset64(expert, tiles * units) * 512
    scales_ptr += offset64(expert, tiles * units) * 64
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    byte = tl.arange(0, BLOCK_K // 2)
    k = byte // 8 * 16 + byte % 8
    x_at = offset64(x_row, stride_x)[None, :] + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, depth, BLOCK_K):
        unit = start // 64
        low, high = _weights(codes_ptr, scales_ptr, tile, unit, n_inside, dtype, BLOCK_N, BLOCK_K)
        x = tl.load(x_ptr + x_at + start, mask=(start + k < depth)[:, None], other=0.0)
        acc = tl.dot(low, x, acc, input_precision="ieee")
        x = tl.load(x_ptr + x_at + start + 8, mask=(start + k < depth)[:, None], other=0.0)
        acc = tl.dot(high, x, acc, input_precision="ieee")
    acc *= tl.load(global_ptr + expert) * 128.0
    if PART == "up":
        acc = squared_relu(acc)
    at = offset64(slot if PART == "slots" else row, columns)[:, None] + out_n[None, :]
    mask = inside[:, None] & (out_n < columns)[None, :]
    tl.store(out_ptr + at, tl.trans(acc).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def w4a16_backward_kernel(
    dy_ptr,
    codes_ptr,
    scales_ptr,
    global_ptr,
    dx_ptr,
    rows,
    width,
    depth,
    stride_dy,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One tile of dy (rows, width) times w (width, depth).
    blocks_k = tl.cdiv(depth, BLOCK_K)
    first_k = tl.program_id(0) % blocks_k * BLOCK_K
    row = tl.program_id(0) // blocks_k * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    tiles, units = tl.cdiv(width, 16), tl.cdiv(depth, 64)
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    dy_at = offset64(tl.where(inside, row, 0), stride_dy)
    low_acc = tl.zeros((BLOCK_K // 2, BLOCK_M), tl.float32)
    high_acc = tl.zeros((BLOCK_K // 2, BLOCK_M), tl.float32)
    for start in range(0, width, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_inside = n < tiles * 16
        tile = tl.where(n_inside, n // 16, 0).to(tl.int64) * units
        low, high = _weights(
            codes_ptr, scales_ptr, tile, first_k // 64, n_inside, dtype, BLOCK_N, BLOCK_K
        )
        dy = tl.load(dy_ptr + dy_at[None, :] + n[:, None], mask=(n < width)[:, None], other=0.0)
        low_acc = tl.dot(tl.trans(low), dy, low_acc, input_precision="ieee")
        high_acc = tl.dot(tl.trans(high), dy, high_acc, input_precision="ieee")
    scale = tl.load(global_ptr) * 128.0
    byte = tl.arange(0, BLOCK_K // 2)
    k = first_k + byte // 8 * 16 + byte % 8
    at = offset64(row, depth)[:, None] + k[None, :]
    mask = inside[:, None] & (k < depth)[None, :]
    tl.store(dx_ptr + at, tl.trans(low_acc * scale).to(dtype), mask=mask)
    tl.store(dx_ptr + at + 8, tl.trans(high_acc * scale).to(dtype), mask=mask)


def linear(x, codes, scales, scale_2, rows, config):
    """As ref.linear."""
    out = x.new_empty((*x.shape[:-1], rows))
    if out.numel():
        flat = as_rows(x)
        _product(flat, (codes, scales, scale_2), out.view(-1, rows), "plain", config)
    return out


def linear_backward(dy, codes, scales, scale_2, columns, config):
    """As ref.linear_backward."""
    dx = dy.new_empty((*dy.shape[:-1], columns))
    if dx.numel():
        flat, tile = as_rows(dy), config.tile
        rows, depth = flat.shape[0], 64
        w4a16_backward_kernel[(cdiv(rows, tile.rows) * cdiv(columns, depth),)](
            flat, codes.contiguous(), scales.contiguous(), scale_2, dx, rows, flat.shape[1],
            columns, flat.stride(0), BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=depth,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dx


def experts(
    x, up_codes, up_scales, up_global_scale, down_codes, down_scales, down_global_scale, width,
    weights, offsets, order, config,
):  # fmt: skip
    """As ref.experts."""
    up = up_codes, up_scales, up_global_scale
    down = down_codes, down_scales, down_global_scale
    x, weights = as_rows(x), weights.contiguous()
    table = _Table(offsets, order, weights.shape[1], config)
    hidden, y = x.new_empty(order.shape[0], width), x.new_empty(x.shape)
    if not y.numel():
        return y
    _product(x, up, hidden, "up", config, table)
    slots, unit = order.shape[0], config.tile.columns
    columns = at_once(x.shape[1], slots * x.element_size(), unit, config.slot_bytes)
    return in_passes(
        x.new_empty(slots, columns), y,
        lambda rows, first: _product(
            hidden, down, rows, "slots", config, table, first, early=first == 0
        ),
        lambda rows, out: slot_sum(rows, weights, out),
    )  # fmt: skip


class _Table:
    """The route of one call, and the tiles of rows that its products share."""

    def __init__(self, offsets, order, top_k, config):
        self.offsets, self.order, self.top_k = offsets.contiguous(), order.contiguous(), top_k
        rows = config.tile.rows
        self.tiles = tiles_of(self.offsets, order.shape[0], rows, always=rows == native.WIDE)


def _product(x, weight, out, part, config, table=None, first=0, early=False):
    """out = part(x_r @ w_e), weight (codes, scales, global scale) in tiles; its columns from
    ``first`` on. ``early``: the launch before is the one that writes x."""
    codes, scales, scale_2 = (t.contiguous() for t in weight)
    rows, columns = out.shape
    tile, depth, width = config.tile, x.shape[1], codes.shape[-4] * 16
    tiles = Tiles(cdiv(rows, tile.rows)) if table is None else table.tiles
    if not columns:
        return
    route = (None, None) if table is None else (table.order, table.offsets)
    route = *route, tiles.expert, tiles.row
    top_k = 1 if table is None else table.top_k
    if config.backend == "csrc":
        native.product(aligned(x), codes, scales, scale_2, *route, top_k, part, tile.rows, out,
                       first, early and tile.rows == native.ROWS[0])  # fmt: skip
        return
    whole = cdiv(depth, 64) % (tile.depth // 64) == 0
    w4a16_kernel[(tiles.count * cdiv(columns, tile.columns),)](
        x, codes, scales, scale_2, out, *route, scale_2.numel(), first, columns, rows, width,
        depth, top_k, x.stride(0), PART=part, GATHER=part == "up", LANES=tiles.lanes,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth if whole else 64,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def specialisations():
    """Launches to compile without a GPU: the layers of the models, bfloat16."""
    from nemokernels.ops.w4a16.op import plan

    def byte(*shape):
        return torch.empty(shape, device="meta", dtype=torch.uint8)

    def weight(count, rows, columns):
        tiles = (*count, cdiv(rows, 16), cdiv(columns, 64), 16)
        return byte(*tiles, 32), byte(*tiles, 4), torch.empty(count, device="meta")

    def grouped(tokens, E, top_k, X, F):
        slots = tokens * top_k
        config = plan(slots, E, torch.bfloat16, "", ("triton",))
        x = torch.empty(tokens, X, device="meta", dtype=torch.bfloat16)
        ints = [torch.empty(n, device="meta", dtype=torch.int32) for n in (E, slots)]
        weights = torch.empty(tokens, top_k, device="meta")
        args = (x, *weight((E,), F, X), *weight((E,), X, F), F, weights, *ints)
        return lambda: experts(*args, config=config)

    nano, super_ = (128, 6, 2688, 1856), (512, 22, 1024, 2688)
    for label, *problem in (
        ("nano 8", 8, *nano), ("nano 1024", 1024, *nano), ("super 16384", 16384, *super_)
    ):  # fmt: skip
        yield _triton.Specialisation(label, grouped(*problem))
    for tokens in (8, 2048):
        x = torch.empty(tokens, 4096, device="meta", dtype=torch.bfloat16)
        config = plan(tokens, 1, torch.bfloat16, "", ("triton",))
        args = (x, *weight((), 8192, 4096), 8192, config)
        yield _triton.Specialisation(f"linear {tokens}", lambda args=args: linear(*args))
    back = (x, *weight((), 4096, 8192), 8192, config)
    yield _triton.Specialisation("linear backward", lambda: linear_backward(*back))
