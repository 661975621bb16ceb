"""Triton kernels of moe_experts: grouped products over the rows of each expert.

T tokens of width X, E experts of width F, R rows sorted by expert, one per slot. A token has k
slots, in a ragged route any number. Rows of tokens are gathered where they are loaded and results
go straight to their slots, so no permuted copy exists; the slots hold a block of columns at a time
(passes.py). A table made on the device gives each tile of rows its expert; where there are fewer
rows than experts, every row may begin a tile and programs find its expert themselves. The grids
depend on shapes alone, and programs without a tile return.

Rows past the end of an expert, and strided columns past the width, are loaded from somewhere valid
rather than masked: they only reach results that are not stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nemokernels import _triton
from nemokernels._tl import column_sum, offset64, squared_relu
from nemokernels._triton import as_rows, cdiv, contiguous
from nemokernels.ops.moe_experts import native
from nemokernels.ops.moe_experts.passes import at_once, in_passes

TABLE_BLOCK = 32


@triton.jit(do_not_specialize=["tiles", "slots"])
def moe_experts_tiles_kernel(
    offsets_ptr,
    expert_ptr,
    row_ptr,
    tiles,
    experts,
    slots,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Expert (-1 for none) and first row of every tile of BLOCK_M rows. Ends that decrease or lie
    # beyond the rows give an expert none or all of them; tile_rows() drops what is no row.
    lane = tl.arange(0, LANES)
    inside = lane < experts
    ends = tl.load(offsets_ptr + lane, mask=inside, other=0)
    starts = tl.load(offsets_ptr + lane - 1, mask=inside & (lane > 0), other=0)
    ends = tl.minimum(tl.maximum(ends, 0), slots)
    starts = tl.minimum(tl.maximum(starts, 0), slots)
    counts = tl.where(inside, tl.maximum(ends - starts, 0), 0)
    needed = tl.cdiv(counts, BLOCK_M)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.cumsum(needed, 0)[None, :] <= tile[:, None]
    expert = tl.sum(before.to(tl.int32), 1)
    within = tile - tl.sum(tl.where(before, needed[None, :], 0), 1)
    row = tl.sum(tl.where(before, counts[None, :], 0), 1) + within * BLOCK_M
    mask = tile < tiles
    tl.store(expert_ptr + tile, tl.where(expert < experts, expert, -1), mask=mask)
    tl.store(row_ptr + tile, row, mask=mask)


@triton.jit
def tile_of(
    offsets_ptr,
    expert_ptr,
    row_ptr,
    tile,
    experts,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
):
    # Expert, -1 for none, and first row of a tile. Without a table tile i begins at row i, if that
    # is an expert's first or a multiple of BLOCK_M rows behind it.
    if expert_ptr is None:
        lane = tl.arange(0, LANES)
        inside = lane < experts
        ends = tl.load(offsets_ptr + lane, mask=inside, other=0)
        expert = tl.sum((inside & (ends <= tile)).to(tl.int32), 0)
        first = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
        begins = (expert < experts) & ((tile - first) % BLOCK_M == 0)
        expert, row = tl.where(begins, expert, -1), tile
    else:
        expert, row = tl.load(expert_ptr + tile), tl.load(row_ptr + tile)
    return expert, row


@triton.jit
def tile_rows(order_ptr, offsets_ptr, first, expert, slots, BLOCK_M: tl.constexpr):
    # Rows of an expert's tile from its first on, which are real, and their slots.
    row = first + tl.arange(0, BLOCK_M)
    inside, slot = slots_of(order_ptr, row, tl.load(offsets_ptr + expert), slots)
    return row, inside, slot


@triton.jit
def slots_of(order_ptr, row, end, slots):
    # Which of these rows are real, and their slots. A route that is not one stays in bounds: its
    # rows are not real, and their slot is 0.
    inside = row < tl.minimum(end, slots)
    slot = tl.load(order_ptr + row, mask=inside, other=0)
    inside &= (slot >= 0) & (slot < slots)
    return inside, tl.where(inside, slot, 0)


@triton.jit
def token_of(tokens_ptr, slot, top_k):
    # A ragged route has a table of its slots' tokens.
    if tokens_ptr is None:
        token = slot // top_k
    else:
        token = tl.load(tokens_ptr + slot)
    return token


@triton.jit(do_not_specialize=["slots"])
def moe_experts_rows_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    tokens_ptr,
    expert_ptr,
    row_ptr,
    weights_ptr,
    hidden_ptr,
    partial_ptr,
    experts,
    first_column,
    columns,
    width,
    depth,
    slots,
    top_k,
    stride_a_row,
    stride_b_expert,
    stride_b_n,
    stride_b_k,
    PART: tl.constexpr,
    GATHER: tl.constexpr,
    TMA_A: tl.constexpr,
    TMA_B: tl.constexpr,
    K_INNER: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One tile of a_r @ b_e, (depth) x (depth, width), of which the result has so many columns from
    # the first one on. PART says what becomes of it: "up" squares, "slots" puts row r where its
    # slot is, "dhidden" is the gradient past squared ReLU and weight.
    # GATHER: a has a row per token. TMA: a or b is a descriptor of its rows; those of b run along
    # the depth (K_INNER) or the width. SWAP: b is the left operand, for a handful of rows.
    blocks_n = tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0) // blocks_n
    block_n = tl.program_id(0) % blocks_n
    expert, first = tile_of(offsets_ptr, expert_ptr, row_ptr, tile, experts, BLOCK_M, LANES)
    if expert < 0:
        return
    row, inside, slot = tile_rows(order_ptr, offsets_ptr, first, expert, slots, BLOCK_M)
    a_row = token_of(tokens_ptr, slot, top_k) if GATHER else tl.where(inside, row, 0)
    out_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first_n = first_column + block_n * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if not TMA_A:
        a_at = offset64(a_row, stride_a_row)
        if SWAP:
            a_ptrs = a_ptr + (a_at[None, :] + k[:, None])
        else:
            a_ptrs = a_ptr + (a_at[:, None] + k[None, :])
    if not TMA_B:
        # Clamped columns would hide from the compiler that neighbours are contiguous.
        column = tl.minimum(n, width - 1) if K_INNER else n
        b_at = offset64(expert, stride_b_expert) + offset64(column, stride_b_n)
        if SWAP:
            b_ptrs = b_ptr + (b_at[:, None] + offset64(k, stride_b_k)[None, :])
        else:
            b_ptrs = b_ptr + (b_at[None, :] + offset64(k, stride_b_k)[:, None])
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = depth - start
        if TMA_A:
            a = a_ptr.load([first, start])
        elif EVEN_K:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k[:, None] if SWAP else k[None, :]) < left, other=0.0)
        if TMA_B and K_INNER:
            b = b_ptr.load([expert * width + first_n, start]).T
        elif TMA_B:
            b = b_ptr.load([expert * depth + start, first_n])
        elif EVEN_K and K_INNER:
            b = tl.load(b_ptrs)
        elif SWAP:
            b_mask = (k < left)[None, :] & (n < width)[:, None]
            b = tl.load(b_ptrs, mask=b_mask, other=0.0)
        else:
            b_mask = (k < left)[:, None] & (n < width)[None, :]
            b = tl.load(b_ptrs, mask=b_mask, other=0.0)
        if SWAP:
            acc = tl.dot(b, a, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        if not TMA_A:
            a_ptrs += BLOCK_K
        if not TMA_B:
            b_ptrs += offset64(BLOCK_K, stride_b_k)
    if SWAP:
        acc = tl.trans(acc)
    mask = inside[:, None] & (out_n < columns)[None, :]
    dtype = out_ptr.dtype.element_ty
    if PART == "slots":
        at = offset64(slot, columns)[:, None] + out_n[None, :]
        tl.store(out_ptr + at, acc.to(dtype), mask=mask)
    else:
        at = offset64(row, columns)[:, None] + out_n[None, :]
        if PART == "up":
            acc = squared_relu(acc)
        else:
            hidden = tl.load(hidden_ptr + at, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weights_ptr + slot, mask=inside, other=0.0)
            dweight = tl.sum(tl.where(mask, hidden * acc, 0.0), 1)
            tl.store(partial_ptr + offset64(block_n, slots) + slot, dweight, mask=inside)
            acc = 2.0 * tl.sqrt(hidden) * (weight[:, None] * acc)
        tl.store(out_ptr + at, acc.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["slots"])
def moe_experts_weight_grad_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    tokens_ptr,
    weights_ptr,
    height,
    width,
    slots,
    top_k,
    stride_a_row,
    stride_b_row,
    DOWN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # out_e (height, width) = sum of a_r b_r^T over the rows of e. DOWN: a has a row per token and b
    # is weighted; otherwise b has a row per token.
    blocks_n = tl.cdiv(width, BLOCK_N)
    blocks = tl.cdiv(height, BLOCK_M) * blocks_n
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    m = block // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.maximum(tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0), 0)
    end = tl.minimum(tl.load(offsets_ptr + expert), slots)
    a_columns, b_columns = a_ptr + m[None, :], b_ptr + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        inside, slot = slots_of(order_ptr, row, end, slots)
        token = token_of(tokens_ptr, slot, top_k)
        a_at = offset64(token if DOWN else row, stride_a_row)[:, None]
        b_at = offset64(row if DOWN else token, stride_b_row)[:, None]
        a_mask = inside[:, None] & (m < height)[None, :]
        b_mask = inside[:, None] & (n < width)[None, :]
        a = tl.load(a_columns + a_at, mask=a_mask, other=0.0)
        b = tl.load(b_columns + b_at, mask=b_mask, other=0.0)
        if DOWN:
            weight = tl.load(weights_ptr + slot, mask=inside, other=0.0)
            b = (b.to(tl.float32) * weight[:, None]).to(b_ptr.dtype.element_ty)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    at = offset64(expert, height) + m
    at = offset64(at, width)[:, None] + n[None, :]
    mask = (m < height)[:, None] & (n < width)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def slot_part(slots_ptr, weights_ptr, row_of_ptr, slot, width, column, HAS_WEIGHTS: tl.constexpr):
    # What a slot adds to its token. Rows lie in the order of the slots, or where a table says.
    if row_of_ptr is None:
        row = slot
    else:
        row = tl.load(row_of_ptr + slot)
    at = offset64(row, width) + column
    part = tl.load(slots_ptr + at, mask=column < width, other=0.0).to(tl.float32)
    if HAS_WEIGHTS:
        part *= tl.load(weights_ptr + slot)
    return part


@triton.jit(do_not_specialize=["slots"])
def moe_experts_slot_sum_kernel(
    slots_ptr,
    weights_ptr,
    starts_ptr,
    row_of_ptr,
    out_ptr,
    slots,
    width,
    stride_out,
    HAS_WEIGHTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # out_t = sum_j weight_tj * slot_tj, in the order of j. TOP_K slots of each token, or those from
    # its start to the next one's; starts of any kind stay in bounds.
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if starts_ptr is None:
        first = offset64(token, TOP_K)
        for j in tl.static_range(TOP_K):
            total += slot_part(
                slots_ptr, weights_ptr, row_of_ptr, first + j, width, column, HAS_WEIGHTS
            )
    else:
        first = tl.maximum(tl.load(starts_ptr + token), 0)
        end = tl.minimum(tl.load(starts_ptr + token + 1), slots)
        for slot in range(first, end):
            total += slot_part(slots_ptr, weights_ptr, row_of_ptr, slot, width, column, HAS_WEIGHTS)
    at = offset64(token, stride_out) + column
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=column < width)


def tile_table(offsets, slots, rows):
    """Expert (-1 for none) and first row of every tile of ``rows`` rows, int32; offsets contiguous.

    As many as any routing of so many slots may need: each expert with rows leaves at most one tile
    unfilled.
    """
    experts = offsets.shape[0]
    count = slots // rows + min(slots, experts)
    expert, row = offsets.new_empty(count), offsets.new_empty(count)
    if count:
        moe_experts_tiles_kernel[(cdiv(count, TABLE_BLOCK),)](
            offsets, expert, row, count, experts, slots, BLOCK_M=rows,
            LANES=_triton.next_power_of_2(experts), BLOCK=TABLE_BLOCK, num_warps=4,
        )  # fmt: skip
    return expert, row


class Tiles(NamedTuple):
    """Tiles of rows: how many at most, the table of them if there is one, and lanes without it."""

    count: int
    expert: torch.Tensor | None = None
    row: torch.Tensor | None = None
    lanes: int = 0


def tiles_of(offsets, slots, rows, always=False):
    """The tiles of ``rows`` rows; offsets contiguous. Kernels find them themselves where that takes
    no more tiles, unless they ``always`` need a table."""
    experts = offsets.shape[0]
    if slots <= experts and not always:
        return Tiles(slots, lanes=_triton.next_power_of_2(experts))
    table = tile_table(offsets, slots, rows)
    return Tiles(table[0].shape[0], *table)


def forward(x, up, down, weights, offsets, order, starts, config):
    """As ref.forward."""
    x, route = as_rows(x), _Route(x.shape[0], weights, offsets, order, starts)
    tiles = _Tiles(route, config)
    hidden = tiles.multiply(x, up.mT, x.new_empty(route.slots, up.shape[1]), "up", True)
    return tiles.multiply_and_sum(hidden, down.mT, True), hidden


def backward(dy, x, up, down, weights, offsets, order, starts, hidden, config):
    """As ref.backward."""
    dy, x, hidden = as_rows(dy), as_rows(x), hidden.contiguous()
    route = _Route(x.shape[0], weights, offsets, order, starts)
    tiles = _Tiles(route, config)
    blocks = cdiv(up.shape[1], tiles.columns(down, "dhidden"))
    partial = torch.empty(blocks, route.slots, dtype=torch.float32, device=x.device)
    da = x.new_empty(route.slots, up.shape[1])
    tiles.multiply(dy, down, da, "dhidden", True, hidden, partial)
    dweights = column_sum(partial, weights.new_empty(weights.shape).view(-1)).view_as(weights)
    dx = tiles.multiply_and_sum(da, up, False)
    dup = _weight_grad(da, x, up, route, config.weights, down=False)
    ddown = _weight_grad(dy, hidden, down, route, config.weights, down=True)
    return dx, dup, ddown, dweights


class _Route:
    """The route of one call as the kernels take it: k slots per token, or as ``starts`` say."""

    def __init__(self, rows, weights, offsets, order, starts):
        self.rows, self.slots, self.starts = rows, order.shape[0], contiguous(starts)
        route = weights, offsets, order
        self.weights, self.offsets, self.order = (t.contiguous() for t in route)
        self.top_k, self.tokens = 1, None
        if starts is None:
            self.top_k = weights.shape[1]
        else:
            slot = torch.arange(self.slots, dtype=torch.int32, device=order.device)
            token = torch.searchsorted(self.starts[1:], slot, right=True, out_int32=True)
            self.tokens = token.clamp_(max=rows - 1)  # in bounds whatever the starts are


class _Tiles:
    """The tiles of rows that one call's products share."""

    def __init__(self, route, config):
        self.route, self.shape, self.slot_bytes = route, config.rows, config.slot_bytes
        self.native, self.tma = config.backend == "csrc", config.tma and not config.rows.swap
        rows = native.ROWS if self.native else self.shape.rows
        self.tiles = tiles_of(route.offsets, route.slots, rows, always=self.native)

    def columns(self, b, part):
        """Of a tile of a_r @ b_e."""
        if not self.native:
            return self.shape.columns
        along = native.ALONG if b.stride(1) == 1 else native.ACROSS
        return native.tile_columns(b.shape[2], native.GRADIENT if part == "dhidden" else along)

    def multiply_and_sum(self, a, b, weighted):
        """The sum of each token's slots of a_r @ b_e, (T, width) in the dtype of a."""
        slots, width, route = a.shape[0], b.shape[2], self.route
        unit = self.columns(b, "slots")
        columns = at_once(width, slots * a.element_size(), unit, self.slot_bytes)
        return in_passes(
            a.new_empty(slots, columns), a.new_empty(route.rows, width),
            lambda rows, first: self.multiply(a, b, rows, "slots", False, first=first),
            lambda rows, out: slot_sum(rows, route.weights, out, weighted, route.starts),
        )  # fmt: skip

    def multiply(self, a, b, out, part, gather, hidden=None, partial=None, first=0):
        """out = part(a_r @ b_e), its columns from ``first`` on; b (E, depth, width) of any
        strides. Returns ``out``."""
        depth, width = b.shape[1:]
        shape, route, columns = self.shape, self.route, out.shape[1]
        tiles = self.tiles
        grid = (tiles.count * cdiv(columns, shape.columns),)
        if not grid[0]:
            return out
        if self.native:
            return native.product(
                a, b.mT, route.order, route.offsets, tiles.expert, tiles.row, route.top_k, part,
                self.columns(b, part), out, first, route.tokens, (route.weights, hidden, partial),
            )  # fmt: skip
        k_inner = b.stride(1) == 1
        b_rows = b.mT if k_inner else b
        # A block that ran over the end of a matrix in k would meet the next expert's.
        tma = self.tma and (k_inner or depth % shape.depth == 0) and takes_tma(b_rows)
        tma_a, a_arg, b_arg = self.tma and not gather and takes_tma(a), a, b
        if tma_a:
            a_arg = TensorDescriptor.from_tensor(a, [shape.rows, shape.depth])
        if tma:
            block = [shape.columns, shape.depth] if k_inner else [shape.depth, shape.columns]
            b_arg = TensorDescriptor.from_tensor(b_rows.view(-1, b_rows.shape[2]), block)
        moe_experts_rows_kernel[grid](
            a_arg, b_arg, out, route.order, route.offsets, route.tokens, tiles.expert, tiles.row,
            route.weights, hidden, partial, b.shape[0], first, columns, width, depth, route.slots,
            route.top_k, a.stride(0), b.stride(0), b.stride(2), b.stride(1), PART=part,
            GATHER=gather, TMA_A=tma_a, TMA_B=tma, K_INNER=k_inner, SWAP=shape.swap,
            EVEN_K=depth % shape.depth == 0, LANES=tiles.lanes, BLOCK_M=shape.rows,
            BLOCK_N=shape.columns, BLOCK_K=shape.depth, num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )  # fmt: skip
        return out


