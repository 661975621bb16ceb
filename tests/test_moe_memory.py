"""What the launchers of the experts allocate for the models' layers at full size; their passes;
how many kernels a layer launches.

Kernels do not run: the tensors are on the meta device, where sizes are all there is.
"""

from unittest import mock

import pytest
import torch
from allocations import Allocations

from nemokernels.ops.moe_experts import op
from nemokernels.ops.moe_experts.passes import SLOT_BYTES, at_once, in_passes
from nemokernels.ops.nvfp4.ref import swizzled_shape
from nemokernels.ops.nvfp4_gemm import op as nvfp4_gemm
from nemokernels.ops.nvfp4_gemm import ref as nvfp4_ref
from nemokernels.ops.w4a16 import op as w4a16

triton = pytest.importorskip("triton", reason="no Triton, no kernels")
BF16 = torch.bfloat16
MODELS = {"nano3": (128, 6, 2688, 1856), "super3": (512, 22, 1024, 2688),
          "ultra": (512, 22, 2048, 5120)}  # fmt: skip


def follow(function):
    with mock.patch.object(triton.runtime.jit.JITFunction, "run", lambda *_, **__: None):
        with Allocations() as seen:
            out = function()
    del out
    return seen


def meta(*shape, dtype=BF16):
    return torch.empty(shape, device="meta", dtype=dtype)


def layer(name, tokens):
    E, k, X, F = MODELS[name]
    route = meta(tokens, k, dtype=torch.float32), meta(E, dtype=torch.int32)
    return (meta(tokens, X), meta(E, F, X), meta(E, X, F), *route,
            meta(tokens * k, dtype=torch.int32), None)  # fmt: skip


