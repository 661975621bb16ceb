"""Causal grouped-query attention in plain torch: the specification and the CPU leg.

B rows, T queries, S keys, KV key-value heads, G query heads on each (H = KV * G), D head size. The
query at position i sees the keys j <= i of its sequence with i - j < window or j < global_tokens;
ALiBi lowers their scores by slope * (i - j).
Inside, a sequence is (KV, G, T, D) or (KV, S, D) in the accumulation dtype, freshly allocated:
products of the same shapes on memory of the same alignment give the same bits wherever the
sequence came from.
"""

from __future__ import annotations

import torch

from nemokernels._checks import check
from nemokernels._registry import acc_dtype

BLOCK = 128  # queries at a time: the scores in memory are H x BLOCK x S


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    window: int | None,
    global_tokens: int,
):
    """out (B, T, H, D) in q's dtype and the log-sum-exp of the scaled scores (B, H, T).

    p = exp(s - max s); out = round(p) v / sum p, with p rounded to v's dtype in the product only.
    """
    acc, groups = acc_dtype(q), k.shape[2]
    rule = alibi_slopes, scale, window, global_tokens
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=acc)
    for row, queries, keys in _sequences(q, k, cu_seqlens):
        qs = _query_heads(q[row, queries], groups, acc)
        ks, vs = _key_heads(k[row, keys], acc), _key_heads(v[row, keys], acc)
        parts, tops = [], []
        for block, seen, places in _blocks(qs, ks, window, global_tokens):
            scores = _scores(qs[:, :, block], ks[:, seen], *places, *rule)
            top = scores.amax(-1, keepdim=True)
            p = scores.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            parts.append(_product(_round(p, v.dtype), vs[:, seen]) / total)
            tops.append((top + total.log())[..., 0])
        if parts:
            out[row, queries] = torch.cat(parts, 2).flatten(0, 1).transpose(0, 1).to(q.dtype)
            lse[row, :, queries] = torch.cat(tops, 2).flatten(0, 1)
    return out, lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    window: int | None,
    global_tokens: int,
):
    """p = exp(s - lse); dv = p^T dout; ds = p * (dout v^T - sum(dout * out));
    dq = scale ds k; dk = scale ds^T q. p and ds are rounded to the inputs' dtype in products.
    """
    acc, groups = acc_dtype(q), k.shape[2]
    rule = alibi_slopes, scale, window, global_tokens
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for row, queries, keys in _sequences(q, k, cu_seqlens):
        qs, outs, douts = (_query_heads(t[row, queries], groups, acc) for t in (q, out, dout))
        ks, vs = _key_heads(k[row, keys], acc), _key_heads(v[row, keys], acc)
        sums = lse[row, :, queries].unflatten(0, (groups, -1))
        delta = (outs * douts).sum(-1, keepdim=True)
        dqs, dks, dvs = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
        for block, seen, places in _blocks(qs, ks, window, global_tokens):
            qb, kb, db = qs[:, :, block], ks[:, seen], douts[:, :, block]
            p = _scores(qb, kb, *places, *rule).sub_(sums[:, :, block, None]).exp_()
            dp = _product(db, vs[:, seen].mT)
            ds = _round(p * (dp - delta[:, :, block]), q.dtype).flatten(1, 2)
            dvs[:, seen] += _round(p, v.dtype).flatten(1, 2).mT @ db.flatten(1, 2)
            dks[:, seen] += scale * (ds.mT @ qb.flatten(1, 2))
            dqs[:, :, block] = scale * (ds @ kb).view_as(qb)
        dq[row, queries] = dqs.flatten(0, 1).transpose(0, 1).to(q.dtype)
        dk[row, keys] = dks.transpose(0, 1).to(k.dtype)
        dv[row, keys] = dvs.transpose(0, 1).to(v.dtype)
    return dq, dk, dv


