"""Norms that emit FP8 with its transpose beside their result, as the layer before a linear one.

Only y is judged here: a last digit of it may move a code. That the codes are those of y is tested.
"""

import torch.nn.functional as F

from nemokernels import gated_rms_norm_fp8, rms_norm_fp8
from nemokernels.bench import bench_gated_rms_norm as gated
from nemokernels.bench.bench_fp8 import codes, scaled
from nemokernels.bench.rows import Subject, mamba, model
from nemokernels.ops.fp8 import cost

EPS = 1e-5


def inputs_add(make, rows, width):
    x, scale = scaled(make, rows, width)
    return dict(x=x, residual=make.randn(rows, width), weight=make.randn(width), scale=scale)


def ours_add(x, residual, weight, scale):
    normed = rms_norm_fp8(x, weight, scale, residual=residual, eps=EPS, transpose=True)
    return normed.y, normed.total


def eager_add(x, residual, weight, scale):
    total = x + residual
    y = F.rms_norm(total, weight.shape, weight, EPS)
    return y, total, *emitted(y, scale)


def emitted(y, scale):
    q = codes(y, scale)
    return q, q.t().contiguous(), y.abs().amax().float()


def inputs_gated(make, rows, width, groups):
    _, scale = scaled(make, 1)
    return dict(**gated.inputs(make, rows, width, groups), scale=scale)


def ours_gated(x, z, weight, groups, scale):
    return gated_rms_norm_fp8(
        x, weight, scale, z=z, eps=EPS, group_size=x.shape[-1] // groups, norm_before_gate=False,
        transpose=True,
    ).y  # fmt: skip


def eager_gated(x, z, weight, groups, scale):
    y = gated.eager(x, z, weight, groups)
    return y, *emitted(y, scale)


ADD = Subject("fp8", "rms_norm_fp8 with residual", inputs=inputs_add, ours=ours_add,
              eager=eager_add, kept=("scale",), tiny=dict(rows=3, width=40))  # fmt: skip
GATED = Subject("fp8", "gated_rms_norm_fp8", inputs=inputs_gated, ours=ours_gated,
                eager=eager_gated, kept=("scale",),
                tiny=dict(rows=3, width=48, groups=4))  # fmt: skip

ROWS = []
for short in ("h8b", "nano3"):
    sizes, rows, label = mamba(short), 16384, f"{short} 16384"
    width, inner = model(short).hidden_size, sizes["H"] * sizes["P"]
    ROWS.append(ADD.row(label, cost=cost.rms_norm(rows, width, 2, residual=True, transpose=True),
                        quick=short == "h8b", rows=rows, width=width))  # fmt: skip
    ROWS.append(GATED.row(label, cost=cost.gated_rms_norm(rows, inner, 2, transpose=True),
                          quick=short == "h8b", rows=rows, width=inner,
                          groups=sizes["G"]))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
