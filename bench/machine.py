"""Where a figure was taken: commit, card, driver, versions, power."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

import nemokernels
from nemokernels import _selftest
from nemokernels.bench import peers

POWER = ("power.limit", "power.draw", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu",
         "clocks_event_reasons.active")  # fmt: skip


def facts(device: torch.device) -> dict:
    """Everything that a result depends on and that does not change during a run."""
    return {
        "commit": commit(),
        "source": _selftest.source_hash(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": card(device),
        "versions": versions(),
        "peers": peers.versions(),
    }


def card(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": query(device, ("driver_version",)).get("driver_version", "unknown"),
    }


def power(device: torch.device) -> dict[str, str]:
    """Clock rates, power and temperature, as nvidia-smi gives them; empty where it does not."""
    return query(device, POWER)


def query(device: torch.device, fields: tuple[str, ...]) -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return parse(fields, done.stdout) if done.returncode == 0 else {}


def parse(fields: tuple[str, ...], text: str) -> dict[str, str]:
    """One line of nvidia-smi's CSV as a dictionary."""
    return dict(zip(fields, (value.strip() for value in text.strip().split(","))))


def versions() -> dict[str, str]:
    found = {
        "nemokernels": nemokernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
    }
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "none"
    return found


def commit() -> str:
    """The commit of the source tree the package runs from, "+" behind it where files differ."""
    here = Path(nemokernels.__file__).resolve().parent.parent
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(here)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def slug(name: str) -> str:
    """A card's name as a folder's: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