def _weight_grad(a, b, like, route, shape, down):
    """sum a_r b_r^T over each expert's rows, in the shape (E, height, width) of ``like``."""
    out = like.new_empty(like.shape)
    experts, height, width = like.shape
    grid = (experts * cdiv(height, shape.rows) * cdiv(width, shape.columns),)
    if grid[0]:
        moe_experts_weight_grad_kernel[grid](
            a, b, out, route.order, route.offsets, route.tokens, route.weights, height, width,
            route.slots, route.top_k, a.stride(0), b.stride(0), DOWN=down, BLOCK_M=shape.rows,
            BLOCK_N=shape.columns, BLOCK_K=shape.depth, num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )  # fmt: skip
    return out


def slot_sum(slots, weights, out, weighted=True, starts=None, row_of=None):
    """The sum of each token's slots (R, X), weighted or plain; rows of out may lie apart. Where
    ``row_of`` (R,) is given, slot s is the row row_of[s] of ``slots``."""
    tokens, width = out.shape
    block = min(_triton.next_power_of_2(width), 2048)
    if out.numel():
        moe_experts_slot_sum_kernel[(tokens, cdiv(width, block))](
            slots, weights, starts, row_of, out, slots.shape[0], width, out.stride(0),
            HAS_WEIGHTS=weighted, TOP_K=weights.shape[1] if starts is None else 0, BLOCK=block,
            num_warps=min(max(block // 256, 1), 8),
        )  # fmt: skip


def takes_tma(t: torch.Tensor) -> bool:
    # What a descriptor of the rows of a contiguous tensor needs.
    inner = t.shape[-1] * t.element_size()
    rows = t.numel() // max(t.shape[-1], 1)
    aligned = inner % 16 == 0 and t.data_ptr() % 16 == 0
    return t.is_contiguous() and aligned and 0 < rows < 2**31


def specialisations():
    """Launches to compile without a GPU: the layers of the models, bfloat16, the H100's plan."""
    from nemokernels.ops.moe_experts.op import plan

    def launch(tokens, experts, top_k, X, F, gradients=False, ragged=False):
        slots = tokens * top_k
        config = plan(slots, experts, torch.bfloat16, gradients, "", ("triton",), (9, 0))
        empty = lambda *s: torch.empty(s, device="meta", dtype=torch.bfloat16)  # noqa: E731
        x, up, down, hidden = (
            empty(tokens, X), empty(experts, F, X), empty(experts, X, F), empty(slots, F)
        )  # fmt: skip
        weights = torch.empty(slots if ragged else (tokens, top_k), device="meta")
        offsets, order, starts = (
            torch.empty(n, device="meta", dtype=torch.int32) for n in (experts, slots, tokens + 1)
        )
        args = (x, up, down, weights, offsets, order, starts if ragged else None)
        if gradients:
            return lambda: backward(x, *args, hidden, config)
        return lambda: forward(*args, config)

    nano = (128, 6, 2688, 1856)
    for label, *problem in (
        ("nano 16384", 16384, *nano),
        ("nano 1024", 1024, *nano),
        ("nano 8", 8, *nano),
        ("super 16384 backward", 16384, 512, 22, 1024, 2688, True),
        ("nano 1024 backward", 1024, *nano, True),
        ("ragged", 131072, 64, 3, 1024, 2688, False, True),
        ("ragged backward", 131072, 64, 3, 1024, 2688, True, True),
    ):
        yield _triton.Specialisation(label, launch(*problem))
    # Rows sorted by expert, as the products in NVFP4 leave them: half of the columns of super.
    rows, weights = torch.empty(360448, 512, device="meta"), torch.empty(16384, 22, device="meta")
    row_of, out = torch.empty(360448, device="meta").int(), torch.empty(16384, 1024, device="meta")
    yield _triton.Specialisation("super 16384 by expert", lambda: slot_sum(
        rows.bfloat16(), weights, out.bfloat16()[:, :512], row_of=row_of))  # fmt: skip
    from nemokernels.ops.moe_experts import kernel_fp8

    yield from kernel_fp8.specialisations()
