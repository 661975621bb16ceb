"""The commands env and selftest: what this machine has, and which backend each op would use."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import nemokernels
from nemokernels import _ext, _selftest
from nemokernels._backends import REFERENCE, backends, default_device
from nemokernels._registry import FAMILIES

PACKAGES = ("torch", "triton", "nvidia-cutlass", "flash-attn", "safetensors",
            "tokenizers", "transformers", "mamba-ssm", "causal-conv1d")  # fmt: skip


def facts() -> dict[str, Any]:
    """Versions, devices, the compiled library and every op's backends, as plain data."""
    cuda = torch.cuda.is_available()
    return {
        "nemokernels": nemokernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": [
            {
                "name": torch.cuda.get_device_name(i),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
                "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
            }
            for i in range(torch.cuda.device_count() if cuda else 0)
        ],
        "extension": _extension(),
        "ops": backends(),
    }


def print_env(console: Console) -> None:
    """Print the same as tables."""
    data = facts()
    console.print(f"nemokernels {data['nemokernels']} on Python {data['python']}")
    console.print(f"{data['platform']}, torch's CUDA: {data['cuda'] or 'none (CPU build)'}")
    for device in data["devices"] or [{"name": "no CUDA device"}]:
        console.print("device: " + ", ".join(str(v) for v in device.values()))
    installed = [f"{name} {version}" for name, version in data["packages"].items() if version]
    console.print("packages: " + ", ".join(installed))
    console.print(f"compiled library: {data['extension']}", highlight=False, soft_wrap=True)
    table = Table("op", "backend here", "why not another", title="ops", title_justify="left")
    for name, entry in sorted(data["ops"].items()):
        reasons = [f"{backend}: {why}" for backend, why in entry["rejected"].items()]
        table.add_row(name, entry["chosen"], "\n".join(reasons) or "there is no other yet")
    console.print(table)


def run_selftest(console: Console) -> bool:
    """Check every backend that can run here against the reference; return whether all passed."""
    device = default_device()
    table = Table("op", "backend", "verdict", title=f"self-test on {device}", title_justify="left")
    good = True
    for family in FAMILIES.values():
        for name in (*family.backends, REFERENCE):
            why = family.backends[name](device) if name != REFERENCE else None
            verdict = why or _selftest.run(family.name, name, device)
            good &= why is not None or verdict == "passed"
            table.add_row(family.name, name, verdict)
    console.print(table)
    return good


def _extension() -> str:
    path, why = _ext.find()
    return why or f"{path} for {', '.join('sm_' + arch for arch in _ext.archs(path))}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
