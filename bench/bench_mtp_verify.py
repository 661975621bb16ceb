"""Verification of four drafts per request: greedy, at temperature 0.8, and cut by top-k and top-p.

A sampled verdict is defined by its random numbers, so plain torch is our reference there.
"""

from functools import partial

import torch

from nemokernels import mtp_verify
from nemokernels.bench.rows import Subject
from nemokernels.ops.mtp_verify import cost, ref

TEMPERATURE = 0.8


def inputs(make, B, K, V, percent):
    """Of the requests, ``percent`` have drafts that greedy verification accepts throughout."""
    logits = make.randn(B, K + 1, V)
    drafts = logits[:, :K].argmax(-1)
    wrong = torch.arange(B, device=make.device) >= B * percent // 100
    return dict(logits=logits, drafts=torch.where(wrong[:, None], (drafts + 1) % V, drafts))


def inputs_sampled(make, B, K, V, *, top_k, top_p):
    return dict(logits=make.randn(B, K + 1, V), drafts=make.integers(V, B, K),
                positions=make.integers(10000, B), top_k=top_k, top_p=top_p)  # fmt: skip


def ours(logits, drafts):
    return tuple(mtp_verify(logits, drafts))


def eager(logits, drafts):
    wide = logits.float()
    best = wide.argmax(-1)
    count = (drafts == best[:, :-1]).int().cumprod(1).sum(1)
    after = best.gather(1, count[:, None])
    place = torch.arange(best.shape[1], device=drafts.device)
    tokens = torch.cat([drafts, after], 1).scatter(1, count[:, None], after)
    logprobs = wide.gather(2, tokens[..., None])[..., 0] - wide.logsumexp(-1)
    return count.int(), after[:, 0], logprobs.where(place <= count[:, None], 0.0)


def ours_sampled(logits, drafts, positions, top_k, top_p):
    return tuple(mtp_verify(logits, drafts, temperature=TEMPERATURE, positions=positions,
                            top_k=top_k, top_p=top_p))  # fmt: skip


def eager_sampled(logits, drafts, positions, top_k, top_p):
    rows = torch.arange(len(logits), device=logits.device)
    temperature = torch.full_like(rows, TEMPERATURE, dtype=torch.float32)
    k = None if top_k is None else torch.full_like(rows, top_k)
    p = None if top_p is None else torch.full_like(temperature, top_p)
    return ref.forward(logits, drafts, None, None, temperature, k, p, rows.new_zeros(1), rows,
                       positions)  # fmt: skip


def sampled(title, top_k=None, top_p=None):
    return Subject(
        "mtp_verify", f"mtp_verify, {title}", ours=ours_sampled, eager=eager_sampled,
        inputs=partial(inputs_sampled, top_k=top_k, top_p=top_p), tiny=dict(B=4, K=3, V=40),
    )  # fmt: skip


GREEDY = Subject("mtp_verify", "mtp_verify, greedy", inputs=inputs, ours=ours, eager=eager,
                 tiny=dict(B=4, K=3, V=40, percent=50))  # fmt: skip
SAMPLED = sampled("sampled")
CUTS = [sampled("top-k 50", 50), sampled("top-p 0.9", None, 0.9)]

ROWS = []
for dtype in (torch.float32, torch.bfloat16):
    for B in (1, 64, 256):
        shape = dict(B=B, K=4, V=131072)
        common = dict(
            cost=cost.forward(*shape.values(), dtype.itemsize),
            dtype=dtype,
            goal=0.85 if B == 256 else None,
            quick=B == 256 and dtype.itemsize == 4,
        )
        for percent in (0, 50, 100) if B == 256 else (50,):
            ROWS.append(GREEDY.row(f"{B} x 4, {percent} % accepted", percent=percent, **shape,
                                   **common))  # fmt: skip
        ROWS.append(SAMPLED.row(f"{B} x 4", **shape, **common))
        common |= dict(goal=None, quick=False)  # a cut reads its row more than once
        ROWS += [cut.row(f"{B} x 4", **shape, **common) for cut in CUTS]


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
