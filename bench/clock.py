"""Taking times: cold caches, medians, everyone in turn.

A time is that of the device, between two events, with the L2 cache emptied before and the host far
enough ahead that the device never waits for a launch. Calls too short for events are captured,
each on its own copy of the inputs, into one CUDA graph whose time is divided by their number.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from nemokernels.bench.check import Task

WARM_UP = 0.05  # seconds
SHORT = 100e-6  # floors below this are timed in a graph
LEAST_NODES, MOST_COPIES = 20, 256
FLUSH = 256 << 20  # bytes; the L2 caches of H100, H200 and B200 hold 50, 60 and 126 MB


@dataclass(frozen=True)
class Stats:
    """Seconds: median and median absolute deviation of n samples."""

    median: float
    mad: float
    n: int

    @classmethod
    def of(cls, samples: list[float]) -> Stats:
        median = statistics.median(samples)
        return cls(median, statistics.median(abs(s - median) for s in samples), len(samples))


@dataclass
class Runner:
    """A task made ready. ``method`` is "events" or "graph", ``note`` why it is not the latter."""

    task: Task
    method: str = "events"
    calls: int = 1
    lead: int = 0
    graph: object = None
    note: str = ""


class Clock(Protocol):
    """What a device has to offer. Tests put a made-up one in its place."""

    device: torch.device

    def ready(self, task: Task, bytes: float | None) -> Runner:
        """Warm ``task`` up; capture it in a graph if ``bytes`` (moved per call) are given."""

    def sample(self, runner: Runner) -> float:
        """Seconds of one call."""

    def peak(self, task: Task) -> int:
        """Bytes allocated during one call above what was allocated before."""

    def launches(self, task: Task) -> int | None:
        """Kernels, copies and fills of one call; None where the driver does not tell."""


class CudaClock:
    """The clock of a CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._l2 = torch.cuda.get_device_properties(device).L2_cache_size

    def ready(self, task: Task, bytes: float | None) -> Runner:
        task.run(task.prepare())  # compiles, and whatever else happens once
        torch.cuda.synchronize()
        began, enqueue = time.perf_counter(), 0.0
        while time.perf_counter() - began < WARM_UP:
            prepared = task.prepare()
            before = time.perf_counter()
            task.run(prepared)
            enqueue = time.perf_counter() - before
            torch.cuda.synchronize()
        # Cycles the device spins while the host enqueues: twice what it took, at about 2 GHz.
        runner = Runner(task, lead=int(min(2 * enqueue + 50e-6, 20e-3) * 2e9))
        if bytes is not None:
            self._capture(runner, bytes)
        return runner

    def _capture(self, runner: Runner, bytes: float) -> None:
        copies = min(max(math.ceil(4 * self._l2 / bytes), 1), MOST_COPIES)
        tasks = [runner.task, *(runner.task.copy() for _ in range(copies - 1))]
        nodes = max(copies, LEAST_NODES)
        graph, kept = torch.cuda.CUDAGraph(), []
        try:
            with torch.cuda.graph(graph):
                for i in range(nodes):
                    kept.append(tasks[i % copies].run(None))
        except RuntimeError as error:
            torch.cuda.synchronize()
            runner.note = f"not captured: {str(error).splitlines()[0]}"
            return
        graph.replay()
        torch.cuda.synchronize()
        runner.method, runner.calls, runner.graph = "graph", nodes, (graph, tasks, kept)

    def sample(self, runner: Runner) -> float:
        prepared = None if runner.graph else runner.task.prepare()
        start, end = self._events
        self._flush.zero_()
        torch.cuda._sleep(runner.lead)
        start.record()
        if runner.graph:
            runner.graph[0].replay()
        else:
            runner.task.run(prepared)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / runner.calls

    def peak(self, task: Task) -> int:
        prepared = task.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        task.run(prepared)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def launches(self, task: Task) -> int | None:
        profiler, prepared = torch.profiler, task.prepare()
        torch.cuda.synchronize()
        try:
            with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as seen:
                task.run(prepared)
                torch.cuda.synchronize()
        except (RuntimeError, AssertionError):  # torch without it, or no right to look
            return None
        # It may also look and see nothing, which is not a call without kernels.
        on_device = profiler.DeviceType.CUDA
        return sum(e.device_type == on_device and not e.is_user_annotation
                   for e in seen.events()) or None  # fmt: skip


def race(
    runners: Mapping[str, Runner], clock: Clock, *, seconds: float = 0.2, least: int = 7,
    most: int = 100,
) -> dict[str, Stats]:  # fmt: skip
    """Time everyone in turn, one sample each per round, so that a change of clock rate hits all.

    A runner is done after ``most`` samples, or at least ``least`` that add up to ``seconds``, or
    three that add up to ten times that.
    """
    samples: dict[str, list[float]] = {name: [] for name in runners}

    def done(taken: list[float]) -> bool:
        spent, n = sum(taken), len(taken)
        return n >= most or (n >= least and spent >= seconds) or (n >= 3 and spent >= 10 * seconds)

    while waiting := [name for name, taken in samples.items() if not done(taken)]:
        for name in waiting:
            samples[name].append(clock.sample(runners[name]))
    return {name: Stats.of(taken) for name, taken in samples.items()}
