"""Causal attention over whole sequences, and over a key-value cache."""

from functools import partial

import torch
import torch.nn.functional as F

from nemokernels import attention, attention_with_cache
from nemokernels.bench.rows import Subject, model
from nemokernels.ops.attention import cost


def inputs(make, B, T, H, KV, D):
    return dict(q=make.randn(B, T, H, D), k=make.randn(B, T, KV, D), v=make.randn(B, T, KV, D))


def eager(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def flash_attn():
    from flash_attn import flash_attn_func as peer

    return lambda q, k, v: peer(q, k, v, causal=True)


def inputs_cached(make, B, T, S, H, KV, D, *, cache_dtype):
    """T new tokens per request after S in its cache, which has room for just these."""
    cache = make.randn(2, B, S + T, KV, D).to(cache_dtype or make.dtype)
    integers = dict(dtype=torch.int32, device=make.device)
    return dict(inputs(make, B, T, H, KV, D), k_cache=cache[0], v_cache=cache[1],
                lengths=torch.full((B,), S, **integers), slots=torch.arange(B, **integers),
                S=S)  # fmt: skip


def ours_cached(q, k, v, k_cache, v_cache, lengths, slots, S):
    return attention_with_cache(q, k, v, k_cache, v_cache, lengths, slots=slots)


def eager_cached(q, k, v, k_cache, v_cache, lengths, slots, S):
    """As all requests have one length."""
    k_cache[:, S:], v_cache[:, S:] = k.to(k_cache.dtype), v.to(v_cache.dtype)
    q, k, v = (t.to(q.dtype).transpose(1, 2) for t in (q, k_cache, v_cache))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(S)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return out.transpose(1, 2)


def flash_attn_cached():
    from flash_attn import flash_attn_with_kvcache as peer

    def run(q, k, v, k_cache, v_cache, lengths, slots, S):
        return peer(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

    return run


WHOLE = Subject(
    "attention", "attention", inputs=inputs, ours=attention, eager=eager,
    peers={"flash_attn": flash_attn}, wrt=("q", "k", "v"), tiny=dict(B=2, T=9, H=4, KV=2, D=8),
)  # fmt: skip


def cached(title, cache_dtype, **peers):
    return Subject(
        "attention_with_cache", title, inputs=partial(inputs_cached, cache_dtype=cache_dtype),
        ours=ours_cached, eager=eager_cached, peers=peers, mutates=("k_cache", "v_cache"),
        tiny=dict(B=2, T=2, S=7, H=4, KV=2, D=8),
    )  # fmt: skip


CACHED = cached("attention_with_cache", None, flash_attn=flash_attn_cached)
E4M3 = cached("attention_with_cache, E4M3 cache", torch.float8_e4m3fn)


def heads(short: str) -> dict[str, int]:
    c = model(short)
    return dict(H=c.num_attention_heads, KV=c.num_key_value_heads, D=c.head_dim)


ROWS = []
for short, B, T in (("nano3", 2, 8192), ("h8b", 2, 8192)):
    shape = dict(B=B, T=T, **heads(short))
    for way in ("forward", "backward"):
        counted = getattr(cost, way)(**shape, itemsize=2, unit="bfloat16")
        ROWS.append(WHOLE.row(f"{short} {B}x{T}", way, cost=counted, quick=short == "nano3",
                              **shape))  # fmt: skip
for short, B, T, S in (("nano3", 1, 1, 8192), ("nano3", 1, 1, 131072), ("nano3", 64, 1, 8192),
                       ("nano3", 64, 4, 8192), ("h8b", 64, 1, 4096)):  # fmt: skip
    shape = dict(B=B, T=T, S=S, **heads(short))
    for held, size in ((CACHED, 2), (E4M3, 1)):
        counted = cost.with_cache(**shape, cache_itemsize=size, itemsize=2, unit="bfloat16")
        ROWS.append(held.row(
            f"{short} {B} x {T} after {S}", cost=counted, quick=(short, B, T) == ("nano3", 64, 1),
            goal=0.85 if (B, T, S) in ((1, 1, 131072), (64, 1, 8192)) else None, **shape,
        ))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
