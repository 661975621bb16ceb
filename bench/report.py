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
    for name in ("row", "backend", "launches", "floor ms", "median ms", "± MAD", "roofline",
                 "goal"):  # fmt: skip
        out.add_column(name, justify="left" if name in ("row", "backend") else "right")
    out.add_column("fastest peer")
    out.add_column("ratio", justify="right")
    for record in document["rows"]:
        out.add_row(*_cells(record))
    return out


def _cells(record: dict) -> list[str | Text]:
    ours, peer = entry(record), best_peer(record)
    if ours is None:
        return [Text(f"{record['id']}: {why_missing(record)}", "red")]
    goal, share = record["goal"], ours.get("roofline")
    launches = "-" if ours.get("launches") is None else str(ours["launches"])
    cells = [record["id"], ours["backend"], launches, _ms(record.get("floor")),
             _ms(ours["median"]), f"{ours['mad'] / ours['median']:.1%}"]  # fmt: skip
    colour = "red" if goal and share and share < goal else "green"
    cells.append(f"[{colour}]{_percent(share)}[/{colour}]" if share else "-")
    cells.append(_percent(goal) if goal else "-")
    if peer is None:
        return [*cells, "not measured", "-"]
    return [*cells, f"{peer['name']} {_ms(peer['median'])}",
            f"{peer['median'] / ours['median']:.2f}x"]  # fmt: skip


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.2%}"


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


def save(document: dict, out: Path | None) -> Path:
    """Write the document, in place of an earlier state of the same run; returns the path."""
    where = folder(document, out)
    where.mkdir(parents=True, exist_ok=True)
    stamp = document["when"].translate({ord(c): None for c in "-:"})[:15]
    path = where / f"{stamp}-{document['commit'][:7]}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.replace(path)
    return path


def plot(document: dict, path: Path) -> None:
    """The roofline of all rows, whatever their dtype; up: attained share of the roof.

    Left, rows that only move, by op. Right, across, the time the products need over the time the
    bytes need, at this card's ceilings: below 1 the copy is the roof, above it the products.
    Filled: ours; hollow: the fastest peer.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (moving, multiplying) = pyplot.subplots(
        1, 2, sharey=True, figsize=(12, 5.5), layout="constrained", width_ratios=(2, 3)
    )
    measured = [r for r in document["rows"] if entry(r)]
    ops = sorted({r["op"] for r in measured})
    for axes, flops in ((moving, False), (multiplying, True)):
        mine = [r for r in measured if bool(r["flops"]) == flops]
        for op in sorted({r["op"] for r in mine}):
            i = ops.index(op)
            style = dict(marker=STYLES[i % len(STYLES)], linestyle="", color=f"C{i % 10}")
            records = [r for r in mine if r["op"] == op]
            across = [_intensity(r, document["ceilings"]["before"]) if flops else op
                      for r in records]  # fmt: skip
            axes.plot(across, [entry(r)["roofline"] for r in records], label=op, **style)
            peers = [(x, p["roofline"]) for x, r in zip(across, records) if (p := best_peer(r))]
            if peers:
                axes.plot(*zip(*peers), markerfacecolor="none", **style)
        axes.axhline(1.0, color="black", linewidth=1)
    moving.set(ylim=(0, 1.1), ylabel="share of the roofline", title="copy alone")
    moving.tick_params("x", rotation=90)
    multiplying.axvline(1.0, color="grey", linewidth=0.5)
    multiplying.set(xscale="log", title=document["card"]["name"],
                    xlabel="time of products / time of copy, at the ceilings")  # fmt: skip
    figure.legend(*multiplying.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _intensity(record: dict, ceilings: dict) -> float:
    products = record["flops"] / ceilings["gemm"][record["unit"]]
    return products / (record["bytes"] / ceilings["copy"])
