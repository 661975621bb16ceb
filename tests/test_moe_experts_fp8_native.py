"""The kernels of csrc/moe_experts with E4M3 operands against plain products.

Every test runs twice: the kernels as warpgroups on the CPU, and, with a GPU, as they are.
"""

import pytest
import torch
from expert_tiles import tiles_of
from fenced import EDGES, fenced

from nemokernels import moe_route, testing
from nemokernels.ops.moe_experts import native, ref

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
TILES = [(part, tile) for part in ("up", "slots") for tile in native.EIGHT]


@pytest.fixture
def device(hopper_device):
    return hopper_device


def values(codes, dtype):
    return codes.view(E4M3).to(dtype)


class Problem:
    """Rows, weights and the route of ``tokens`` tokens, two slots each, over five experts."""

    def __init__(self, part, tokens, columns, depth, per_row=False, chosen=None):
        self.part, slots = part, 2 * tokens
        logits = torch.randn(tokens, 5)
        logits[:, 0] = -torch.inf
        if chosen is not None:
            logits[:, chosen] += 100
        route = moe_route(logits, top_k=2)
        self.order, self.offsets, self.tokens = route.order, route.offsets, None
        rows, rand = tokens if part == "up" else slots, lambda *s: torch.rand(s) + 0.5  # noqa: E731
        self.a = torch.randn(rows, depth).to(E4M3).view(torch.uint8)
        self.weights = torch.randn(5, columns, depth).to(E4M3).view(torch.uint8)
        self.b_scale = (rand(5, columns) if per_row else rand(5)) / depth**0.5
        self.a_scale = rand(5) if part == "slots" else rand(tokens) if per_row else rand(1)
        self.out_scale = rand(5) / 16

    def run(self, device, tile, first=0, columns=None):
        slots, width = self.order.shape[0], columns or self.weights.shape[1]
        dtype = torch.uint8 if self.part == "up" else BF16
        out = torch.full((slots, width), 255, dtype=dtype, device=device)  # NaN where it is E4M3
        given = self.order, self.offsets, *tiles_of(self.offsets, native.ROWS)
        scales = [t.to(device) for t in (self.a_scale, self.b_scale, self.out_scale)]
        native.product(
            self.a.to(device), self.weights.to(device), *(t.to(device) for t in given), 2,
            self.part, tile, out, first, self.tokens, scales=scales,
        )  # fmt: skip
        return out.cpu()

    def plain(self, dtype):
        """The same in ``dtype``, not yet rounded."""
        out = torch.empty(self.order.shape[0], self.weights.shape[1], dtype=dtype)
        for e, r in ref.segments(self.offsets):
            slot = self.order[r].long()
            a = values(self.a[slot // 2 if self.part == "up" else r], dtype)
            product = a @ values(self.weights[e], dtype).T * self.b_scale[e].to(dtype)
            if self.part == "slots":
                out[slot] = product * self.a_scale[e].to(dtype)
                continue
            scale = self.a_scale if self.a_scale.numel() == 1 else self.a_scale[slot // 2, None]
            product = (product * scale.to(dtype)).relu().square()
            out[r] = (product * (1 / self.out_scale[e].to(dtype))).clamp(max=448)
        return out

    def rounded(self, out):
        return out.to(E4M3 if self.part == "up" else BF16).float()


def compare(problem, device, tile):
    got = problem.run(device, tile)
    got = values(got, torch.float32) if problem.part == "up" else got.float()
    low = problem.rounded(problem.plain(torch.float32))
    testing.assert_matches(got, problem.plain(torch.float64), low, problem.part)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("part, tile", TILES)
def test_products(device, part, tile, per_row):
    compare(Problem(part, 40, tile + 16, 400, per_row), device, tile)


@pytest.mark.parametrize("part, tile", TILES)
@pytest.mark.parametrize("tokens", [1, 33, 65])
def test_tiles_that_are_partly_full(device, part, tile, tokens):
    compare(Problem(part, tokens, 48, 144, True, chosen=3), device, tile)
    compare(Problem(part, 2 * tokens, 16, 16, chosen=1), device, tile)


@pytest.mark.parametrize("part, tile", TILES)
def test_stages_come_round(device, part, tile):
    compare(Problem(part, 90, 2 * tile + 16, 784), device, tile)


@pytest.mark.parametrize("tile", native.EIGHT)
def test_every_bit_of_what_comes_up(device, tile):
    """Exact sums: a tie of E4M3 shows the order of operations, the square times a reciprocal."""
    problem = Problem("up", 1, 64, 16)
    codes = torch.arange(0x28, 0x58, dtype=torch.uint8)
    square, tie = codes.view(E4M3).float().square(), 1 + (2 * (torch.arange(48) % 8) + 1) / 16
    scale = square / tie
    by_product, by_division = square * (1 / scale), square / scale
    want = by_product.to(E4M3)
    assert not torch.equal(want.float(), by_division.to(E4M3).float())
    problem.order = torch.arange(48, dtype=torch.int32)
    problem.offsets = torch.arange(1, 49, dtype=torch.int32)
    problem.tokens = torch.arange(48, dtype=torch.int32).to(device)
    problem.a = codes[:, None].repeat(1, 16)
    one = torch.eye(16).to(E4M3).view(torch.uint8)
    problem.weights = one.repeat(48, 4, 1)
    problem.a_scale, problem.b_scale, problem.out_scale = torch.ones(1), torch.ones(48), scale
    got = problem.run(device, tile)
    assert torch.equal(got.view(E4M3).float(), want.float()[:, None].expand(48, 64))


def test_saturation_and_nan(device):
    problem = Problem("up", 8, 32, 32)
    problem.out_scale = torch.full((5,), 1e-9)
    problem.a[3, 5] = 0x7F  # NaN
    got = problem.run(device, 160).view(E4M3).float()
    nan = (problem.order // 2 == 3)[:, None]
    assert torch.equal(got.isnan(), nan.expand_as(got))
    assert ((got == 448) | (got == 0) | nan).all() and (got == 448).any()


@pytest.mark.parametrize("part, tile", TILES)
def test_equal_bits_on_repeat_and_by_columns(device, part, tile):
    problem = Problem(part, 9, 400, 80, True)
    whole = problem.run(device, tile)
    assert torch.equal(problem.run(device, tile), whole)
    for first, columns in ((0, 16), (160, 240), (384, 16)):
        some = problem.run(device, tile, first, columns)
        assert torch.equal(some, whole[:, first : first + columns])


@pytest.mark.parametrize("part", ["up", "slots"])
def test_a_table_of_tokens_says_whose_a_slot_is(device, part):
    problem = Problem(part, 12, 32, 48, True)
    want = problem.run(device, 128)
    if part == "up":
        turned = torch.randperm(12)
        problem.a, problem.a_scale = problem.a[turned], problem.a_scale[turned]
        place = turned.argsort()
        problem.tokens = place[torch.arange(24) // 2].int().to(device)
    assert torch.equal(problem.run(device, 128), want)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("part, tile", TILES)
def test_reads_nothing_beyond_its_operands(host_library, part, tile, per_row, edge):
    problem = Problem(part, 35, tile + 16, 48, per_row)
    want = problem.run("cpu", tile)
    for name in ("a", "weights", "order", "offsets", "a_scale", "b_scale", "out_scale"):
        setattr(problem, name, fenced(getattr(problem, name), edge))
    assert torch.equal(problem.run("cpu", tile), want)


@pytest.mark.parametrize("change, message", [
    (lambda p: setattr(p, "weights", p.weights.view(E4M3).bfloat16()), "operands of one dtype"),
    (lambda p: setattr(p, "weights", p.weights[:, :24].contiguous())
     or setattr(p, "b_scale", p.b_scale[:, :24].contiguous()), "multiples of 16 bytes"),
    (lambda p: setattr(p, "weights", p.weights.mT.contiguous().mT), "along their depth"),
    (lambda p: setattr(p, "a_scale", p.a_scale[:2]), "as many float32 values"),
    (lambda p: setattr(p, "b_scale", p.b_scale.double()), "as many float32 values"),
    (lambda p: setattr(p, "out_scale", p.out_scale[:3]), "as many float32 values"),
])  # fmt: skip
def test_refused(device, change, message):
    problem = Problem("up", 4, 32, 48, True)
    change(problem)
    with pytest.raises(RuntimeError, match=message):
        problem.run(device, 160)
