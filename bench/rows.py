"""What is measured: subjects (a function with its inputs and peers) and rows (one shape of one).

A ``bench_<op>.py`` makes subjects and lists their rows in ``ROWS``::

    RELU2 = Subject("relu2", "relu2", inputs=inputs, ours=relu2, eager=eager, wrt=("x",),
                    tiny=dict(rows=3, width=40))
    ROWS = [RELU2.row("h8b 32768", cost=cost.forward(32768 * 21504, 2), rows=32768, width=21504)]
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

import nemokernels.bench
from nemokernels._cost import Cost
from nemokernels.models.variants import find_config

WAYS = ("forward", "backward", "both")  # "both" times a forward and its backward together

# Short names of the released models whose shapes the rows use.
MODELS = {
    "nano3": "Nemotron 3 Nano 30B-A3B",
    "super3": "Nemotron 3 Super 120B-A12B",
    "ultra": "Nemotron 3 Ultra 550B-A55B",
    "h8b": "Nemotron-H 8B",
    "h56b": "Nemotron-H 56B",
    "nano4b": "Nemotron 3 Nano 4B",
    "minitron8b": "Minitron 8B",
}


@functools.cache
def model(short: str):
    """The configuration of one of ``MODELS``."""
    return find_config(MODELS[short])


def mamba(short: str) -> dict[str, int]:
    """H, P, G and N of a model's Mamba-2 layers."""
    c = model(short)
    return dict(H=c.mamba_num_heads, P=c.mamba_head_dim, G=c.n_groups, N=c.ssm_state_size)


def unit(dtype: torch.dtype) -> str:
    """The dtype's name, as costs and ceilings use it."""
    return str(dtype).removeprefix("torch.")


@dataclass
class Make:
    """Makes random inputs of one device and dtype, always the same ones."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    _generator: torch.Generator | None = field(init=False, default=None)

    def __post_init__(self):
        self.device = torch.device(self.device)
        if self.device.type != "meta":
            self._generator = torch.Generator(self.device).manual_seed(self.seed)

    def _options(self, dtype):
        return dict(device=self.device, dtype=dtype or self.dtype, generator=self._generator)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, **self._options(dtype))

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.rand(shape, **self._options(dtype))

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(high, shape, **self._options(dtype))

    def tensor(self, values, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Subject:
    """A public function and those it is timed beside.

    Attributes:
        family: its op folder's family, of which the backend is reported.
        title: the function's name.
        inputs: ``inputs(make, **shape)`` returns keyword arguments of ``ours``, the same for all.
        ours: calls the public function; returns a tensor or a tuple of tensors. What is written in
            place is returned too.
        eager: the same in plain torch, as a user would write it; timed as is and compiled.
        tiny: a shape that runs on a CPU in a moment, for the tests.
        peers: name of a distribution (see peers.py) to a function that imports it and returns the
            same as ``ours``. Results are compared in order; a peer may return fewer.
        wrt: inputs that gradients are taken of, through the first result.
        exact: computes what ``ours`` does with bounded memory, for the float64 reference.
        lows: compute the same with other roundings, for the budget of results of few elements.
        mutates: inputs that are written in place.
        needs: why it cannot be measured on a device; None if it can.
        kept: inputs that the float64 reference takes as they are, such as scales.
    """

    family: str
    title: str
    inputs: Callable[..., dict]
    ours: Callable
    eager: Callable
    tiny: Mapping[str, int]
    peers: Mapping[str, Callable[[], Callable]] = field(default_factory=dict)
    wrt: tuple[str, ...] = ()
    exact: Callable | None = None
    lows: tuple[Callable, ...] = ()
    mutates: tuple[str, ...] = ()
    needs: Callable[[torch.device], str | None] = lambda device: None
    kept: tuple[str, ...] = ()

    def row(
        self,
        label: str,
        way: str = "forward",
        *,
        cost: Cost,
        dtype: torch.dtype = torch.bfloat16,
        goal: float | None = None,
        quick: bool = False,
        **shape: int,
    ) -> Row:
        return Row(self, label, way, cost, dtype, shape, goal, quick)


@dataclass(frozen=True)
class Row:
    """One shape. ``goal`` is the roofline share to reach; ``quick`` rows run with --quick."""

    subject: Subject
    label: str
    way: str
    cost: Cost
    dtype: torch.dtype
    shape: Mapping[str, int]
    goal: float | None = None
    quick: bool = False

    @property
    def id(self) -> str:
        return f"{self.subject.title} {self.way} {self.label} {unit(self.dtype)}"


def ops() -> list[str]:
    """Names of the bench files, without prefix: one per op."""
    files = pkgutil.iter_modules(nemokernels.bench.__path__)
    return sorted(f.name.removeprefix("bench_") for f in files if f.name.startswith("bench_"))


def rows(names: tuple[str, ...] = (), *, quick: bool = False) -> list[Row]:
    """The rows of these bench files, of all without names; quick ones come first.

    Raises:
        ValueError: no such file.
    """
    known = ops()
    for name in names:
        if name not in known:
            raise ValueError(f"no bench for op {name!r}; there are {', '.join(known)}")
    modules = (importlib.import_module(f"nemokernels.bench.bench_{n}") for n in names or known)
    found = [row for module in modules for row in module.ROWS if row.quick or not quick]
    return sorted(found, key=lambda row: not row.quick)
