"""RMSNorm alone and with the residual addition before it, at the models' hidden sizes."""

import torch.nn.functional as F

from nemokernels import rms_norm
from nemokernels.bench.rows import Subject, model
from nemokernels.ops.rms_norm import cost

EPS = 1e-5


def inputs(make, rows, width):
    return dict(x=make.randn(rows, width), weight=make.randn(width))


def inputs_add(make, rows, width):
    return dict(residual=make.randn(rows, width), **inputs(make, rows, width))


def ours(x, weight, residual=None):
    return rms_norm(x, weight, residual=residual, eps=EPS)


def eager(x, weight, residual=None):
    if residual is None:
        return F.rms_norm(x, weight.shape, weight, EPS)
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def liger():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def liger_add():
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return lambda x, weight, residual: liger_fused_add_rms_norm(x, residual, weight, EPS)


def flashinfer():
    from flashinfer.norm import rmsnorm

    return lambda x, weight: rmsnorm(x, weight, EPS)


common = dict(ours=ours, eager=eager, tiny=dict(rows=3, width=40))
NORM = Subject("rms_norm", "rms_norm", inputs=inputs, wrt=("x", "weight"),
               peers={"liger": liger, "flashinfer": flashinfer}, **common)  # fmt: skip
ADD = Subject("rms_norm", "rms_norm with residual", inputs=inputs_add, peers={"liger": liger_add},
              wrt=("x", "weight", "residual"), **common)  # fmt: skip

ROWS = []
for short in ("nano3", "super3", "ultra", "nano4b"):
    for rows in (32768, 64):
        shape = dict(rows=rows, width=model(short).hidden_size)
        for subject, residual in ((NORM, False), (ADD, True)):
            label, quick = f"{short} {rows}", short == "super3" and rows > 64
            forward = cost.forward(*shape.values(), 2, residual)
            ROWS.append(subject.row(label, cost=forward, quick=quick, **shape))
            if rows > 64:
                backward = cost.backward(*shape.values(), 2, residual)
                ROWS.append(subject.row(label, "backward", cost=backward, quick=quick, **shape))


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
