"""The routed experts, given the route or with the router: training shapes, prefill, decoding."""

import functools

import torch
import torch.nn.functional as F

from nemokernels import FP8Experts, Route, moe_experts, moe_route
from nemokernels.bench import bench_moe_route
from nemokernels.bench.rows import Subject, model
from nemokernels.ops.moe_experts import cost
from nemokernels.ops.moe_route import ref as routing

PIECE = 640  # of the hidden width, in float64


@functools.cache
def logits(T: int, E: int) -> torch.Tensor:
    """The same on every device, so that the experts it touches can be counted in advance."""
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0))


def touched(T: int, E: int, k: int) -> int:
    """How many experts the tokens of a row choose."""
    if T >= 1024:
        return E
    return logits(T, E).topk(k).indices.unique().numel()


def route(make, T, E, k):
    scores = logits(T, E).to(make.device)
    weights, experts, _, offsets, order = routing.forward(scores, None, k, 1, 1, True, 2.5)
    return dict(weights=weights, experts=experts, offsets=offsets, order=order)


def as_route(weights, experts, offsets, order):
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    return Route(weights, experts, counts, offsets, order)


def inputs(make, T, X, F, E, k):
    return dict(x=make.randn(T, X), up=make.randn(E, F, X) * X**-0.5,
                down=make.randn(E, X, F) * F**-0.5, **route(make, T, E, k))  # fmt: skip


def ours(x, up, down, **route):
    return moe_experts(x, up, down, as_route(**route))


def exact(x, up, down, **route):
    """In float64 a sum over pieces of the hidden width: not all matrices fit in that dtype."""
    if x.dtype != torch.float64:
        return ours(x, up, down, **route)
    pieces = zip(up.split(PIECE, 1), down.split(PIECE, 2))
    return sum(ours(x, a.to(x.dtype), b.to(x.dtype), **route) for a, b in pieces)


def eager(x, up, down, weights, experts, offsets, order):
    token = order.long() // weights.shape[1]
    hidden = F.relu(torch._grouped_mm(x[token], up.mT, offs=offsets)).square()
    return add_up(torch._grouped_mm(hidden, down.mT, offs=offsets), x, weights, order)


