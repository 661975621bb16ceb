"""``nemokernels bench``."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from nemokernels.bench import compare as comparing
from nemokernels.bench import machine, report
from nemokernels.bench import tune as tuning
from nemokernels.bench.rows import rows
from nemokernels.bench.run import NoDevice, open_clock, run


def bench(
    ops: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    quick: bool = False,
    no_peers: bool = False,
    minutes: float | None = None,
    out: Path | None = None,
    compare: tuple[Path, Path] | None = None,
    tune: bool = False,
) -> int:
    """Measure ops on the GPU at hand: check, time, print the table, write JSON and a roofline plot.

    Exit code 1: a row failed its check, or there is no GPU. With --compare 1: something got worse.

    Args:
        ops: names of ops, as in bench_<op>.py; all without any.
        quick: only the rows that goals are set for.
        no_peers: leave out the peer libraries that are installed; torch stays.
        minutes: start no row after so many.
        out: folder for the results; bench/results without it.
        compare: measure nothing; hold the second result file against the first.
        tune: instead of measuring, look for faster configurations of these ops and write them into
            their tables (with --out into files there).
    """
    if compare is not None:
        return comparing.main([str(path) for path in compare])
    chosen = rows(ops, quick=quick)
    try:
        clock = open_clock()
    except NoDevice as error:
        print(f"nemokernels bench: {error}", file=sys.stderr)
        return 1
    if tune and not ops:
        raise ValueError("--tune needs the names of ops")
    console = Console(width=None if sys.stdout.isatty() else 180, soft_wrap=True)
    say = functools.partial(console.print, highlight=False, markup=False)
    if tune:
        card = machine.card(clock.device)["name"]
        write = lambda found: tuning.write(found, card, out)  # noqa: E731
        for path in write(tuning.tune(chosen, clock, say=say, minutes=minutes, save=write)):
            say(f"written to {path}")
        return 0
    document = run(chosen, clock, with_peers=not no_peers, minutes=minutes, say=say,
                   save=lambda document: report.save(document, out))  # fmt: skip
    path = report.save(document, out)
    report.show(document, console)
    say(f"written to {path}")
    if importlib.util.find_spec("matplotlib") is None:
        say("no plot: matplotlib is not installed")
    elif any(report.entry(record) for record in document["rows"]):
        report.plot(document, path.with_suffix(".png"))
    return 1 if any("failed" in record for record in document["rows"]) else 0
