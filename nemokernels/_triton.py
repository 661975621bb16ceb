"""The host's side of the Triton kernels: where they can run, and how their arguments are laid out.

Triton itself is imported only by the ``kernel.py`` files and by ``_tl.py``, which they share.
Importing this module or the package does not need it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels load and store
OLDEST = (8, 0)  # older devices have no bfloat16
ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))  # capabilities with 160 KB of shared memory or more


class Specialisation(NamedTuple):
    """A launch that matters, for the test that compiles without a GPU.

    ``launch`` calls a launcher with meta tensors; the test compiles every kernel it launches and
    runs none. ``label`` names the problem, for example ``"nano3 backward"``.
    """

    label: str
    launch: Callable[[], object]


@dataclass(frozen=True)
class RowConfig:
    """How a norm runs: the backend and its launch parameters; ``reason`` says why not Triton.

    A program holds ``rows`` rows of ``block`` columns at a time. The backward runs ``programs``
    programs side by side; each walks blocks of rows and loads ``num_stages - 1`` of them ahead.
    """

    backend: str
    rows: int = 0
    block: int = 0
    programs: int = 0
    num_warps: int = 0
    num_stages: int = 0
    reason: str = ""


@functools.cache
def reason(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``; None if they can."""
    why = cuda_reason(device)
    if why is None and importlib.util.find_spec("triton") is None:
        why = "triton is not installed"
    return why


def cuda_reason(device: torch.device) -> str | None:
    """Why no compiled kernel can run on ``device``; None if it is a recent enough CUDA device."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        want, have = ("sm_{}{}".format(*c) for c in (OLDEST, capability))
        return f"the kernels need {want} or newer, this device is {have}"
    return None


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def unsupported(*tensors: torch.Tensor | None) -> str:
    """Why the kernels cannot take these tensors' dtypes; empty if they can."""
    wrong = [t.dtype for t in tensors if t is not None and t.dtype not in DTYPES]
    names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
    return f"the Triton kernels take {names}, got {wrong[0]}" if wrong else ""


def needs_reference(op: str, barred: str, backends: tuple[str, ...]) -> bool:
    """Whether the reference must run: Triton is not among ``backends``, or ``barred`` says why not.

    Raises:
        RuntimeError: the reference is not among them either.
    """
    if "triton" in backends and not barred:
        return False
    if "reference" not in backends:
        raise RuntimeError(f"{op}: {barred or 'no backend can run here'}")
    return True


def as_rows(t: torch.Tensor | None) -> torch.Tensor | None:
    """(..., D) as (rows, D) with unit stride along D; a view where the strides allow one."""
    if t is None:
        return None
    t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def aligned(t: torch.Tensor) -> torch.Tensor:
    """A matrix whose rows lie apart and can be loaded 16 bytes at a time: ``t`` or a copy."""
    apart = t.stride(0) >= t.shape[1] or t.shape[0] <= 1
    if apart and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t.contiguous()``; None stays None."""
    return None if t is None else t.contiguous()


def row_stride(t: torch.Tensor | None) -> int:
    """The stride between the rows of a matrix; 0 for None."""
    return 0 if t is None else t.stride(0)


def row_divisor(*tensors: torch.Tensor | None) -> int:
    """16 if it divides the strides of rows and tokens of all tensors (B, T, ...), else 1.

    Kernels get it as a constant, and the strides of rows unspecialised: rows are as far apart as
    they are long, and Triton would compile anew for a length that happens to be divisible by 16.
    """
    strides = [s for t in tensors if t is not None for s in t.stride()[t.shape[0] == 1 : 2]]
    return 1 if any(s % 16 for s in strides) else 16


def divisor(n: int) -> int:
    """16 if it divides a length that vectors need to know divisible, else 1; see row_divisor."""
    return 1 if n % 16 else 16


def axes(*tensors: torch.Tensor) -> tuple:
    """The strides of the tensors' rows, which are never specialised; then those of the other axes
    of each, as tuples, whose elements always are."""
    return *(t.stride(0) for t in tensors), *(t.stride()[1:] for t in tensors)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)
