"""Squared ReLU over the widest activations of the dense models."""

import torch.nn.functional as F

from nemokernels import relu2
from nemokernels.bench.rows import Subject, model
from nemokernels.ops.relu2 import cost


def inputs(make, rows, width):
    return dict(x=make.randn(rows, width))


def eager(x):
    return F.relu(x).square()


RELU2 = Subject(
    "relu2", "relu2", inputs=inputs, ours=relu2, eager=eager, wrt=("x",),
    tiny=dict(rows=3, width=40),
)  # fmt: skip

ROWS = []
for short, rows in (("h8b", 32768), ("nano4b", 32768), ("h8b", 64)):
    shape = dict(rows=rows, width=model(short).intermediate_size)
    n = shape["rows"] * shape["width"]
    first = short == "h8b" and rows == 32768
    label = f"{short} {rows}"
    ROWS.append(RELU2.row(label, cost=cost.forward(n, 2), quick=first, **shape))
    if rows > 64:
        ROWS.append(RELU2.row(label, "backward", cost=cost.backward(n, 2), quick=first, **shape))


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
