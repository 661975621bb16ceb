"""Verification of drafted tokens in plain torch: the specification and the CPU leg.

B requests, K drafts, V vocabulary. Row j of a request is the target's distribution p of the token
after j accepted drafts; draft j was drawn from q. Probabilities are in the accumulation dtype
(float32; float64 stays float64), random numbers in float32 whatever the dtype.

Random words come from Philox4x32-10 with the seed as its key and, as its counter, the 64-bit
request id in the two low words, the token's position in the third, and in the fourth 0 for the
acceptance (word 0) or 1 + v // 4 for the noise of token v (word v % 4). A draw depends on nothing
else: not on the batch, the number of drafts or the backend. Every position is decided by its own
words, once, so that steps that follow each other stay independent.
"""

from __future__ import annotations

import torch

from nemokernels import _philox
from nemokernels._checks import check
from nemokernels._registry import acc_dtype

SLACK = 0.01  # of the sum of draft_probs: more than rounding a distribution to 16 bits makes


def forward(
    logits: torch.Tensor,
    drafts: torch.Tensor,
    draft_lengths: torch.Tensor | None,
    draft_probs: torch.Tensor | None,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    seed: torch.Tensor,
    request_ids: torch.Tensor,
    positions: torch.Tensor,
):
    """Returns accepted (B), next_token (B) and logprobs (B, K + 1)."""
    batch, rows, vocab = logits.shape
    lengths = drafts.new_full((batch,), rows - 1) if draft_lengths is None else draft_lengths.long()
    wide, drafts = logits.to(acc_dtype(logits)), drafts.long()
    peak, best = wide.amax(-1), wide.argmax(-1)
    sound = peak.isfinite()  # neither NaN nor +inf in the row, and not -inf throughout
    step = torch.arange(rows - 1, device=logits.device)
    live = (step < lengths[:, None]) & sound[:, :-1]
    in_vocab = (drafts >= 0) & (drafts < vocab)
    index = drafts.clamp(0, vocab - 1)

    if logits.device.type == "cpu":
        _check_values(drafts, live, vocab, draft_probs, temperature, top_k, top_p)
    keep, p = live & (drafts == best[:, :-1]), None
    if temperature is not None:
        p = target(wide, peak, temperature.to(wide.dtype), top_k, top_p)
        p_draft = p[:, :-1].gather(2, index[..., None])[..., 0]
        q_draft = torch.ones_like(p_draft)
        if draft_probs is not None:
            q_draft = draft_probs.gather(2, index[..., None])[..., 0].to(p.dtype)
        u = acceptance(seed, request_ids, positions, rows - 1).to(p.dtype)
        # p / q > u without the division. Strict: a draft the target excludes is never accepted.
        sampled = live & in_vocab & (q_draft > 0) & (u * q_draft < p_draft)
        greedy = ~(temperature > 0)
        keep = torch.where(greedy[:, None], keep, sampled)
    accepted = keep.long().cumprod(1).sum(1)

    # The row of the first draft that was not accepted, or the one past the last draft.
    last = torch.arange(batch, device=logits.device), accepted
    token = best[last]
    if p is not None:
        weights = p[last]
        if rows > 1:
            at = last[0], accepted.clamp(max=rows - 2)
            rejected = (accepted < lengths) & in_vocab[at]
            q = None if draft_probs is None else draft_probs[at]
            weights = residual(weights, index[at], rejected, q)
        noise = exponential(seed, request_ids, positions + accepted, vocab).to(p.dtype)
        token = torch.where(greedy, token, race(weights, noise))
    token = token.masked_fill(~sound[last], -1)
    pad = lengths < 0
    accepted, token = accepted.masked_fill(pad, -1), token.masked_fill(pad, 0)
    logprobs = log_probabilities(wide, index, accepted, token)
    return accepted.int(), token, logprobs


def _check_values(drafts, live, vocab, draft_probs, temperature, top_k, top_p) -> None:
    """What the host can only know where the tensors' values are at hand."""
    _refuse("drafts", drafts, live & ((drafts < 0) | (drafts >= vocab)), f"from 0 to {vocab - 1}")
    if temperature is None:
        return
    for name, value, good, wanted in (
        ("temperature", temperature, lambda t: (t >= 0) & t.isfinite(), "finite and not negative"),
        ("top_k", top_k, lambda k: k >= 0, "at least 0"),
        ("top_p", top_p, lambda p: (p > 0) & (p <= 1), "in (0, 1]"),
    ):
        if value is not None:
            _refuse(name, value, ~good(value), wanted)
    if draft_probs is not None:
        sums = draft_probs.sum(-1, dtype=acc_dtype(draft_probs))
        used = live & (temperature > 0)[:, None]
        _refuse("draft_probs.sum(-1)", sums, used & ~((sums - 1.0).abs() <= SLACK), "1")


