"""The Triton kernels of moe_experts with any number of slots per token, interpreted."""

import pytest
import torch
from expert_kernels import F16, F32, NAMES, NO_OFFSETS, TILES, compare, guarded, make, run, small
from fenced import EDGES, fenced, results

from nemokernels import ragged_route
from nemokernels.ops.moe_experts import kernel, op, ref


def ragged(counts, experts, width, hidden, dtype=F32):
    """Arguments of the forward, and dy; token t has ``counts[t]`` of the experts."""
    (x, up, down, *_), dy = make(len(counts), experts, 1, width, hidden, dtype)
    chosen = [row[:n] for row, n in zip(torch.rand(len(counts), experts).argsort(1), counts)]
    numbers = torch.cat([*chosen, torch.empty(0, dtype=torch.int64)]).int()
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    route = ragged_route(torch.rand(len(numbers)), numbers, starts, num_experts=experts)
    return (x, up, down, *route), dy


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("tile", TILES)
def test_tiles(tile, dtype):
    compare(*ragged([2, 0, 1, 5, 5, 0, 0, 3, 1, 4] * 2, 5, 48, 24, dtype), small(tile, True))


@pytest.mark.parametrize(
    "counts", [[1], [0], [0, 0, 3], [3, 0, 0], [1] * 33, [4] * 5, [0, 4, 0, 4, 0]]
)
def test_any_number_of_slots(counts):
    args, dy = ragged(counts, 4, 10, 7)
    y, hidden, dx, *_ = compare(args, dy)
    without = torch.tensor(counts) == 0
    assert not y[without].any() and not dx[without].any() and hidden.shape[0] == sum(counts)


@pytest.mark.parametrize("size", [([], 4, 8, 8), ([0, 0], 4, 8, 8), ([1, 2], 4, 0, 8),
                                  ([1, 2], 4, 8, 0)])  # fmt: skip
def test_empty(size):
    args, dy = ragged(*size)
    got, want = run(args, dy, small("tall", True)), run(args, dy, (), ref)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_over_slots_are_rounded_once(weighted):
    """Weights and sums are in float32: the reference's bits, whatever the route."""
    slots, weights, out = torch.randn(12, 40).to(F16), torch.rand(12), torch.empty(4, 40, dtype=F16)
    starts = torch.tensor([0, 4, 4, 5, 12], dtype=torch.int32)
    kernel.slot_sum(slots, weights, out, weighted, starts)
    assert torch.equal(out, ref.ragged_sum(slots, weights if weighted else None, starts))
    each = weights.view(4, 3)
    kernel.slot_sum(slots, each, out, weighted)
    whole = ref.slot_sum(slots.view(4, 3, 40), each if weighted else None)
    assert torch.equal(out, whole)
    order = torch.randperm(12)  # the slot of each row
    kernel.slot_sum(slots[order], each, out.fill_(0), weighted, row_of=order.argsort().int())
    assert torch.equal(out, whole)


@pytest.mark.parametrize("tile", TILES)
def test_as_many_slots_each_have_the_bits_of_a_route(tile):
    args, dy = make(9, 5, 2, 40, 24)
    starts = torch.arange(10, dtype=torch.int32) * 2
    uneven = *args[:3], args[3].flatten(), *args[4:6], starts
    got, want = run(uneven, dy, small(tile, True)), run(args, dy, small(tile, True))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.flatten(), b.flatten()) and a.any()


def test_passes_over_columns_have_the_same_bits():
    args, dy = ragged([2, 0, 3, 1, 4], 4, 72, 32)
    results = []
    for most in (10 * 32 * 4, 2**40):
        config = op.Config("triton", TILES["wide"], TILES["tall"], True, slot_bytes=most)
        results.append(run(args, dy, [config, config]))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*results, strict=True))


def test_products_of_csrc(host_library):
    """Tables, sums over slots and weight gradients in Triton, the products over rows in csrc."""
    args, dy = ragged([2, 0, 3, 1, 4] * 4, 4, 24, 40, F16)
    slots = args[5].shape[0]
    plans = [op.plan(slots, 4, F16, way, "", ("csrc",), (9, 0)) for way in (False, True)]
    assert [p.backend for p in plans] == ["csrc"] * 2
    compare(args, dy, plans)


def test_strides():
    (x, up, down, *route), dy = ragged([2, 0, 3, 1, 4] * 4, 4, 24, 16)
    compare((x, up, down, *(torch.stack([t, t], -1)[..., 0] for t in route)), dy, small("wide", 0))


@pytest.mark.parametrize("where", ["x", "dy"])
def test_a_nan_stays_in_its_token(where):
    args, dy = ragged([2, 1, 3, 2, 0, 2], 4, 24, 40)
    {"x": args[0], "dy": dy}[where][2] = torch.nan
    got, want = run(args, dy, small("tall", True)), run(args, dy, (), ref)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.isfinite(b).any()


NO_STARTS = [(0, 3, 1, 20, 5, 10), (-7, 2, 4, 6, 8, 10), (2**31 - 1,) * 6, (-(2**31),) * 6,
             (10, 8, 6, 4, 2, 0), (0, 2**31 - 1, 0, -(2**31), 3, 3)]  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("starts", NO_STARTS)
def test_starts_that_are_none_stay_in_bounds(starts, edge):
    """Neither a token that is none is read nor a slot."""
    (x, *rest, _), dy = ragged([2, 3, 0, 1, 4], 4, 24, 16)
    args = [fenced(t, edge) for t in (x, *rest, torch.tensor(starts, dtype=torch.int32))]
    with results(edge):
        out = run(args, fenced(dy, edge), small("tall", False))
    assert [t.shape for t in out[:3]] == [x.shape, (10, 16), x.shape]
    tokens = kernel._Route(5, *args[3:]).tokens
    assert ((tokens >= 0) & (tokens < 5)).all()


@pytest.mark.parametrize("offsets", NO_OFFSETS)
def test_a_route_that_is_none_stays_in_bounds(offsets):
    (x, up, down, weights, _, order, starts), dy = ragged([2, 3, 0, 1, 4], 4, 24, 16)
    order[[0, 3, 8]] = torch.tensor([-7, 10, 2**31 - 1], dtype=torch.int32)
    args = x, up, down, weights, torch.tensor(offsets, dtype=torch.int32), order, starts
    with guarded() as inside:
        run(args, dy, small("swap", False))
    assert inside()
