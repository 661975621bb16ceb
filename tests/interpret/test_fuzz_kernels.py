"""The problems that a GPU gets by the thousand, a few of each specialisation interpreted."""

import fuzz
import pytest
import torch

from nemokernels import _backends, _triton

KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
CASES = [(fuzzed, n) for fuzzed in fuzz.FUZZED for n in range(len(fuzzed.specialisations))]


@pytest.fixture(autouse=True)
def _cuda_legs(monkeypatch):
    monkeypatch.setattr(_backends, "usable", lambda family, device: ("triton",))
    monkeypatch.setattr(_triton, "processors", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("fuzzed, which", CASES, ids=lambda v: getattr(v, "name", v))
def test_random_problems(fuzzed, which):
    """Fewer heads and groups than on a GPU: programs run one after the other here."""
    options = fuzzed.specialisations[which]
    fewer = {"G": 1, "H": 2} if "H" in options else {"G": 2, "R": 2, "groups": 2}
    changed = {name: min(fewer[name], options[name]) for name in fewer.keys() & options}
    if fuzzed.family == "ssd" and options["dtype"] == fuzz.BF16:
        changed["dtype"] = fuzz.F16  # products of bfloat16 are garbage in the interpreter
    most = 2 if "norm" in fuzzed.family else 24
    fuzzed.run(which, range(which, which + 1), most, torch.device("cpu"), _leg, **changed)


def _leg(operator, args):
    return operator.overload.redispatch(KEYS, *args)
