"""The kernels of csrc/w4a16 against the reference.

Every test runs twice: the kernels as loops on the CPU, and, with a GPU, as they are.
"""

import pytest
import torch
from expert_tiles import tiles_of
from fenced import EDGES, fenced
from machine_code import functions_of, needs_nvcc

from nemokernels import NVFP4, moe_route, testing, tile_nvfp4
from nemokernels.ops.moe_route.ref import group_rows
from nemokernels.ops.w4a16 import native, op, ref

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def device(native_device):
    return native_device


def random_weight(*shape):
    """Every code and every block scale that is a number and not negative, subnormal ones too."""
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    scales = torch.randint(0, 127, (*shape[:-1], shape[-1] // 16), dtype=torch.uint8)
    scale_2 = torch.rand(shape[:-2]) / 100 + 1e-3
    return tile_nvfp4(NVFP4(codes, scales.view(torch.float8_e4m3fn), scale_2))[:3]


def product(device, x, weight, route, part, rows, out):
    args = [t if t is None else t.to(device) for t in (x, *weight, *route)]
    return native.product(*args, 2, part, rows, out.to(device)).cpu()


def parts(x, weight, route, width):
    """What each part must return, from the reference's pieces in x's dtype's accumulator."""
    acc = torch.promote_types(x.dtype, F32)
    order, offsets = route
    out = {part: torch.zeros(order.shape[0], width, dtype=acc) for part in ("up", "slots")}
    for e, r in ref.moe.segments(offsets):
        slot = order[r].long()
        w = ref.values(weight[0][e], weight[1][e], width, x.shape[1], acc)
        scale = weight[2][e].to(acc)
        out["up"][r] = (x[slot // 2].to(acc) @ w.T * scale).relu().square()
        out["slots"][slot] = x[r].to(acc) @ w.T * scale
    return {part: value.to(x.dtype) for part, value in out.items()}


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rows", native.ROWS)
@pytest.mark.parametrize("width, depth", [(32, 64), (16, 16), (80, 304), (33, 640)])
def test_linear(device, dtype, rows, width, depth):
    weight = random_weight(width, depth)
    for tokens in (1, 7, rows, rows + 1):
        x = (torch.randn(tokens, depth) / 64).to(dtype)
        got = product(device, x, weight, (None,) * 4, "plain", rows, x.new_empty(tokens, width))
        low, exact = (ref.linear(t, *weight, width) for t in (x, x.double()))
        testing.assert_matches(got, exact, low)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rows", native.ROWS)
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("spread", ["random", "one expert"])
def test_experts(device, dtype, rows, tokens, spread):
    logits = torch.randn(tokens, 5)
    logits[:, 0] = -torch.inf
    logits[:, 3] += 100.0 if spread == "one expert" else 0.0
    route = moe_route(logits, top_k=2)
    table = (route.order, route.offsets, *tiles_of(route.offsets, rows))
    weight = random_weight(5, 48, 80)
    for part, count in (("up", tokens), ("slots", 2 * tokens)):
        x = (torch.randn(count, 80) / 64).to(dtype)
        out = torch.full((2 * tokens, 48), torch.nan, dtype=dtype)
        got = product(device, x, weight, table, part, rows, out)
        x = torch.cat([x, x]) if part == "up" else x  # rows for the part that is not asked
        low, exact = (parts(t, weight, table[:2], 48)[part] for t in (x, x.double()))
        testing.assert_matches(got, exact, low, part)


@pytest.mark.parametrize("rows", native.ROWS)
@pytest.mark.parametrize("experts", [5, 70])
def test_without_a_table_of_tiles_the_same_bits(device, rows, experts):
    x, weight = (torch.randn(40, 80) / 64).to(BF16), random_weight(experts, 48, 80)
    for chosen in (torch.randint(experts, (40, 1)), torch.full((40, 1), experts - 1),
                   torch.zeros(40, 1, dtype=torch.int64)):  # fmt: skip
        _, *route = group_rows(chosen, experts)
        for part in ("up", "slots"):
            got, want = (
                product(device, x, weight, (*route[::-1], *tiles), part, rows,
                        torch.full((40, 48), torch.nan, dtype=BF16))
                for tiles in ((None, None), tiles_of(route[0], rows))
            )  # fmt: skip
            assert torch.equal(got, want) and want.isfinite().all()


def test_down_may_begin_before_up_has_ended(device, rows=native.ROWS[0]):
    """What up writes is read by all of down, some of which begins before."""
    _, offsets, order = group_rows(torch.randint(40, (40, 1)), 40)
    up, down = ([t.to(device) for t in random_weight(40, *s)] for s in ((304, 80), (48, 304)))
    x = (torch.randn(40, 80) / 64).to(BF16).to(device)
    route = [t.to(device) for t in (order, offsets)] + [None, None]

    def run(early):
        hidden = x.new_full((40, 304), torch.nan)
        out = x.new_full((40, 48), torch.nan)
        native.product(x, *up, *route, 1, "up", rows, hidden)
        return native.product(hidden, *down, *route, 1, "slots", rows, out, 0, early).cpu()

    want = run(False)
    assert want.isfinite().all()
    for _ in range(100 if device.type == "cuda" else 1):
        assert torch.equal(run(True), want)
    rows = native.ROWS[1]
    with pytest.raises(RuntimeError, match="expected 8 rows per block to be early"):
        run(True)


@needs_nvcc
def test_machine_code_waits_before_it_reads_what_is_written(build_cache):
    for name in ("w4a16_bf16.cu", "w4a16_fp16.cu"):
        found = functions_of(name)
        early = [code for code in found if "Lb1E" in code.split("\n", 1)[0]]
        assert len(found) == 4 and len(early) == 1
        for code in found:
            # griddepcontrol.wait: before x is read, and for whoever reads none
            assert code.count("ACQBULK") == (2 if code in early else 0)
            assert ("PREEXIT" in code) == (code not in early)  # griddepcontrol.launch_dependents
        for code in early:
            before, after = code.split("ACQBULK", 1)
            # Weights, and rows of x.
            assert "LDG.E.NA.LTC128B.64.CONSTANT" in before and "LDG.E.128" not in before
            assert "LDG.E.128 " in after and "LDG.E.128.CONSTANT" not in after


def test_wide_products_need_a_table(hopper_device):
    route = torch.arange(4).int(), torch.tensor([4], dtype=torch.int32), None, None
    with pytest.raises(RuntimeError, match="expected the route of every row"):
        product(hopper_device, torch.zeros(4, 80).to(BF16), random_weight(1, 48, 80), route, "up",
                native.WIDE, torch.zeros(4, 48).to(BF16))  # fmt: skip


@pytest.mark.parametrize("rows", native.ROWS)
def test_some_columns(device, rows):
    """Passes over the columns of the down projection: the bits of one over all."""
    route = moe_route(torch.randn(9, 5), top_k=2)
    table = [t.to(device) for t in (route.order, route.offsets, *tiles_of(route.offsets, rows))]
    x = (torch.randn(18, 80) / 64).to(BF16).to(device)
    weight = [t.to(device) for t in random_weight(5, 120, 80)]

    def product(first, columns):
        out = torch.full((18, columns), torch.nan, dtype=BF16, device=device)
        return native.product(x, *weight, *table, 2, "slots", rows, out, first)

    whole = product(0, 120)
    assert whole.isfinite().all()
    for first, columns in ((0, 64), (64, 56), (16, 32), (96, 24)):
        assert torch.equal(product(first, columns), whole[:, first : first + columns])
    for first, columns in ((8, 32), (-16, 32), (112, 32)):
        with pytest.raises(RuntimeError, match="from a multiple of 16 on"):
            product(first, columns)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_code_and_scale_is_exact(device, dtype, rows=16):
    """x picks one column at a time: e2m1 times block scale comes out in full, negative ones too,
    which nvfp4_linear takes where it is not asked to read them all first."""
    codes = torch.arange(16).repeat(256, 1)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    scales = torch.arange(256, dtype=torch.uint8)
    scales[[127, 255]] = 0  # would be NaN
    weight = *ref.tile(packed, scales[:, None]), torch.ones(())
    x = torch.eye(16, dtype=dtype)
    got = product(device, x, weight, (None,) * 4, "plain", rows, x.new_empty(16, 256))
    assert torch.equal(got, ref.linear(x, *weight, 256)) and got.abs().max() == 448 * 6


def test_nan_and_infinity_stay_in_their_row(device, rows=8):
    weight, x = random_weight(48, 128), torch.randn(9, 128).to(BF16)
    clean = product(device, x, weight, (None,) * 4, "plain", rows, x.new_empty(9, 48))
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[4] = value
        got = product(device, bad, weight, (None,) * 4, "plain", rows, x.new_empty(9, 48))
        assert not got[4].isfinite().any() and torch.equal(got[:4], clean[:4])
        assert torch.equal(got[5:], clean[5:])
    weight[1][0, 0, 2, 1] = 0x7F
    got = product(device, x, weight, (None,) * 4, "plain", rows, x.new_empty(9, 48))
    assert got[:, 2].isnan().all() and torch.equal(got[:, 3:], clean[:, 3:])


def test_nan_passes_the_squared_relu_of_its_token_alone(device, rows=8):
    x, offsets = torch.randn(9, 64).to(BF16), torch.tensor([18], dtype=torch.int32)
    table = torch.arange(18, dtype=torch.int32), offsets, *tiles_of(offsets, rows)
    x[4] = torch.nan
    got = product(device, x, random_weight(1, 48, 64), table, "up", rows, x.new_empty(18, 48))
    assert got[8:10].isnan().all() and got[:8].isfinite().all() and got[10:].isfinite().all()


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("rows", (*native.ROWS, native.WIDE))
def test_reads_nothing_beyond_its_operands(host_library, rows, edge):
    """Widths that fill no block of 32, depths that fill no unit of 64, a row more than a tile."""
    offsets = torch.tensor([0, rows + 1], dtype=torch.int32)
    route = torch.randperm(rows + 1).int(), offsets, *tiles_of(offsets, rows)
    for part, table, weight in (
        ("plain", (None,) * 4, random_weight(40, 80)), ("slots", route, random_weight(2, 40, 80)),
    ):  # fmt: skip
        x, *rest = (t if t is None else fenced(t, edge)
                    for t in (torch.randn(rows + 1, 80).to(BF16), *weight, *table))  # fmt: skip
        out = fenced(torch.zeros(rows + 1, 40, dtype=BF16), edge)
        assert native.product(x, *rest, 2, part, rows, out).any()


def test_a_route_that_is_none_stays_in_bounds(device, rows=8):
    """Slots and experts out of range, offsets behind the end: nothing is read or written there."""
    weight, x = random_weight(2, 32, 64), torch.randn(4, 64).to(BF16)
    order = torch.tensor([0, -7, 99, 3], dtype=torch.int32)
    offsets = torch.tensor([3, 900], dtype=torch.int32)
    table = [torch.tensor(t, dtype=torch.int32) for t in ([0, 1, 1, 7, -3], [0, 3, -256, 0, 0])]
    if torch.device(device).type == "cpu":
        x, order, offsets = (fenced(t, "behind") for t in (x, order, offsets))
        weight, table = ([fenced(t, "behind") for t in parts] for parts in (weight, table))
    for part in ("up", "slots"):
        out = torch.full((4, 32), -5.0, dtype=BF16)
        got = product(device, x, weight, (order, offsets, *table), part, rows, out)
        assert (got[[1, 2]] == -5).all() and (got[[0, 3]] != -5).any(1).all()


@pytest.mark.parametrize("ends, reached", [
    ((3, 900), [0, 3]), ((-1, 2), []), ((2, -9), []), ((-5, -5), []), ((2**31 - 1, 7), [0, 3]),
    ((-(2**31), 2**31 - 1), [0, 3]),
])  # fmt: skip
def test_ends_that_are_none_without_a_table(device, ends, reached):
    weight, x = random_weight(2, 32, 64), torch.randn(4, 64).to(BF16)
    route = [torch.tensor(t, dtype=torch.int32) for t in ([0, -7, 99, 3], ends)]
    if torch.device(device).type == "cpu":
        x, *route = (fenced(t, "behind") for t in (x, *route))
        weight = [fenced(t, "behind") for t in weight]
    for part in ("up", "slots"):
        out = torch.full((4, 32), -5.0, dtype=BF16)
        got = product(device, x, weight, (*route, None, None), part, 8, out)
        assert (got != -5).any(1).nonzero().flatten().tolist() == reached, part


def test_strided_rows_and_repeats(device, rows=8):
    weight, x = random_weight(40, 96), torch.randn(12, 96).to(BF16)
    run = lambda t: product(device, t, weight, (None,) * 4, "plain", rows, t.new_empty(12, 40))  # noqa: E731
    want = run(x)
    assert torch.equal(run(torch.cat([x, x], 1)[:, :96]), want) and torch.equal(run(x), want)


@pytest.mark.parametrize("part, message", [
    (lambda x: x[:, 1:65], "aligned to 16 bytes"),
    (lambda x: x[:, :64].float(), "bfloat16 or float16"),
    (lambda x: x, "in tiles of 16 x 64"),
    (lambda x: x[:2, :64], "one per row of the result"),
])  # fmt: skip
def test_refused(device, part, message):
    weight, x = random_weight(16, 64), part(torch.ones(3, 128, dtype=BF16, device=device))
    with pytest.raises(RuntimeError, match=message):
        product(device, x, weight, (None,) * 4, "plain", 8, x.new_empty(3, 16))


# 256 rows per block


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("width, depth", [(32, 64), (16, 16), (136, 304), (264, 528)])
def test_wide_linear(hopper_device, dtype, width, depth):
    """More stages than the ring has, more tiles than blocks, tiles that are half full or less."""
    weight = random_weight(width, depth)
    for tokens in (1, 128, 129, 300):
        x = (torch.randn(tokens, depth) / 64).to(dtype)
        args = weight, (None,) * 4, "plain", native.WIDE, x.new_empty(tokens, width)
        got = product(hopper_device, x, *args)
        low, exact = (ref.linear(t, *weight, width) for t in (x, x.double()))
        testing.assert_matches(got, exact, low)
        assert torch.equal(product(hopper_device, x, *args), got)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("tokens, spread", [
    (1, "random"), (7, "random"), (150, "random"), (64, "one expert"), (129, "one expert"),
    (300, "one expert"),
])  # fmt: skip
def test_wide_experts(hopper_device, dtype, tokens, spread):
    test_experts(hopper_device, dtype, native.WIDE, tokens, spread)


def test_wide_columns_rows_and_routes(hopper_device):
    for rows in (native.ROWS[0], native.WIDE):
        test_every_code_and_scale_is_exact(hopper_device, BF16, rows)
    test_some_columns(hopper_device, native.WIDE)
    test_strided_rows_and_repeats(hopper_device, native.WIDE)
    test_a_route_that_is_none_stays_in_bounds(hopper_device, native.WIDE)


def test_wide_nan_and_infinity(hopper_device):
    test_nan_and_infinity_stay_in_their_row(hopper_device, native.WIDE)
    test_nan_passes_the_squared_relu_of_its_token_alone(hopper_device, native.WIDE)


def test_wide_zero_sizes_and_what_is_refused(hopper_device):
    x = torch.randn(3, 64).to(BF16)
    for rows, width in ((0, 16), (3, 0)):
        args = random_weight(width, 64), (None,) * 4, "plain", native.WIDE
        assert product(hopper_device, x[:rows], *args, x.new_empty(rows, width)).numel() == 0
    args = random_weight(33, 64), (None,) * 4, "plain", native.WIDE
    with pytest.raises(RuntimeError, match="rows of the result aligned"):
        product(hopper_device, x, *args, x.new_empty(3, 33))


def test_too_many_wide_tiles_are_refused(hopper_device):
    """They are counted in 32 bits."""
    x, width = torch.zeros(1, 64, dtype=BF16), 2**20
    weight = [torch.zeros(width // 16, 1, 16, size, dtype=torch.uint8) for size in (32, 4)]
    none = torch.full((2**31 // (width // 128),), -1, dtype=torch.int32)
    args = (*weight, torch.ones(1)), (none[:1], none[:1], none, none), "slots", native.WIDE
    with pytest.raises(RuntimeError, match="expected fewer tiles"):
        product(hopper_device, x, *args, x.new_empty(1, width))


@pytest.mark.parametrize("rows", [8, native.WIDE])
def test_rows_that_overlap_are_copied(hopper_device, rows):
    weight, one = random_weight(40, 96), torch.randn(1, 96).to(BF16)
    args = weight, (None,) * 4, "plain", rows, one.new_empty(20, 40)
    got = product(hopper_device, one.expand(20, 96), *args)
    assert torch.equal(got, product(hopper_device, one.repeat(20, 1), *args))


def test_plan():
    everywhere = ("csrc", "triton", "reference")

    def of(rows, experts=128, dtype=BF16, backends=everywhere, **kwargs):
        return op.plan(rows, experts, dtype, "", backends, **kwargs)

    assert [of(t * 6).tile.rows for t in (1, 64, 256, 1024)] == [8, 8, 16, 32]
    assert of(384).backend == "csrc" and of(384, dtype=F32).backend == "triton"
    assert of(16384 * 6).backend == "triton" and of(16384 * 6, backends=("csrc",)).backend == "csrc"
    assert of(8, backends=("csrc",), forward=False).backend == "triton"
    assert of(8, backends=("reference",)).backend == "reference"
    assert "2048 experts, got 3000" in of(8, 3000).reason
    with pytest.raises(RuntimeError, match="csrc takes bfloat16 and float16"):
        of(8, dtype=F32, backends=("csrc",))
