"""The Triton kernels of moe_experts, interpreted, against the reference."""

import dataclasses

import pytest
import torch
from expert_kernels import (
    F16,
    F32,
    NAMES,
    NO_OFFSETS,
    TILES,
    compare,
    configs_of,
    guarded,
    make,
    run,
    small,
)

from nemokernels.bench.bench_moe_route import with_tiles
from nemokernels.ops.moe_experts import kernel, op, ref
from nemokernels.ops.moe_experts.passes import at_once
from nemokernels.ops.moe_route import ref as route


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("tokens, experts, top_k, width, hidden",
                         [(21, 3, 2, 48, 24), (5, 5, 4, 7, 19)])  # fmt: skip
def test_tiles(tokens, experts, top_k, width, hidden, dtype, tile, tma):
    compare(*make(tokens, experts, top_k, width, hidden, dtype), small(tile, tma))


@pytest.mark.parametrize("tokens, dtype, capability", [
    (10, F16, (9, 0)), (10, F16, (8, 9)), (30, F16, (9, 0)), (110, F16, (9, 0)),
    (110, F16, (8, 0)), (50, F16, (8, 9)), (50, F32, (9, 0)),
])  # fmt: skip
def test_plans(tokens, dtype, capability):
    args, dy = make(tokens, 2, 2, 136, 72, dtype, torch.tensor([[1, 0]]).expand(tokens, 2))
    compare(args, dy, configs_of(args, capability))


@pytest.mark.parametrize("tokens, experts, top_k", [(1, 1, 1), (1, 8, 3), (13, 16, 4), (30, 9, 1)])
def test_sizes(tokens, experts, top_k):
    compare(*make(tokens, experts, top_k, 10, 7))


@pytest.mark.parametrize("tokens, experts", [(1, 6), (31, 6), (32, 6), (33, 6), (33, 40)])
def test_all_to_one_expert(tokens, experts):
    args, dy = make(tokens, experts, 1, 24, 16, chosen=torch.full((tokens, 1), 4))
    got = compare(args, dy, small("tall", True))
    for grad in got[3:5]:
        assert (grad[torch.arange(experts) != 4] == 0).all() and grad[4].abs().sum() > 0


@pytest.mark.parametrize("tile", ["swap", "tall"])
def test_loads(tile):
    loads = torch.tensor([0, 1, 7, 127, 129, 0])
    chosen = torch.arange(6).repeat_interleave(loads)[torch.randperm(264)][:, None]
    args, dy = make(264, 6, 1, 24, 16, chosen=chosen)
    got = compare(args, dy, small(tile, True))
    for grad in got[3:5]:
        assert (grad[[0, 5]] == 0).all() and grad[1:5].flatten(1).any(1).all()


def test_random_routings():
    for tokens in range(1, 30, 7):
        experts = 1 + tokens % 7
        logits = torch.randn(tokens, experts) * torch.linspace(0, 6, experts)
        top_k = 1 + tokens % experts
        args, dy = make(tokens, experts, top_k, 16, 8, chosen=route.ranking(logits)[:, :top_k])
        compare(args, dy, small(list(TILES)[tokens % 3], True))


@pytest.mark.parametrize("size", [(0, 4, 2, 8, 8), (3, 4, 2, 0, 8), (3, 4, 2, 8, 0)])
def test_empty(size):
    args, dy = make(*size)
    got, want = run(args, dy, configs_of(args)), run(args, dy, (), ref)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_strides(tile, tma):
    (x, up, down, weights, *rest), dy = make(25, 4, 2, 24, 16)
    wide = torch.full((25, 60), torch.nan)
    wide[:, 5:53:2] = x
    turned = down.mT.contiguous().mT, weights.t().contiguous().t(), *rest
    dy = torch.cat((dy, dy), 1)[:, :24]
    up = up.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    compare((wide[:, 5:53:2], up, *turned), dy, small(tile, tma))
    x, up = torch.cat((x, x), 1)[:, :24], torch.cat((up, up), 2)[..., :24]
    compare((x, up, *turned), dy.t().clone().t(), small(tile, tma))


