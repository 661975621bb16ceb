"""What the tests of the kernels on a GPU share."""

import contextlib

import torch
from torch.utils._pytree import tree_leaves, tree_map

from nemokernels import testing


def to(device, tree):
    return tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, tree)


def compare(fn, tensors, grads, device="cuda"):
    """Outputs and gradients of ``fn(*tensors)`` on the device against the reference on the CPU."""
    low = testing.gradients(fn, tensors, grads)
    exact = testing.gradients(fn, [t.double() for t in tensors], [g.double() for g in grads])
    got = testing.gradients(fn, to(device, tensors), to(device, grads))
    for i, (a, want, plain) in enumerate(zip(sum(got, []), sum(exact, []), sum(low, []))):
        testing.assert_matches(a, want, plain, f"output or gradient {i}")


@contextlib.contextmanager
def references():
    """Torch may use what has no deterministic form on a GPU: a reference's cumsum has none."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def same_bits(one, other):
    """Every tensor of two trees is equal, NaN included."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other)))
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def replay(fn):
    """What ``fn()`` returns when it is captured in a CUDA graph, replayed twice."""
    fn()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()
    for _ in range(2):
        tree_map(lambda t: t.detach().fill_(-1), out)  # an output may be a view
        graph.replay()
    torch.cuda.synchronize()
    return out
