"""Tables of configurations that were measured to be faster than what a ``plan()`` chooses.

``ops/<op>/tuned.json`` maps a card's name to problems, and each problem to the fields of the op's
Config to change. ``nemokernels bench OP --tune`` writes it. Without a table, or on another card,
the plan's configuration is used as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import torch

from nemokernels._triton import next_power_of_2


def bucket(problem: tuple) -> str:
    """A problem's key: sizes rounded up to a power of two, dtypes and flags as they are."""

    def part(value):
        if isinstance(value, int) and not isinstance(value, bool):
            return str(next_power_of_2(value))
        return str(value).removeprefix("torch.")

    return " ".join(map(part, problem))


def tuned(op: str, device: torch.device, problem: tuple, config):
    """A plan's ``config``, changed as the table of ``op`` says for ``problem`` on this card."""
    if config.backend == "reference" or not table(op):
        return config
    return changed(config, table(op).get(card(device), {}).get(bucket(problem), {}))


def changed(config, fields: dict):
    """``config`` with these fields, as JSON stores them: lists for tuples, objects for dataclasses.

    Raises:
        TypeError: ``config`` has no such field.
    """

    def restored(old, new):
        if isinstance(new, dict):
            return changed(old, new)
        return tuple(new) if isinstance(new, list) else new

    known = {name: restored(getattr(config, name, None), value) for name, value in fields.items()}
    return dataclasses.replace(config, **known)


def difference(old, new) -> dict:
    """The fields in which ``new`` differs from ``old``; :func:`changed` is the inverse."""
    found = {}
    for field in dataclasses.fields(new):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before != after:
            nested = dataclasses.is_dataclass(before) and dataclasses.is_dataclass(after)
            found[field.name] = difference(before, after) if nested else after
    return found


def path(op: str) -> Path:
    """The path of an op's table."""
    return Path(__file__).parent / "ops" / op / "tuned.json"


@functools.cache
def table(op: str) -> dict[str, dict[str, dict]]:
    """The table of an op; empty if it has none."""
    return json.loads(path(op).read_text()) if path(op).exists() else {}


@functools.cache
def card(device: torch.device) -> str:
    """The name of a CUDA device's card."""
    return torch.cuda.get_device_name(device)
