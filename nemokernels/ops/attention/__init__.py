"""Causal grouped-query attention: over whole sequences, and over a key-value cache."""

from __future__ import annotations

import torch

from nemokernels._autocast import autocast
from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.attention import op

__all__ = ["attention", "attention_with_cache"]

E4M3 = torch.float8_e4m3fn


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    global_tokens: int = 0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention; query head h reads key-value head ``h // (H / KV)``.

    ``out_i = sum_j softmax_j(scale * q_i . k_j - slope * (i - j)) v_j`` over the keys ``j <= i``
    with ``i - j < window`` or ``j < global_tokens``. i and j are positions in the sequence: the
    last query stands at the last key. Slopes are those of ALiBi, zero without alibi_slopes.
    Scores, softmax and both sums are in float32 (float64 for float64 input).
    The unnormalised probabilities are rounded to v's dtype before they meet v, as are the
    probabilities and the score gradients before their products in the backward. A sequence's result
    depends on that sequence alone, bit for bit: packed, batched or by itself.
    Under autocast q, k and v are cast to the autocast dtype.

    On CUDA our kernels run, or, where they have not passed their self-test, torch's or flash-attn's
    (not run yet); ``backends()`` says which. torch's add up the gradient of q in any order unless
    ``torch.use_deterministic_algorithms`` is on.

    Args:
        q: (B, T, H, D), float32, bfloat16, float16 or float64, any strides.
        k, v: (B, S, KV, D), q's dtype; S at least T, H a multiple of KV.
        cu_seqlens: (sequences + 1,) int32, ascending from 0 to T: bounds of the sequences packed
            into the one row (B is 1, S equals T). None: every row is a sequence.
        scale: factor of the scores; None: ``D ** -0.5``.
        window: how many keys a query sees, its own included; None: all up to its own.
        global_tokens: this many keys at the start of each sequence are seen by every later query,
            whatever the window.
        alibi_slopes: (H,) float32. It gets no gradient.

    Returns:
        (B, T, H, D) in q's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value, or
            alibi_slopes requires a gradient. The values of cu_seqlens are checked where the
            reference runs; elsewhere nothing outside the row is touched whatever they are.

    Source: Ainslie et al., "GQA", 2023; Press et al., "Train Short, Test Long", 2022 (ALiBi);
    rounding points of Dao, "FlashAttention-2", 2023.
    """
    where = "attention"
    check_tensor(where, "q", q, shape=(None, None, None, None), dims="(B, T, H, D)", dtypes=FLOATS)
    q, k, v = _common(where, q, k, v)
    rows, length, heads, _ = q.shape
    check(where, k.shape[1] >= length,
          "`k` has {} tokens, expected at least the {} of q", k.shape[1], length)  # fmt: skip
    if cu_seqlens is not None:
        check_tensor(where, "cu_seqlens", cu_seqlens, shape=(None,), dims="(sequences + 1,)",
                     dtypes=(torch.int32,), device=q.device)  # fmt: skip
        check(where, cu_seqlens.shape[0] >= 1, "`cu_seqlens` is empty, expected at least [0]")
        check(where, rows == 1, "`q` has batch {}, expected 1 with cu_seqlens", rows)
        check(
            where,
            k.shape[1] == length,
            "`k` has {} tokens, expected the {} of q with cu_seqlens",
            k.shape[1],
            length,
        )
    rule = _rule(where, q, scale, window, global_tokens, alibi_slopes)
    return op.attention(q, k, v, cu_seqlens, *rule)[0]


def attention_with_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    slots: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    global_tokens: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Append k and v to the cache, in place, and attend causally over cache and new tokens.

    Token i of row b is written at position ``lengths[b] + i`` of slot ``slots[b]`` (rounded to the
    cache's dtype) and its query sees positions up to ``lengths[b] + i`` of that slot, as stored.
    Which of them, and at what score, is as in ``attention``.
    Softmax and sums are in float32 (float64 for a float64 q); what is read from the cache and the
    unnormalised probabilities are in q's dtype in the products. A query's result depends on its own
    keys alone, bit for bit: five tokens in one call give what five calls give, in any batch.
    An E4M3 cache holds ``k / k_scale`` and ``v / v_scale``, saturated and rounded to nearest even;
    products take what it holds, and the scales multiply the scores and the result.
    ``lengths`` is not advanced. No gradient. Under autocast q, k and v are cast, the caches not.

    Args:
        q: (B, T, H, D), float32, bfloat16, float16 or float64, any strides.
        k, v: (B, T, KV, D), q's dtype; H a multiple of KV.
        k_cache, v_cache: (slots, max_length, KV, D), any float dtype or float8_e4m3fn, the
            same for both.
        lengths: (B,) int32, tokens already in the slot; ``lengths + T <= max_length``.
        slots: (B,) int32, each slot at most once. Negative: a padding row, which touches no slot
            and whose output is zero.
        scale, window, global_tokens, alibi_slopes: as in ``attention``.
        k_scale, v_scale: what a unit of an E4M3 cache stands for; 1 for other caches.

    Returns:
        (B, T, H, D) in q's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value. The
            values of lengths and slots are checked, before anything is written, where the
            reference runs.
        RuntimeError: an input requires a gradient.
    """
    where = "attention_with_cache"
    check_tensor(where, "q", q, shape=(None, None, None, None), dims="(B, T, H, D)", dtypes=FLOATS)
    q, k, v = _common(where, q, k, v)
    rows, length, _, dim = q.shape
    check(where, k.shape[1] == length,
          "`k` has {} tokens, expected the {} of q", k.shape[1], length)  # fmt: skip
    check_tensor(where, "k_cache", k_cache, shape=(None, None, k.shape[2], dim),
                 dims="(slots, max_length, KV, D)", dtypes=(*FLOATS, E4M3),
                 device=q.device)  # fmt: skip
    check_tensor(where, "v_cache", v_cache, shape=k_cache.shape, dims="the shape of k_cache",
                 dtypes=(k_cache.dtype,), device=q.device)  # fmt: skip
    for name, value in (("lengths", lengths), ("slots", slots)):
        check_tensor(where, name, value, shape=(rows,), dims="(B,)", dtypes=(torch.int32,),
                     device=q.device)  # fmt: skip
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        check(where, 0.0 < value < float("inf"),
              "`{}` must be positive and finite, got {}", name, value)  # fmt: skip
        check(where, value == 1.0 or k_cache.dtype == E4M3,
              "`{}` is {}, expected 1 with a cache of {}", name, value, k_cache.dtype)  # fmt: skip
    rule = _rule(where, q, scale, window, global_tokens, alibi_slopes)
    scales = k_scale, v_scale
    return op.attention_with_cache(q, k, v, k_cache, v_cache, lengths, slots, *rule, *scales)


