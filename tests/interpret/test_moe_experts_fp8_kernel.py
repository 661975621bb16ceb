"""The Triton kernel of moe_experts in FP8, interpreted, against the reference."""

import dataclasses

import pytest
import torch

from nemokernels import testing
from nemokernels.ops.moe_experts import kernel_fp8, op, ref
from nemokernels.ops.moe_route import ref as route

TILES = {
    "small": op.Tile(16, 16, 32, 1, 1),
    "wide": op.Tile(32, 64, 64, 1, 1),
    "swap": op.Tile(16, 32, 32, 1, 1, True),
}


def byte(*shape):
    return torch.randn(shape).to(torch.float8_e4m3fn).view(torch.uint8)


def make(tokens, experts, top_k, width, hidden, per_row=False, chosen=None):
    if chosen is None:
        scores = torch.rand(tokens, experts)
        scores[:, 0] -= 1
        chosen = scores.argsort(-1, descending=True)[:, :top_k]
    _, offsets, order = route.group_rows(chosen, experts)
    rand = lambda *shape: torch.rand(shape) + 0.5  # noqa: E731
    scales = (rand(tokens), rand(experts, hidden), rand(experts, width)) if per_row else (
        rand(1), rand(experts), rand(experts))  # fmt: skip
    return (byte(tokens, width), scales[0], byte(experts, hidden, width), scales[1] / width,
            rand(experts) / 9, byte(experts, width, hidden), scales[2] / hidden,
            torch.rand(tokens, top_k), offsets, order)  # fmt: skip


def compare(args, tile, tma=True, dtype=torch.float32):
    config = op.Config("triton", TILES[tile], None, tma)
    got = kernel_fp8.forward(*args, dtype=dtype, config=config)
    low = ref.forward_fp8(*args, dtype)
    exact = ref.forward_fp8(*testing.to_double(args), torch.float64)
    assert got.dtype == dtype
    testing.assert_matches(got, exact, low)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("size", [(21, 3, 2, 48, 64), (5, 5, 4, 32, 24), (1, 8, 3, 16, 80)])
def test_forward(size, tile, tma, per_row):
    compare(make(*size, per_row), tile, tma)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_returned_dtypes(dtype):
    compare(make(7, 3, 2, 32, 32), "wide", dtype=dtype)


@pytest.mark.parametrize("per_row, tma", [(False, True), (True, False)])
def test_passes_over_columns_have_the_same_bits(per_row, tma):
    args, tile = make(5, 3, 2, 80, 32, per_row), TILES["small"]
    few, every = (
        kernel_fp8.forward(*args, dtype=torch.float16, config=op.Config(
            "triton", tile, None, tma, slot_bytes=most))
        for most in (10 * 32 * 2, 2**40)  # 32 of 80 columns at a time, or all
    )  # fmt: skip
    assert torch.equal(few, every) and few.any()


@pytest.mark.parametrize("tokens, experts", [(1, 4), (31, 4), (33, 4), (33, 40)])
def test_all_to_one_expert(tokens, experts):
    compare(make(tokens, experts, 1, 32, 16, chosen=torch.full((tokens, 1), 2)), "small")


@pytest.mark.parametrize("per_row", [False, True])
def test_loads(per_row):
    loads = torch.tensor([0, 1, 7, 127, 129, 0])
    chosen = torch.arange(6).repeat_interleave(loads)[torch.randperm(264)][:, None]
    compare(make(264, 6, 1, 16, 16, per_row, chosen), "wide")


def test_random_routings():
    for tokens in range(1, 30, 4):
        compare(make(tokens, 2 + tokens % 5, 2, 16, 16, per_row=tokens % 8 == 1), "wide")


def test_every_bit_of_the_hidden_layer():
    """Identities in the place of matrices show it. It lies at ties of E4M3, so that the order of
    operations decides: the square times the reciprocal of the scale."""
    values = torch.arange(0x28, 0x58, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    square, tie = values.square(), 1 + (2 * (torch.arange(48) % 8) + 1) / 16
    scale = square / tie
    by_product, by_division = ((square * (1 / scale)), (square / scale))
    hidden = by_product.to(torch.float8_e4m3fn).float()
    assert not torch.equal(hidden, by_division.to(torch.float8_e4m3fn).float())
    one = torch.eye(16).to(torch.float8_e4m3fn).view(torch.uint8).repeat(48, 1, 1)
    x = values[:, None].repeat(1, 16).to(torch.float8_e4m3fn).view(torch.uint8)
    _, offsets, order = route.group_rows(torch.arange(48)[:, None], 48)
    got = kernel_fp8.forward(
        x, torch.ones(1), one, torch.ones(48), scale, one, torch.ones(48), torch.ones(48, 1),
        offsets, order, dtype=torch.float32, config=op.Config("triton", TILES["small"]),
    )  # fmt: skip
    assert torch.equal(got, (hidden * scale)[:, None].expand(48, 16))


def test_no_tokens():
    args = make(0, 3, 2, 16, 16)
    config = op.Config("triton", TILES["small"])
    assert kernel_fp8.forward(*args, dtype=torch.float32, config=config).shape == (0, 16)


def test_saturation():
    args = list(make(12, 4, 2, 32, 32))
    args[4] = torch.full((4,), 1e-9)
    config = op.Config("triton", TILES["small"], None, True)
    got = kernel_fp8.forward(*args, dtype=torch.float32, config=config)
    want = ref.forward_fp8(*args, torch.float32)
    assert want.isfinite().all() and want.any()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("experts", [2, 9])
def test_a_route_that_is_none_stays_in_bounds(experts):
    *args, weights, _, _ = make(4, experts, 2, 32, 32)
    order = torch.tensor([0, -7, 99, 3, 1, 2, 5, 6], dtype=torch.int32)
    offsets = torch.tensor([3] + [900] * (experts - 1), dtype=torch.int32)
    config = op.Config("triton", TILES["small"])
    got = kernel_fp8.forward(*args, weights, offsets, order, dtype=torch.float32, config=config)
    assert got.shape == (4, 32)


@pytest.mark.parametrize("tokens, per_row", [(70, False), (70, True), (2, True)])
def test_products_of_csrc(host_library, tokens, per_row):
    """The table of tiles and the sums over slots are Triton's."""
    args = make(tokens, 4, 2, 176, 48, per_row)
    for most in (1, 2**40):
        config = op.plan_fp8(2 * tokens, 4, "", ("csrc",), (9, 0))
        config = dataclasses.replace(config, slot_bytes=most)
        got = kernel_fp8.forward(*args, dtype=torch.bfloat16, config=config)
        low = ref.forward_fp8(*args, torch.bfloat16)
        exact = ref.forward_fp8(*testing.to_double(args), torch.float64)
        testing.assert_matches(got, exact, low)


def test_plan():
    everywhere = ("triton", "reference")

    def of(rows, capability=(9, 0), experts=128):
        return op.plan_fp8(rows, experts, "", everywhere, capability)

    assert [of(t * 6).rows.rows for t in (8, 1024, 16384)] == [16, 64, 128]
    assert of(48).rows.swap and not of(1024 * 6).rows.swap
    assert of(16384 * 6, (8, 9)).rows.rows == 64 and not of(8, (8, 9)).tma
    assert "FP8 products need sm_89 or newer, this is sm_80" in of(8, (8, 0)).reason
    assert "2048 experts, got 3000" in of(8, experts=3000).reason
