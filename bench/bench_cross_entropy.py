"""The loss at the vocabulary's width, logits never whole: forward, backward, and both at once.

Liger and cut-cross-entropy make their gradients in or beside the forward, so their backward alone
says nothing; they stand beside "both".
"""

import torch.nn.functional as F

from nemokernels import linear_cross_entropy
from nemokernels.bench.rows import Subject, model
from nemokernels.ops.cross_entropy import cost


def inputs(make, T, D, V):
    return dict(hidden=make.randn(T, D), weight=make.randn(V, D) * D**-0.5,
                targets=make.integers(V, T))  # fmt: skip


def eager(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def liger():
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as peer

    return lambda hidden, weight, targets: peer(hidden, weight, targets)


def cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy as peer

    return lambda hidden, weight, targets: peer(hidden, weight, targets)


def subject(**peers):
    return Subject(
        "cross_entropy", "linear_cross_entropy", inputs=inputs, ours=linear_cross_entropy,
        eager=eager, peers=peers, wrt=("hidden", "weight"), tiny=dict(T=5, D=16, V=40),
    )  # fmt: skip


WITH_PEERS = subject(liger=liger, cut_cross_entropy=cut_cross_entropy)
ALONE = subject()

ROWS = []
for short in ("nano3", "super3", "minitron8b"):
    shape = dict(T=8192, D=model(short).hidden_size, V=model(short).vocab_size)
    for way in ("forward", "backward", "both"):
        counted = getattr(cost, way)(**shape, itemsize=2, unit="bfloat16")
        ROWS.append((ALONE if way == "backward" else WITH_PEERS).row(
            f"{short} 8192", way, cost=counted, quick=short == "nano3", **shape
        ))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
