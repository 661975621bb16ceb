"""The router: from float32 logits to weights, experts, counts and the order of the rows; and with
the table of tiles that the experts' kernels begin with, all that comes before their first product.
"""

import torch

from nemokernels import moe_route
from nemokernels._cost import Cost
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


def inputs_planned(make, T, E, k, height):
    return dict(inputs(make, T, E, k), height=height)


def ours_planned(logits, bias, k, height):
    route = ours(logits, bias, k)
    if not logits.is_cuda:
        return with_tiles(route, height)
    from nemokernels.ops.moe_experts.kernel import tile_table

    return *route, *tile_table(route[3], route[4].numel(), height)


def exact_planned(logits, bias, k, height):
    return with_tiles(ours(logits, bias, k), height)


def eager_planned(logits, bias, k, height):
    return with_tiles(eager(logits, bias, k), height)


def tiles_of(rows, experts, height):
    """As many as any routing of so many rows may need."""
    return rows // height + min(rows, experts)


def with_tiles(route, height):
    """And of every tile of ``height`` rows its expert, -1 for none, and its first row."""
    *_, counts, offsets, order = route
    zero, (experts,) = counts.new_zeros(1), counts.shape
    ends = ((counts + height - 1) // height).cumsum(0).int()
    tile = torch.arange(tiles_of(order.numel(), experts, height), device=order.device)
    expert = torch.searchsorted(ends, tile.int(), right=True)
    within = tile - torch.cat([zero, ends])[expert]
    row = torch.cat([zero, offsets])[expert] + within * height
    return *route, torch.where(expert < experts, expert, -1).int(), row.int()


ROUTE = Subject(
    "moe_route", "moe_route", inputs=inputs, ours=ours, eager=eager, wrt=("logits",),
    tiny=dict(T=5, E=12, k=3),
)  # fmt: skip
PLANNED = Subject(
    "moe_route", "moe_route and the tiles of its rows", inputs=inputs_planned, ours=ours_planned,
    eager=eager_planned, exact=exact_planned, tiny=dict(T=5, E=12, k=3, height=2),
)  # fmt: skip

COPY = 3.0e12  # bytes per second of an H100, for goals in microseconds
ROUTE_GOALS = {("nano3", 64): 3e-6}  # for weights, experts and counts; order is in it, too
GOALS = {("nano3", 64): 6e-6, ("nano3", 16384): 35e-6}

ROWS = []
for short in ("nano3", "super3"):
    config = model(short)
    for tokens in (1, 64, 16384):
        shape = dict(T=tokens, E=config.n_routed_experts, k=config.num_experts_per_tok)
        counted = cost.forward(*shape.values(), 4)
        goal = ROUTE_GOALS.get((short, tokens))
        ROWS.append(ROUTE.row(
            f"{short} {tokens}", cost=counted, dtype=torch.float32,
            goal=goal and counted.floor(COPY, {}) / goal, **shape,
        ))  # fmt: skip
        height = 128 if tokens > 1000 else 16
        table = 8 * tiles_of(tokens * shape["k"], shape["E"], height)
        counted, goal = Cost(counted.bytes + table), GOALS.get((short, tokens))
        ROWS.append(PLANNED.row(
            f"{short} {tokens}", cost=counted, dtype=torch.float32, quick=goal is not None,
            goal=goal and counted.floor(COPY, {}) / goal, **shape, height=height,
        ))  # fmt: skip
    ROWS.append(ROUTE.row(f"{short} {tokens}", "backward", cost=cost.backward(*shape.values(), 4),
                          dtype=torch.float32, **shape))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