@pytest.mark.parametrize("tokens", [8, 1024, 16384, 65536])
@pytest.mark.parametrize("name", MODELS)
def test_unquantised(name, tokens):
    """Forward: hidden and y. Backward: gradients of hidden, x, the matrices and the weights. Beside
    them the rows of some columns, and tables of a few bytes per slot."""
    from nemokernels.ops.moe_experts import kernel

    E, k, X, F = MODELS[name]
    args, slots = layer(name, tokens), tokens * k
    hidden = meta(slots, F)
    for backward in (False, True):
        config = op.plan(slots, E, BF16, backward, "", ("triton",), (9, 0))
        if backward:
            seen = follow(lambda: kernel.backward(args[0], *args, hidden, config))  # noqa: B023
            partial = 4 * slots * -(-F // config.rows.columns)
            wanted = sum(t.nbytes for t in (*args[:3], args[3], hidden)) + partial
        else:
            seen = follow(lambda: kernel.forward(*args, config))  # noqa: B023
            wanted = args[0].nbytes + hidden.nbytes
        held = seen.peak - wanted
        assert held <= max(SLOT_BYTES, slots * config.rows.columns * 2) + 8 * slots + 16 * E
        copy = slots * X * 2
        assert copy <= SLOT_BYTES or held < copy - 16 * E, "a copy of x per slot"


def launched(function):
    """Names of the kernels in the order of their launches."""
    names = []

    def note(kernel, *_, **__):
        names.append(kernel.__name__.removeprefix("moe_").removesuffix("_kernel"))

    with mock.patch.object(triton.runtime.jit.JITFunction, "run", note):
        function()
    return names


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 8, 64, 16384])
def test_launches(name, tokens):
    """Up to 1024 slots weights and ids in one, counts, ends and order in a second. Else weights,
    ids and counts in one, after what they are added to is zeroed; ends and order in two, whose
    pieces run side by side. Then the table of tiles, if there are more slots than experts, and the
    two products, of which the second and its sum are as many as there are passes."""
    from nemokernels.ops.moe_experts import kernel
    from nemokernels.ops.moe_route import kernel as routing
    from nemokernels.ops.moe_route import op as moe_route

    E, k, X, _ = MODELS[name]
    slots, logits = tokens * k, meta(tokens, E, dtype=torch.float32)
    planned = moe_route.plan(tokens, E, k, "", ("triton",), 132)
    names = launched(lambda: routing.forward(logits, logits[0], k, 1, 1, True, 2.5, planned))
    few = ["route_choose", "route_order"]
    many = ["route_clear", "route_choose", "route_scan", "route_order"]
    assert names == (few if slots <= 1024 else many)
    config = op.plan(slots, E, BF16, False, "", ("triton",), (9, 0))
    names = launched(lambda: kernel.forward(*layer(name, tokens), config))
    columns = at_once(X, 2 * slots, config.rows.columns, SLOT_BYTES)
    passes = ["experts_rows", "experts_slot_sum"] * -(-X // columns)
    table = ["experts_tiles"] if slots > E else []
    assert names == [*table, "experts_rows", *passes]


def test_ragged():
    """Three slots of each token on the average, as a rank of eight sees them."""
    from nemokernels.ops.moe_experts import kernel

    rows, (_, _, X, F) = 131072, MODELS["super3"]
    slots, E = 3 * rows, 64
    x, up, down, hidden = meta(rows, X), meta(E, F, X), meta(E, X, F), meta(slots, F)
    offsets, order, starts = (meta(n, dtype=torch.int32) for n in (E, slots, rows + 1))
    args = (x, up, down, meta(slots, dtype=torch.float32), offsets, order, starts)
    config = op.plan(slots, E, BF16, True, "", ("triton",), (9, 0))
    forward = follow(lambda: kernel.forward(*args, config)).peak - x.nbytes - hidden.nbytes
    backward = follow(lambda: kernel.backward(x, *args, hidden, config)).peak
    partial = 4 * slots * -(-F // config.rows.columns)
    backward -= sum(t.nbytes for t in (*args[:4], hidden)) + partial
    for held in (forward, backward):
        assert 0 < held <= SLOT_BYTES + 16 * slots < slots * X * 2


def byte(*shape):
    return meta(*shape, dtype=torch.uint8)


def nvfp4_tiles(E, rows, columns):
    tiles = (E, rows // 16, -(-columns // 64), 16)
    return byte(*tiles, 32), byte(*tiles, 4), meta(E, dtype=torch.float32)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["fp8", "w4a16"])
def test_quantised(name, form):
    from nemokernels.ops.moe_experts import kernel_fp8
    from nemokernels.ops.w4a16 import kernel as kernel_w4a16

    E, k, X, F = MODELS[name]
    tokens, (x, *_, weights, offsets, order, _) = 16384, layer(name, 16384)
    route, slots, scale = (weights, offsets, order), tokens * k, meta(E, dtype=torch.float32)
    if form == "fp8":
        args = (byte(tokens, X), scale[:1], byte(E, F, X), scale, scale, byte(E, X, F), scale)
        config = op.plan_fp8(slots, E, "", ("triton",), (9, 0))
        seen = follow(lambda: kernel_fp8.forward(*args, *route, dtype=BF16, config=config))
    else:
        args = (x, *nvfp4_tiles(E, F, X), *nvfp4_tiles(E, X, F), F)
        config = w4a16.plan(slots, E, BF16, "", ("triton",))
        seen = follow(lambda: kernel_w4a16.experts(*args, *route, config=config))
    hidden = slots * F * (1 if form == "fp8" else 2)
    held = seen.peak - hidden - x.nbytes
    assert 0 < held <= SLOT_BYTES + 8 * slots + 16 * E
    assert held < slots * X * 2 - 16 * E


def test_a_pass_that_is_too_wide_is_seen():
    """The same accounting, told to hold everything at once."""
    from nemokernels.ops.moe_experts import kernel

    args, (_, k, X, F) = layer("super3", 16384), MODELS["super3"]
    config = op.Config("triton", op.Tile(128, 256, 64, 8, 4), None, True, slot_bytes=2**40)
    seen = follow(lambda: kernel.forward(*args, config))
    assert seen.peak > args[0].nbytes + 16384 * k * (F + X) * 2


def test_columns_at_once():
    of = lambda slots, width, unit=256, most=SLOT_BYTES: at_once(  # noqa: E731
        width, 2 * slots, unit, most
    )
    assert of(8 * 6, 2688) == 2816  # whole tiles, one pass
    assert of(16384 * 6, 2688) == 1536  # two passes: 6 and 5 tiles
    assert of(16384 * 22, 1024) == 512 and of(16384 * 22, 2048) == 512
    assert of(65536 * 22, 1024) == 256  # never less than a tile
    assert of(0, 2688) == 2816 and of(48, 0) == 256 and of(48, 10) == 256
    assert of(100, 640, 64, 100 * 2 * 64 * 4) == 256  # 10 tiles, up to 4 at a time: 4, 4, 2
    for slots, width, unit, most in ((7, 100, 16, 700), (50, 2688, 64, 64000), (1, 33, 32, 1)):
        columns = of(slots, width, unit, most)
        assert columns % unit == 0 and (columns == unit or slots * columns * 2 <= most)
        fewer = -(-width // columns) - 1  # passes
        assert fewer == 0 or slots * -(-width // (fewer * unit)) * unit * 2 > most


def test_passes_cover_every_column_once():
    source = torch.randn(6, 100)
    out, widths = torch.full((3, 100), torch.nan), []

    def multiply(rows, first):
        assert rows.is_contiguous()
        rows.copy_(source[:, first : first + rows.shape[1]])
        widths.append(rows.shape[1])

    def add(rows, out):
        out.copy_(rows.view(3, 2, -1).sum(1))

    rows = torch.empty(6, 48)
    assert in_passes(rows, out, multiply, add) is out
    assert widths == [48, 48, 4] and torch.equal(out, source.view(3, 2, 100).sum(1))


def nvfp4_swizzled(E, rows, columns):
    scales = byte(*swizzled_shape((E, rows, columns // 16)))
    return byte(E, rows, columns // 2), scales, meta(E, dtype=torch.float32)


def follow_nvfp4(name, tokens, most=SLOT_BYTES):
    """What experts of NVFP4 activations allocate, and the sizes of their products."""
    E, k, X, F = MODELS[name]
    x, *_, weights, offsets, order, _ = layer(name, tokens)
    made = []

    def multiply(a, a_scales, b, b_scales, alpha, offsets, squared_relu, first, out):
        assert a.shape == (out.shape[0], b.shape[2]) and first + out.shape[1] <= b.shape[1]
        assert a_scales.shape[0] == nvfp4_ref.padded_rows(a.shape[0], E)
        made.append((*out.shape, squared_relu))

    up, down, scale = nvfp4_swizzled(E, F, X), nvfp4_swizzled(E, X, F), meta(E, dtype=torch.float32)
    args = (x, scale[:1], *up, scale, *down, weights, offsets, order)
    return follow(lambda: nvfp4_ref.compose(
        multiply, *args, quantize=nvfp4_gemm.quantize, combine=nvfp4_gemm.add_up, slot_bytes=most
    )), made  # fmt: skip


@pytest.mark.parametrize("tokens", [8, 1024, 16384, 65536])
@pytest.mark.parametrize("name", MODELS)
def test_nvfp4_activations(name, tokens):
    """y and 4.5 bits per element of the hidden layer, whose tiles of scales are padded. Beside them
    no more than the bound for rows that enter the experts, and then for rows that leave them."""
    E, k, X, F = MODELS[name]
    slots, (seen, made) = tokens * k, follow_nvfp4(name, tokens)
    padded = min(slots, E) * 128  # rows
    wanted = tokens * X * 2 + slots * F // 2 + (slots + padded) * F // 16
    bound = max(SLOT_BYTES, slots * 128 * 2)
    held = seen.peak - wanted
    assert held <= bound + padded * X // 16 + 20 * slots + 64 * E
    hidden, y = ([m for m in made if m[2] == up] for up in (True, False))
    assert sum(rows for rows, *_ in hidden) == slots and {m[1] for m in hidden} == {F}
    assert sum(columns for _, columns, _ in y) == X and {m[0] for m in y} == {slots}
    assert all(rows % 128 == 0 for rows, *_ in hidden[:-1])


@pytest.mark.parametrize("name", MODELS)
def test_nvfp4_activations_have_no_copy_per_slot(name):
    """Beside y, and codes and scales of the hidden layer, nothing has X or F for all rows."""
    E, k, X, F = MODELS[name]
    slots, most = 8192 * k, 32 << 20
    seen, made = follow_nvfp4(name, 8192, most)
    for kept in (8192 * X * 2, slots * F // 2, nvfp4_ref.padded_rows(slots, E) * F // 16):
        seen.sizes.remove(kept)
    assert max(seen.sizes) <= max(most, slots * 128 * 2) < slots * X // 2 and len(made) > 8
