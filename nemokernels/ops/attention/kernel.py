"""Triton kernels of attention_with_cache: write the new tokens, attend to parts, combine.

A program takes the query heads of one token that share a key-value head, and one part of the keys.
The parts and the tiles depend on the cache alone and are combined in order, so that a query's bits
depend neither on the other tokens of the call nor on the batch. Tiles without a visible key are not
read. Rows whose slot or length the cache does not hold are left out as padding is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import offset64, offset_in_row, row_offset, to_fp8
from nemokernels._triton import axes, cdiv, row_divisor
from nemokernels.ops.attention.kernel_sequence import LONG


@triton.jit
def _row(lengths_ptr, slots_ptr, b, tokens, slots, room):
    # Slot and old length of a row, and whether it is one: no padding, and inside the cache.
    slot, length = tl.load(slots_ptr + b), tl.load(lengths_ptr + b)
    held = (slot >= 0) & (slot < slots) & (length >= 0) & (length <= room - tokens)
    return slot, length, held


@triton.jit
def _stored(x, inverse, dtype: tl.constexpr):
    # x as the cache holds it: E4M3 in units of a scale, given as its inverse.
    if dtype == tl.float8e4nv:
        return to_fp8(x.to(tl.float32) * inverse, 448.0, dtype)
    else:
        return x.to(dtype)


@triton.jit(do_not_specialize=["tokens", "slots", "room", "k_row", "v_row", "kc_row", "vc_row"])
def attention_write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    lengths_ptr,
    slots_ptr,
    k_inverse,
    v_inverse,
    tokens,
    slots,
    room,
    groups,
    dim,
    k_row,
    v_row,
    kc_row,
    vc_row,
    k_strides,
    v_strides,
    kc_strides,
    vc_strides,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0) % groups
    t = tl.program_id(0) // groups % tokens
    b = tl.program_id(0) // groups // tokens
    slot, length, held = _row(lengths_ptr, slots_ptr, b, tokens, slots, room)
    d = tl.arange(0, BLOCK_D)
    mask = (d < dim) & held
    k_at = row_offset(b, k_row, ROWS) + offset_in_row(t, group, k_strides)
    k_at += offset64(d, k_strides[2])
    k = tl.load(k_ptr + k_at, mask=mask, other=0.0)
    v_at = row_offset(b, v_row, ROWS) + offset_in_row(t, group, v_strides)
    v_at += offset64(d, v_strides[2])
    v = tl.load(v_ptr + v_at, mask=mask, other=0.0)
    k_at = row_offset(slot, kc_row, ROWS) + offset_in_row(length + t, group, kc_strides)
    k_at += offset64(d, kc_strides[2])
    tl.store(k_cache_ptr + k_at, _stored(k, k_inverse, k_cache_ptr.dtype.element_ty), mask=mask)
    v_at = row_offset(slot, vc_row, ROWS) + offset_in_row(length + t, group, vc_strides)
    v_at += offset64(d, vc_strides[2])
    tl.store(v_cache_ptr + v_at, _stored(v, v_inverse, v_cache_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "slots", "room", "parts", "q_row", "kc_row", "vc_row"])
def attention_part_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    lengths_ptr,
    slots_ptr,
    slopes_ptr,
    sums_ptr,
    top_ptr,
    total_ptr,
    scale,
    window,
    global_tokens,
    tokens,
    slots,
    room,
    groups,
    heads,
    dim,
    parts,
    q_row,
    kc_row,
    vc_row,
    q_strides,
    kc_strides,
    vc_strides,
    ROWS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts % groups
    t = tl.program_id(0) // parts // groups % tokens
    b = tl.program_id(0) // parts // groups // tokens
    slot, length, held = _row(lengths_ptr, slots_ptr, b, tokens, slots, room)
    seen = length + t + 1
    first = tl.maximum(seen - window, 0)  # of the window
    begin = part * PART
    end = tl.minimum(begin + PART, seen)
    if held and begin < end and (end > first or begin < global_tokens):
        d = tl.arange(0, BLOCK_D)
        shared = heads // groups
        lane = tl.arange(0, BLOCK_H)
        head = group * shared + lane
        q_at = row_offset(b, q_row, ROWS) + offset_in_row(t, head, q_strides)
        q_at = q_at[:, None] + offset64(d, q_strides[2])[None, :]
        q_mask = (lane < shared)[:, None] & (d < dim)[None, :]
        q = tl.load(q_ptr + q_at, mask=q_mask, other=0.0)
        if HAS_SLOPES:
            slope = tl.load(slopes_ptr + head, mask=lane < shared, other=0.0)
        top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        sums = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        k_cache_ptr += row_offset(slot, kc_row, ROWS) + offset64(group, kc_strides[1])
        v_cache_ptr += row_offset(slot, vc_row, ROWS) + offset64(group, vc_strides[1])
        # Tiles of global tokens, then tiles of the window, in one loop that loads ahead.
        near = tl.maximum(begin, first // BLOCK_N * BLOCK_N)
        global_end = tl.minimum(tl.minimum(global_tokens, near), end)
        ahead = tl.cdiv(tl.maximum(global_end - begin, 0), BLOCK_N)
        tiles = ahead + tl.cdiv(tl.maximum(end - near, 0), BLOCK_N)
        for tile in range(0, tiles):
            start = tl.where(tile < ahead, begin + tile * BLOCK_N, near + (tile - ahead) * BLOCK_N)
            key = start + tl.arange(0, BLOCK_N)
            visible = (key < seen) & ((key >= first) | (key < global_tokens))
            k_at = offset64(d, kc_strides[2])[:, None] + offset64(key, kc_strides[0])[None, :]
            k_mask = (d < dim)[:, None] & visible[None, :]
            k = tl.load(k_cache_ptr + k_at, mask=k_mask, other=0.0).to(q.dtype)
            v_at = offset64(key, vc_strides[0])[:, None] + offset64(d, vc_strides[2])[None, :]
            v_mask = visible[:, None] & (d < dim)[None, :]
            v = tl.load(v_cache_ptr + v_at, mask=v_mask, other=0.0).to(q.dtype)
            scores = tl.dot(q, k, input_precision="ieee") * scale
            if HAS_SLOPES:
                scores -= slope[:, None] * (seen - 1 - key).to(tl.float32)[None, :]
            scores = tl.where(visible[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp(scores - higher[:, None])
            fade = tl.exp(top - higher)
            total = total * fade + tl.sum(p, 1)
            sums = sums * fade[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
            top = higher
        at = offset64(offset64(b, tokens) + t, heads) + head
        at = at * parts + part
        tl.store(top_ptr + at, top, mask=lane < shared)
        tl.store(total_ptr + at, total, mask=lane < shared)
        tl.store(sums_ptr + offset64(at, dim)[:, None] + d[None, :], sums, mask=q_mask)


@triton.jit(do_not_specialize=["tokens", "slots", "room", "parts"])
def attention_combine_kernel(
    sums_ptr,
    top_ptr,
    total_ptr,
    lengths_ptr,
    slots_ptr,
    out_ptr,
    v_scale,
    window,
    global_tokens,
    tokens,
    slots,
    room,
    heads,
    dim,
    parts,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0) // heads % tokens
    b = tl.program_id(0) // heads // tokens
    _, length, held = _row(lengths_ptr, slots_ptr, b, tokens, slots, room)
    near = tl.maximum(length + t + 1 - window, 0)
    used = tl.where(held, tl.cdiv(length + t + 1, PART), 0)
    d = tl.arange(0, BLOCK_D)
    first = offset64(tl.program_id(0), parts)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, used, BLOCK):
        part = start + tl.arange(0, BLOCK)
        mask = (part < used) & ((part * PART + PART > near) | (part * PART < global_tokens))
        tops = tl.load(top_ptr + first + part, mask=mask, other=float("-inf"))
        totals = tl.load(total_ptr + first + part, mask=mask, other=0.0)
        at = offset64(first + part, dim)[:, None] + d[None, :]
        s = tl.load(sums_ptr + at, mask=mask[:, None] & (d < dim)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no part of this block was visible
        fade, weight = tl.exp(top - base), tl.exp(tops - base)
        total = total * fade + tl.sum(totals * weight, 0)
        sums = sums * fade + tl.sum(s * weight[:, None], 0)
        top = higher
    out = tl.where(used > 0, sums / tl.where(used > 0, total, 1.0) * v_scale, 0.0)
    at = offset64(tl.program_id(0), dim) + d
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=d < dim)


def with_cache(
    q, k, v, k_cache, v_cache, lengths, slots, slopes, scale, window, global_tokens, k_scale,
    v_scale, config,
):  # fmt: skip
    """As ref.with_cache, without its checks of index values."""
    (rows, tokens, heads, dim), (held, room, groups, _) = q.shape, k_cache.shape
    window, global_tokens = min(window or LONG, LONG), min(global_tokens, LONG)
    has_slopes = slopes is not None
    slopes = slopes.contiguous() if has_slopes else lengths
    out = q.new_empty(q.shape)
    parts = cdiv(room, config.part)
    if not out.numel():
        return out
    if not held or not room:
        return out.zero_()
    lengths, slots = lengths.contiguous(), slots.contiguous()
    attention_write_kernel[(rows * tokens * groups,)](
        k, v, k_cache, v_cache, lengths, slots, 1.0 / k_scale, 1.0 / v_scale, tokens, held, room,
        groups, dim, *axes(k, v, k_cache, v_cache), ROWS=row_divisor(k, v, k_cache, v_cache),
        BLOCK_D=config.block_d, num_warps=1,
    )  # fmt: skip
    sums = q.new_empty(rows, tokens, heads, parts, dim, dtype=torch.float32)
    top, total = (sums.new_empty(sums.shape[:-1]) for _ in range(2))
    attention_part_kernel[(rows * tokens * groups * parts,)](
        q, k_cache, v_cache, lengths, slots, slopes, sums, top, total, scale * k_scale, window,
        global_tokens, tokens, held, room, groups, heads, dim, parts, *axes(q, k_cache, v_cache),
        ROWS=row_divisor(q, k_cache, v_cache), HAS_SLOPES=has_slopes, PART=config.part,
        BLOCK_H=config.block_h, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    attention_combine_kernel[(rows * tokens * heads,)](
        sums, top, total, lengths, slots, out, v_scale, window, global_tokens, tokens, held, room,
        heads, dim, parts, PART=config.part, BLOCK=8, BLOCK_D=config.block_d, num_warps=1,
    )  # fmt: skip
    return out


def specialisations():
    """Launches to compile without a GPU: 32 query heads on 2, of 128, and 96 on 8 of 192."""
    from nemokernels.ops.attention.kernel_sequence import specialisations as of_sequences
    from nemokernels.ops.attention.op import plan

    yield from of_sequences()

    def launch(rows, tokens, room, *rule, heads=(32, 2, 128), dtype=torch.bfloat16):
        H, KV, D = heads
        config = plan(H, KV, D, room, torch.bfloat16, "", ("triton",))
        q = torch.empty(rows, tokens, H, D, device="meta", dtype=torch.bfloat16)
        cache = torch.empty(rows, room, KV, D, device="meta", dtype=dtype)
        one = torch.empty(rows, device="meta", dtype=torch.int32)
        new = q[:, :, :KV]
        return lambda: with_cache(q, new, new, cache, cache, one, one, *rule, config)

    plain = None, 0.1, None, 0, 1.0, 1.0
    windowed = torch.empty(32, device="meta"), 0.1, 1024, 128, 1.0, 1.0
    eight = dict(dtype=torch.float8_e4m3fn)
    for label, launched in (
        ("batch 64 of 8192", launch(64, 1, 8192, *plain)),
        ("batch 2 of 131072, 5 tokens", launch(2, 5, 131072, *plain)),
        ("window and ALiBi", launch(64, 1, 8192, *windowed)),
        ("batch 64 of 8192, E4M3", launch(64, 1, 8192, None, 0.1, None, 0, 0.5, 0.5, **eight)),
        ("96 heads on 8 of 192", launch(64, 1, 4096, *plain, heads=(96, 8, 192))),
    ):
        yield _triton.Specialisation(label, launched)
