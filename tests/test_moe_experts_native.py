"""The kernels of csrc/moe_experts against plain products.

Every test runs twice: the kernels as warpgroups on the CPU, and, with a GPU, as they are.
"""

import pytest
import torch
from expert_tiles import tiles_of
from fenced import EDGES, fenced

from nemokernels import moe_route, testing
from nemokernels.ops.moe_experts import native, ref

BF16, F16 = torch.bfloat16, torch.float16
TILES = [("up", c) for c in native.ALONG] + [("slots", c) for c in native.ALONG]
TILES += [("slots across", c) for c in native.ACROSS] + [("dhidden", c) for c in native.GRADIENT]
SOME = [("up", 224), ("slots", 192), ("slots across", 256), ("dhidden", 192)]


@pytest.fixture
def device(hopper_device):
    return hopper_device


class Problem:
    """Rows, weights and the route of ``tokens`` tokens, two slots each, over five experts."""

    def __init__(self, part, tokens, columns, depth, dtype=BF16, chosen=None):
        self.part, self.top_k, slots = part, 2, 2 * tokens
        logits = torch.randn(tokens, 5)
        logits[:, 0] = -torch.inf
        if chosen is not None:
            logits[:, chosen] += 100
        route = moe_route(logits, top_k=2)
        self.order, self.offsets, self.tokens = route.order, route.offsets, None
        rows = slots if part.startswith("slots") else tokens
        self.a = (torch.randn(rows, depth) / depth**0.5).to(dtype)
        self.weights = torch.randn(5, columns, depth).to(dtype)
        if part in ("slots across", "dhidden"):
            self.weights = self.weights.mT.contiguous().mT
        self.slot_weights, self.hidden = torch.rand(tokens, 2), torch.randn(slots, columns)
        self.hidden = self.hidden.relu().square().to(dtype)

    def run(self, device, tile, first=0, columns=None):
        """The result and, of the gradient, its partial sums; NaN where nothing is written."""
        slots, width = self.order.shape[0], columns or self.weights.shape[1]
        nan = dict(fill_value=torch.nan, device=device)
        out, gradient = torch.full((slots, width), dtype=self.a.dtype, **nan), ()
        if self.part == "dhidden":
            partial = torch.full((-(-width // tile), slots), **nan)
            gradient = self.slot_weights.to(device), self.hidden.to(device), partial
        given = self.order, self.offsets, *tiles_of(self.offsets, native.ROWS)
        native.product(
            self.a.to(device), self.weights.to(device), *(t.to(device) for t in given), self.top_k,
            self.part.split()[0], tile, out, first,
            None if self.tokens is None else self.tokens.to(device), *([gradient] * bool(gradient)),
        )  # fmt: skip
        return [out.cpu(), *(t.cpu() for t in gradient[2:])]

    def plain(self, dtype):
        """The same, summed up in ``dtype``."""
        columns = self.weights.shape[1]
        out = torch.empty(self.order.shape[0], columns, dtype=dtype)
        dweights = torch.empty(self.order.shape[0], dtype=dtype)
        for e, r in ref.segments(self.offsets):
            slot = self.order[r].long()
            token = slot // self.top_k if self.tokens is None else self.tokens[slot]
            a = self.a[r] if self.part.startswith("slots") else self.a[token]
            product = a.to(dtype) @ self.weights[e].to(dtype).T
            if self.part == "up":
                out[r] = product.relu().square()
            elif self.part == "dhidden":
                hidden, weight = self.hidden[r].to(dtype), self.slot_weights.flatten()[slot, None]
                dweights[slot] = (hidden * product).sum(1)
                out[r] = 2 * hidden.sqrt() * (weight.to(dtype) * product)
            else:
                out[slot] = product
        return [out, dweights][: 1 + (self.part == "dhidden")]


def compare(problem, device, tile):
    got, exact = problem.run(device, tile), problem.plain(torch.float64)
    low = problem.plain(torch.float32)
    testing.assert_matches(got[0], exact[0], low[0].to(problem.a.dtype), problem.part)
    if problem.part == "dhidden":
        testing.assert_matches(got[1].sum(0), exact[1], low[1], "dweights")


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("part, tile", TILES)
def test_products(device, part, tile, dtype):
    compare(Problem(part, 40, tile + 16, 200, dtype), device, tile)


@pytest.mark.parametrize("part, tile", SOME)
def test_any_number_of_slots_per_token(device, part, tile):
    """Tokens of the slots from a table: of a route of two each the same bits, and of any other."""
    problem = Problem(part, 70, 40, 72)
    want, slots = problem.run(device, tile), problem.order.shape[0]
    problem.tokens, problem.top_k = torch.arange(slots, dtype=torch.int32) // 2, 1
    assert all(torch.equal(a, b) for a, b in zip(problem.run(device, tile), want))
    problem.tokens = torch.randint(70, (slots,)).sort().values.int()
    compare(problem, device, tile)


@pytest.mark.parametrize("part, tile", SOME)
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 65])
def test_tiles_that_are_partly_full(device, part, tile, tokens):
    """All tokens to one expert (and another): 64 rows or fewer leave a warpgroup idle."""
    compare(Problem(part, tokens, 24, 72, chosen=3), device, tile)
    compare(Problem(part, 2 * tokens, 8, 8, chosen=1), device, tile)


@pytest.mark.parametrize("part, tile", SOME)
def test_stages_come_round(device, part, tile):
    """More of the depth than there are stages, and more tiles than blocks."""
    compare(Problem(part, 150, 2 * tile + 8, 456), device, tile)


@pytest.mark.parametrize("part, tile", SOME)
def test_no_tokens_to_most_experts(device, part, tile):
    problem = Problem(part, 6, 16, 16)
    problem.offsets[1:4] = 0  # all rows to the last
    compare(problem, device, tile)


@pytest.mark.parametrize("part, tile", SOME)
def test_equal_inputs_give_equal_bits(device, part, tile):
    """Whatever else the tile holds, too: a row's place in it changes nothing."""
    problem = Problem(part, 60, 40, 80)
    first, again = problem.run(device, tile), problem.run(device, tile)
    turned = Problem.__new__(Problem)
    turned.__dict__.update(problem.__dict__)
    starts = [0, *problem.offsets.tolist()]
    turned.order = torch.cat([problem.order[a:b].flip(0) for a, b in zip(starts, starts[1:])])
    flip = lambda t: torch.cat([t[a:b].flip(0) for a, b in zip(starts, starts[1:])])  # noqa: E731
    turned.hidden = flip(problem.hidden)
    if part.startswith("slots"):
        turned.a = flip(problem.a)
    other = turned.run(device, tile)
    if not part.startswith("slots"):
        other[0] = flip(other[0])
    for a, b, c in zip(first, again, other):
        assert torch.equal(a, b) and torch.equal(a, c) and a.isfinite().all()


@pytest.mark.parametrize("part, tile", [("slots", 192), ("slots across", 256)])
def test_some_columns(device, part, tile):
    problem = Problem(part, 9, 600, 80)
    (whole,) = problem.run(device, tile)
    for first, columns in ((0, 256), (256, 344), (8, 16), (592, 8)):
        (some,) = problem.run(device, tile, first, columns)
        assert torch.equal(some, whole[:, first : first + columns])
    for first, columns in ((600, 8), (-8, 16), (0, 608)):
        with pytest.raises(RuntimeError, match="expected columns of the weights"):
            problem.run(device, tile, first, columns)


@pytest.mark.parametrize("part, tile", SOME)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_where_they_belong(device, part, tile, value):
    """A block that ends behind an expert's rows or depth must not meet the next expert's."""
    problem = Problem(part, 30, 24, 72)
    clean = problem.run(device, tile)[0]
    problem.weights[2] = value
    problem.a[3] = value
    want = problem.plain(torch.float32)[0].to(BF16)
    got = problem.run(device, tile)[0]
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    fine = want.isfinite().all(1)
    assert torch.equal(got[fine], clean[fine]) and fine.sum() > 10


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_went_up_may_be_no_number(device, value):
    problem = Problem("dhidden", 30, 24, 72)
    problem.hidden[5:7] = value
    (out, (sums,)), want = problem.run(device, 192), problem.plain(torch.float32)
    for a, b in zip((out, sums), want):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


def test_columns_that_there_are_not_add_nothing(device):
    """To the sums over columns: infinity times the zeros in their place would be NaN."""
    problem = Problem("dhidden", 8, 24, 72)
    problem.weights, problem.hidden = problem.weights.abs() + 1, problem.hidden + 1
    problem.a[3] = torch.inf
    _, (sums,) = problem.run(device, 192)
    assert sums.isinf().nonzero().flatten().tolist() == [6, 7] and not sums.isnan().any()


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("part, tile", SOME)
def test_reads_nothing_beyond_its_operands(host_library, part, tile, edge):
    """Rows and columns that fill no tile."""
    problem = Problem(part, 35, tile + 8, 72)
    want = problem.run("cpu", tile)
    for name in ("a", "order", "offsets", "slot_weights", "hidden"):
        setattr(problem, name, fenced(getattr(problem, name), edge))
    if problem.weights.is_contiguous():
        problem.weights = fenced(problem.weights, edge)
    else:
        problem.weights = fenced(problem.weights.mT, edge).mT
    assert all(torch.equal(a, b) for a, b in zip(problem.run("cpu", tile), want))


@pytest.mark.parametrize("part, tile", SOME)
def test_strided_operands(device, part, tile):
    problem = Problem(part, 20, 40, 72)
    want = problem.run(device, tile)
    problem.a = torch.cat([problem.a, problem.a], 1)[:, :72]
    inner = problem.weights.mT if part in ("slots across", "dhidden") else problem.weights
    wide = torch.cat([inner, torch.full_like(inner, torch.nan)], 2)[:, :, : inner.shape[2]]
    problem.weights = wide.mT if inner is not problem.weights else wide
    assert not problem.weights.is_contiguous() and not problem.weights.mT.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(problem.run(device, tile), want))
    problem.a = torch.cat([problem.a[:, :1], problem.a], 1)[:, 1:]  # off by an element: copied
    assert all(torch.equal(a, b) for a, b in zip(problem.run(device, tile), want))


