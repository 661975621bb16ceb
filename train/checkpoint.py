"""Training checkpoints: sharded safetensors through torch.distributed.checkpoint.

``<out>/checkpoints/step-00000100/`` holds every rank's shards of the parameters, buffers and AdamW
moments, and ``state.json``. It is written under a name that ends in ``.incomplete``, synced and
then renamed, so a folder without that ending is complete. Any number of ranks can load it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

_FORMAT = 1
_COMPLETE = re.compile(r"step-(\d{8})")


class ResumeError(ValueError):
    """A training checkpoint is damaged or belongs to another run; the message says which."""


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below ``folder``."""
    if not folder.is_dir():
        return None
    complete = [p for p in folder.iterdir() if _COMPLETE.fullmatch(p.name)]
    return max(complete, default=None)


def tensors(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """All tensors of a run, by name. Missing moments are created as zeros."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    found = {f"model.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"optimizer.{names[parameter]}.{key}"] = state[key]
    return found


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.AdamW,
    facts: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` and keep the newest ``keep``.

    A run can resume from it only with equal ``facts``.

    Raises:
        OSError: the folder cannot be written. No incomplete checkpoint is left under a final name.
    """
    target = folder / f"step-{step:08d}"
    staging = target.with_name(target.name + ".incomplete")
    if _rank() == 0:
        for leftover in folder.glob("step-*.incomplete") if folder.is_dir() else ():
            shutil.rmtree(leftover)
        staging.mkdir(parents=True)
    _barrier()
    with _single_process_is_meant():
        dcp.save(
            tensors(module, optimizer),
            storage_writer=HuggingFaceStorageWriter(str(staging), save_distributed=True),
            no_dist=not dist.is_initialized(),
        )
    _barrier()
    if _rank() == 0:
        with open(staging / "state.json", "w") as file:
            json.dump({"format": _FORMAT, "step": step, "facts": facts}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(staging)
        os.replace(staging, target)
        _sync_folder(folder)
        for old in sorted(p for p in folder.iterdir() if _COMPLETE.fullmatch(p.name))[:-keep]:
            shutil.rmtree(old)
    _barrier()
    return target


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the facts of two runs, in words."""
    changed = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += differences(old, new)
        elif key == "tokens" and old != new:  # digests, which say nothing
            changed.append("the text, or how it is tokenised, is another")
        elif old != new:
            changed.append(f"{key} was {old!r}, now {new!r}")
    return changed


def load(path: Path, module: nn.Module, optimizer: torch.optim.AdamW, facts: dict[str, Any]) -> int:
    """Fill module and optimizer from the checkpoint at ``path``; return its step.

    Raises:
        ResumeError: it is damaged, or a run with different ``facts`` wrote it; the message names
            them.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        step, before = int(state["step"]), dict(state["facts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path}/state.json cannot be used: {error}") from None
    if changed := differences(before, facts):
        raise ResumeError(
            f"{path} belongs to a different run ({'; '.join(changed)}); "
            "train into another folder, or start over with --fresh"
        )
    found = tensors(module, optimizer)
    try:
        with _single_process_is_meant():
            dcp.load(
                found,
                storage_reader=HuggingFaceStorageReader(str(path)),
                no_dist=not dist.is_initialized(),
            )
    except (Exception, CheckpointException) as error:  # whatever failed, on whichever rank
        raise ResumeError(f"{path} cannot be loaded: {error}") from error
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["step"] = torch.tensor(float(step))
    return step


@contextlib.contextmanager
def _single_process_is_meant() -> Iterator[None]:
    """Without a process group DCP warns that it assumes a single process, which is right here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
