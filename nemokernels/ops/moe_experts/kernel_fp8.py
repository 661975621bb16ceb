"""Triton kernel of moe_experts in FP8: both operands E4M3, scales in the epilogue.

The rows of x are gathered where they are loaded, squared ReLU and the quantisation of its result
are the epilogue of the up projection, and the down projection puts each row where its slot is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nemokernels import _triton
from nemokernels._tl import offset64, squared_relu, to_fp8
from nemokernels._triton import cdiv
from nemokernels.ops.moe_experts import native
from nemokernels.ops.moe_experts.kernel import slot_sum, takes_tma, tile_of, tile_rows, tiles_of
from nemokernels.ops.moe_experts.passes import at_once, in_passes

E4M3 = torch.float8_e4m3fn


@triton.jit(do_not_specialize=["slots"])
def moe_experts_fp8_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    hidden_scale_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    expert_ptr,
    row_ptr,
    experts,
    first_column,
    columns,
    slots,
    width,
    depth,
    top_k,
    stride_a,
    UP: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COLUMN: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One tile of a_r @ b_e^T (width); the result has so many columns of it from the first one on.
    # UP: a has a row per token and its scale one or one per token, the result is squared and
    # quantised; else a is the hidden layer, under its expert's scale, and the result goes to its
    # slot. b_e has one scale or one per column of the result. SWAP: b is the left operand, for a
    # handful of rows, which as the left one would be multiplied as float16.
    blocks_n = tl.cdiv(columns, BLOCK_N)
    tile, block_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    expert, first = tile_of(offsets_ptr, expert_ptr, row_ptr, tile, experts, BLOCK_M, LANES)
    if expert < 0:
        return
    row, inside, slot = tile_rows(order_ptr, offsets_ptr, first, expert, slots, BLOCK_M)
    a_row = slot // top_k if UP else tl.where(inside, row, 0)
    out_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first_n = first_column + block_n * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (offset64(a_row, stride_a)[:, None] + k[None, :])
    if not TMA:
        b_row = offset64(expert, width) + tl.minimum(n, width - 1)
        b_ptrs = b_ptr + ((b_row * depth)[None, :] + k[:, None])
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k < depth - start)[None, :], other=0.0)
        if TMA:
            b = b_ptr.load([expert * width + first_n, start]).T
        elif EVEN_K:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=(k < depth - start)[:, None], other=0.0)
        # Hopper's FP8 products keep 14 bits of a sum: every block is added in float32.
        if SWAP:
            acc = tl.dot(tl.trans(b), tl.trans(a), acc, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=BLOCK_K)
        a_ptrs += BLOCK_K
        if not TMA:
            b_ptrs += BLOCK_K
    if SWAP:
        acc = tl.trans(acc)
    if SCALE_PER_COLUMN:
        at = offset64(expert, width) + n
        acc *= tl.load(b_scale_ptr + at, mask=n < width, other=0.0)[None, :]
    else:
        acc *= tl.load(b_scale_ptr + expert)
    mask = inside[:, None] & (out_n < columns)[None, :]
    hidden_scale = tl.load(hidden_scale_ptr + expert)
    if UP:
        if SCALE_PER_ROW:
            acc *= tl.load(a_scale_ptr + a_row, mask=inside, other=0.0)[:, None]
        else:
            acc *= tl.load(a_scale_ptr)
        acc = squared_relu(acc) * tl.div_rn(1.0, hidden_scale)
        out = to_fp8(acc, 448.0, tl.float8e4nv)
        at = offset64(row, columns)[:, None] + out_n[None, :]
    else:
        out = (acc * hidden_scale).to(out_ptr.dtype.element_ty)
        at = offset64(slot, columns)[:, None] + out_n[None, :]
    tl.store(out_ptr + at, out, mask=mask)


def forward(
    x, x_scale, up, up_scale, hidden_scale, down, down_scale, weights, offsets, order, dtype,
    config,
):  # fmt: skip
    """As ref.forward_fp8."""
    weights, offsets, order = weights.contiguous(), offsets.contiguous(), order.contiguous()
    slots, tile, by_csrc = order.shape[0], config.rows, config.backend == "csrc"
    tiles = tiles_of(offsets, slots, native.ROWS if by_csrc else tile.rows, always=by_csrc)
    hidden = x.new_empty(slots, up.shape[1])

    def tile_columns(b):
        return native.tile_columns(b.shape[1], native.EIGHT) if by_csrc else tile.columns

    def product(a, a_scale, b, b_scale, out, is_up, first=0):
        a, b, b_scale = a.contiguous(), b.contiguous(), b_scale.contiguous()
        (_, width, depth), columns = b.shape, out.shape[1]
        grid = (tiles.count * cdiv(columns, tile.columns),)
        if not grid[0]:
            return
        if by_csrc:
            native.product(
                a, b, order, offsets, tiles.expert, tiles.row, weights.shape[1],
                "up" if is_up else "slots", tile_columns(b), out, first,
                scales=(a_scale, b_scale, hidden_scale),
            )  # fmt: skip
            return
        a, b = a.view(E4M3), b.view(E4M3)
        out = out.view(E4M3) if is_up else out
        tma = config.tma and takes_tma(b)
        b_arg = b
        if tma:
            b_arg = TensorDescriptor.from_tensor(b.view(-1, depth), [tile.columns, tile.depth])
        moe_experts_fp8_kernel[grid](
            a, a_scale, b_arg, b_scale, hidden_scale, out, order, offsets, tiles.expert, tiles.row,
            up.shape[0], first, columns, slots, width, depth, weights.shape[1], a.stride(0),
            UP=is_up, SCALE_PER_ROW=a_scale.numel() != 1, SCALE_PER_COLUMN=b_scale.dim() == 2,
            TMA=tma, EVEN_K=depth % tile.depth == 0, SWAP=tile.swap, LANES=tiles.lanes,
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    hidden_scale = hidden_scale.contiguous()
    product(x, x_scale.contiguous(), up, up_scale, hidden, True)
    each, unit = slots * dtype.itemsize, tile_columns(down)
    columns = at_once(x.shape[1], each, unit, config.slot_bytes)
    return in_passes(
        x.new_empty((slots, columns), dtype=dtype), x.new_empty(x.shape, dtype=dtype),
        lambda rows, first: product(hidden, hidden_scale, down, down_scale, rows, False, first),
        lambda rows, out: slot_sum(rows, weights, out),
    )  # fmt: skip


def specialisations():
    """Launches to compile without a GPU: layers of the models, per-tensor and per-row scales."""
    from nemokernels.ops.moe_experts.op import plan_fp8

    def launch(tokens, E, top_k, X, F, per_row):
        slots = tokens * top_k
        byte = lambda *s: torch.empty(s, device="meta", dtype=torch.uint8)  # noqa: E731
        real = lambda *s: torch.empty(s, device="meta")  # noqa: E731
        ints = [torch.empty(n, device="meta", dtype=torch.int32) for n in (E, slots)]
        scales = (real(tokens), real(E, F), real(E, X)) if per_row else (real(1), real(E), real(E))
        args = (byte(tokens, X), scales[0], byte(E, F, X), scales[1], real(E), byte(E, X, F),
                scales[2], real(tokens, top_k), *ints)  # fmt: skip
        config = plan_fp8(slots, E, "", ("triton",), (9, 0))
        return lambda: forward(*args, dtype=torch.bfloat16, config=config)

    nano, super_ = (128, 6, 2688, 1856), (512, 22, 1024, 2688)
    for label, tokens, shape, per_row in (
        ("nano 16384", 16384, nano, False), ("super 1024", 1024, super_, True),
        ("nano 8", 8, nano, False),
    ):  # fmt: skip
        yield _triton.Specialisation(f"fp8 {label}", launch(tokens, *shape, per_row))