@pytest.mark.parametrize("edge", [None, *EDGES])
@pytest.mark.parametrize("part, tile", SOME)
def test_a_route_that_is_none_stays_in_bounds(device, part, tile, edge):
    """Slots and experts out of range, offsets behind the end: nothing is read or written there."""
    problem = Problem(part, 2, 16, 24)
    if edge:
        tokens = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
        problem.tokens = fenced(tokens, edge) if device.type == "cpu" else tokens
    problem.order = torch.tensor([0, -7, 99, 3], dtype=torch.int32)
    if edge and device.type == "cpu":
        problem.order = fenced(problem.order, edge)
    problem.offsets = torch.tensor([3, 900, 900, -5, 2**31 - 1], dtype=torch.int32)
    tiles = torch.tensor([0, 1, 4, 7, -3, 2**31 - 1]), torch.tensor([0, 3, -128, 0, 0, 0])
    tables = [t.int() for t in tiles]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "tiles_of", lambda *_: tables)
        got = problem.run(device, tile)[0]
    assert got[[1, 2]].isnan().all() and got[[0, 3]].isfinite().all()


@pytest.mark.parametrize("change, message", [
    (lambda p: setattr(p, "a", p.a.float()), "operands of one dtype"),
    (lambda p: setattr(p, "a", p.a[:, :8]), "weights of as many experts"),
    (lambda p: setattr(p, "a", p.a[:3]), "a row per token"),
    (lambda p: setattr(p, "weights", p.weights[:, :12].contiguous()), "multiples of 16 bytes"),
    (lambda p: setattr(p, "weights", p.weights[..., :20].contiguous())
     or setattr(p, "a", p.a[:, :20].contiguous()), "multiples of 16 bytes"),
    (lambda p: setattr(p, "weights", p.weights.mT.contiguous().mT), "along their depth to go up"),
    (lambda p: setattr(p, "order", p.order.long()), "int32"),
    (lambda p: setattr(p, "offsets", p.offsets[:4]), "weights of as many experts"),
    (lambda p: setattr(p, "tokens", p.order[1:]), "a token of every slot"),
    (lambda p: setattr(p, "tokens", p.order.long()), "int32"),
])  # fmt: skip
def test_refused(device, change, message):
    problem = Problem("up", 4, 16, 24)
    change(problem)
    with pytest.raises(RuntimeError, match=message):
        problem.run(device, 224)


