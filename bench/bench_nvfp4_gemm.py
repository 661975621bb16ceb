"""Products of two NVFP4 operands: a linear layer, and routed experts.

Plain torch stands beside it with the same operands in bfloat16. The activations of the linear layer
are quantised before; those of the experts are quantised in the time that is measured.
"""

import torch
import torch.nn.functional as F

from nemokernels import NVFP4Experts, moe_experts, nvfp4_linear, swizzle_nvfp4
from nemokernels.bench import bench_moe_experts as moe
from nemokernels.bench.bench_w4a16 import dense, weight
from nemokernels.bench.rows import Subject
from nemokernels.ops.nvfp4 import ref as nvfp4
from nemokernels.ops.nvfp4_gemm import cost, op


def inputs(make, M, K, N):
    x, w = weight(make, M, K), weight(make, N, K)
    return dict(packed=(swizzle_nvfp4(x), swizzle_nvfp4(w)), dense=(dense(make, x), dense(make, w)))


def ours(packed, dense):
    return nvfp4_linear(*packed)


def eager(packed, dense):
    return F.linear(*dense)


def inputs_experts(make, T, X, F, E, k):
    up, down = weight(make, E, F, X), weight(make, E, X, F)
    scale = make.tensor([5 / 2688] * E, torch.float32)
    experts = [NVFP4Experts(*swizzle_nvfp4(up), scale[:1]),
               NVFP4Experts(*swizzle_nvfp4(down), 4 * scale)]  # fmt: skip
    return dict(x=make.randn(T, X), packed=experts,
                dense=(dense(make, up), dense(make, down)), **moe.route(make, T, E, k))  # fmt: skip


def ours_experts(x, packed, dense, **route):
    return moe_experts(x, *packed, moe.as_route(**route))


def eager_experts(x, packed, dense, weights, experts, offsets, order):
    """Operands rounded as NVFP4 rounds them, products in bfloat16."""

    def rounded(t, step):
        return nvfp4.dequantize(*nvfp4.quantize(t, 2688 * step, 1, None), t.dtype)

    up, down = packed
    token = order.long() // weights.shape[1]
    rows = rounded(x, up.input_scale[0])[token]
    hidden = F.relu(torch._grouped_mm(rows, dense[0].mT, offs=offsets)).square()
    rows = torch._grouped_mm(rounded(hidden, down.input_scale[0]), dense[1].mT, offs=offsets)
    return moe.add_up(rows, x, weights, order)


LINEAR = Subject(
    "nvfp4_gemm", "nvfp4_linear of NVFP4 activations", inputs=inputs, ours=ours, eager=eager,
    kept=("packed", "dense"), tiny=dict(M=3, K=64, N=16), needs=op.reason,
)  # fmt: skip
EXPERTS = Subject(
    "nvfp4_gemm", "moe_experts in NVFP4", inputs=inputs_experts, ours=ours_experts,
    eager=eager_experts, kept=("packed", "dense"), tiny=dict(T=5, X=64, F=96, E=6, k=2),
    needs=op.reason,
)  # fmt: skip

ROWS = []
for M in (1, 64, 4096):
    shape = dict(M=M, K=4096, N=18560)
    ROWS.append(LINEAR.row(f"{M} x 4096 to 18560", **shape, cost=cost.linear(**shape)))
for short, T in (("nano3", 64), ("nano3", 16384), ("super3", 16384)):
    sizes = moe.sizes(short)
    used = moe.touched(T, sizes["E"], sizes["k"])
    counted = T, sizes["X"], sizes["F"], sizes["k"], used
    ROWS.append(EXPERTS.row(f"{short} {T}", cost=cost.experts(*counted), T=T, **sizes))


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
