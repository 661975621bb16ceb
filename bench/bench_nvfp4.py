"""NVFP4: quantisation, and the pair of orientations that training needs.

Stochastic rounding is defined by its random bits, so plain torch is our reference there.
"""

import torch

from nemokernels import quantize_nvfp4, quantize_nvfp4_pair
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


def ours_maxima(x, amax, seed):
    """The kernel of the maxima as well."""
    return ours_pair(x, None, seed)


def eager_maxima(x, amax, seed):
    return eager_pair(x, None, seed)


def eager_pair(x, amax, seed):
    return ref.quantize_pair(x, amax, amax, 1, True, seed)


QUANTIZE = Subject("nvfp4", "quantize_nvfp4", inputs=inputs, ours=ours, eager=eager,
                   kept=("amax",), tiny=dict(rows=16, width=32))  # fmt: skip
PAIR = Subject("nvfp4", "quantize_nvfp4_pair, Hadamard, stochastic", inputs=inputs_pair,
               ours=ours_pair, eager=eager_pair, kept=("amax",),
               tiny=dict(rows=16, width=32))  # fmt: skip
MAXIMA = Subject("nvfp4", "quantize_nvfp4_pair, its maxima too", inputs=inputs_pair,
                 ours=ours_maxima, eager=eager_maxima, kept=("amax",),
                 tiny=dict(rows=16, width=32))  # fmt: skip

ROWS = []
for width in (4096, 2688):
    shape = dict(rows=32768, width=width)
    elements, label, quick = 32768 * width, f"32768 x {width}", width == 4096
    ROWS.append(QUANTIZE.row(label, cost=cost.quantize(elements, 2), quick=quick, **shape))
    ROWS.append(PAIR.row(label, cost=cost.quantize(elements, 2, copies=2), goal=0.65, quick=quick,
                         **shape))  # fmt: skip
    # One pass more: both maxima must be known before a block is rounded.
    ROWS.append(MAXIMA.row(label, cost=cost.quantize(elements, 4, copies=2), **shape))


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