def test_tiles_of_another_width_are_refused(device):
    for part in ("up", "slots", "slots across", "dhidden"):
        with pytest.raises(RuntimeError, match="tiles of another width"):
            Problem(part, 4, 16, 24).run(device, 128)


def test_too_many_tiles_are_refused(device):
    """They are counted in 32 bits."""
    a, weights = (torch.empty(s, dtype=BF16, device=device) for s in ((0, 8), (1, 1, 8)))
    none = torch.full((1 + 2**31 // (2**27 // 192),), -1, dtype=torch.int32, device=device)
    given = a, weights.expand(1, 2**27, 8), none[:0], none[:1]
    with pytest.raises(RuntimeError, match="expected fewer tiles"):
        native.product(*given, none, none, 2, "up", 192, a.new_empty(0, 2**27))


def test_which_weights_are_taken():
    up, down = torch.empty(3, 24, 16, dtype=BF16), torch.empty(3, 16, 24, dtype=BF16)
    assert native.refusal(up, down) == ""
    assert "bfloat16, float16 and E4M3, got torch.float32" in native.refusal(
        up.float(), down.float()
    )
    for sizes in ((3, 20, 16), (3, 24, 12), (3, 24, 0)):
        assert "multiples of 8, got" in native.refusal(up, torch.empty(sizes, dtype=BF16))
    flat = torch.empty(2000, dtype=BF16)
    for strides, first in (((384, 1, 24), 0), ((384, 20, 1), 0), ((380, 16, 1), 0),
                           ((384, 16, 1), 1)):  # fmt: skip
        view = flat.as_strided((3, 24, 16), strides, first)
        assert "contiguous and aligned to 16 bytes" in native.refusal(view, down)


@pytest.mark.parametrize("columns, tile, padded", [
    (1856, 232, 0), (2688, 224, 0), (1024, 256, 0), (2048, 256, 0), (5120, 256, 0), (24, 192, 168),
])  # fmt: skip
def test_tiles_of_the_models(columns, tile, padded):
    assert native.tile_columns(columns, native.ALONG) == tile
    assert -columns % tile == padded