@pytest.mark.parametrize(
    "tile, tma, turned",
    [("swap", False, False), ("swap", False, True), ("wide", True, False), ("tall", True, True)],
)
def test_passes_over_columns_have_the_same_bits(tile, tma, turned):
    args, dy = make(5, 3, 2, 72, 32)
    if turned:  # their columns are the inner axis
        args = args[0], *(m.mT.contiguous().mT for m in args[1:3]), *args[3:]
    results, columns = [], TILES[tile].columns
    for most in (10 * columns * 4, 2**40):  # one tile of columns at a time, or all
        shape = op.Config("triton", TILES[tile], TILES["tall"], tma, slot_bytes=most)
        results.append(run(args, dy, [shape, shape]))
    assert at_once(72, 10 * 4, columns, 10 * columns * 4) == columns
    for few, every in zip(*results, strict=True):
        assert torch.equal(few, every) and few.is_contiguous() and few.any()


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("where", ["x", "up", "down", "down turned", "dy"])
def test_a_nan_stays_where_it_belongs(where, tile, tma):
    args, dy = make(20, 5, 2, 24, 40, chosen=torch.tensor([[1, 2], [3, 4]]).repeat(10, 1))
    x, up, down = args[:3]
    if where == "down turned":  # a block that ends behind an expert's rows meets the next one's
        down = down.mT.contiguous().mT
        args = (x, up, down, *args[3:])
    {"x": x[3], "up": up[2], "down": down[2], "dy": dy[3]}[where.split()[0]].fill_(torch.nan)
    got, want = run(args, dy, small(tile, tma)), run(args, dy, (), ref)
    for name, a, b in zip(NAMES, got, want):
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.isfinite(b).any()


@pytest.mark.parametrize("offsets", NO_OFFSETS)
def test_tiles_of_a_route_that_is_none(offsets):
    expert, row = kernel.tile_table(torch.tensor(offsets, dtype=torch.int32), 12, 4)
    assert ((expert >= -1) & (expert < 4)).all()
    assert ((row >= 0) & (row < 4 * 12))[expert >= 0].all()  # each expert has 12 rows at most


