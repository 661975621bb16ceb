"""NVFP4: quantisation, the pair that training needs, and the W4A16 linear layer.

Stochastic rounding is defined by its random bits, so plain torch is our reference there.
"""

import torch
import torch.nn.functional as F

from nemokernels import nvfp4_linear, quantize_nvfp4, quantize_nvfp4_pair
from nemokernels.bench.rows import Subject
from nemokernels.ops.nvfp4 import cost, ref

AMAX = 6.0


def inputs(make, rows, width):
    x = make.randn(rows, width).clamp(-AMAX, AMAX)
    return dict(x=x, amax=make.tensor(AMAX, torch.float32))


def inputs_pair(make, rows, width):
    return dict(inputs(make, rows, width), seed=make.tensor(7, torch.int64))


def ours(x, amax):
    return tuple(quantize_nvfp4(x, amax=amax))


def eager(x, amax):
    return ref.quantize(x, amax, 1, None)


def ours_pair(x, amax, seed):
    pair = quantize_nvfp4_pair(x, amax=amax, amax_t=amax, hadamard=True, seed=seed)
    return tuple(part for quantised in pair for part in quantised)


def eager_pair(x, amax, seed):
    return ref.quantize_pair(x, amax, amax, 1, True, seed)


def inputs_linear(make, M, K, N):
    # Codes and scales of standard normal weights, without quantising a matrix for it.
    scales = (0.5 + make.rand(N, K // 16, dtype=torch.float32)).to(torch.float8_e4m3fn)
    codes = make.integers(256, N, K // 2, dtype=torch.uint8)
    return dict(x=make.randn(M, K), codes=codes, scales=scales,
                global_scale=make.tensor(K**-0.5, torch.float32))  # fmt: skip


def ours_linear(x, codes, scales, global_scale):
    return nvfp4_linear(x, codes, scales, global_scale)


def eager_linear(x, codes, scales, global_scale):
    return F.linear(x, ref.dequantize(codes, scales, global_scale, x.dtype))


QUANTIZE = Subject("nvfp4", "quantize_nvfp4", inputs=inputs, ours=ours, eager=eager,
                   kept=("amax",), tiny=dict(rows=16, width=32))  # fmt: skip
PAIR = Subject("nvfp4", "quantize_nvfp4_pair, Hadamard, stochastic", inputs=inputs_pair,
               ours=ours_pair, eager=eager_pair, kept=("amax",),
               tiny=dict(rows=16, width=32))  # fmt: skip
LINEAR = Subject("nvfp4", "nvfp4_linear", inputs=inputs_linear, ours=ours_linear,
                 eager=eager_linear, kept=("global_scale",),
                 tiny=dict(M=3, K=32, N=16))  # fmt: skip

ROWS = []
for width in (4096, 2688):
    shape = dict(rows=32768, width=width)
    elements, label, quick = 32768 * width, f"32768 x {width}", width == 4096
    ROWS.append(QUANTIZE.row(label, cost=cost.quantize(elements, 2), quick=quick, **shape))
    ROWS.append(PAIR.row(label, cost=cost.quantize(elements, 2, copies=2), goal=0.65, quick=quick,
                         **shape))  # fmt: skip
for M in (1, 64, 16384):
    shape = dict(M=M, K=4096, N=18560)
    ROWS.append(LINEAR.row(f"{M} x 4096 to 18560", quick=M == 64, **shape,
                           cost=cost.linear(**shape, itemsize=2, unit="bfloat16")))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
