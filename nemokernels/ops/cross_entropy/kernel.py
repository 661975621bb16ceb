"""Triton kernels of linear_cross_entropy: no logit of the forward reaches memory.

``statistics`` makes a tile of logits and leaves each row's peak and sum of exponentials there;
``combine`` joins them. The backward makes the logits again, for some classes at a time: ``grad``
turns a tile into the gradient of its logits, and ``product`` multiplies the block by hidden, which
completes these classes' rows of dweight, and by their weights, which adds to dhidden in float32.

Tokens that are ignored keep their place; what is loaded of them reaches no result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nemokernels import _triton
from nemokernels._tl import offset64
from nemokernels._triton import as_rows, cdiv

GROUP = 16  # rows of tiles that follow each other, so that the other operand stays in the L2 cache


@triton.jit
def _place(blocks_m, blocks_n, GROUP: tl.constexpr):
    # Row and column of this program's tile.
    program = tl.program_id(0)
    first = program // (GROUP * blocks_n) * GROUP
    rows = tl.minimum(blocks_m - first, GROUP)
    within = program % (GROUP * blocks_n)
    return first + within % rows, within // rows


@triton.jit
def _load(
    ptr, row, column, rows, columns, stride, TMA: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    # A tile of a matrix whose rows are contiguous; zero past its ends. TMA: ptr is a descriptor.
    if TMA:
        return ptr.load([row, column])
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        return tl.load(ptr + offset64(r, stride)[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, tokens, classes, features, stride_hidden, stride_weight,
    TMA_HIDDEN: tl.constexpr, TMA_WEIGHT: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # This program's tile of logits, its block of classes, its tokens and its classes.
    block_m, block_n = _place(tl.cdiv(tokens, BLOCK_M), tl.cdiv(classes, BLOCK_N), GROUP)
    row, column = block_m * BLOCK_M, block_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, features, BLOCK_K):
        h = _load(hidden_ptr, row, k, tokens, features, stride_hidden, TMA_HIDDEN, BLOCK_M, BLOCK_K)
        w = _load(weight_ptr, column, k, classes, features, stride_weight, TMA_WEIGHT, BLOCK_N,
                  BLOCK_K)  # fmt: skip
        acc = tl.dot(h, w.T, acc, input_precision="ieee")
    return acc, block_n, row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)


@triton.jit
def _targets(targets_ptr, token, mask, ignore, first, classes):
    # Column of each token's target, as if all classes were here; which count; which are none.
    target = tl.load(targets_ptr + token, mask=mask, other=ignore).to(tl.int64)
    keep = target != ignore
    return target - first, keep, keep & ((target < 0) | (target >= classes))


@triton.jit
def _base(peak):
    # What exponents are taken relative to; infinities speak for themselves.
    return tl.where(tl.abs(peak) < float("inf"), peak, 0.0)


@triton.jit
def _fade(peak, higher):
    # What turns a sum relative to one peak into one relative to a higher. No peak: no sum.
    return tl.exp(tl.minimum(_base(peak) - _base(higher), 0.0))


@triton.jit(do_not_specialize=["tokens"])
def cross_entropy_statistics_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    peak_ptr,
    mass_ptr,
    chosen_ptr,
    total_ptr,
    ignore,
    first,
    all_classes,
    tokens,
    classes,
    features,
    stride_hidden,
    stride_weight,
    SUMS: tl.constexpr,
    TMA_HIDDEN: tl.constexpr,
    TMA_WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    logits, block_n, token, column = _logits(
        hidden_ptr, weight_ptr, tokens, classes, features, stride_hidden, stride_weight,
        TMA_HIDDEN, TMA_WEIGHT, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    real = token < tokens
    at = offset64(block_n, tokens) + token
    target, keep, _ = _targets(targets_ptr, token, real, ignore, first, all_classes)
    mine = (target >= block_n * BLOCK_N) & (target < (block_n + 1) * BLOCK_N) & (target < classes)
    hit = column[None, :] == target[:, None]
    tl.store(chosen_ptr + token, tl.sum(tl.where(hit, logits, 0.0), 1), mask=keep & mine)
    if SUMS:
        inside = tl.where((column < classes)[None, :], logits, 0.0)
        tl.store(total_ptr + at, tl.sum(inside, 1), mask=real)
    if classes % BLOCK_N:
        logits = tl.where((column < classes)[None, :], logits, float("-inf"))
    peak = tl.max(logits, 1)
    mass = tl.sum(tl.exp(logits - _base(peak)[:, None]), 1)
    tl.store(peak_ptr + at, peak, mask=real)
    tl.store(mass_ptr + at, mass, mask=real)


@triton.jit(do_not_specialize=["tokens"])
def cross_entropy_combine_kernel(
    targets_ptr,
    peak_ptr,
    mass_ptr,
    sums_ptr,
    lse_ptr,
    chosen_ptr,
    total_ptr,
    ignore,
    first,
    all_classes,
    tokens,
    classes,
    blocks,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = token < tokens
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = offset64(block, tokens)[:, None] + token[None, :]
        mask = (block < blocks)[:, None] & real[None, :]
        peaks = tl.load(peak_ptr + at, mask=mask, other=float("-inf"))
        masses = tl.load(mass_ptr + at, mask=mask, other=0.0)
        higher = tl.maximum(peak, tl.max(peaks, 0))
        parts = masses * _fade(peaks, higher[None, :])
        mass = mass * _fade(peak, higher) + tl.sum(parts, 0)
        peak = higher
        if SUMS:
            total += tl.sum(tl.load(sums_ptr + at, mask=mask, other=0.0), 0)
    target, keep, wrong = _targets(targets_ptr, token, real, ignore, first, all_classes)
    lse = tl.where(keep, _base(peak) + tl.log(mass), 0.0)
    tl.store(lse_ptr + token, lse, mask=real)
    tl.store(total_ptr + token, tl.where(keep, total, 0.0), mask=real)
    here = keep & (target >= 0) & (target < classes)
    tl.store(chosen_ptr + token, tl.where(wrong, float("nan"), 0.0), mask=real & ~here)


@triton.jit(do_not_specialize=["tokens"])
def cross_entropy_grad_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    lse_ptr,
    dlse_ptr,
    dchosen_ptr,
    dtotal_ptr,
    out_ptr,
    ignore,
    first,
    all_classes,
    begin,
    tokens,
    classes,
    features,
    stride_hidden,
    stride_weight,
    stride_out,
    SUMS: tl.constexpr,
    TMA_HIDDEN: tl.constexpr,
    TMA_WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The gradient of the logits of the classes from ``begin`` on, which weight_ptr begins with.
    logits, _, token, column = _logits(
        hidden_ptr, weight_ptr, tokens, classes, features, stride_hidden, stride_weight,
        TMA_HIDDEN, TMA_WEIGHT, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    real = token < tokens
    target, keep, wrong = _targets(targets_ptr, token, real, ignore, first + begin, all_classes)
    lse = tl.load(lse_ptr + token, mask=keep, other=0.0)
    dlse = tl.load(dlse_ptr + token, mask=keep, other=0.0)
    dlse = tl.where(wrong, float("nan"), dlse)
    dchosen = tl.load(dchosen_ptr + token, mask=keep, other=0.0)
    grad = dlse[:, None] * tl.exp(logits - lse[:, None])
    grad += tl.where(column[None, :] == target[:, None], dchosen[:, None], 0.0)
    if SUMS:
        grad += tl.load(dtotal_ptr + token, mask=keep, other=0.0)[:, None]
    grad = tl.where(keep[:, None], grad, 0.0)
    at = offset64(token, stride_out)[:, None] + column[None, :]
    mask = real[:, None] & (column < classes)[None, :]
    tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def cross_entropy_product_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    targets_ptr,
    ignore,
    tokens,
    classes,
    columns,
    stride_a,
    stride_b,
    stride_out,
    OVER_TOKENS: tl.constexpr,
    ADD: tl.constexpr,
    TMA_A: tl.constexpr,
    TMA_B: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # out (tokens, columns) = a @ b, added to what is there if ADD; a is (tokens, classes).
    # OVER_TOKENS: out (classes, columns) = a^T @ b over the tokens that count; what b holds of
    # others may be NaN.
    rows = classes if OVER_TOKENS else tokens
    depth = tokens if OVER_TOKENS else classes
    block_m, block_n = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row, column = block_m * BLOCK_M, block_n * BLOCK_N
    m, n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    out_at = offset64(m, stride_out)[:, None] + n[None, :]
    out_mask = (m < rows)[:, None] & (n < columns)[None, :]
    if ADD:
        acc = tl.load(out_ptr + out_at, mask=out_mask, other=0.0)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if OVER_TOKENS:
            a = _load(a_ptr, k, row, depth, rows, stride_a, TMA_A, BLOCK_K, BLOCK_M).T
            token = k + tl.arange(0, BLOCK_K)
            target = tl.load(targets_ptr + token, mask=token < depth, other=ignore).to(tl.int64)
            mask = (target != ignore)[:, None] & (n < columns)[None, :]
            at = offset64(token, stride_b)[:, None] + n[None, :]
            b = tl.load(b_ptr + at, mask=mask, other=0.0)
        else:
            a = _load(a_ptr, row, k, rows, depth, stride_a, TMA_A, BLOCK_M, BLOCK_K)
            b = _load(b_ptr, k, column, depth, columns, stride_b, TMA_B, BLOCK_K, BLOCK_N)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


def forward(hidden, weight, targets, ignore_index, first, classes, sums, config):
    """As ref.forward; a target that is no class leaves NaN."""
    hidden, weight, targets = as_rows(hidden), as_rows(weight), targets.contiguous()
    tokens, here = hidden.shape[0], weight.shape[0]
    lse, chosen, total = (hidden.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    if not tokens:
        return lse, chosen, total
    blocks = cdiv(here, config.logits.columns)
    # Each by itself: where a part of a larger one begins would depend on the tokens.
    peak, mass = (hidden.new_empty(blocks, tokens, dtype=torch.float32) for _ in range(2))
    part = hidden.new_empty(blocks if sums else 0, tokens, dtype=torch.float32)
    labels = ignore_index, first, classes
    if here:
        _over_logits(
            cross_entropy_statistics_kernel, hidden, weight, config,
            (targets, peak, mass, chosen, part, *labels), (), sums,
        )  # fmt: skip
    cross_entropy_combine_kernel[(cdiv(tokens, 32),)](
        targets, peak, mass, part, lse, chosen, total, *labels, tokens, here, blocks, SUMS=sums,
        BLOCK=32, BLOCKS=32, num_warps=4,
    )  # fmt: skip
    return lse, chosen, total


def backward(
    dlse, dchosen, dtotal, hidden, weight, targets, lse, ignore_index, first, classes, config
):
    """As ref.backward; a target that is no class leaves NaN."""
    hidden, weight, targets = as_rows(hidden), as_rows(weight), targets.contiguous()
    tokens, here = hidden.shape[0], weight.shape[0]
    dweight = weight.new_empty(weight.shape)
    if not tokens or not here:
        return hidden.new_zeros(hidden.shape), dweight.zero_()
    sums, room = dtotal is not None, min(config.classes, here)
    dlse, dchosen, lse = dlse.contiguous(), dchosen.contiguous(), lse.contiguous()
    dtotal = dtotal.contiguous() if sums else dlse
    dhidden = hidden.new_empty(hidden.shape, dtype=hidden.dtype if room == here else torch.float32)
    # Rows that start where descriptors can.
    block = hidden.new_empty(tokens, cdiv(room, 16) * 16)
    for begin in range(0, here, room):
        end = min(begin + room, here)
        dlogits, rows = block[:, : end - begin], weight[begin:end]
        _over_logits(
            cross_entropy_grad_kernel, hidden, rows, config,
            (targets, lse, dlse, dchosen, dtotal, dlogits, ignore_index, first, classes, begin),
            (dlogits.stride(0),), sums,
        )  # fmt: skip
        _product(dlogits, hidden, dweight[begin:end], config, (targets, ignore_index))
        _product(dlogits, rows, dhidden, config, add=begin > 0)
    del block, dlogits
    return dhidden.to(hidden.dtype), dweight


def _over_logits(kernel, hidden, weight, config, args, strides, sums):
    # A program for every tile of hidden @ weight.T.
    tile, (tokens, features), classes = config.logits, hidden.shape, weight.shape[0]
    tma_hidden, hidden_arg = _operand(hidden, tile.rows, tile.depth, config.tma)
    tma_weight, weight_arg = _operand(weight, tile.columns, tile.depth, config.tma)
    kernel[(cdiv(tokens, tile.rows) * cdiv(classes, tile.columns),)](
        hidden_arg, weight_arg, *args, tokens, classes, features, hidden.stride(0),
        weight.stride(0), *strides, SUMS=sums, TMA_HIDDEN=tma_hidden, TMA_WEIGHT=tma_weight,
        GROUP=GROUP, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _product(a, b, out, config, labels=None, add=False):
    # out (+)= a @ b, or, with labels, a.T @ b over the tokens that count.
    tile, (rows, columns), over_tokens = config.grads, out.shape, labels is not None
    box = (tile.depth, tile.rows) if over_tokens else (tile.rows, tile.depth)
    tma_a, a_arg = _operand(a, *box, config.tma)
    tma_b, b_arg = _operand(b, tile.depth, tile.columns, config.tma and not over_tokens)
    cross_entropy_product_kernel[(cdiv(rows, tile.rows) * cdiv(columns, tile.columns),)](
        a_arg, b_arg, out, *(labels or (None, 0)), *a.shape, columns, a.stride(0), b.stride(0),
        out.stride(0), OVER_TOKENS=over_tokens, ADD=add, TMA_A=tma_a, TMA_B=tma_b, GROUP=GROUP,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip


def _operand(t: torch.Tensor, rows: int, columns: int, tma: bool):
    # Whether t is loaded by descriptor, and what the kernel takes.
    size = t.element_size()
    aligned = t.stride(0) * size % 16 == 0 and t.data_ptr() % 16 == 0
    if tma and aligned and t.shape[1] <= t.stride(0) and t.shape[0] < 2**31:
        return True, TensorDescriptor.from_tensor(t, [rows, columns])
    return False, t


def specialisations():
    """Launches to compile without a GPU: the head of Nano and one of 256000 x 4096, bfloat16."""
    from nemokernels.ops.cross_entropy.op import plan

    def launch(tokens, features, classes, gradients=False):
        config = plan(tokens, features, torch.bfloat16, "", ("triton",), 132, (9, 0))
        empty = lambda *s: torch.empty(s, device="meta", dtype=torch.bfloat16)  # noqa: E731
        hidden, weight = empty(tokens, features), empty(classes, features)
        targets = torch.empty(tokens, device="meta", dtype=torch.int64)
        one = torch.empty(tokens, device="meta")
        labels = -100, 0, classes
        if gradients:
            grads = one, one, None
            return lambda: backward(*grads, hidden, weight, targets, one, *labels, config)
        return lambda: forward(hidden, weight, targets, *labels, False, config)

    yield _triton.Specialisation("8192 x 2688 of 131072", launch(8192, 2688, 131072))
    yield _triton.Specialisation("8192 x 2688 of 6144, backward", launch(8192, 2688, 6144, True))
    yield _triton.Specialisation("4096 x 4096 of 256000", launch(4096, 4096, 256000))
