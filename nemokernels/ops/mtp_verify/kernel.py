"""Triton kernels of mtp_verify.

``rows`` reads every row that may matter once and leaves, per block of the vocabulary, its peak,
where that is, and two sums of exponentials. ``cut`` finds the thresholds of top-k and top-p.
``accept`` walks the drafts of a request. ``draw`` races the tokens of the one row that the next
token comes from, ``finish`` picks the winner. The blocks depend on the vocabulary alone, so that a
request's bits do not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import offset64, offset_in_row, row_offset
from nemokernels._triton import cdiv, contiguous, next_power_of_2, row_divisor

LENGTHS = ["rows", "stride_logits", "stride_drafts", "stride_probs", "stride_seed"]


@triton.jit
def _draft_length(lengths_ptr, request, drafts, HAS_LENGTHS: tl.constexpr):
    length = tl.cast(drafts, tl.int64)
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths_ptr + request).to(tl.int64), length)
    return length


@triton.jit
def _temperature(temperature_ptr, request, SAMPLED: tl.constexpr):
    # Zero is greedy, as is what is no temperature.
    heat = 0.0
    if SAMPLED:
        heat = tl.load(temperature_ptr + request).to(tl.float32)
        heat = tl.where(heat > 0.0, heat, 0.0)
    return heat


@triton.jit
def _block_peaks(peak_ptr, at, vocab, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    # Where the statistics of a row's blocks are, which are there, their peaks, the row's peak.
    block = tl.arange(0, BLOCKS)
    inside = block < tl.cdiv(vocab, BLOCK)
    at = at * tl.cdiv(vocab, BLOCK) + block
    peaks = tl.load(peak_ptr + at, mask=inside, other=float("-inf"))
    return at, inside, peaks, tl.max(peaks, 0)


@triton.jit
def _total(sum_ptr, at, inside, peaks, peak, heat):
    sums = tl.load(sum_ptr + at, mask=inside, other=0.0)
    return tl.sum(tl.where(peaks > float("-inf"), sums * tl.exp((peaks - peak) / heat), 0.0), 0)


@triton.jit(do_not_specialize=["rows", "stride_logits"])
def mtp_verify_rows_kernel(
    logits_ptr,
    lengths_ptr,
    temperature_ptr,
    peak_ptr,
    best_ptr,
    sum_ptr,
    heated_ptr,
    rows,
    vocab,
    stride_logits,
    logits_strides,
    ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(vocab, BLOCK)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks % rows
    request = tl.program_id(0) // blocks // rows
    if row <= _draft_length(lengths_ptr, request, rows - 1, HAS_LENGTHS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        at = row_offset(request, stride_logits, ROWS) + offset_in_row(row, column, logits_strides)
        x = tl.load(logits_ptr + at, mask=column < vocab, other=float("-inf")).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))  # both leave a row without distribution
        peak, best = tl.max(x, 0, return_indices=True)
        x -= tl.where(peak > float("-inf"), peak, 0.0)
        total = tl.sum(tl.exp(x), 0)
        at = tl.program_id(0)
        tl.store(peak_ptr + at, peak)
        tl.store(best_ptr + at, block * BLOCK + best)
        tl.store(sum_ptr + at, total)
        if SAMPLED:
            heat = _temperature(temperature_ptr, request, SAMPLED)
            if heat > 0.0:
                if heat != 1.0:
                    total = tl.sum(tl.exp(x / heat), 0)
                tl.store(heated_ptr + at, total)


@triton.jit
def _heated(row_ptr, start, vocab, stride, peak, heat, least, BLOCK: tl.constexpr):
    # exp((logit - peak) / temperature), 1 at the peak; zero below least and past the vocabulary.
    column = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + offset64(column, stride), mask=column < vocab, other=float("-inf"))
    p = tl.exp((x.to(tl.float32) - peak) / heat)
    return tl.where(p >= least, p, 0.0)


@triton.jit
def _mass(row_ptr, vocab, stride, peak, heat, least, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, vocab, BLOCK):
        total += _heated(row_ptr, start, vocab, stride, peak, heat, least, BLOCK).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _threshold(
    row_ptr, vocab, stride, peak, heat, least, limit, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    # The smallest t for which the p > t hold less than limit: their sum, or how many there are.
    # The bits of nonnegative floats are ordered as the floats are; 30 of them reach past 1, which
    # is the peak and always stays. Two are found at a time.
    kind: tl.constexpr = tl.float64 if WEIGHTED else tl.int32
    base = tl.full((), 0, tl.int32)
    for i in range(0, 15):
        step = tl.full((), 1 << 28, tl.int32) >> (2 * i)
        t = base + step - 1
        n0 = tl.zeros((BLOCK,), kind)
        n1 = tl.zeros((BLOCK,), kind)
        n2 = tl.zeros((BLOCK,), kind)
        for start in range(0, vocab, BLOCK):
            p = _heated(row_ptr, start, vocab, stride, peak, heat, least, BLOCK)
            bits = p.to(tl.int32, bitcast=True)
            weight = p.to(tl.float64) if WEIGHTED else tl.full((BLOCK,), 1, tl.int32)
            zero = tl.zeros((BLOCK,), kind)
            n0 += tl.where(bits > t, weight, zero)
            n1 += tl.where(bits > t + step, weight, zero)
            n2 += tl.where(bits > t + 2 * step, weight, zero)
        digit = (tl.sum(n0, 0) >= limit).to(tl.int32) + (tl.sum(n1, 0) >= limit).to(tl.int32)
        digit += (tl.sum(n2, 0) >= limit).to(tl.int32)
        base += digit * step
    return tl.minimum(base, 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "stride_logits"])
def mtp_verify_cut_kernel(
    logits_ptr,
    lengths_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    peak_ptr,
    least_ptr,
    mass_ptr,
    rows,
    vocab,
    stride_logits,
    logits_strides,
    ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_CUT: tl.constexpr,
):
    row = tl.program_id(0) % rows
    request = tl.program_id(0) // rows
    live = row <= _draft_length(lengths_ptr, request, rows - 1, HAS_LENGTHS)
    heat = _temperature(temperature_ptr, request, True)
    if live and heat > 0.0:
        at = offset64(request, rows) + row
        _, _, _, peak = _block_peaks(peak_ptr, at, vocab, BLOCK, BLOCKS)
        row_ptr = logits_ptr + row_offset(request, stride_logits, ROWS)
        row_ptr += offset64(row, logits_strides[0])
        if tl.abs(peak) < float("inf"):
            least = 0.0
            if HAS_TOP_K:
                top_k = tl.load(top_k_ptr + request).to(tl.int64)
                if top_k > 0 and top_k < vocab:
                    least = _threshold(row_ptr, vocab, logits_strides[1], peak, heat, least, top_k,
                                       False, BLOCK_CUT)  # fmt: skip
            mass = _mass(row_ptr, vocab, logits_strides[1], peak, heat, least, BLOCK_CUT)
            if HAS_TOP_P:
                top_p = tl.load(top_p_ptr + request).to(tl.float64)
                if top_p < 1.0:
                    larger = _threshold(row_ptr, vocab, logits_strides[1], peak, heat, least,
                                        top_p * mass, True, BLOCK_CUT)  # fmt: skip
                    least = tl.maximum(least, larger)
                    mass = _mass(row_ptr, vocab, logits_strides[1], peak, heat, least, BLOCK_CUT)
            tl.store(least_ptr + at, least)
            tl.store(mass_ptr + at, mass.to(tl.float32))


@triton.jit
def _target(
    heated_ptr, least_ptr, mass_ptr, at, block_at, inside, peaks, peak, heat, HAS_CUT: tl.constexpr
):
    # What the p = exp((logit - peak) / temperature) that stay reach at least, and their sum.
    if HAS_CUT:
        return tl.load(least_ptr + at), tl.load(mass_ptr + at)
    else:
        return 0.0, _total(heated_ptr, block_at, inside, peaks, peak, heat)


@triton.jit
def _draft(drafts_ptr, request, row, live, vocab, stride_drafts, stride_draft):
    # A draft where live, and whether it is a token of the vocabulary.
    at = offset64(request, stride_drafts) + offset64(row, stride_draft)
    draft = tl.load(drafts_ptr + at, mask=live, other=-1).to(tl.int64)
    return draft, (draft >= 0) & (draft < vocab)


@triton.jit(do_not_specialize=LENGTHS)
def mtp_verify_accept_kernel(
    logits_ptr,
    drafts_ptr,
    lengths_ptr,
    probs_ptr,
    temperature_ptr,
    seed_ptr,
    ids_ptr,
    positions_ptr,
    peak_ptr,
    best_ptr,
    sum_ptr,
    heated_ptr,
    least_ptr,
    mass_ptr,
    accepted_ptr,
    token_ptr,
    logprobs_ptr,
    rows,
    vocab,
    stride_logits,
    logits_strides,
    stride_drafts,
    stride_draft,
    stride_probs,
    probs_strides,
    stride_seed,
    ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    SAMPLED: tl.constexpr,
    HAS_CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    request = tl.program_id(0)
    length = _draft_length(lengths_ptr, request, rows - 1, HAS_LENGTHS)
    heat = _temperature(temperature_ptr, request, SAMPLED)
    accepted = tl.where(length < 0, -1, 0)
    token = tl.full((), 0, tl.int64)
    going = length >= 0
    logits_ptr += row_offset(request, stride_logits, ROWS)
    while going:
        at = offset64(request, rows) + accepted
        block_at, inside, peaks, peak = _block_peaks(peak_ptr, at, vocab, BLOCK, BLOCKS)
        sound = tl.abs(peak) < float("inf")
        bests = tl.load(best_ptr + block_at, mask=inside & (peaks == peak), other=vocab)
        best = tl.min(bests, 0).to(tl.int64)
        live = sound & (accepted < length)
        draft, live = _draft(
            drafts_ptr, request, accepted, live, vocab, stride_drafts, stride_draft
        )
        logit_at = offset_in_row(accepted, draft, logits_strides)
        logit = tl.load(logits_ptr + logit_at, mask=live, other=0.0).to(tl.float32)
        keep = live & (draft == best)
        if SAMPLED:
            if live and heat > 0.0:
                least, mass = _target(heated_ptr, least_ptr, mass_ptr, at, block_at, inside, peaks,
                                      peak, heat, HAS_CUT)  # fmt: skip
                p = tl.exp((logit - peak) / heat)
                p = tl.where(p >= least, p, 0.0) / mass
                q = 1.0
                if HAS_PROBS:
                    q_at = row_offset(request, stride_probs, ROWS)
                    q_at += offset_in_row(accepted, draft, probs_strides)
                    q = tl.load(probs_ptr + q_at).to(tl.float32)
                seed = tl.load(seed_ptr + offset64(request, stride_seed))
                word = _philox(seed, ids_ptr, positions_ptr, request, accepted, 0)[0]
                u = (word >> 8).to(tl.float32) * (1.0 / 16777216.0)
                keep = (q > 0.0) & (u * q < p)
        log_sum = tl.log(_total(sum_ptr, block_at, inside, peaks, peak, 1.0))
        token = tl.where(sound, best, -1)
        logprob = tl.where(keep, logit - peak, 0.0) - log_sum
        logprob = tl.where(sound, logprob, float("nan"))
        tl.store(logprobs_ptr + at, logprob)
        accepted += keep.to(tl.int32)
        going = keep
    tl.store(accepted_ptr + request, accepted)
    tl.store(token_ptr + request, token)
    row = tl.arange(0, BLOCK_ROWS)
    past = (row > accepted) & (row < rows)
    tl.store(logprobs_ptr + offset64(request, rows) + row, 0.0, mask=past)


@triton.jit
def _philox(seed, ids_ptr, positions_ptr, request, ahead, block):
    # The counter of ref.py: request id, position, which draw.
    request_id = tl.load(ids_ptr + request).to(tl.int64)
    position = tl.load(positions_ptr + request).to(tl.int64) + ahead
    low, high = request_id.to(tl.uint32), (request_id >> 32).to(tl.uint32)
    last = tl.cast(block, tl.uint32)
    return tl.philox(seed, low, high, position.to(tl.uint32), last, 10)


@triton.jit
def _exponential(word):
    # -log(1 - u), u = (word + 0.5) * 2**-32 up to 1 - 2**-24, to the last digits: up to 1/2 it is
    # 2 atanh(u / (2 - u)); above, 1 - u is exact and is m * 2**e, and -log(m) is the other term.
    # |s| <= 1/3, for which seven terms of the series leave 1.4e-8 (see softplus).
    u = tl.minimum((word.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), 1.0 - 1.0 / 16777216.0)
    bits = (1.0 - u).to(tl.int32, bitcast=True)
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    small = u <= 0.5
    s = tl.where(small, u, 1.0 - m) / tl.where(small, 2.0 - u, 1.0 + m)
    t = s * s
    series = 1.0 / 11.0 + t * (1.0 / 13.0)
    series = 1.0 / 9.0 + t * series
    series = 1.0 / 7.0 + t * series
    series = 1.0 / 5.0 + t * series
    series = 1.0 / 3.0 + t * series
    octaves = tl.where(small, 0, 127 - (bits >> 23)).to(tl.float32)
    return octaves * 0.6931471805599453 + 2.0 * (s + s * t * series)


@triton.jit
def _race(weight, noise):
    return tl.max(tl.where(weight > 0.0, weight / noise, -1.0), 0, return_indices=True)


@triton.jit(do_not_specialize=LENGTHS)
def mtp_verify_draw_kernel(
    logits_ptr,
    drafts_ptr,
    lengths_ptr,
    probs_ptr,
    temperature_ptr,
    seed_ptr,
    ids_ptr,
    positions_ptr,
    peak_ptr,
    heated_ptr,
    least_ptr,
    mass_ptr,
    accepted_ptr,
    score_ptr,
    winner_ptr,
    rows,
    vocab,
    stride_logits,
    logits_strides,
    stride_drafts,
    stride_draft,
    stride_probs,
    probs_strides,
    stride_seed,
    ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_DRAW: tl.constexpr,
):
    # Two races with the same noise: of the residual, and of the target for where it is empty.
    blocks = tl.cdiv(vocab, BLOCK_DRAW)
    block = tl.program_id(0) % blocks
    request = tl.program_id(0) // blocks
    heat = _temperature(temperature_ptr, request, True)
    accepted = tl.load(accepted_ptr + request)
    if accepted >= 0 and heat > 0.0:
        at = offset64(request, rows) + accepted
        block_at, inside, peaks, peak = _block_peaks(peak_ptr, at, vocab, BLOCK, BLOCKS)
        if tl.abs(peak) < float("inf"):
            least, mass = _target(heated_ptr, least_ptr, mass_ptr, at, block_at, inside, peaks,
                                  peak, heat, HAS_CUT)  # fmt: skip
            start = block * BLOCK_DRAW
            column = start + tl.arange(0, BLOCK_DRAW)
            row_ptr = logits_ptr + row_offset(request, stride_logits, ROWS)
            row_ptr += offset64(accepted, logits_strides[0])
            p = _heated(row_ptr, start, vocab, logits_strides[1], peak, heat, least, BLOCK_DRAW)
            p = p / mass
            more = accepted < _draft_length(lengths_ptr, request, rows - 1, HAS_LENGTHS)
            draft, rejected = _draft(
                drafts_ptr, request, accepted, more, vocab, stride_drafts, stride_draft
            )
            if HAS_PROBS:
                q_at = row_offset(request, stride_probs, ROWS)
                q_at += offset_in_row(accepted, column, probs_strides)
                q = tl.load(probs_ptr + q_at, mask=(column < vocab) & rejected, other=0.0)
                q = q.to(tl.float32)
                rest = tl.where(p > q, p - q, 0.0)
            else:
                rest = tl.where(column == draft, 0.0, p)
            rest = tl.where(rejected, rest, 0.0)
            seed = tl.load(seed_ptr + offset64(request, stride_seed))
            group = 1 + start // 4 + tl.arange(0, BLOCK_DRAW // 4)
            word0, word1, word2, word3 = _philox(
                seed, ids_ptr, positions_ptr, request, accepted, group
            )
            words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
            noise = _exponential(words)
            score, winner = _race(rest, noise)
            out = offset64(request, blocks) * 2 + block
            tl.store(score_ptr + out, score)
            tl.store(winner_ptr + out, start + winner)
            score, winner = _race(p, noise)
            tl.store(score_ptr + out + blocks, score)
            tl.store(winner_ptr + out + blocks, start + winner)


@triton.jit
def _winner(score_ptr, winner_ptr, at, blocks, vocab, BLOCKS_DRAW: tl.constexpr):
    block = tl.arange(0, BLOCKS_DRAW)
    scores = tl.load(score_ptr + at + block, mask=block < blocks, other=-2.0)
    score = tl.max(scores, 0)
    winners = tl.load(winner_ptr + at + block, mask=scores == score, other=vocab)
    return score, tl.min(winners, 0).to(tl.int64)


@triton.jit(do_not_specialize=["rows", "stride_logits"])
def mtp_verify_finish_kernel(
    logits_ptr,
    temperature_ptr,
    peak_ptr,
    sum_ptr,
    accepted_ptr,
    score_ptr,
    winner_ptr,
    token_ptr,
    logprobs_ptr,
    rows,
    vocab,
    stride_logits,
    logits_strides,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_DRAW: tl.constexpr,
    BLOCKS_DRAW: tl.constexpr,
):
    request = tl.program_id(0)
    heat = _temperature(temperature_ptr, request, True)
    accepted = tl.load(accepted_ptr + request)
    if accepted >= 0 and heat > 0.0:
        at = offset64(request, rows) + accepted
        block_at, inside, peaks, peak = _block_peaks(peak_ptr, at, vocab, BLOCK, BLOCKS)
        if tl.abs(peak) < float("inf"):
            blocks = tl.cdiv(vocab, BLOCK_DRAW)
            first = offset64(request, blocks) * 2
            score, token = _winner(score_ptr, winner_ptr, first, blocks, vocab, BLOCKS_DRAW)
            _, plain = _winner(score_ptr, winner_ptr, first + blocks, blocks, vocab, BLOCKS_DRAW)
            token = tl.where(score >= 0.0, token, plain)
            logits_ptr += row_offset(request, stride_logits, ROWS)
            logit = tl.load(logits_ptr + offset_in_row(accepted, token, logits_strides))
            log_sum = tl.log(_total(sum_ptr, block_at, inside, peaks, peak, 1.0))
            tl.store(token_ptr + request, token)
            tl.store(logprobs_ptr + at, logit.to(tl.float32) - peak - log_sum)


def verify(
    logits, drafts, lengths, probs, temperature, top_k, top_p, seed, request_ids, positions, config
):
    """As ref.forward. Nothing waits for the device."""
    batch, rows, vocab = logits.shape
    accepted = logits.new_empty(batch, dtype=torch.int32)
    token = logits.new_empty(batch, dtype=torch.int64)
    logprobs = logits.new_empty(batch, rows, dtype=torch.float32)
    if not batch:
        return accepted, token, logprobs
    lengths, temperature, top_k, top_p, request_ids, positions = map(
        contiguous, (lengths, temperature, top_k, top_p, request_ids, positions)
    )
    sampled = temperature is not None
    cut = sampled and (top_k is not None or top_p is not None)
    blocks = cdiv(vocab, config.block)
    # Each by itself: where a part of a larger one begins would depend on the batch, and so would
    # what is compiled.
    peak, total, heated = (
        logits.new_empty(batch, rows, blocks, dtype=torch.float32) for _ in range(3)
    )
    best = logits.new_empty(batch, rows, blocks, dtype=torch.int32)
    least, mass = (logits.new_empty(batch, rows, dtype=torch.float32) for _ in range(2))
    sizes = rows, vocab, logits.stride(0), logits.stride()[1:]
    probs_strides = (0, 0, 0) if probs is None else probs.stride()
    strides = (*drafts.stride(), probs_strides[0], probs_strides[1:],
               seed.stride(0) if seed.shape[0] > 1 else 0)  # fmt: skip
    random = seed, request_ids, positions
    apart = row_divisor(logits, probs)
    split = dict(ROWS=apart, BLOCK=config.block, BLOCKS=next_power_of_2(blocks))
    has_lengths, has_probs = lengths is not None, probs is not None
    mtp_verify_rows_kernel[(batch * rows * blocks,)](
        logits, lengths, temperature, peak, best, total, heated, *sizes, ROWS=apart,
        HAS_LENGTHS=has_lengths, SAMPLED=sampled, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    if cut:
        mtp_verify_cut_kernel[(batch * rows,)](
            logits, lengths, temperature, top_k, top_p, peak, least, mass, *sizes,
            HAS_LENGTHS=has_lengths, HAS_TOP_K=top_k is not None, HAS_TOP_P=top_p is not None,
            BLOCK_CUT=config.block_cut, **split, num_warps=config.num_warps_cut,
        )  # fmt: skip
    mtp_verify_accept_kernel[(batch,)](
        logits, drafts, lengths, probs, temperature, *random, peak, best, total, heated, least,
        mass, accepted, token, logprobs, *sizes, *strides, HAS_LENGTHS=has_lengths,
        HAS_PROBS=has_probs, SAMPLED=sampled, HAS_CUT=cut, **split,
        BLOCK_ROWS=max(next_power_of_2(rows), 32), num_warps=1,
    )  # fmt: skip
    if sampled:
        parts = cdiv(vocab, config.block_draw)
        score = logits.new_empty(batch, 2, parts, dtype=torch.float32)
        winner = logits.new_empty(batch, 2, parts, dtype=torch.int32)
        mtp_verify_draw_kernel[(batch * parts,)](
            logits, drafts, lengths, probs, temperature, *random, peak, heated, least, mass,
            accepted, score, winner, *sizes, *strides, HAS_LENGTHS=has_lengths,
            HAS_PROBS=has_probs, HAS_CUT=cut, **split, BLOCK_DRAW=config.block_draw,
            num_warps=config.num_warps_draw,
        )  # fmt: skip
        mtp_verify_finish_kernel[(batch,)](
            logits, temperature, peak, total, accepted, score, winner, token, logprobs, *sizes,
            **split, BLOCK_DRAW=config.block_draw, BLOCKS_DRAW=next_power_of_2(parts), num_warps=1,
        )  # fmt: skip
    return accepted, token, logprobs


def specialisations():
    """Launches to compile without a GPU: 131072 tokens, bfloat16."""
    from nemokernels.ops.mtp_verify.op import plan

    def launch(drafted, cut):
        batch, drafts, vocab = 256, 4, 131072
        logits = torch.empty(batch, drafts + 1, vocab, device="meta", dtype=torch.bfloat16)
        ids = torch.empty(batch, drafts, device="meta", dtype=torch.int64)
        one = torch.empty(batch, device="meta")
        probs = logits[:, 1:].float() if drafted else None
        knobs = (one, one.int(), one) if cut else (one if drafted else None, None, None)
        args = logits, ids, one.int(), probs, *knobs, ids[:1, 0], ids[:, 0], ids[:, 0]
        return lambda: verify(*args, plan(vocab, "", ("triton",)))

    yield _triton.Specialisation("greedy", launch(False, False))
    yield _triton.Specialisation("sampled drafts", launch(True, False))
    yield _triton.Specialisation("greedy drafts, top-k and top-p", launch(False, True))
