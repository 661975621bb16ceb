"""``nemokernels models`` and ``nemokernels slice``: commands about models that run none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nemokernels.models import (
    NemotronVLConfig,
    Variant,
    find_variant,
    list_variants,
    names,
    read_config,
    slice_checkpoint,
)
from nemokernels.models.checkpoint import open_checkpoint
from nemokernels.models.fields import check_object, read_file
from nemokernels.models.memory import PRECISIONS, Memory, gpus_needed, precision_of
from nemokernels.models.memory import memory as count_memory
from nemokernels.models.variants import find_config

GPUS = {"H100": 80.0, "H200": 141.0, "B200": 192.0}  # GB, as their makers state it


def models(
    name: Annotated[str | None, tyro.conf.Positional] = None,
    memory: bool = False,
    precision: tuple[str, ...] = PRECISIONS,
    context: int = 8192,
    batch: int = 1,
    gpu_gb: tuple[float, ...] = (),
    reserve: float = 0.1,
    given: tuple[str, ...] = (),
) -> int:
    """List the released models, describe one, or compute how much memory serving it takes.

    Args:
        name: a model's name or hub id, a checkpoint folder or a config.json; without it, all are
            listed.
        memory: show the size of weights, key-value cache and Mamba states, and how many GPUs they
            need.
        precision: precisions of the weights: bf16, fp8, nvfp4.
        context: tokens per sequence.
        batch: sequences held at once.
        gpu_gb: GPU sizes in GB (10^9 bytes); by default H100 80, H200 141, B200 192.
        reserve: share of every GPU left for activations and workspaces.
        given: FIELD=VALUE for fields of its config.json that are not public.
    """
    if name is None and memory:
        raise ValueError("--memory: of which model? `nemokernels models` lists them")
    if given and not memory:
        raise ValueError("--given: only --memory needs what is not public")
    console = Console(highlight=False)
    if name is None:
        print_models(console)
        return 0
    variant = _described(name)
    if not memory:
        print_model(console, variant)
        return 0
    config = variant.config or find_config(name, **dict(map(_given, given)))
    gpus = {f"{size:g} GB": size for size in gpu_gb} or GPUS
    sizes = {"context": context, "batch": batch}
    print_memory(console, variant, config, precision, sizes, gpus, reserve)
    return 0


def print_models(console: Console) -> None:
    """Print one line per released model."""
    table = Table()
    table.add_column("model", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("hub id, and what is missing", overflow="fold")
    family = None
    for v in list_variants():
        if v.family != family:
            family = v.family
            table.add_section()
            table.add_row(f"[bold]{family}[/bold]")
        stated = "" if v.published is None else f"stated {v.published}"
        count = stated if v.parameters is None else f"{v.parameters:,}"
        table.add_row(v.name, count, "\n".join(filter(None, (v.hub_id, v.missing))))
    console.print(table)
    console.print("parameters: of all stored tensors, counted; or what its makers state")


def print_model(console: Console, variant: Variant) -> None:
    """Print everything that is known about a model, and what is not."""
    count = None if variant.parameters is None else f"{variant.parameters:,}"
    facts = {
        "family": variant.family,
        "hub id": variant.hub_id,
        "also": "\n".join(variant.other_hub_ids),
        "parameters": count,
        "stated": variant.published,
        "active": variant.active,
        "tensors": variant.tensors and f"{variant.tensors:,}",
        "configured": variant.part,
        "cannot be built": variant.reason,
        "to be given": ", ".join(variant.arguments),
        "not public": "\n".join(variant.unknown),
    }
    table = Table(title=variant.name, title_justify="left", show_header=False)
    for key, value in facts.items():
        if value:
            table.add_row(key, str(value))
    known = variant.fields if variant.config is None else variant.config.to_dict()
    for key, value in known.items():
        listed = isinstance(value, list) and len(value) > 8
        table.add_row(key, f"{len(value)} entries" if listed else str(value))
    console.print(table)


def print_memory(
    console: Console, variant: Variant, config, precisions, sizes, gpus, reserve
) -> None:
    """Print a table with one column per precision."""
    chosen = {name: precision_of(variant, name) for name in precisions}
    needs = {name: count_memory(config, how, **sizes) for name, how in chosen.items()}
    title = f"{variant.name}: {sizes['batch']:,} x {sizes['context']:,} tokens"
    table = Table("", *needs, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, show in _ROWS.items():
        table.add_row(label, *(show(need) for need in needs.values()))
    table.add_section()
    for label, size in gpus.items():
        counts = (gpus_needed(n.total, size * 1e9, reserve=reserve) for n in needs.values())
        label = label if label.endswith("GB") else f"{label} ({size:g} GB)"
        table.add_row(f"GPUs: {label}", *map(str, counts))
    console.print(table)
    console.print(
        "GB = 10^9 bytes, GiB = 2^30 bytes. Not counted: activations, workspaces; "
        f"{reserve:.0%} of every GPU is left free for them, and the rest split evenly."
    )
    if variant.part:
        console.print(f"counted: {variant.part}")
    for name, how in chosen.items():
        if how.assumed:
            console.print(f"{name} assumes: {how.assumed}")


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


def _weights(need: Memory) -> str:
    parts = [f"{how} {_gb(size)}" for how, size in need.weights.items()]
    return "\n".join([_gb(sum(need.weights.values())), *(parts if len(parts) > 1 else ())])


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f}"


_ROWS = {
    "weights, GB": _weights,
    "KV cache per token, bytes": lambda need: f"{need.kv_token:,}",
    "KV cache per sequence, GB": lambda need: _gb(need.kv),
    "SSM and conv state per sequence, bytes": lambda need: f"{need.state:,}",
    "all, GB": lambda need: _gb(need.total),
    "all, GiB": lambda need: f"{need.total / 2**30:,.2f}",
}


def _described(name: str) -> Variant:
    """The released model of this name, or the one that a config.json describes."""
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json":
        return find_variant(name)
    config = read_config(path)
    if isinstance(config, NemotronVLConfig) and Path(name).is_dir():
        with open_checkpoint(name) as opened:  # its tensors say the rest
            config = opened.config
    tensors = sum(1 for _ in names.tensor_shapes(config))
    return Variant(name, config.model_type, None, parameters=names.element_count(config),
                   tensors=tensors, config=config)  # fmt: skip


def _given(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--given {text!r}: expected FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _object(data: object) -> dict[str, object]:
    check_object(data, "widths")
    return data
