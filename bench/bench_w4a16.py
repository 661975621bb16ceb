"""NVFP4 weights under unquantised activations: a linear layer, and routed experts.

Plain torch stands beside it with the same weights in bfloat16, as a user without it would run them.
"""

import torch
import torch.nn.functional as F

from nemokernels import NVFP4, moe_experts, moe_route, nvfp4_linear, tile_nvfp4
from nemokernels.bench import bench_moe_experts as moe
from nemokernels.bench.rows import Subject
from nemokernels.ops.nvfp4 import ref
from nemokernels.ops.w4a16 import cost


def weight(make, *shape):
    """A random matrix, or one per expert, in NVFP4 as a checkpoint has it."""
    *lead, K = shape
    codes = make.integers(256, *lead, K // 2, dtype=torch.uint8)
    scales = (0.5 + make.rand(*lead, K // 16, dtype=torch.float32)).to(torch.float8_e4m3fn)
    leading = lead[:-1] or [1]
    return NVFP4(codes, scales, make.tensor([K**-0.5] * leading[0], torch.float32))


def dense(make, packed):
    return ref.dequantize(packed.codes, packed.scales, packed.global_scale, make.dtype)


def inputs(make, M, K, N):
    packed = weight(make, N, K)
    return dict(x=make.randn(M, K), tiled=tile_nvfp4(packed), dense=dense(make, packed))


def ours(x, tiled, dense):
    return nvfp4_linear(x, tiled)


def eager(x, tiled, dense):
    return F.linear(x, dense)


def inputs_experts(make, T, X, F, E, k):
    up, down = weight(make, E, F, X), weight(make, E, X, F)
    return dict(x=make.randn(T, X), tiled=(tile_nvfp4(up), tile_nvfp4(down)),
                dense=(dense(make, up), dense(make, down)), **moe.route(make, T, E, k))  # fmt: skip


def ours_experts(x, tiled, dense, **route):
    return moe_experts(x, *tiled, moe.as_route(**route))


def eager_experts(x, tiled, dense, **route):
    return moe.eager(x, *dense, **route)


def inputs_layer(make, T, X, F, E, k):
    given = inputs_experts(make, T, X, F, E, k)
    parts = {name: given[name] for name in ("x", "tiled", "dense")}
    return dict(**parts, logits=moe.logits(T, E).to(make.device), k=k)


def ours_layer(x, tiled, dense, logits, k):
    return moe_experts(x, *tiled, moe_route(logits, top_k=k, scale=2.5))


def eager_layer(x, tiled, dense, logits, k):
    return moe.eager(x, *dense, **moe.eager_route(logits, k))


LINEAR = Subject(
    "w4a16", "nvfp4_linear", inputs=inputs, ours=ours, eager=eager, kept=("tiled", "dense"),
    tiny=dict(M=3, K=64, N=16),
)  # fmt: skip
EXPERTS = Subject(
    "w4a16", "moe_experts with NVFP4 weights", inputs=inputs_experts, ours=ours_experts,
    eager=eager_experts, kept=("tiled", "dense"), tiny=dict(T=5, X=64, F=80, E=6, k=2),
)  # fmt: skip
LAYER = Subject(
    "w4a16", "moe_experts with NVFP4 weights and its router", inputs=inputs_layer, ours=ours_layer,
    eager=eager_layer, kept=("tiled", "dense", "logits"), tiny=dict(T=5, X=64, F=80, E=6, k=2),
)  # fmt: skip

ROWS = []
for M in (1, 64, 4096):
    shape = dict(M=M, K=4096, N=18560)
    ROWS.append(LINEAR.row(f"{M} x 4096 to 18560", quick=M == 64, **shape,
                           cost=cost.linear(**shape, itemsize=2, unit="bfloat16")))  # fmt: skip
for short, tokens in (("nano3", (1, 8, 64, 1024, 16384)), ("super3", (64,))):
    sizes = moe.sizes(short)
    for T in tokens:
        used = moe.touched(T, sizes["E"], sizes["k"])
        counted = T, sizes["X"], sizes["F"], sizes["k"], used, 2, "bfloat16"
        goal = {1: 0.70, 8: 0.88, 64: 0.92, 16384: 0.60}.get(T)
        ROWS.append(EXPERTS.row(f"{short} {T}", cost=cost.experts(*counted), goal=goal,
                                quick=short == "nano3" and T == 16384, T=T, **sizes))  # fmt: skip
        if T <= 64:
            ROWS.append(LAYER.row(f"{short} {T}", cost=cost.experts(*counted), goal=goal,
                                  quick=short == "nano3", T=T, **sizes))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
