"""A run: check every row, time it beside its peers, write down where it stands."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch

from nemokernels import _backends
from nemokernels._registry import FAMILIES
from nemokernels.bench import machine, peers, plans
from nemokernels.bench.ceilings import Ceilings, calibrate
from nemokernels.bench.check import Judge, Wrong
from nemokernels.bench.clock import SHORT, Clock, CudaClock, Runner, race
from nemokernels.bench.rows import Row, unit

SCHEMA = 1
OURS = "nemokernels"
CHECKED = "float64 reference at full size"


class NoDevice(RuntimeError):
    """There is nothing to measure on."""


def open_clock() -> CudaClock:
    """The clock of the current CUDA device, every backend's self-test done. Raises NoDevice."""
    if not torch.cuda.is_available():
        raise NoDevice("not measured: torch sees no CUDA device here")
    device = torch.device("cuda", torch.cuda.current_device())
    for family in FAMILIES:  # later it could run inside a forced plan and prove the wrong backend
        _backends.usable(family, device)
    return CudaClock(device)


def run(
    rows: Sequence[Row],
    clock: Clock,
    *,
    with_peers: bool = True,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
    save: Callable[[dict], object] = lambda document: None,
) -> dict:
    """Measure rows; returns the document that is written as JSON.

    With ``minutes``, rows that would start later are listed as not measured. ``save`` gets the
    document after every row, so that a run which is killed leaves what it had.
    """
    began = time.monotonic()
    document = {"schema": SCHEMA, **machine.facts(clock.device), "rows": []}
    before = calibrate(clock)
    document["ceilings"] = {"before": vars(before)}
    for row in rows:
        late = minutes is not None and time.monotonic() - began > 60 * minutes
        record = describe(row)
        document["rows"].append(record)
        if late:
            record["not_measured"] = f"{minutes:g} minutes were over"
            continue
        if why := row.subject.needs(clock.device):
            record["not_measured"] = why
            say(line(record))
            continue
        record |= contest(row, clock, before, with_peers=with_peers)
        place(record, row, before)
        say(line(record))
        save(document)
        if "fatal" in record:
            document["fatal"] = record["fatal"]
            break
    document["power"] = machine.power(clock.device)
    if "fatal" not in document:
        after = calibrate(clock)
        document["ceilings"] |= {"after": vars(after), "drift": before.drift(after)}
        for record, row in zip(document["rows"], rows):
            place(record, row, before.best(after))
    save(document)
    return document


def describe(row: Row) -> dict:
    """A row without its results."""
    return {
        "id": row.id,
        "op": row.subject.family,
        "way": row.way,
        "shape": dict(row.shape),
        "dtype": unit(row.dtype),
        "bytes": row.cost.bytes,
        "flops": row.cost.flops,
        "unit": row.cost.unit,
        "goal": row.goal,
        "entries": [],
    }


def contest(row: Row, clock: Clock, ceilings: Ceilings, *, with_peers: bool = True) -> dict:
    """Check and time one row: its entries, or why it has none."""
    torch.compiler.reset()  # or dynamo would stop compiling after eight shapes of one function
    try:
        return _contest(row, clock, ceilings, with_peers)
    except Wrong as error:
        return {"failed": f"wrong: {error}"}
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # one broken row must not cost the run the others
        return {"failed": describe_error(error), **_fatal(clock)}
    finally:
        _release(clock)


def _contest(row: Row, clock: Clock, ceilings: Ceilings, with_peers: bool) -> dict:
    judge = Judge(row, clock.device)
    with plans.watched() as seen:
        error = judge.ours(judge.task(row.subject.ours).once())
    entries = [{"name": OURS, "version": machine.versions()["nemokernels"], "error": error,
                "backend": plans.backend(seen), "config": plans.as_data(seen)}]  # fmt: skip
    tasks = {OURS: judge.task(row.subject.ours)}
    for name, get in contestants(row, with_peers).items():
        entry = {"name": name}
        entries.append(entry)
        try:
            function, entry["version"] = get()
            entry["error"] = judge.peer(judge.task(function).once())
            tasks[name] = judge.task(function)
        except peers.Absent as reason:
            entry["not_measured"] = str(reason)
        except Wrong as reason:
            entry["not_measured"] = f"wrong: {reason}"
        except Exception as reason:  # a peer's failure is its own
            entry["not_measured"] = describe_error(reason)
            if _fatal(clock):
                raise
    del judge.exact, judge.low
    _release(clock)

    graph = row.way == "forward" and row.cost.floor(ceilings.copy, ceilings.gemm) < SHORT
    runners: dict[str, Runner] = {}
    for entry in entries:
        name = entry["name"]
        if name not in tasks:
            continue
        capture = graph and entry.get("backend") != plans.REFERENCE
        try:
            entry["memory"] = clock.peak(tasks[name])
            runners[name] = clock.ready(tasks[name], row.cost.bytes if capture else None)
        except Exception as reason:
            if name == OURS or _fatal(clock):
                raise
            entry["not_measured"] = describe_error(reason)
    for name, stats in race(runners, clock).items():
        entry = next(e for e in entries if e["name"] == name)
        entry |= vars(stats) | {"method": runners[name].method}
        if runners[name].note:
            entry["note"] = runners[name].note
    # After the times: a profiler that has looked once may cost every later launch something.
    entries[0]["launches"] = clock.launches(tasks[OURS])
    return {"checked": CHECKED, "entries": entries}


def contestants(row: Row, with_peers: bool) -> dict[str, Callable]:
    """Everyone but us: name to a function that returns (function, version) or raises."""
    eager, torch_version = row.subject.eager, torch.__version__
    found = {
        "torch eager": lambda: (eager, torch_version),
        "torch.compile": lambda: (torch.compile(eager, dynamic=False), torch_version),
    }
    if with_peers:
        for name, connect in row.subject.peers.items():
            found[name] = lambda name=name, connect=connect: peers.load(name, connect)
    return found


def place(record: dict, row: Row, ceilings: Ceilings) -> None:
    """Add the floor and everyone's share of the roofline, if anyone has a time."""
    if not record["entries"]:
        return
    record["floor"] = row.cost.floor(ceilings.copy, ceilings.gemm)
    for entry in record["entries"]:
        if "median" in entry:
            entry["roofline"] = record["floor"] / entry["median"]


def line(record: dict) -> str:
    """One line of progress."""
    if "failed" in record:
        return f"{record['id']}: {record['failed']}"
    if "not_measured" in record:
        return f"{record['id']}: not measured: {record['not_measured']}"
    times = (f"{e['name']} {e['median'] * 1e3:.4g} ms" for e in record["entries"] if "median" in e)
    return f"{record['id']}: {', '.join(times)}"


def describe_error(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _release(clock: Clock) -> None:
    if clock.device.type == "cuda" and not _fatal(clock):
        gc.collect()
        torch.cuda.empty_cache()


def _fatal(clock: Clock) -> dict[str, str]:
    """Says so if the device is beyond use: an illegal access ends every later call too."""
    if clock.device.type == "cuda":
        try:
            torch.cuda.synchronize(clock.device)
        except RuntimeError as error:
            return {"fatal": describe_error(error)}
    return {}