def _common(where: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    rows, _, heads, dim = q.shape
    check_tensor(where, "k", k, shape=(rows, None, None, dim), dims="(B, S, KV, D)", dtypes=FLOATS,
                 device=q.device)  # fmt: skip
    check_tensor(where, "v", v, shape=k.shape, dims="the shape of k", dtypes=FLOATS,
                 device=q.device)  # fmt: skip
    groups = k.shape[2]
    check(where, dim >= 1 and groups >= 1 and heads >= 1 and heads % groups == 0,
          "`q` has {} heads of size {}, expected a positive multiple of the {} heads of k",
          heads, dim, groups)  # fmt: skip
    q, k, v = autocast(q, k, v)
    for name, value in (("k", k), ("v", v)):
        check_tensor(where, name, value, dtypes=(q.dtype,))
    return q, k, v


def _rule(where: str, q: torch.Tensor, scale, window, global_tokens, alibi_slopes):
    # What op.RULE takes: which keys a query sees, and their scores.
    if scale is None:
        scale = q.shape[-1] ** -0.5
    check(where, 0.0 < scale < float("inf"), "`scale` must be positive and finite, got {}", scale)
    check(where, window is None or window >= 1, "`window` must be at least 1, got {}", window)
    check(where, global_tokens >= 0, "`global_tokens` must not be negative, got {}", global_tokens)
    if alibi_slopes is not None:
        check_tensor(where, "alibi_slopes", alibi_slopes, shape=(q.shape[2],), dims="(H,)",
                     dtypes=(torch.float32,), device=q.device)  # fmt: skip
        check(where, not alibi_slopes.requires_grad,
              "`alibi_slopes` requires a gradient; it has none")  # fmt: skip
    return alibi_slopes, scale, window, global_tokens
