"""A run for people: the table, the file, the roofline plot."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemokernels.bench.machine import slug
from nemokernels.bench.run import OURS

STYLES = ("o", "s", "^", "v", "D", "P", "X", "*")


def entry(record: dict, name: str = OURS) -> dict | None:
    """The measured entry of that name in a row; None if there is none."""
    return next((e for e in record["entries"] if e["name"] == name and "median" in e), None)


def best_peer(record: dict) -> dict | None:
    """The fastest of the others."""
    others = [e for e in record["entries"] if e["name"] != OURS and "median" in e]
    return min(others, key=lambda e: e["median"], default=None)


def why_missing(record: dict) -> str:
    """Why a row has no figure of ours."""
    return record.get("failed") or record.get("not_measured") or "not measured"


def table(document: dict) -> Table:
    """One line per row. A share below the row's goal is red."""
    card, ceilings = document["card"]["name"], document.get("ceilings", {}).get("before")
    title = f"{card}, commit {document['commit'][:7]}"
    if ceilings:
        rates = ", ".join(f"{k} {v / 1e12:.0f}" for k, v in ceilings["gemm"].items())
        title += f"\ncopy {ceilings['copy'] / 1e12:.2f} TB/s, products in TFLOP/s: {rates}"
    out = Table(title=title)
    for name in ("row", "backend", "floor ms", "median ms", "± MAD", "roofline", "goal"):
        out.add_column(name, justify="left" if name in ("row", "backend") else "right")
    out.add_column("fastest peer")
    out.add_column("ratio", justify="right")
    for record in document["rows"]:
        out.add_row(*_cells(record))
    return out


def _cells(record: dict) -> list[str | Text]:
    ours, peer = entry(record), best_peer(record)
    if ours is None:
        return [record["id"], Text(why_missing(record), "red")]
    goal, share = record["goal"], ours.get("roofline")
    cells = [record["id"], ours["backend"], _ms(record.get("floor")), _ms(ours["median"]),
             f"{ours['mad'] / ours['median']:.1%}"]  # fmt: skip
    colour = "red" if goal and share and share < goal else "green"
    cells.append(f"[{colour}]{share:.0%}[/{colour}]" if share else "-")
    cells.append(f"{goal:.0%}" if goal else "-")
    if peer is None:
        return [*cells, "not measured", "-"]
    return [*cells, f"{peer['name']} {_ms(peer['median'])}",
            f"{peer['median'] / ours['median']:.2f}x"]  # fmt: skip


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}"


def absences(document: dict) -> dict[str, list[str]]:
    """Reason to the names that were not measured for it, each once."""
    found: dict[str, list[str]] = {}
    for record in document["rows"]:
        for e in record["entries"]:
            if "not_measured" in e:
                names = found.setdefault(e["not_measured"], [])
                if e["name"] not in names:
                    names.append(e["name"])
    return found


def show(document: dict, console: Console) -> None:
    """Print the table and what is missing from it."""
    console.print(table(document))
    for reason, names in absences(document).items():
        console.print(f"not measured: {', '.join(names)}: {reason}", highlight=False, markup=False)
    drift = document.get("ceilings", {}).get("drift", {})
    moved = {k: v for k, v in drift.items() if abs(v) > 0.03}
    if moved:
        changes = ", ".join(f"{k} {v:+.1%}" for k, v in moved.items())
        console.print(f"ceilings moved during the run: {changes}", highlight=False)
    if "fatal" in document:
        console.print(f"[red]the device is lost: {document['fatal']}[/red]")


def folder(document: dict, out: Path | None) -> Path:
    """Where results go: ``out``, or bench/results/ of the current folder, one folder per card."""
    return (out or Path("bench") / "results") / slug(document["card"]["name"])


def write(document: dict, out: Path | None) -> Path:
    """Write the document and its plot side by side; returns the JSON's path."""
    where = folder(document, out)
    where.mkdir(parents=True, exist_ok=True)
    stamp = document["when"].translate({ord(c): None for c in "-:"})[:15]
    path = where / f"{stamp}-{document['commit'][:7]}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    if any("roofline" in e for r in document["rows"] for e in r["entries"]):
        plot(document, path.with_suffix(".png"))
    return path


def plot(document: dict, path: Path) -> None:
    """The roofline of all rows, whatever their dtype.

    Across: time the products need over time the bytes need, at this card's ceilings; left of 1 the
    copy is the roof, right of it the products. Up: attained share of the roof. Filled: ours;
    hollow: the fastest peer.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ceilings = document["ceilings"]["before"]
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for i, op in enumerate(sorted({r["op"] for r in document["rows"]})):
        style = dict(marker=STYLES[i % len(STYLES)], linestyle="", color=f"C{i % 10}")
        records = [r for r in document["rows"] if r["op"] == op and entry(r)]
        for name, pick, face in ((op, entry, f"C{i % 10}"), (None, best_peer, "none")):
            chosen = [(_intensity(r, ceilings), pick(r)) for r in records]
            points = [(x, e["roofline"]) for x, e in chosen if e]
            if points:
                axes.plot(*zip(*points), label=name, markerfacecolor=face, **style)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.axvline(1.0, color="grey", linewidth=0.5)
    axes.set(xscale="log", ylim=(0, 1.1), xlabel="time of products / time of copy at the ceilings",
             ylabel="share of the roofline", title=document["card"]["name"])  # fmt: skip
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _intensity(record: dict, ceilings: dict) -> float:
    products = record["flops"] / ceilings["gemm"].get(record["unit"], float("inf"))
    return max(products / (record["bytes"] / ceilings["copy"]), 1e-2)
