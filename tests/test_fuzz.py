"""A thousand random problems per op on a GPU; a few for the CUDA kernels that the CPU can run."""

import fuzz
import pytest
import sanitize
import torch
from fuzz_draw import Draw

from nemokernels import _backends, _triton, use_backend
from nemokernels._registry import FAMILIES

PROBLEMS = 1000
CASES = [
    (fuzzed, backend, which)
    for fuzzed in fuzz.FUZZED
    for backend in FAMILIES[fuzzed.family].backends
    for which in range(len(fuzzed.specialisations))
]


def name(value):
    return getattr(value, "name", value)


@pytest.mark.gpu
@pytest.mark.parametrize("fuzzed, backend, which", CASES, ids=name)
def test_random_problems(fuzzed, backend, which):
    numbers = range(which, PROBLEMS, len(fuzzed.specialisations))
    with use_backend(fuzzed.family, backend, "cuda"):
        fuzzed.run(which, numbers, 300, torch.device("cuda"),
                   lambda operator, args: operator.overload(*args))  # fmt: skip


@pytest.mark.parametrize("fuzzed, backend, which", [c for c in CASES if c[1] == "csrc"], ids=name)
def test_as_loops_on_the_cpu(fuzzed, backend, which, host_library, monkeypatch):
    monkeypatch.setattr(_backends, "usable", lambda family, device: (backend,))
    monkeypatch.setattr(_triton, "processors", lambda device: 2)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    fuzzed.run(which, range(which, which + 40), 100, torch.device("cpu"),
               lambda operator, args: operator.overload.redispatch(key, *args))  # fmt: skip


@pytest.mark.parametrize("fuzzed", fuzz.FUZZED, ids=name)
def test_every_specialisation_gets_its_share(fuzzed):
    """At most twelve, so that a GPU compiles little; and a number is one problem everywhere."""
    assert len(fuzzed.specialisations) <= 12
    shapes = [[], []]
    for seen in shapes:
        judge = lambda operator, *args, seen=seen: _record(seen, operator, args)  # noqa: E731
        fuzzed.problem(Draw(3, 20, torch.device("cpu")), judge, **fuzzed.specialisations[0])
    assert shapes[0] == shapes[1] and shapes[0]


def _record(seen, operator, args):
    seen.append((operator, [a.shape if isinstance(a, torch.Tensor) else a for a in args]))
    family = next(f for f in FAMILIES.values() if operator in f.operators)
    return family.operators[operator].reference(*args)


def test_a_wrong_kernel_is_found():
    """One element of one output, by a little more than rounding."""

    def wrong(operator, args):
        out = operator.reference(*args)
        if isinstance(out, tuple) and out[0].numel() > 9:
            out[0].view(-1)[9] += 0.1 * out[0].abs().max()
        return out

    for fuzzed in fuzz.FUZZED[:4]:
        with pytest.raises(AssertionError, match=f"{fuzzed.name}, 0, problem|of all problems"):
            fuzzed.run(0, range(4), 30, torch.device("cpu"), wrong)
        fuzzed.run(0, range(2), 30, torch.device("cpu"), lambda o, args: o.reference(*args))


@pytest.mark.parametrize("fuzzed", fuzz.FUZZED, ids=name)
def test_what_the_sanitizer_watches(fuzzed):
    seen = []
    sanitize.run(fuzzed, torch.device("cpu"), lambda o, args: seen.append(o) or o.reference(*args))
    assert {*seen} <= {*FAMILIES[fuzzed.family].operators.values()}
    assert len(seen) >= sanitize.PROBLEMS
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="CUDA device"):
            sanitize.main([])
