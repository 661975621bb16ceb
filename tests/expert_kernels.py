"""Problems for the Triton kernels of the experts, and what their tests share. Not a test itself."""

import contextlib
from unittest import mock

import torch

from nemokernels import testing
from nemokernels.ops.moe_experts import kernel, op, ref
from nemokernels.ops.moe_route import ref as route

F32, F16 = torch.float32, torch.float16
NAMES = ("y", "hidden", "dx", "dup", "ddown", "dweights")


def make(tokens, experts, top_k, width, hidden, dtype=F32, chosen=None):
    """Arguments of the forward, and dy. Without ``chosen`` expert 0 has no rows if it can."""
    x, dy = torch.randn(2, tokens, width).to(dtype)
    up = (torch.randn(experts, hidden, width) / max(width, 1) ** 0.5).to(dtype)
    down = (torch.randn(experts, width, hidden) / max(hidden, 1) ** 0.5).to(dtype)
    if chosen is None:
        scores = torch.rand(tokens, experts)
        scores[:, 0] -= 1
        chosen = scores.argsort(-1, descending=True)[:, :top_k]
    _, offsets, order = route.group_rows(chosen, experts)
    return (x, up, down, torch.rand(tokens, top_k), offsets, order, None), dy


def configs_of(args, capability=(9, 0)):
    x, *_, offsets, order, _ = args
    return [op.plan(order.shape[0], offsets.shape[0], x.dtype, way, "", ("triton",), capability)
            for way in (False, True)]  # fmt: skip


def run(args, dy, configs, functions=kernel):
    out = functions.forward(*args, *configs[:1])
    return *out, *functions.backward(dy, *args, out[1], *configs[1:])


def compare(args, dy, configs=None):
    """Forward and backward against the reference in float64; returns what they gave."""
    configs = configs or configs_of(args)
    low, got = ref.forward(*args), kernel.forward(*args, configs[0])
    # From the same hidden: it is rounded, and saved as it is.
    got += kernel.backward(dy, *args, low[1], configs[1])
    exact = ref.forward(*testing.to_double(args))
    exact += ref.backward(dy.double(), *testing.to_double(args), low[1].double())
    low += ref.backward(dy, *args, low[1])
    for name, a, want, plain in zip(NAMES, got, exact, low):
        assert a.dtype == plain.dtype and a.is_contiguous(), name
        testing.assert_matches(a, want, plain, name)
    return got


TILES = {
    "swap": op.Tile(16, 32, 16, 1, 1, True),
    "tall": op.Tile(32, 16, 32, 1, 1),
    "wide": op.Tile(16, 32, 16, 1, 1),
}


def small(name, tma):
    forward = op.Config("triton", TILES[name], None, tma)
    return forward, op.Config("triton", TILES[name], TILES["tall"], tma)


NO_OFFSETS = [(900, 3, -7, 12), (3, 2**31 - 1, -(2**31), 5), (-1, -1, -1, -1), (2**30,) * 4]


@contextlib.contextmanager
def guarded():
    """Memory of the results lies between walls; the function says whether they still stand."""
    walls, empty, size = [], torch.Tensor.new_empty, 4096

    def walled(tensor, *shape, **options):
        out = empty(tensor, *shape, **options)
        whole = empty(tensor, (out.numel() + 2 * size,), **options).fill_(7)
        walls.extend((whole[:size], whole[-size:]))
        return whole[size : size + out.numel()].view(out.shape)

    with mock.patch.object(torch.Tensor, "new_empty", walled):
        yield lambda: all(bool((wall == 7).all()) for wall in walls)
    assert walls
