"""The libraries that ops are timed beside, where they are installed and can be imported."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

# Name of a peer in a bench file: the distributions that bring it.
DISTRIBUTIONS = {
    "mamba_ssm": ("mamba-ssm",),
    "fla": ("fla-core", "flash-linear-attention"),
    "causal_conv1d": ("causal-conv1d",),
    "liger": ("liger-kernel",),
    "cut_cross_entropy": ("cut-cross-entropy",),
    "flash_attn": ("flash-attn",),
    "flashinfer": ("flashinfer-python",),
    "sonic_moe": ("sonic-moe",),
    "transformer_engine": ("transformer-engine",),
    "linear": ("torch",),  # torch's own product in the row's dtype
    "scaled_mm": ("torch",),  # torch's own products of 8-bit operands
    "scaled_grouped_mm": ("torch",),
}


class Absent(Exception):
    """A peer cannot be measured here; the message says why."""


def version(name: str) -> str:
    """The installed version of a peer. Raises Absent if there is none."""
    for distribution in DISTRIBUTIONS[name]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise Absent(f"{DISTRIBUTIONS[name][0]} is not installed")


def load(name: str, connect: Callable[[], Callable]) -> tuple[Callable, str]:
    """The peer's function, as ``connect`` imports and wraps it, and its version. Raises Absent."""
    have = version(name)
    try:
        return connect(), have
    except Exception as error:  # whatever an import may raise: missing symbols, wrong CUDA, ...
        raise Absent(f"{name} {have} does not import: {type(error).__name__}: {error}") from None


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except Absent:
            continue
    return found
