"""Finding faster configurations: ``nemokernels bench OP --tune``.

For every kind of problem that an op's table distinguishes, the configuration of the plan is raced
against the op's ``candidates()``; the winner, if it is better by more than chance, is raced against
its own, until nothing is better. Only candidates with the right results take part.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nemokernels import _tuned
from nemokernels.bench import plans
from nemokernels.bench.check import Judge, Task
from nemokernels.bench.clock import Clock, Runner, race
from nemokernels.bench.rows import Row
from nemokernels.bench.run import describe_error

ROUNDS = 4
BETTER = 0.02  # a winner is faster by this share, and by three median absolute deviations


class Forced(Task):
    """A task in which one configuration of a plan is replaced by another, backward included."""

    def __init__(self, task: Task, op: str, planned: object, config: object):
        super().__init__(task.function, task.row, task.inputs, task.grad)
        self._change = lambda name, made: config if (name, made) == (op, planned) else made
        self._copied = op, planned, config

    def prepare(self):
        with plans.watched(self._change):
            return super().prepare()

    def run(self, prepared):
        with plans.watched(self._change):
            return super().run(prepared)

    def copy(self) -> Forced:
        return Forced(super().copy(), *self._copied)

    def once(self):
        with plans.watched(self._change):
            return super().once()


@contextlib.contextmanager
def problems() -> Iterator[list[tuple[str, str]]]:
    """Collect ``(op, key)`` of every look into a table in the block."""
    found, original = [], _tuned.tuned

    def tuned(op, device, problem, config):
        found.append((op, _tuned.bucket(problem)))
        return original(op, device, problem, config)

    _tuned.tuned = tuned
    try:
        yield found
    finally:
        _tuned.tuned = original


def tune(
    rows: Sequence[Row],
    clock: Clock,
    *,
    say: Callable[[str], None] = print,
    minutes: float | None = None,
    save: Callable[[dict], object] | None = None,
) -> dict:
    """Race candidates on these rows. Returns ``{op: {key: fields}}``, of what got faster.

    With ``minutes``, rows that would start later are left out. ``save`` gets what was found so far
    after every row.

    Raises:
        ValueError: an op that offers no candidates.
    """
    done: dict[str, dict[str, dict]] = {}
    began = time.monotonic()
    for row in rows:
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            say(f"{row.id}: {minutes:g} minutes were over")
            continue
        op = row.subject.family
        module = importlib.import_module(f"nemokernels.ops.{op}.op")
        if not hasattr(module, "candidates"):
            raise ValueError(f"op {op!r} offers no candidates to tune")
        table = done.setdefault(op, {})
        judge = Judge(row, clock.device)
        task = judge.task(row.subject.ours)
        with problems() as keys, plans.watched() as seen:
            judge.ours(task.once())
        mine = [config for name, config in seen if name == op and config.backend != plans.REFERENCE]
        asked = [key for name, key in keys if name == op]
        if not mine or not asked:
            say(f"{row.id}: the reference runs, there is nothing to tune")
            continue
        planned, key = mine[-1], asked[-1]  # the backward's, which came after its forward's
        if (key, row.way) in table:  # another row of the same kind
            continue
        best = climb(row, judge, task, planned, module.candidates, clock, say)
        table[key, row.way] = _tuned.difference(planned, best)
        if save is not None:
            save(_all_merged(done))
    return _all_merged(done)


def climb(row, judge, task, planned, candidates, clock: Clock, say) -> object:
    """The best configuration found from ``planned`` on."""
    op, best = row.subject.family, planned
    for _ in range(ROUNDS):
        runners: dict[object, Runner] = {}
        for config in dict.fromkeys((best, *candidates(best, row.way != "forward"))):
            forced = Forced(task, op, planned, config)
            try:
                judge.ours(forced.once())
                runners[config] = clock.ready(forced, None)
            except Exception as error:  # too much shared memory, a layout that does not compile
                say(f"{row.id}: {describe_error(error)}")
        times = race(runners, clock)
        winner = min(times, key=lambda config: times[config].median)
        gain = times[best].median - times[winner].median
        if gain <= max(BETTER * times[best].median, 3 * times[best].mad):
            return best
        say(f"{row.id}: {times[best].median * 1e3:.4g} -> {times[winner].median * 1e3:.4g} ms")
        best = winner
    return best


def _all_merged(done: dict) -> dict:
    return {op: _merged(table) for op, table in done.items()}


def _merged(table: dict) -> dict[str, dict]:
    """Forward and backward of a problem change fields of one configuration."""
    merged: dict[str, dict] = {}
    for (key, _), fields in table.items():
        if fields:
            merged.setdefault(key, {}).update(fields)
    return merged


def write(found: dict, card: str, out: Path | None) -> list[Path]:
    """Merge what was found into the ops' tables; with ``out`` into files there. Returns paths."""
    written = []
    for op, entries in found.items():
        if not entries:
            continue
        path = _tuned.path(op) if out is None else out / f"{op}-tuned.json"
        table = json.loads(path.read_text()) if path.exists() else {}
        mine = table.setdefault(card, {})
        for key, fields in entries.items():
            mine[key] = {**mine.get(key, {}), **fields}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        written.append(path)
    _tuned.table.cache_clear()
    return written
