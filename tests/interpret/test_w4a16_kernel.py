"""The Triton kernels of w4a16, interpreted, against the reference."""

import dataclasses

import pytest
import torch

from nemokernels import NVFP4, testing, tile_nvfp4
from nemokernels.ops.moe_experts.op import Tile
from nemokernels.ops.moe_route import ref as route
from nemokernels.ops.w4a16 import kernel, native, op, ref

F32, F16 = torch.float32, torch.float16
TILES = {
    "small": Tile(16, 16, 64, 1, 1),
    "deep": Tile(16, 32, 128, 1, 1),
    "tall": Tile(32, 16, 64, 1, 1),
}


def config(name):
    return op.Config("triton", TILES[name])


def weight_of(*shape):
    """Every code and every block scale that is a number and not negative, subnormal ones too."""
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    scales = torch.randint(0, 127, (*shape[:-1], shape[-1] // 16), dtype=torch.uint8)
    scale_2 = torch.rand(shape[:-2]) / 100 + 1e-3
    return tile_nvfp4(NVFP4(codes, scales.view(torch.float8_e4m3fn), scale_2))[:3]


def quantized(*shape):
    """As :func:`weight_of`, at the size of a trained weight."""
    codes, scales, scale_2 = weight_of(*shape)
    scales = torch.randint(0x30, 0x48, scales.shape, dtype=torch.uint8)
    return codes, scales, scale_2 * (shape[-1] ** -0.5)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rows, width, depth", [(17, 33, 48), (33, 40, 144), (3, 7, 256)])
def test_linear(rows, width, depth, dtype, tile):
    weight, dy = weight_of(width, depth), torch.randn(rows, width).to(dtype) / 64
    x = torch.randn(rows, depth).to(dtype) / 64
    got = kernel.linear(x, *weight, width, config(tile))
    low, exact = (ref.linear(t, *weight, width) for t in (x, x.double()))
    testing.assert_matches(got, exact, low)
    got = kernel.linear_backward(dy, *weight, depth, config(tile))
    low, exact = (ref.linear_backward(t, *weight, depth) for t in (dy, dy.double()))
    testing.assert_matches(got, exact, low)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_every_code_and_scale_is_exact(dtype):
    """Negative scales too, which nvfp4_linear takes where it is not asked to read them first."""
    codes = torch.arange(16).repeat(254, 1)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    scales = torch.cat([torch.arange(127), torch.arange(128, 255)]).to(torch.uint8)
    weight = *ref.tile(packed, scales[:, None]), torch.ones(())
    x, y = torch.eye(16, dtype=dtype), torch.eye(254, dtype=dtype)
    large = op.Config("triton", Tile(64, 128, 64, 1, 1))
    got = kernel.linear(x, *weight, 254, large)
    assert torch.equal(got, ref.linear(x, *weight, 254)) and got.abs().max() == 448 * 6
    got = kernel.linear_backward(y, *weight, 16, large)
    assert torch.equal(got, ref.linear_backward(y, *weight, 16))


def make(tokens, experts, top_k, width, hidden, dtype=F32, chosen=None):
    x = torch.randn(tokens, width).to(dtype)
    if chosen is None:
        scores = torch.rand(tokens, experts)
        scores[:, 0] -= 1  # expert 0 has no rows if it can
        chosen = scores.argsort(-1, descending=True)[:, :top_k]
    _, offsets, order = route.group_rows(chosen, experts)
    up, down = quantized(experts, hidden, width), quantized(experts, width, hidden)
    return x, *up, *down, hidden, torch.rand(tokens, top_k), offsets, order


def compare(args, name):
    got = kernel.experts(*args, config=config(name))
    exact = ref.experts(*testing.to_double(args[:1]), *args[1:8], args[8].double(), *args[9:])
    low = ref.experts(*args)
    assert got.dtype == low.dtype and got.is_contiguous()
    testing.assert_matches(got, exact, low)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("size", [(21, 3, 2, 48, 32), (1, 5, 3, 144, 48)])
def test_experts(size, dtype, tile):
    compare(make(*size, dtype), tile)


@pytest.mark.parametrize("tokens, experts", [(1, 4), (31, 4), (33, 4), (33, 40)])
def test_all_to_one_expert(tokens, experts):
    compare(make(tokens, experts, 1, 32, 16, chosen=torch.full((tokens, 1), 2)), "tall")


@pytest.mark.parametrize("tile", TILES)
def test_loads(tile):
    loads = torch.tensor([0, 1, 7, 127, 129, 0])
    chosen = torch.arange(6).repeat_interleave(loads)[torch.randperm(264)][:, None]
    compare(make(264, 6, 1, 16, 16, chosen=chosen), tile)


def test_random_routings():
    for tokens in range(1, 30, 7):
        compare(make(tokens, 2 + tokens % 5, 2, 16, 16), "tall")


def test_plans():
    for tokens in (3, 30, 110):
        args = make(tokens, 1, 1, 80, 48, F16)
        plan = op.plan(tokens, 1, F16, "", ("triton",))
        testing.assert_matches(
            kernel.experts(*args, config=plan),
            ref.experts(args[0].double(), *args[1:]),
            ref.experts(*args),
        )
    config_32 = op.plan(300, 1, F32, "", ("triton",))
    x, weight = torch.randn(3, 128), weight_of(33, 128)
    got = kernel.linear(x, *weight, 33, config_32)
    testing.assert_matches(got, ref.linear(x.double(), *weight, 33), ref.linear(x, *weight, 33))


@pytest.mark.parametrize("rows, width, depth", [(0, 8, 16), (3, 0, 16), (3, 8, 0)])
def test_empty(rows, width, depth):
    weight, x = weight_of(width, depth), torch.randn(rows, depth)
    assert torch.equal(kernel.linear(x, *weight, width, config("small")), torch.zeros(rows, width))
    dx = kernel.linear_backward(torch.ones(rows, width), *weight, depth, config("small"))
    assert torch.equal(dx, torch.zeros(rows, depth))


def test_no_tokens():
    args = make(0, 3, 2, 16, 16)
    assert kernel.experts(*args, config=config("small")).shape == (0, 16)


def test_strides_and_leading_axes():
    weight, x = weight_of(40, 96), torch.randn(4, 3, 96)
    want = kernel.linear(x, *weight, 40, config("small"))
    views = (torch.cat([x, x], 2)[..., :96], x.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    assert all(torch.equal(kernel.linear(v, *weight, 40, config("small")), want) for v in views)


def test_nan_stays_where_it_belongs():
    args = make(20, 5, 2, 32, 32, chosen=torch.tensor([[1, 2], [3, 4]]).repeat(10, 1))
    args[0][3] = torch.nan
    args[2][2, 0, 0, 5, 1] = 0x7F  # a scale of expert 2
    got, want = kernel.experts(*args, config=config("tall")), ref.experts(*args)
    assert torch.equal(got.isnan(), want.isnan()) and want.isfinite().any()


@pytest.mark.parametrize("experts", [2, 9])
def test_a_route_that_is_none_stays_in_bounds(experts):
    """Slots out of range and offsets behind the end: nothing is written there."""
    weight, x = quantized(experts, 32, 32), torch.randn(8, 32)
    order = torch.tensor([0, -7, 99, 3, 1, 2, 5, 6], dtype=torch.int32)
    offsets = torch.tensor([3] + [900] * (experts - 1), dtype=torch.int32)
    for part in ("up", "slots"):
        around = torch.full((40, 32), -5.0)
        table = kernel._Table(offsets, order, 2, config("small"))
        kernel._product(x, weight, around[16:24], part, config("small"), table)
        assert (around[:16] == -5).all() and (around[24:] == -5).all()
        reached = [0, 1, 2, 3, 5, 6] if part == "slots" else [0, 3, 4, 5, 6, 7]
        assert (around[16:24] != -5).any(1).nonzero().flatten().tolist() == reached


def test_passes_over_columns_have_the_same_bits():
    chosen = torch.rand(9, 4).argsort(1)[:, :2]
    _, offsets, order = route.group_rows(chosen, 4)
    args = (torch.randn(9, 64), *quantized(4, 32, 64), *quantized(4, 64, 32), 32,
            torch.rand(9, 2), offsets, order)  # fmt: skip
    few, every = (
        kernel.experts(*args, config=op.Config("triton", TILES["small"], slot_bytes=most))
        for most in (18 * 16 * 4, 2**40)  # 16 columns at a time, or all
    )
    assert torch.equal(few, every) and few.any()


@pytest.mark.parametrize("tokens, most", [(150, 1), (150, 2**40), (2, 1)])
def test_wide_products_of_csrc(host_library, tokens, most):
    """The table of tiles and the sums over slots are Triton's."""
    wide = op.Config("csrc", Tile(native.WIDE, 128, 64, 4, 2), slot_bytes=most)
    args = make(tokens, 4, 2, 272, 48, F16)
    got = kernel.experts(*args, config=wide)
    exact = ref.experts(*testing.to_double(args[:1]), *args[1:8], args[8].double(), *args[9:])
    testing.assert_matches(got, exact, ref.experts(*args))
    x, weight = torch.randn(2, 130, 80).half(), quantized(24, 80)
    got = kernel.linear(x, *weight, 24, wide)
    testing.assert_matches(got, ref.linear(x.double(), *weight, 24), ref.linear(x, *weight, 24))


@pytest.mark.parametrize("rows, early", [
    (native.ROWS[0], [0, 1, 0, 0]), (native.ROWS[1], [0] * 4), (native.WIDE, [0] * 4)])  # fmt: skip
def test_only_what_follows_up_begins_early(monkeypatch, rows, early):
    """Two passes over the columns of down behind one up, and no launch between the first two."""
    seen = []
    monkeypatch.setattr(native, "product", lambda *args: seen.append(args[9:]))
    config = op.Config("csrc", Tile(rows, 128, 64, 4, 2), slot_bytes=1)
    kernel.experts(*make(5, 4, 2, 272, 48, F16), config=config)
    assert [part for part, *_ in seen] == ["up", "slots", "slots", "slots"]
    assert [first for *_, first, _ in seen] == [0, 0, 128, 256]
    assert [int(flag) for *_, flag in seen] == early


def test_a_table_that_names_what_cannot_run(monkeypatch):
    x, weight = torch.randn(40, 80).half(), quantized(24, 80)
    tile = Tile(native.WIDE, 128, 64, 4, 2)
    table = lambda *a: dataclasses.replace(a[-1], backend="csrc", tile=tile)  # noqa: E731
    monkeypatch.setattr(op._tuned, "tuned", table)

    def rows(columns=24, depth=80, backends=("csrc", "triton"), capability=(9, 0)):
        monkeypatch.setattr(op._backends, "usable", lambda *_: backends)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        config = op._plan(x[:, :depth], 40, 1, weight[2], columns=columns)
        return config.backend, config.tile.rows

    assert rows() == ("csrc", native.WIDE)
    assert rows(columns=23) == rows(depth=0) == rows(capability=(10, 0)) == ("csrc", 32)
    assert rows(backends=("triton", "reference"))[0] == "triton"
    monkeypatch.setattr(op._backends, "usable", lambda *_: ("csrc", "triton"))
    assert op._plan(x, 40, 1, weight[2]).backend == "triton"  # a backward
