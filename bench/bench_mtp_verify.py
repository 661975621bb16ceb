"""Verification of four drafts per request: greedy, and at temperature 0.8.

A sampled verdict is defined by its random numbers, so plain torch is our reference there.
"""

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


def inputs_sampled(make, B, K, V):
    return dict(logits=make.randn(B, K + 1, V), drafts=make.integers(V, B, K),
                positions=make.integers(10000, B))  # fmt: skip


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


def ours_sampled(logits, drafts, positions):
    return tuple(mtp_verify(logits, drafts, temperature=TEMPERATURE, positions=positions))


def eager_sampled(logits, drafts, positions):
    rows = torch.arange(len(logits), device=logits.device)
    temperature = torch.full_like(rows, TEMPERATURE, dtype=torch.float32)
    return ref.forward(logits, drafts, None, None, temperature, None, None, rows.new_zeros(1), rows,
                       positions)  # fmt: skip


GREEDY = Subject("mtp_verify", "mtp_verify, greedy", inputs=inputs, ours=ours, eager=eager,
                 tiny=dict(B=4, K=3, V=40, percent=50))  # fmt: skip
SAMPLED = Subject("mtp_verify", "mtp_verify, sampled", inputs=inputs_sampled, ours=ours_sampled,
                  eager=eager_sampled, tiny=dict(B=4, K=3, V=40))  # fmt: skip

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


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
