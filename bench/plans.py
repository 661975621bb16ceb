"""What the ops' ``plan()`` functions decide, seen and changed from outside.

A context variable would not do: the backward of a CUDA tensor runs in autograd's own thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import threading
from collections.abc import Callable, Iterator

REFERENCE = "reference"


@contextlib.contextmanager
def watched(change: Callable[[str, object], object] | None = None) -> Iterator[list]:
    """Collect ``(op, configuration)`` of every plan made in the block, once each.

    Args:
        change: ``change(op, configuration)`` returns the configuration to use instead.
    """
    seen: list = []
    originals = []
    depth = threading.local()

    def wrap(op, plan):
        def planned(*args, **kwargs):
            depth.now = getattr(depth, "now", 0) + 1
            try:
                config = plan(*args, **kwargs)
            finally:
                depth.now -= 1
            if depth.now == 0:  # a _plan() around a plan() has the last word
                config = config if change is None else change(op, config)
                if (op, config) not in seen:
                    seen.append((op, config))
            return config

        return planned

    for name, module in list(sys.modules.items()):
        if not re.fullmatch(r"nemokernels\.ops\.\w+\.(\w+_)?op", name):
            continue
        for attribute in [a for a in vars(module) if re.fullmatch(r"_?plan(_\w+)?", a)]:
            originals.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, wrap(name.split(".")[2], originals[-1][2]))
    try:
        yield seen
    finally:
        for module, attribute, plan in originals:
            setattr(module, attribute, plan)


def to_reference(op: str, config: object) -> object:
    """For :func:`watched`: every op runs its reference."""
    return type(config)(REFERENCE)


def backend(seen: list) -> str:
    """The backends in use; the reference where no op had anything to plan."""
    return "+".join(sorted({config.backend for _, config in seen})) or REFERENCE


def as_data(seen: list) -> list[dict]:
    """The configurations as JSON takes them."""

    def fields(config):
        values = config._asdict() if hasattr(config, "_asdict") else dataclasses.asdict(config)
        return {k: v for k, v in values.items() if v not in (None, "", 0, False)}

    return [{"op": op, **fields(config)} for op, config in seen]
