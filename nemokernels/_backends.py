"""Which backend an op uses here, and why each other one is not available."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nemokernels import _selftest
from nemokernels._registry import FAMILIES

REFERENCE = "reference"
_forced: dict[str, str] = {}  # process-wide: autograd runs a GPU's backward in another thread


def default_device() -> torch.device:
    """The current CUDA device, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable(family: str, device: torch.device) -> tuple[str, ...]:
    """Backends of ``family`` that can run on ``device`` and have passed their self-test there.

    The order is preference; the reference is always last. Inside :func:`use_backend` only the
    backend asked for is returned.
    """
    if family in _forced:
        return (_forced[family],)
    proven = [
        name
        for name, reason in FAMILIES[family].backends.items()
        if reason(device) is None and _selftest.passed(family, name, device)
    ]
    return (*proven, REFERENCE)


def backends(device: torch.device | str | None = None) -> dict[str, dict]:
    """For every op family: the backend it would use on ``device`` and why not the others.

    Returns:
        ``{family: {"chosen": name, "rejected": {name: reason}}}``. Runs no kernel: a backend whose
        self-test has not run on this device counts as rejected, with that reason.
    """
    device = torch.device(device) if device is not None else default_device()
    table = {}
    for family in FAMILIES.values():
        rejected = {}
        for name, reason in family.backends.items():
            why = reason(device) or _selftest.why_not(family.name, name, device)
            if why is not None:
                rejected[name] = why
        chosen = next((name for name in family.backends if name not in rejected), REFERENCE)
        table[family.name] = {"chosen": chosen, "rejected": rejected}
    return table


@contextlib.contextmanager
def use_backend(family: str, name: str, device: torch.device | str | None = None) -> Iterator[None]:
    """Use exactly this backend of ``family`` inside the block, for tests, the bench and debugging.

    It holds for all threads of the process, because autograd runs a GPU's backward in a thread of
    its own.

    Raises:
        ValueError: no such family or backend.
        RuntimeError: the backend cannot run on ``device`` (default: the current one); the message
            carries the reason. It is never replaced by another one.
    """
    device = torch.device(device) if device is not None else default_device()
    if family not in FAMILIES:
        raise ValueError(f"no op family {family!r}; there are {', '.join(sorted(FAMILIES))}")
    known = FAMILIES[family].backends
    if name != REFERENCE and name not in known:
        have = ", ".join((*known, REFERENCE))
        raise ValueError(f"op {family!r} has no backend {name!r}; it has {have}")
    why = None if name == REFERENCE else known[name](device)
    if why is not None:
        raise RuntimeError(f"backend {name!r} of op {family!r} cannot run on {device}: {why}")
    before = _forced.get(family)
    _forced[family] = name
    try:
        yield
    finally:
        if before is None:
            del _forced[family]
        else:
            _forced[family] = before
