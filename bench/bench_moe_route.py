"""The router: from float32 logits to weights, experts, counts and the order of the rows."""

import torch

from nemokernels import moe_route
from nemokernels.bench.rows import Subject, model
from nemokernels.ops.moe_route import cost


def inputs(make, T, E, k):
    return dict(logits=make.randn(T, E), bias=make.randn(E, dtype=torch.float32) / 10, k=k)


def ours(logits, bias, k):
    return tuple(moe_route(logits, top_k=k, correction_bias=bias, scale=2.5))


def eager(logits, bias, k):
    scores = logits.sigmoid()
    experts = (scores + bias).topk(k).indices
    weights = scores.gather(1, experts)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
    flat = experts.flatten()
    counts = torch.zeros_like(bias, dtype=torch.int64).index_add_(0, flat, torch.ones_like(flat))
    order = flat.argsort(stable=True)
    return weights, *(t.int() for t in (experts, counts, counts.cumsum(0), order))


ROUTE = Subject(
    "moe_route", "moe_route", inputs=inputs, ours=ours, eager=eager, wrt=("logits",),
    tiny=dict(T=5, E=12, k=3),
)  # fmt: skip

ROWS = []
for short in ("nano3", "super3"):
    config = model(short)
    for tokens in (1, 64, 16384):
        shape = dict(T=tokens, E=config.n_routed_experts, k=config.num_experts_per_tok)
        quick = short == "nano3" and tokens > 1
        ROWS.append(ROUTE.row(f"{short} {tokens}", cost=cost.forward(*shape.values(), 4),
                              dtype=torch.float32, quick=quick, **shape))  # fmt: skip
    ROWS.append(ROUTE.row(f"{short} {tokens}", "backward", cost=cost.backward(*shape.values(), 4),
                          dtype=torch.float32, **shape))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
