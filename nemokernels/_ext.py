"""The compiled library of csrc/: where it is, whether it fits the device, and how it is loaded.

C++ implements the operators of the namespace ``nemokernels_C``. Their schemas are declared in
Python, through :func:`define`, so that they exist on a machine without the library too.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

from nemokernels import _build, _triton

NAMESPACE = "nemokernels_C"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
OLDEST = 90  # compute capability times ten; older devices run the Triton kernels


def define(schema: str) -> torch._ops.OpOverload:
    """Declare ``nemokernels_C::<schema>`` and return the overload. Loads nothing."""
    LIBRARY.define(schema)
    return getattr(getattr(torch.ops, NAMESPACE), schema.split("(", 1)[0].strip()).default


@functools.cache
def find() -> tuple[Path | None, str | None]:
    """The library built from the sources this package carries, or None and why there is none."""
    digest = _build.source_digest()
    stale = []
    for folder in (_build.PACKAGE, _build.cache_dir()):
        for path in sorted(folder.glob("_C-*.so")):
            if path.name.startswith(f"_C-{digest}-"):
                return path, None
            stale.append(path)
    if stale:
        return None, f"{stale[-1]} was built from other sources; run `nemokernels build`"
    return None, "the CUDA library is not built; run `nemokernels build` (needs nvcc)"


def archs(path: Path) -> list[str]:
    """The architectures a library's name lists: ``_C-<digest>-90a-100a.so`` has 90a and 100a."""
    return re.fullmatch(r"_C-[0-9a-f]+-([0-9a-z-]+)\.so", path.name).group(1).split("-")


def reason(device: torch.device) -> str | None:
    """Why the library cannot run on ``device``; None if it can, and then it is loaded."""
    why = _triton.cuda_reason(device)
    return why or _reason_on(torch.cuda.get_device_capability(device))


@functools.cache
def _reason_on(capability: tuple[int, int]) -> str | None:
    number = 10 * capability[0] + capability[1]
    if number < OLDEST:
        return f"the CUDA library needs sm_{OLDEST} or newer, this device is sm_{number}"
    path, why = find()
    if path is None:
        return why
    if f"{number}a" not in archs(path):
        have = ", ".join(f"sm_{arch}" for arch in archs(path))
        return f"{path.name} was built for {have}, this device is sm_{number}"
    return load(path)


@functools.cache
def load(path: Path) -> str | None:
    """Load the library into this process; return why the loader refused it, or None."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error.__cause__ or error}"
    return None
