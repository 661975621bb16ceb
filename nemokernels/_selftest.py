"""Proof that a backend computes the right thing on this device.

A backend is selected automatically only after it has reproduced the reference here. The verdict is
kept per op and backend, under a key of the device, the driver, torch, triton and this package's
source, so that a change to any of them runs the self-test again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map

from nemokernels import _ext, testing
from nemokernels._registry import FAMILIES, Example, Operator

_verdicts: dict[str, dict[str, str]] = {}
_running = False


def cache_file() -> Path:
    """Where verdicts are kept: ``$XDG_CACHE_HOME/nemokernels/selftest.json``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nemokernels" / "selftest.json"


@functools.cache
def source_hash() -> str:
    """Hash over the installed package's sources and compiled libraries."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".so", ".json"):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    digest.update(str(_ext.find()[0]).encode())  # it may lie outside the package
    return digest.hexdigest()[:16]


@functools.cache
def device_key(device: torch.device) -> str:
    """The key that a verdict is valid under."""
    name, driver = "cpu", "none"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = str(torch._C._cuda_getDriverVersion())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return " | ".join((name, f"driver {driver}", f"torch {torch.__version__}",
                       f"triton {triton}", f"source {source_hash()}"))  # fmt: skip


def run(family: str, backend: str, device: torch.device) -> str:
    """Run every operator of ``family`` on its example and on what probes this backend has; return
    "passed" or what failed.

    Inputs are bfloat16 (float32 on the CPU). The oracle is the reference in float64; the error
    budget comes from the reference in the inputs' dtype.
    """
    from nemokernels._backends import use_backend

    global _running
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    verdict, _running = "passed", True
    try:
        with use_backend(family, backend, device):
            for operator in FAMILIES[family].operators.values():
                if operator.example is not None:
                    for example in (operator.example, *operator.probes.get(backend, ())):
                        _compare(operator, example, device, dtype)
    except Exception as error:  # a verdict, not control flow: every failure disqualifies
        verdict = f"self-test failed: {error}"
    finally:
        _running = False
    _record(family, backend, device, verdict)
    return verdict


def passed(family: str, backend: str, device: torch.device) -> bool:
    """Whether ``backend`` has passed here; runs the self-test if there is no verdict yet.

    Raises:
        RuntimeError: there is no verdict and a CUDA graph is being captured, which would record the
            self-test. Run ``nemokernels selftest``, or call the op once before capturing.
    """
    verdict = _known(device).get(f"{family}/{backend}")
    if verdict is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"backend {backend!r} of op {family!r} has no self-test record on this device and "
                "a CUDA graph is being captured; run `nemokernels selftest` first"
            )
        verdict = run(family, backend, device)
    return verdict == "passed"


def why_not(family: str, backend: str, device: torch.device) -> str | None:
    """Why the backend does not count as proven here, or None if it does. Runs nothing."""
    verdict = _known(device).get(f"{family}/{backend}", "self-test has not run on this device")
    return None if verdict == "passed" else verdict


def _compare(
    operator: Operator, example: Example, device: torch.device, dtype: torch.dtype
) -> None:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        args = example(device, dtype)
    cpu = tree_map(lambda t: t.cpu() if isinstance(t, torch.Tensor) else t, args)
    copies = [tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, a)
              for a in (args, cpu, testing.to_double(cpu))]  # fmt: skip
    with torch.no_grad():
        actual = operator.overload(*copies[0])
        low = operator.reference(*copies[1])
        exact = operator.reference(*copies[2])
    # Operators that mutate are judged by what they return and by what they left behind.
    trees = [(out, copy) for out, copy in zip((actual, low, exact), copies)]
    name = operator.overload.name()
    for got, plain, want in zip(*(tree_leaves(tree) for tree in trees)):
        if not isinstance(got, torch.Tensor):
            continue
        if got.dtype.is_floating_point and got.element_size() > 1:
            testing.assert_matches(got, want, plain, name)
        elif not torch.equal(got.cpu(), plain):
            raise AssertionError(f"{name}: integer or 8-bit output differs from the reference")


def _known(device: torch.device) -> dict[str, str]:
    key = device_key(device)
    if key not in _verdicts:
        _verdicts[key] = _read().get(key, {})
    return _verdicts[key]


def _read() -> dict[str, dict[str, str]]:
    try:
        data = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # absent or damaged: the self-test simply runs again
        return {}
    return data if isinstance(data, dict) else {}


def _record(family: str, backend: str, device: torch.device, verdict: str) -> None:
    _known(device)[f"{family}/{backend}"] = verdict
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        table = {**_read(), device_key(device): _known(device)}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".selftest")
        with os.fdopen(handle, "w") as file:
            json.dump(table, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError:  # a read-only home only costs the self-test again in the next process
        return