def add_up(rows, x, weights, order):
    """Every token's rows, weighted."""
    scaled = (rows * weights.flatten()[order.long(), None]).float()
    total = torch.zeros_like(x, dtype=torch.float32)
    return total.index_add_(0, order.long() // weights.shape[1], scaled).to(x.dtype)


def inputs_layer(make, T, X, F, E, k):
    given = inputs(make, T, X, F, E, k)
    matrices = {name: given[name] for name in ("x", "up", "down")}
    return dict(**matrices, logits=logits(T, E).to(make.device), k=k)


def ours_layer(x, up, down, logits, k):
    return moe_experts(x, up, down, moe_route(logits, top_k=k, scale=2.5))


def eager_route(logits, k):
    bias = logits.new_zeros(logits.shape[1])
    weights, experts, _, offsets, order = bench_moe_route.eager(logits, bias, k)
    return dict(weights=weights, experts=experts, offsets=offsets, order=order)


def eager_layer(x, up, down, logits, k):
    return eager(x, up, down, **eager_route(logits, k))


def sonic_moe():
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs as peer

    def run(x, up, down, weights, experts, offsets, order):
        tokens, k = weights.shape
        token = torch.arange(tokens, device=x.device, dtype=torch.int32).repeat_interleave(k)
        return peer(x, weights.flatten(), token, experts.flatten(), up.permute(1, 2, 0), None,
                    down.permute(1, 2, 0), None, up.shape[0],
                    torch.cuda.current_stream().cuda_stream, ActivationType.RELU_SQ)[0]  # fmt: skip

    return run


def flashinfer():
    from flashinfer.fused_moe import cutlass_fused_moe as peer
    from flashinfer.fused_moe.core import ActivationType

    def run(x, up, down, weights, experts, offsets, order):
        out = peer(x, experts, weights, up, down, x.dtype, quant_scales=[],
                   activation_type=ActivationType.Relu2)  # fmt: skip
        return out[0] if isinstance(out, (list, tuple)) else out

    return run


FP8 = torch.float8_e4m3fn
STEP = 5 / 448  # what fills E4M3 with standard normal numbers, to five sigma


def inputs_fp8(make, T, X, F, E, k):
    """Codes of normal weights, their scales, and the same weights in bfloat16 for plain torch."""
    up, down = (codes(make.randn(E, *shape), STEP) for shape in ((F, X), (X, F)))
    ones = make.tensor([1.0] * E, torch.float32)
    return dict(
        x=make.randn(T, X), up=FP8Experts(up, ones * STEP * X**-0.5, ones[:1] * STEP),
        down=FP8Experts(down, ones * STEP * F**-0.5, ones * STEP * 5),
        dense=tuple(t.to(make.dtype) * (STEP * t.shape[2] ** -0.5) for t in (up, down)),
        **route(make, T, E, k),
    )  # fmt: skip


def ours_fp8(x, up, down, dense, **route):
    return moe_experts(x, up, down, as_route(**route))


def inputs_fp8_layer(make, T, X, F, E, k):
    given = inputs_fp8(make, T, X, F, E, k)
    parts = {name: given[name] for name in ("x", "up", "down", "dense")}
    return dict(**parts, logits=logits(T, E).to(make.device), k=k)


def ours_fp8_layer(x, up, down, dense, logits, k):
    return ours_layer(x, up, down, logits, k)


def eager_fp8_layer(x, up, down, dense, logits, k):
    return eager_fp8(x, up, down, dense, **eager_route(logits, k))


def codes(x, step):
    return (x.float() / step).clamp(-448, 448).to(FP8)


def eager_fp8(x, up, down, dense, weights, experts, offsets, order):
    """Operands rounded as FP8 rounds them, products in bfloat16."""

    def rounded(t, step):
        return (codes(t, step).float() * step).to(t.dtype)

    token, up_step, down_step = order.long() // weights.shape[1], up.input_scale, down.input_scale
    hidden = F.relu(torch._grouped_mm(rounded(x, up_step)[token], dense[0].mT, offs=offsets))
    hidden = rounded(hidden.square(), down_step[0])
    rows = torch._grouped_mm(hidden, dense[1].mT, offs=offsets)
    return add_up(rows, x, weights, order)


def scaled_grouped_mm():
    """torch's own product of 8-bit rows by expert, with a scale per row of either operand."""

    def product(rows, step, matrix, offsets):
        per_row = step.expand(len(rows)).contiguous()
        per_column = matrix.scale[:, None].expand(matrix.values.shape[:2]).contiguous()
        return torch._scaled_grouped_mm(
            codes(rows, step), matrix.values.mT, per_row, per_column, offs=offsets,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip

    def run(x, up, down, dense, weights, experts, offsets, order):
        token = order.long() // weights.shape[1]
        hidden = F.relu(product(x[token], up.input_scale, up, offsets)).square()
        return add_up(product(hidden, down.input_scale[:1], down, offsets), x, weights, order)

    return run


def scaled_grouped_mm_layer():
    run = scaled_grouped_mm()
    return lambda logits, k, **given: run(**given, **eager_route(logits, k))


def subject(**options):
    return Subject("moe_experts", "moe_experts", inputs=inputs, ours=ours, eager=eager,
                   tiny=dict(T=5, X=16, F=24, E=6, k=2), **options)  # fmt: skip


# The float64 reference takes the same logits, so that it chooses the same experts.
LAYER = Subject("moe_experts", "moe_experts with its router", inputs=inputs_layer, ours=ours_layer,
                eager=eager_layer, wrt=("x", "up", "down", "logits"), kept=("logits",),
                tiny=dict(T=5, X=16, F=24, E=6, k=2))  # fmt: skip
FORWARD = subject(exact=exact, kept=("up", "down"),
                  peers={"sonic_moe": sonic_moe, "flashinfer": flashinfer})  # fmt: skip
BACKWARD = subject(wrt=("x", "up", "down", "weights"), peers={"sonic_moe": sonic_moe})
EIGHT = Subject(
    "moe_experts", "moe_experts with FP8 weights", inputs=inputs_fp8, ours=ours_fp8,
    eager=eager_fp8, peers={"scaled_grouped_mm": scaled_grouped_mm}, kept=("up", "down", "dense"),
    tiny=dict(T=5, X=16, F=32, E=6, k=2),
)  # fmt: skip

EIGHT_LAYER = Subject(
    "moe_experts", "moe_experts with FP8 weights and its router", inputs=inputs_fp8_layer,
    ours=ours_fp8_layer, eager=eager_fp8_layer, kept=("up", "down", "dense", "logits"),
    peers={"scaled_grouped_mm": scaled_grouped_mm_layer}, tiny=dict(T=5, X=16, F=32, E=6, k=2),
)  # fmt: skip


def sizes(short: str) -> dict[str, int]:
    """X, F, E and k of a model's routed experts."""
    c = model(short)
    return dict(X=c.moe_latent_size or c.hidden_size, F=c.moe_intermediate_size,
                E=c.n_routed_experts, k=c.num_experts_per_tok)  # fmt: skip


ROWS = []
for short, tokens in (("nano3", (1, 8, 64, 1024, 16384)), ("super3", (1, 64, 16384)),
                      ("ultra", (64,))):  # fmt: skip
    goals = {1: 0.85, 8: 0.97, 64: 0.97, 16384: 0.75}
    for T in tokens:
        shape = dict(T=T, **sizes(short))
        used = touched(T, shape["E"], shape["k"])
        counted = T, shape["X"], shape["F"], shape["k"], used, 2, "bfloat16"
        ROWS.append(FORWARD.row(f"{short} {T}", cost=cost.forward(*counted), goal=goals.get(T),
                                quick=short == "nano3" and T < 1024, **shape))  # fmt: skip
        if T == 16384:
            ROWS.append(LAYER.row(f"{short} {T}", cost=cost.forward(*counted), goal=0.75,
                                  quick=short == "nano3", **shape))  # fmt: skip
        if (short, T) == ("nano3", 16384):  # the larger model's gradients in float64 do not fit
            ROWS.append(LAYER.row(f"{short} {T}", "both", cost=cost.both(*counted), **shape))
        if (short, T) in (("nano3", 16384), ("nano3", 1024)):
            ROWS.append(BACKWARD.row(f"{short} {T}", "backward", cost=cost.backward(*counted),
                                     quick=T == 16384, **shape))  # fmt: skip
for T in (64, 1024, 16384):
    shape = dict(T=T, **sizes("nano3"))
    used = touched(T, shape["E"], shape["k"])
    counted = cost.forward(T, shape["X"], shape["F"], shape["k"], used, 2, "float8_e4m3fn",
                           weight_itemsize=1)  # fmt: skip
    ROWS.append(EIGHT.row(f"nano3 {T}", cost=counted, **shape))
    if T == 16384:
        ROWS.append(EIGHT_LAYER.row(f"nano3 {T}", cost=counted, goal=0.60, quick=True, **shape))


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
