"""Verification of drafted tokens, and plain sampling as its case without drafts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.mtp_verify import op

__all__ = ["Verdict", "mtp_verify"]

_INTEGERS = (torch.int32, torch.int64)


class Verdict(NamedTuple):
    """What a step emits: the first ``accepted`` drafts, then ``next_token``.

    Attributes:
        accepted: (B,), int32, 0 to the request's number of drafts; -1 for a pad request, so that
            ``accepted + 1`` tokens are emitted in every case.
        next_token: (B,), int64. -1 where the row it should come from has no distribution; 0 for a
            pad request.
        logprobs: (B, K + 1), float32 (float64 for float64 logits), natural log of the softmax of
            the logits as given (before temperature, top-k and top-p) at each emitted token; zero
            beyond them; NaN for a ``next_token`` of -1.
    """

    accepted: torch.Tensor
    next_token: torch.Tensor
    logprobs: torch.Tensor


def mtp_verify(
    logits: torch.Tensor,
    drafts: torch.Tensor,
    *,
    draft_lengths: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    temperature: float | torch.Tensor | None = None,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    seed: int | torch.Tensor = 0,
    request_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> Verdict:
    """Accept a prefix of the drafted tokens and choose the token that follows it.

    Row j of ``logits`` is the target's answer after j accepted drafts. The target distribution p
    is ``softmax(logits / temperature)`` cut by top-k, then by top-p, then renormalised. Both cuts
    are by value (equal probabilities stay or go together): top-k keeps a token that fewer than k
    exceed, top-p one for which those that exceed it hold less than ``top_p`` of what top-k left.

    *Greedy* (temperature 0): draft x_j is accepted while it is the largest logit (lowest index
    among equals); the next token is the largest logit of the first row that was not accepted.

    *Sampled*: x_j is accepted if ``u * q(x_j) < p(x_j)`` and ``q(x_j) > 0``, u uniform in [0, 1).
    At the first rejection the next token is drawn from ``max(p - q, 0)`` normalised; after the
    last draft from p. Without ``draft_probs`` q is one at the draft: it is accepted with
    probability p(x_j) and otherwise p without x_j is drawn from. Emitted tokens are distributed
    as p, whatever was drafted, if each draft was drawn from its q independently of this call's
    random numbers: **do not draft with the same seed**.

    Without drafts (K = 0) this is a sampler: ``next_token`` is drawn from p.

    Random numbers are a function of (seed, request id, position) alone (counters in
    ``nemokernels/ops/mtp_verify/ref.py``), so the batch a request sits in, its place there and the
    number of drafts change none of them. Computed in float32 (float64 for float64 logits), under
    autocast too. Not differentiable. Nothing waits for the device.

    A row with a NaN or +inf, or with nothing but -inf, has no distribution: its draft is rejected
    and a next token from it is -1. Rows past ``draft_lengths`` and other requests are not
    affected. On a device a draft outside [0, V) is never accepted, and p itself is drawn from.

    Args:
        logits: (B, K + 1, V), float32, bfloat16, float16 or float64, any strides. -inf excludes.
        drafts: (B, K), int32 or int64.
        draft_lengths: (B,), int32 or int64: drafts of each request, 0 to K; K if not given. A
            negative one marks a pad request.
        draft_probs: (B, K, V), the distributions the drafts were drawn from, rows summing to one.
        temperature: scalar or (B,) float tensor; 0 or not given is greedy.
        top_k: scalar or (B,) integer tensor; 0 or not given keeps all.
        top_p: scalar or (B,) float tensor in (0, 1]; 1 or not given keeps all.
        seed: int or int64 tensor of one or B elements, 64 bits.
        request_ids: (B,), int32 or int64; the row number if not given.
        positions: (B,), int32 or int64, below 2**32: the place in its sequence of the token that
            the first draft (without drafts the next token) proposes; 0 if not given.

    Returns:
        A Verdict.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value. Of
            values in tensors, drafts, knobs and sums of draft_probs are checked on the CPU; a
            device is not waited for.

    Source: Leviathan et al., "Fast inference from transformers via speculative decoding", 2023;
    Chen et al., "Accelerating large language model decoding with speculative sampling", 2023.
    """
    where = "mtp_verify"
    check_tensor(where, "logits", logits, shape=(None, None, None), dims="(B, K + 1, V)",
                 dtypes=FLOATS)  # fmt: skip
    (batch, rows, vocab), device = logits.shape, logits.device
    check(where, rows >= 1 and vocab >= 1,
          "`logits` needs at least one row and one token, got {}", tuple(logits.shape))  # fmt: skip
    check_tensor(where, "drafts", drafts, shape=(batch, rows - 1), dims="(B, K)",
                 dtypes=_INTEGERS, device=device)  # fmt: skip
    if draft_probs is not None:
        check_tensor(where, "draft_probs", draft_probs, shape=(batch, rows - 1, vocab),
                     dims="(B, K, V)", dtypes=FLOATS, device=device)  # fmt: skip

    for name, value in (("draft_lengths", draft_lengths), ("request_ids", request_ids),
                        ("positions", positions)):  # fmt: skip
        if value is not None:
            _check_vector(name, value, _INTEGERS, logits)
    temperature = _vector("temperature", temperature, float, logits)
    top_k, top_p = _vector("top_k", top_k, int, logits), _vector("top_p", top_p, float, logits)
    seed = _seed(seed, logits)
    if request_ids is None:
        request_ids = torch.arange(batch, device=device)
    if positions is None:
        positions = torch.zeros(batch, dtype=torch.int64, device=device)
    return Verdict(*op.mtp_verify(logits, drafts, draft_lengths, draft_probs, temperature, top_k,
                                  top_p, seed, request_ids, positions))  # fmt: skip


_RANGES = {
    "temperature": (lambda t: 0 <= t < math.inf, "finite and not negative"),
    "top_k": (lambda k: k >= 0, "at least 0"),
    "top_p": (lambda p: 0 < p <= 1, "in (0, 1]"),
    "seed": (lambda s: 0 <= s < 2**64, "in [0, 2**64)"),
}


def _check_vector(name, value, dtypes, logits):
    check_tensor("mtp_verify", name, value, shape=logits.shape[:1], dims="(B,)", dtypes=dtypes,
                 device=logits.device)  # fmt: skip


def _check_scalar(name, value, kind):
    if not isinstance(value, (int, float) if kind is float else int) or isinstance(value, bool):
        raise TypeError(f"mtp_verify: `{name}` must be {kind.__name__} or a torch.Tensor, "
                        f"got {type(value).__name__}")  # fmt: skip
    holds, wanted = _RANGES[name]
    check("mtp_verify", holds(value), "`{}` must be {}, got {}", name, wanted, value)


def _vector(name, value, kind, logits):
    """One value per request, of a scalar or a tensor; None stays None."""
    if value is None:
        return None
    dtypes = FLOATS if kind is float else _INTEGERS
    if isinstance(value, torch.Tensor):
        _check_vector(name, value, dtypes, logits)
        return value
    _check_scalar(name, value, kind)
    return torch.full(logits.shape[:1], value, dtype=dtypes[0], device=logits.device)


def _seed(seed, logits):
    if isinstance(seed, torch.Tensor):
        check_tensor("mtp_verify", "seed", seed, dtypes=(torch.int64,), device=logits.device)
        check("mtp_verify", seed.numel() in (1, logits.shape[0]),
              "`seed` needs 1 or {} elements, got {}", logits.shape[0], seed.numel())  # fmt: skip
        return seed.reshape(-1)
    _check_scalar("seed", seed, int)
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((1,), signed, dtype=torch.int64, device=logits.device)
