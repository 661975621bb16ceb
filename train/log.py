"""The training log: one JSON line per step, a progress bar, the loss curve."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemokernels.train.trainer import Report

SECONDS_A_LINE = 10.0


class Log:
    """Append reports to ``path`` and show them on a progress bar, in a file as lines now and then.

    When a run resumes at ``step``, later lines are removed: they are of steps whose checkpoint was
    lost.
    """

    def __init__(self, path: Path, *, step: int, steps: int, show: bool = True):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.reports = [r for r in read(path) if r.step <= step] if step else []
        self._file = open(path, "w") if show else None
        for report in self.reports if self._file else ():
            self._write(report)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            disable=not show,
        )
        self._task = self._bar.add_task("", total=steps, completed=step, line="")
        console = self._bar.console
        self._lines = console if show and not console.is_terminal else None
        self._steps, self._due = steps, 0.0

    def __enter__(self) -> Log:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if self._file:
            self._file.close()

    def __call__(self, report: Report) -> None:
        self.reports.append(report)
        if self._file:
            self._write(report)
        line = f"loss {report.losses[0]:.3f}  {report.tokens / report.seconds:,.0f} tok/s"
        self._bar.update(self._task, completed=report.step, line=line)
        if self._lines and time.monotonic() >= self._due:
            self._lines.print(f"step {report.step}/{self._steps}  {line}", highlight=False)
            self._due = time.monotonic() + SECONDS_A_LINE

    def _write(self, report: Report) -> None:
        self._file.write(json.dumps(dataclasses.asdict(report)) + "\n")
        self._file.flush()


def read(path: Path) -> list[Report]:
    """The reports in a log, without a last line that a crash cut short."""
    reports = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            reports.append(Report(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return reports


def plot(reports: list[Report], path: Path) -> None:
    """Write the loss curve as a PNG: next token and every MTP depth over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for depth in range(len(reports[0].losses)):
        label = f"MTP depth {depth}" if depth else "next token"
        axes.plot([r.step for r in reports], [r.losses[depth] for r in reports], label=label)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
