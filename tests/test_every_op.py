"""The contract every registered operator keeps, checked on its own example."""

import contextlib
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import nemokernels
from nemokernels import _backends, _selftest, use_backend
from nemokernels._registry import FAMILIES
from nemokernels.ops.moe_experts import native as moe_native
from nemokernels.ops.w4a16 import op as w4a16

OPERATORS = {
    name: operator for family in FAMILIES.values() for name, operator in family.operators.items()
}
FORWARDS = [name for name, operator in OPERATORS.items() if operator.differentiable]
CPU = torch.device("cpu")


def example(name, dtype=torch.float32):
    torch.manual_seed(0)
    return OPERATORS[name].example(CPU, dtype)


def with_grad(args):
    return tree_map(
        lambda t: (
            t.detach().clone().requires_grad_()
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t.element_size() > 1
            else t
        ),
        args,
    )


def clone(args):
    return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", OPERATORS)
def test_has_example(name):
    assert OPERATORS[name].example is not None


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    torch.library.opcheck(OPERATORS[name].overload, example(name))


@pytest.mark.parametrize("name", FORWARDS)
def test_opcheck_with_gradients(name):
    torch.library.opcheck(OPERATORS[name].overload, with_grad(example(name)))


@pytest.mark.parametrize("name", OPERATORS)
def test_meta_agrees_with_cpu(name):
    args = example(name)
    meta = tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, args)
    overload = OPERATORS[name].overload
    for real, fake in zip(tensors(overload(*clone(args))), tensors(overload(*meta))):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("name", OPERATORS)
def test_same_inputs_same_bits(name):
    overload, args = OPERATORS[name].overload, example(name)
    first, second = tensors(overload(*clone(args))), tensors(overload(*clone(args)))
    for a, b in zip(first, second):
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", FORWARDS)
def test_compiles_to_one_graph(name):
    torch.compiler.reset()  # `loss` is one code object; past 8 operators dynamo would give up
    overload, args = OPERATORS[name].overload, example(name)
    floats = [o.is_floating_point() for o in tensors(overload(*args))]

    def loss(*a):
        outs = tensors(overload(*a))
        return sum(o.sum() for o, keep in zip(outs, floats) if keep and o.requires_grad)

    eager_in, compiled_in = with_grad(args), with_grad(args)
    loss(*eager_in).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled_in).backward()
    for a, b in zip(tensors(eager_in), tensors(compiled_in)):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", FORWARDS)
def test_runs_again_in_the_backward(name):
    """Under torch.utils.checkpoint, which hands out what was saved once."""
    overload, grads = OPERATORS[name].overload, []

    def loss(*args):
        outs = [o for o in tensors(overload(*args)) if o.is_floating_point() and o.requires_grad]
        return sum(o.float().square().sum() for o in outs)

    for again in (False, True):
        args = with_grad(example(name))
        (checkpoint(loss, *args, use_reentrant=False) if again else loss(*args)).backward()
        grads.append([t.grad for t in tensors(args) if t.grad is not None])
    assert grads[0] and len(grads[0]) == len(grads[1])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def moved(args, ways, step):
    """The arguments, those that have a gradient moved by so much along ``ways``."""
    ways = iter(ways)

    def one(t):
        there = isinstance(t, torch.Tensor) and t.requires_grad
        return t.detach() + step * next(ways) if there else t

    return tree_map(one, args)


# The gradient of a product in FP8 is that of the product of what was quantised.
@pytest.mark.parametrize("name", [name for name in FORWARDS if name != "fp8_product"])
def test_every_output_that_asks_for_a_gradient_has_the_right_one(name):
    """Each by itself, in float64, along one random direction of all inputs that have one."""
    overload, args, step = OPERATORS[name].overload, with_grad(example(name, torch.float64)), 1e-6
    leaves = [t for t in tensors(args) if t.requires_grad]
    asking = {i: out for i, out in enumerate(tensors(overload(*args))) if out.requires_grad}
    assert asking
    for i, out in asking.items():
        dy = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, dy, allow_unused=True, retain_graph=True)
        ways = [torch.randn_like(t) if g is not None else torch.zeros_like(t)
                for t, g in zip(leaves, grads)]  # fmt: skip
        ends = [tensors(overload(*moved(args, ways, s)))[i] for s in (step, -step)]
        want = ((ends[0] - ends[1]) * dy).sum() / (2 * step)
        got = sum((g * way).sum() for g, way in zip(grads, ways) if g is not None)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORWARDS)
def test_double_backward_raises(name):
    args = with_grad(example(name))
    outs = [o for o in tensors(OPERATORS[name].overload(*args)) if o.requires_grad]
    wanted = [a for a in tensors(args) if a.requires_grad]
    grads = torch.autograd.grad(
        [o.float().square().sum() for o in outs], wanted, create_graph=True, allow_unused=True
    )
    live = [g for g in grads if g is not None and g.requires_grad]
    assert live
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        sum(g.float().square().sum() for g in live).backward()