def with_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    window: int | None,
    global_tokens: int,
    k_scale: float,
    v_scale: float,
):
    """Write k and v into their slots, then one query at a time over exactly the keys it sees.

    Each query is its own product of shape (KV, G, D) x (KV, D, keys), so its bits depend neither
    on the number of tokens in the call nor on the batch.
    """
    acc, groups, length = acc_dtype(q), k.shape[2], q.shape[1]
    rule = alibi_slopes, scale * k_scale, window, global_tokens
    rows = _cache_rows(lengths.tolist(), slots.tolist(), length, k_cache.shape)
    out = q.new_zeros(q.shape)
    for b, slot, start in rows:
        k_cache[slot, start : start + length] = _stored(k[b], k_cache.dtype, k_scale)
        v_cache[slot, start : start + length] = _stored(v[b], v_cache.dtype, v_scale)
        for i in range(length):
            at = torch.arange(start + i + 1, device=q.device)
            at = at[_visible(start + i, at, window, global_tokens)]
            query = _query_heads(q[b, i : i + 1], groups, acc)
            keys, values = (_key_heads(c[slot][at].to(q.dtype), acc) for c in (k_cache, v_cache))
            scores = _scores(query, keys, at[-1:], at, *rule)
            p = torch.exp(scores - scores.amax(-1, keepdim=True))
            attended = _product(_round(p, q.dtype), values) / p.sum(-1, keepdim=True)
            out[b, i] = (attended * v_scale).flatten(0, 2).to(q.dtype)
    return out


def _stored(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    return (x.to(acc_dtype(x)) * (1.0 / scale)).clamp(-448.0, 448.0).to(dtype)


def _sequences(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | None):
    # (row, slice of its queries, slice of its keys) of every sequence.
    length, keys = q.shape[1], k.shape[1]
    if cu_seqlens is None:
        return [(row, slice(0, length), slice(0, keys)) for row in range(q.shape[0])]
    bounds = cu_seqlens.tolist()
    check(
        "attention",
        bounds[0] == 0 and bounds[-1] == length and bounds == sorted(bounds),
        f"`cu_seqlens` must ascend from 0 to {length}, the length of q, got {bounds}",
    )
    return [(0, slice(a, b), slice(a, b)) for a, b in zip(bounds, bounds[1:])]


def _cache_rows(lengths: list[int], slots: list[int], new: int, shape: torch.Size):
    # (row, slot, start) of every row that is not padding, all checked before any is written.
    rows = [(b, s, n) for b, (s, n) in enumerate(zip(slots, lengths)) if s >= 0]
    where, taken = "attention_with_cache", set()
    for b, slot, start in rows:
        check(where, slot < shape[0], f"`slots` holds {slot} at row {b}, expected below {shape[0]}")
        check(where, slot not in taken, f"`slots` holds {slot} twice, expected each slot once")
        check(where, 0 <= start and start + new <= shape[1],
              f"`lengths` holds {start} at row {b}; with {new} new tokens expected 0 to "
              f"{shape[1] - new}, the cache holds {shape[1]}")  # fmt: skip
        taken.add(slot)
    return rows


def _query_heads(x: torch.Tensor, groups: int, acc: torch.dtype) -> torch.Tensor:
    # (T, H, D) -> (KV, G, T, D)
    return _own(x.transpose(0, 1), acc).unflatten(0, (groups, -1))


def _key_heads(x: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    # (S, KV, D) -> (KV, S, D)
    return _own(x.transpose(0, 1), acc)


def _own(x: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    return x.to(acc, copy=True, memory_format=torch.contiguous_format)


def _blocks(q: torch.Tensor, k: torch.Tensor, window: int | None, global_tokens: int):
    # (slice of queries, slice of the keys that some of them see, (positions of both))
    length, ahead = q.shape[2], k.shape[1] - q.shape[2]
    places = torch.arange(k.shape[1], device=q.device)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        far = window is None or global_tokens
        seen = slice(0 if far else max(ahead + start - window + 1, 0), ahead + stop)
        yield slice(start, stop), seen, (places[ahead + start : ahead + stop], places[seen])


def _visible(query, key: torch.Tensor, window: int | None, global_tokens: int) -> torch.Tensor:
    near = key > query - window if window is not None else True
    return (key <= query) & (near | (key < global_tokens))


def _scores(q, k, queries, keys, alibi_slopes, scale, window, global_tokens) -> torch.Tensor:
    # (KV, G, queries, keys); ``queries`` and ``keys`` are the positions of those of q and k.
    scores = _product(q, k.mT).mul_(scale)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype).view(*scores.shape[:2], 1, 1)
        scores -= slopes * (queries[:, None] - keys)
    hidden = ~_visible(queries[:, None], keys, window, global_tokens)
    return scores.masked_fill_(hidden, float("-inf"))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # (KV, G, M, K) x (KV, K, N): the G heads of a group share one right-hand side.
    return (a.flatten(1, 2) @ b).unflatten(1, a.shape[1:3])


def _round(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).to(x.dtype)
