"""``nemokernels slice``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from nemokernels.models import names, slice_checkpoint
from nemokernels.models.fields import check_object, read_file


def slice_(
    folder: Annotated[Path, tyro.conf.Positional],
    out: Path,
    widths: Path,
) -> int:
    """Write a nested model of an elastic checkpoint as a checkpoint of its own.

    Args:
        folder: the checkpoint of the whole model (nemotron_h).
        out: a new folder.
        widths: a JSON file that maps axes to widths, for example
            {"hidden_size": 2304, "n_routed_experts": 104, "layers": [0, 1, 3]}.
    """
    done = slice_checkpoint(folder, out, read_file(widths, _object))
    before, after = names.element_count(done.parent), names.element_count(done.child)
    Console(highlight=False).print(f"{before:,} -> {after:,} parameters, model in {out}")
    return 0


def _object(data: object) -> dict[str, object]:
    check_object(data, "widths")
    return data
