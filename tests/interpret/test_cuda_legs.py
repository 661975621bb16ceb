"""The operators' CUDA legs, from plan() to the kernels, on CPU tensors."""

import contextlib

import fenced
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import nemokernels  # noqa: F401  (registers the operators)
from nemokernels import _backends, _registry, _triton, testing
from nemokernels._registry import FAMILIES

NAMES = [
    (family.name, name)
    for family in FAMILIES.values() if "triton" in family.backends
    for name in family.operators
]  # fmt: skip
FLOATING = [
    (family, name) for family, name in NAMES
    if any(t.dtype.is_floating_point and t.element_size() > 1
           for t in tree_leaves(FAMILIES[family].operators[name].example(
               torch.device("cpu"), torch.float32)) if isinstance(t, torch.Tensor))
]  # fmt: skip
KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@pytest.fixture(params=[("triton",), ("triton", "reference"), ("reference",)], ids="+".join)
def usable(request, monkeypatch):
    monkeypatch.setattr(_backends, "usable", lambda family, device: request.param)
    monkeypatch.setattr(_triton, "processors", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _registry._warn_once.cache_clear()
    return request.param


# Kernels that read beyond an operand or a result end the run.
EDGES = {("triton",): "before", ("triton", "reference"): "behind"}


def at_the_edge(value, edge):
    if isinstance(value, torch.Tensor) and value.is_contiguous():
        return fenced.fenced(value, edge)
    return value


def copies(args):
    clone = lambda t: t.clone() if isinstance(t, torch.Tensor) else t  # noqa: E731
    return tree_map(clone, args), tree_map(clone, args), testing.to_double(tree_map(clone, args))


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("family, name", NAMES)
@pytest.mark.filterwarnings("ignore:.*has no kernel:RuntimeWarning")
def test_example(family, name, usable):
    operator = FAMILIES[family].operators[name]
    native, plain, exact = copies(operator.example(torch.device("cpu"), torch.float32))
    with contextlib.ExitStack() as edge_of_memory:
        if edge := EDGES.get(usable):
            native = tree_map(lambda t: at_the_edge(t, edge), native)
            edge_of_memory.enter_context(fenced.results(edge))
        got = operator.overload.redispatch(KEYS, *native)
    low, want = operator.reference(*plain), operator.reference(*exact)
    for tree in ((got, low, want), (native, plain, exact)):
        for a, b, c in zip(*map(tensors, tree)):
            if a.dtype.is_floating_point:
                testing.assert_matches(a, c, b, name)
            else:
                assert torch.equal(a, b), name


@pytest.mark.parametrize("family, name", FLOATING)
def test_float64_is_for_the_reference(family, name, usable):
    operator = FAMILIES[family].operators[name]
    native, plain, _ = copies(
        testing.to_double(operator.example(torch.device("cpu"), torch.float32))
    )
    if "reference" not in usable:
        with pytest.raises(RuntimeError, match="float64"):
            operator.overload.redispatch(KEYS, *native)
        return
    parts = "ssd_chunk_scan_backward" if name == "mamba_mixer_backward" else name
    with pytest.warns(RuntimeWarning, match=f"{parts} has no kernel"):
        got = operator.overload.redispatch(KEYS, *native)
    for a, b in zip(tensors(got), tensors(operator.reference(*plain))):
        assert torch.equal(a, b)