@pytest.mark.parametrize("name", OPERATORS)
def test_forward_mode_raises(name):
    args = example(name)
    with forward_ad.dual_level():
        dual = tree_map(
            lambda t: (
                forward_ad.make_dual(t, torch.ones_like(t))
                if isinstance(t, torch.Tensor) and t.is_floating_point() and t.element_size() > 1
                else t
            ),
            args,
        )
        if all(forward_ad.unpack_dual(t).tangent is None for t in tensors(dual)):
            return  # it takes codes and integers alone
        with pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
            OPERATORS[name].overload(*dual)


def test_forward_mode_of_torch_func_raises():
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="not supported by nemokernels::relu2"):
        torch.func.jvp(nemokernels.relu2, (x,), (x,))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_without_gradient_refuse_it(name):
    operator = OPERATORS[name]
    if operator.differentiable or name.endswith("_backward"):
        return
    args = with_grad(example(name))
    if not any(t.requires_grad for t in tensors(args)):
        return
    with pytest.raises(RuntimeError, match="no gradient|not differentiable|does not require grad"):
        outs = [o for o in tensors(operator.overload(*args)) if o.is_floating_point()]
        sum(o.float().sum() for o in outs).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_selftest_passes_with_reference(family):
    assert _selftest.run(family, "reference", CPU) == "passed"


def test_a_forced_backend_holds_in_autograds_threads():
    """A GPU's backward runs in a thread of its own; leaving the block restores what was before."""

    def seen():
        found = []
        thread = threading.Thread(target=lambda: found.append(_backends.usable("relu2", CPU)))
        thread.start()
        thread.join()
        return found[0]

    before = dict(_backends._forced)
    with use_backend("relu2", "reference", CPU):
        _backends._forced["relu2"] = "triton"  # as an outer block would have set it
        with use_backend("relu2", "reference", CPU):
            assert seen() == ("reference",)
        assert seen() == ("triton",)
    assert _backends._forced == before


PROBES = [
    (name, backend, make)
    for name, operator in OPERATORS.items()
    for backend, examples in operator.probes.items()
    for make in examples
]


@pytest.mark.parametrize("name, backend, make", PROBES)
def test_probes_are_arguments_of_a_backend_that_there_is(name, backend, make):
    (family,) = (f for f in FAMILIES.values() if name in f.operators)
    assert backend in family.backends
    args = make(CPU, torch.float32)
    OPERATORS[name].overload(*args)
    shapes = [[t.shape for t in tensors(some)] for some in (args, example(name))]
    assert shapes[0] != shapes[1]


def test_selftest_runs_the_probes_of_its_backend(monkeypatch):
    seen = []
    compare = lambda operator, make, *rest: seen.append(make)  # noqa: E731
    monkeypatch.setattr(_selftest, "_compare", compare)
    monkeypatch.setattr(_selftest, "_record", lambda *args: None)
    probes = OPERATORS["moe_route"].probes["csrc"]
    for backend, more in (("csrc", probes), ("reference", [])):
        seen.clear()
        monkeypatch.setattr(_backends, "use_backend", lambda *args: contextlib.nullcontext())
        _selftest.run("moe_route", backend, CPU)
        assert seen[0] == OPERATORS["moe_route_backward"].example
        assert seen[1:] == [OPERATORS["moe_route"].example, *more]


def tile_rows(args):
    """Of csrc/w4a16's tile."""
    x, order = args[0], args[-1]
    problem = (order.shape[0], args[-2].shape[0]) if len(args) > 5 else (x.shape[:-1].numel(), 1)
    return {w4a16.plan(*problem, torch.bfloat16, "", ("csrc", "triton")).tile.rows}


def tile_columns(args):
    """Of csrc/moe_experts' tiles."""
    up = next(t for t in args if isinstance(t, torch.Tensor) and t.dim() == 3)
    options = moe_native.EIGHT if up.dtype == torch.uint8 else moe_native.ALONG
    return {moe_native.tile_columns(columns, options) for columns in up.shape[1:]}


def per_lane(args):
    """Experts of a lane of csrc/moe_route."""
    return {-(-args[0].shape[1] // 32)}


@pytest.mark.parametrize("name, instance, every", [
    ("nvfp4_linear", tile_rows, {8, 16, 32}),
    ("nvfp4_experts", tile_rows, {8, 16, 32}),
    ("moe_experts", tile_columns, {*moe_native.ALONG}),
    ("moe_experts_fp8", tile_columns, {*moe_native.EIGHT}),
    ("moe_route", per_lane, {1, 4, 16}),
])  # fmt: skip
def test_the_selftest_reaches_every_instance(name, instance, every):
    operator = OPERATORS[name]
    makes = (operator.example, *operator.probes["csrc"])
    assert set().union(*(instance(make(CPU, torch.bfloat16)) for make in makes)) == every