@pytest.mark.parametrize("counts", [(0, 1, 7, 127, 129), (0, 0, 0), (300,), (5,) * 130])
@pytest.mark.parametrize("height", [16, 128])
def test_tiles_of_a_route(counts, height):
    """Against the formula that the bench has in plain torch, entries without a tile included."""
    counts = torch.tensor(counts, dtype=torch.int32)
    offsets = counts.cumsum(0).int()
    *_, expert, row = with_tiles((counts, offsets, torch.arange(int(counts.sum()))), height)
    got = kernel.tile_table(offsets, int(counts.sum()), height)
    assert torch.equal(got[0], expert) and torch.equal(got[1], row)
    if offsets[-1]:
        covered = [r for e, r in zip(*got) if e >= 0]
        assert len(covered) == int(((counts + height - 1) // height).sum())


@pytest.mark.parametrize("offsets", NO_OFFSETS)
@pytest.mark.parametrize("tile, tma, experts", [("swap", False, 4), ("tall", True, 4),
                                                ("swap", False, 13)])  # fmt: skip
def test_a_route_that_is_none_stays_in_bounds(tile, tma, experts, offsets):
    """Slots out of range and ends of any kind: nothing is written where it does not belong."""
    (x, up, down, weights, _, order, _), dy = make(6, experts, 2, 24, 16)
    offsets += offsets[-1:] * (experts - 4)
    order[[0, 3, 8]] = torch.tensor([-7, 12, 2**31 - 1], dtype=torch.int32)
    args = x, up, down, weights, torch.tensor(offsets, dtype=torch.int32), order, None
    with guarded() as inside:
        out = run(args, dy, small(tile, tma))
    assert inside() and [t.shape for t in out[:3]] == [x.shape, (12, 16), x.shape]


@pytest.mark.parametrize(
    "tokens, width, hidden, most", [(40, 24, 40, 2**40), (9, 400, 16, 1), (2, 16, 24, 1)]
)
def test_products_of_csrc(host_library, tokens, width, hidden, most):
    """Tables, sums over slots and weight gradients in Triton, the products over rows in csrc."""
    args, dy = make(tokens, 5, 2, width, hidden, F16)
    plans = [op.plan(2 * tokens, 5, F16, way, "", ("csrc",), (9, 0)) for way in (False, True)]
    assert [p.backend for p in plans] == ["csrc"] * 2
    compare(args, dy, [dataclasses.replace(p, slot_bytes=most) for p in plans])
    wide = torch.cat((dy, dy), 1)[:, 1 : width + 1]  # rows that are not aligned
    compare(args, wide, plans)


def test_overflow_and_dead_units():
    args, dy = make(20, 4, 2, 24, 16, F16)
    args[0][2] *= 3000
    args[1][1] = -args[1][1].abs()
    args[0][5] = args[0][5].abs()
    got, want = run(args, dy, small("wide", True)), run(args, dy, (), ref)
    assert want[1].isinf().any()
    for name, a, b in zip(NAMES, got, want):
        assert torch.equal(a.isfinite(), b.isfinite()), name


def test_plan():
    everywhere = ("triton", "reference")

    def of(tokens, dtype=torch.bfloat16, backward=False, capability=(9, 0), experts=128):
        return op.plan(tokens * 6, experts, dtype, backward, "", everywhere, capability)

    assert of(16384) == op.Config("triton", op.Tile(128, 256, 64, 8, 4), None, True)
    assert of(16384, capability=(8, 0)).rows.num_stages == 3
    assert not of(16384, capability=(8, 0)).tma
    assert of(1024).rows.rows == 64 and of(64).rows.swap and not of(64, F32).rows.swap
    assert of(16384, capability=(12, 0)).rows == op.Tile(64, 128, 32, 4, 3)
    assert of(8, backward=True).weights and not of(8).weights
    assert "2048 experts, got 3000" in of(8, experts=3000).reason
    assert of(0, experts=0).backend == "triton"
    with pytest.raises(RuntimeError, match="got float64"):
        op.plan(8, 8, F32, False, "got float64", ("triton",), (9, 0))
    both = (96, 8, F16, False, "")
    assert op.plan(*both, ("triton", "csrc", "reference"), (9, 0)).backend == "triton"
    assert op.plan(*both, ("csrc", "reference"), (9, 0)).backend == "csrc"
    assert op.plan(*both, ("csrc", "reference"), (9, 0), "no").reason == "no"
    with pytest.raises(RuntimeError, match="moe_experts: csrc takes widths"):
        op.plan(*both, ("csrc",), (9, 0), "csrc takes widths")
    assert op.plan_fp8(96, 8, "", ("csrc",), (9, 0)).backend == "csrc"
    assert op.plan_fp8(96, 8, "", ("csrc", "reference"), (9, 0), "no").reason == "no"


def test_a_table_that_names_csrc_where_it_cannot_run(monkeypatch):
    args, _ = make(9, 5, 2, 24, 16, F16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(op._tuned, "tuned", lambda *a: dataclasses.replace(a[-1], backend="csrc"))
    for backends, want in ((("triton", "csrc"), "csrc"), (("triton", "reference"), "triton")):
        monkeypatch.setattr(op._backends, "usable", lambda *a, backends=backends: backends)
        assert op._plan(*args).backend == want
    monkeypatch.setattr(op._backends, "usable", lambda *a: ("triton", "csrc"))
    assert op._plan(args[0].float(), *(w.float() for w in args[1:3]), *args[3:]).backend == "triton"
