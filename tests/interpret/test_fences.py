"""The kernels around experts read nothing beyond their operands: tiles that overhang, tiles of no
expert, widths and depths that fill no block."""

import fenced
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from nemokernels import NVFP4, tile_nvfp4
from nemokernels.ops.moe_experts import kernel, kernel_fp8
from nemokernels.ops.moe_experts import op as experts
from nemokernels.ops.moe_route import kernel as routing
from nemokernels.ops.moe_route import op as moe_route
from nemokernels.ops.moe_route.ref import group_rows
from nemokernels.ops.nvfp4 import kernel as nvfp4
from nemokernels.ops.nvfp4 import op as nvfp4_op
from nemokernels.ops.w4a16 import kernel as w4a16
from nemokernels.ops.w4a16 import op as w4a16_op

T, E, K, X, F = 5, 4, 2, 48, 24
SMALL, DEEP = experts.Tile(16, 32, 32, 1, 1), experts.Tile(16, 32, 64, 1, 1)
SWAP = experts.Tile(16, 32, 16, 1, 1, True)


def route():
    """No row for the first expert, a few for the last: the tables have tiles of none."""
    _, offsets, order = group_rows(torch.rand(T, E - 1).argsort(1)[:, :K] + 1, E)
    return torch.rand(T, K), offsets, order


def unquantised(tile, tma):
    config = experts.Config("triton", tile, SMALL, tma)
    args = torch.randn(T, X), torch.randn(E, F, X), torch.randn(E, X, F), *route()

    def run(dy, hidden, *args):
        ahead = kernel.forward(*args, None, config)
        return *ahead, *kernel.backward(dy, *args, None, hidden, config)

    return run, (torch.randn(T, X), torch.rand(T * K, F), *args)


def ragged():
    config = experts.Config("triton", SMALL, SMALL)
    weights, *rest = route()
    starts = torch.tensor([0, 3, 3, 4, 8, 10], dtype=torch.int32)
    args = torch.randn(T, X), torch.randn(E, F, X), torch.randn(E, X, F), weights.flatten(), *rest

    def run(dy, hidden, *args):
        return *kernel.forward(*args, config), *kernel.backward(dy, *args, hidden, config)

    return run, (torch.randn(T, X), torch.rand(T * K, F), *args, starts)


def fp8(per_row, tma):
    byte = lambda *shape: torch.randn(shape).to(torch.float8_e4m3fn).view(torch.uint8)  # noqa: E731
    scales = (torch.rand(T), torch.rand(E, F), torch.rand(E, X)) if per_row else (
        torch.rand(1), torch.rand(E), torch.rand(E))  # fmt: skip
    args = (byte(T, X), scales[0], byte(E, F, X), scales[1], torch.rand(E) + 1, byte(E, X, F),
            scales[2], *route())  # fmt: skip
    config = experts.Config("triton", SMALL, None, tma)
    return lambda *args: kernel_fp8.forward(*args, dtype=torch.float32, config=config), args


def four_bits(*shape):
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    scales = torch.ones(*shape[:-1], shape[-1] // 16).to(torch.float8_e4m3fn)
    return tile_nvfp4(NVFP4(codes, scales, torch.ones(shape[:-2])))[:3]


def nvfp4_experts():
    config = w4a16_op.Config("triton", DEEP)
    args = (torch.randn(T, X), *four_bits(E, 80, X), *four_bits(E, X, 80)), route()
    return lambda weights, route: w4a16.experts(*weights, 80, *route, config=config), args


def nvfp4_linear():
    config = w4a16_op.Config("triton", DEEP)

    def run(x, dy, *weight):
        return (w4a16.linear(x, *weight, 40, config),
                w4a16.linear_backward(dy, *weight, X, config))  # fmt: skip

    return run, (torch.randn(T, X), torch.randn(T, 40), *four_bits(40, X))


def router():
    config = moe_route.Config("triton", 4, 1, 16, 12)  # in three pieces

    def run(logits, bias, dweights):
        weights, chosen, *rest = routing.forward(logits, bias, 3, 4, 2, True, 2.5, config)
        return weights, chosen, *rest, routing.backward(dweights, logits, chosen, True, 2.5, config)

    return run, (torch.randn(9, 12), torch.randn(12), torch.randn(9, 3))


def quantiser():
    config = nvfp4_op.Config("triton", 32, 32, 1)

    def run(x, seed):
        pair = nvfp4.quantize_pair(x, None, None, 1, True, seed, True, config)
        plain = nvfp4.quantize(x, None, 1, seed, 0, False, config)
        return *pair, *plain, nvfp4.dequantize(*plain, torch.float32), nvfp4.hadamard16(x)

    return run, (torch.randn(48, 80), torch.tensor(7))


CASES = {
    "unquantised": lambda: unquantised(SMALL, False),
    "unquantised, swapped": lambda: unquantised(SWAP, False),
    "unquantised, TMA": lambda: unquantised(SMALL, True),
    "unquantised, any number of slots": ragged,
    "FP8": lambda: fp8(False, False),
    "FP8, TMA, a scale per row": lambda: fp8(True, True),
    "NVFP4 experts": nvfp4_experts,
    "NVFP4 linear": nvfp4_linear,
    "NVFP4 quantiser": quantiser,
    "router": router,
}


@pytest.mark.parametrize("edge", fenced.EDGES)
@pytest.mark.parametrize("case", CASES)
def test_reads_stay_inside(case, edge):
    run, args = CASES[case]()
    args = tree_map(lambda t: fenced.fenced(t, edge), args)
    with fenced.results(edge):
        assert all(t.any() for t in tree_leaves(run(*args)))