def _refuse(name: str, value: torch.Tensor, wrong: torch.Tensor, wanted: str) -> None:
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        place = ", ".join(f"{what} {i}" for what, i in zip(("request", "draft"), at))
        check(
            "mtp_verify", False, f"`{name}` is {value[at].item():g} at {place}, expected {wanted}"
        )


def target(
    logits: torch.Tensor,
    peak: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
) -> torch.Tensor:
    """Probabilities (B, rows, V) after temperature, then top-k, then top-p, in this order.

    Both cuts are by value, so equal probabilities are kept or cut together: top-k keeps a token if
    fewer than k are larger; top-p keeps it if the larger ones hold less than top_p of the mass
    that top-k left. The largest is always kept.
    """
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None, None]
    p = ((logits - peak[..., None]) / heat).exp()  # the largest is exactly 1
    if top_k is not None:
        ordered, vocab = p.sort(-1, descending=True).values, p.shape[-1]
        last = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long() - 1
        p = p.where(p >= ordered.gather(2, last[:, None, None].expand(-1, p.shape[1], 1)), 0.0)
    if top_p is not None:
        ordered = p.sort(-1, descending=True).values
        mass = ordered.double().cumsum(-1)
        larger = torch.nn.functional.pad(mass[..., :-1], (1, 0))  # mass before each place
        share = torch.where(top_p < 1, top_p.double(), torch.inf)[:, None, None] * mass[..., -1:]
        last = ((larger < share).sum(-1, keepdim=True) - 1).clamp(min=0)
        p = p.where(p >= ordered.gather(2, last), 0.0)
    return p / p.sum(-1, keepdim=True)


def residual(
    p: torch.Tensor, draft: torch.Tensor, rejected: torch.Tensor, q: torch.Tensor | None
) -> torch.Tensor:
    """max(p - q, 0), not normalised, where the draft was rejected; p elsewhere. All are (B, ...).

    Without q the draft was certain, and p without the draft remains. Where rounding leaves
    nothing, p.
    """
    if q is None:
        rest = p.scatter(1, draft[:, None], 0.0)
    else:
        rest = (p - q.to(p.dtype)).clamp(min=0)
    usable = rejected & (rest > 0).any(-1)
    return torch.where(usable[:, None], rest, p)


def race(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """argmax(weights / noise): a draw from weights / sum(weights) if noise is exponential."""
    return torch.where(weights > 0, weights / noise, -1.0).argmax(-1)


def acceptance(
    seed: torch.Tensor, request_ids: torch.Tensor, positions: torch.Tensor, steps: int
) -> torch.Tensor:
    """u (B, steps) in [0, 1), for the tokens at positions, positions + 1, ..."""
    ahead = torch.arange(steps, device=positions.device)
    word = _philox.philox4x32(
        seed.view(-1, 1), request_ids[:, None].long(), positions[:, None].long() + ahead
    )[0]
    return _philox.uniform(word)


def exponential(
    seed: torch.Tensor, request_ids: torch.Tensor, positions: torch.Tensor, vocab: int
) -> torch.Tensor:
    """Exponential noise (B, V) of the token at each request's position.

    -log(1 - u) with u = (word + 0.5) * 2**-32 capped at 1 - 2**-24: between 1e-10 and 17, with the
    fine steps at the small end, where the race is decided.
    """
    block = 1 + torch.arange((vocab + 3) // 4, device=positions.device)
    words = _philox.philox4x32(
        seed.view(-1, 1), request_ids[:, None].long(), positions[:, None].long(), block
    )
    u = (torch.stack(words, -1).flatten(1)[:, :vocab].float() + 0.5) * 2.0**-32
    return -torch.log1p(-u.clamp(max=1 - 2.0**-24))


def log_probabilities(
    logits: torch.Tensor, drafts: torch.Tensor, accepted: torch.Tensor, token: torch.Tensor
) -> torch.Tensor:
    """log_softmax(logits) of the emitted tokens: accepted drafts, then ``token``, then zeros."""
    rows = logits.shape[1]
    place = torch.arange(rows, device=logits.device)
    emitted = torch.cat([drafts, token.new_zeros(token.shape[0], 1)], 1)
    emitted = torch.where(place == accepted[:, None], token.clamp(min=0)[:, None], emitted)
    chosen = logits.gather(2, emitted[..., None])[..., 0]
    values = chosen - logits.logsumexp(-1)
    # A row without a distribution reads as NaN, also where logsumexp itself is infinite.
    values = values.where((token >= 0)[:, None] | (place < accepted[:, None]), torch.nan)
    return values.where(place <= accepted[:, None], 0.0)
