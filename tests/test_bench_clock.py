"""The CUDA clock, with torch.cuda replaced by something that keeps a diary."""

import contextlib
import types

import on_gpu
import pytest
import torch
from fake_clock import tiny

from nemokernels.bench import clock as clocks
from nemokernels.bench.check import Judge
from nemokernels.bench.clock import CudaClock, race

CPU = torch.device("cpu")
NAMES = ("synchronize", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats",
         "get_device_properties", "graph", "CUDAGraph", "Event")  # fmt: skip


@pytest.fixture
def diary(monkeypatch):
    """What the clock asks of the device, in order. Every event pair is 6 ms apart."""
    told, depth = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("event")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, end):
            return 6.0

    class Graph:
        def replay(self):
            told.append("replay")

    @contextlib.contextmanager
    def graph(_):
        depth.append(True)
        try:
            yield
        finally:
            depth.pop()

    fake = types.SimpleNamespace(
        Event=Event, CUDAGraph=Graph, graph=graph, told=told, capturing=depth,
        synchronize=lambda *_: told.append("synchronize"),
        _sleep=lambda cycles: told.append(("sleep", cycles)),
        get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=50 << 20),
        memory_allocated=lambda device: 100, max_memory_allocated=lambda device: 350,
        reset_peak_memory_stats=lambda device: told.append("reset"),
    )  # fmt: skip
    for name in NAMES:
        assert hasattr(torch.cuda, name)
    monkeypatch.setattr(clocks, "WARM_UP", 0.001)
    monkeypatch.setattr(clocks, "FLUSH", 1024)
    monkeypatch.setattr(clocks, "torch", types.SimpleNamespace(
        cuda=fake, empty=torch.empty, uint8=torch.uint8, profiler=Profiler(told)))  # fmt: skip
    return fake


class Profiler:
    """In the place of torch.profiler: tells of these (device type, annotation) events."""

    ProfilerActivity, DeviceType = torch.profiler.ProfilerActivity, torch.profiler.DeviceType

    def __init__(self, told):
        self.told, self.found, self.refuses = told, [], None

    @contextlib.contextmanager
    def profile(self, activities):
        assert activities == [self.ProfilerActivity.CUDA]
        if self.refuses:
            raise self.refuses
        self.told.append("profile")
        yield self
        self.told.append("profiled")

    def events(self):
        return [types.SimpleNamespace(device_type=kind, is_user_annotation=note)
                for kind, note in self.found]  # fmt: skip


def task(op="relu2", way="forward"):
    row = tiny(op, way=way)[0]
    judge = Judge(row, CPU)
    return judge.task(row.subject.ours)


def test_a_sample_is_cold_and_the_host_ahead(diary):
    clock, one = CudaClock(CPU), task()
    runner = clock.ready(one, None)
    assert runner.method == "events" and runner.calls == 1 and runner.lead >= 100_000
    clock._flush.fill_(7)
    diary.told.clear()
    assert clock.sample(runner) == pytest.approx(6e-3)
    assert not clock._flush.any()
    assert diary.told == [("sleep", runner.lead), "event", "event", "wait"]


def test_a_backward_is_timed_alone(diary):
    clock, order = CudaClock(CPU), []
    one = task(way="backward")
    prepare, run = one.prepare, one.run
    one.prepare = lambda: order.append("forward") or prepare()
    one.run = lambda prepared: order.append(list(diary.told)) or run(prepared)
    runner = clock.ready(one, None)
    diary.told.clear()
    order.clear()
    clock.sample(runner)
    assert order == ["forward", [("sleep", runner.lead), "event"]]


def test_a_graph_holds_distinct_copies(diary):
    clock, one = CudaClock(CPU), task()
    captured = []
    function = one.function
    one.function = lambda x: captured.append((x.data_ptr(), bool(diary.capturing))) or function(x)
    runner = clock.ready(one, 40e6)  # six copies overflow four times the cache
    inside = [pointer for pointer, capturing in captured if capturing]
    assert runner.method == "graph" and runner.calls == len(inside) == clocks.LEAST_NODES
    assert len(set(inside)) == 6 and inside[:6] == inside[6:12]
    diary.told.clear()
    assert clock.sample(runner) == pytest.approx(6e-3 / clocks.LEAST_NODES)
    assert "replay" in diary.told


def test_tiny_calls_get_many_copies_up_to_a_limit(diary):
    runner = CudaClock(CPU).ready(task(), 100.0)
    assert runner.calls == clocks.MOST_COPIES


def test_what_cannot_be_captured_is_timed_by_events(diary):
    one = task()
    function = one.function

    def waits(x):
        if diary.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return function(x)

    one.function = waits
    clock = CudaClock(CPU)
    runner = clock.ready(one, 40e6)
    assert (runner.method, runner.calls, runner.graph) == ("events", 1, None)
    assert runner.note == "not captured: operation not permitted when stream is capturing"
    assert race({"a": runner}, clock)["a"].median == pytest.approx(6e-3)


def test_peak_memory_is_what_a_call_adds(diary):
    assert CudaClock(CPU).peak(task()) == 250


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_launches_are_what_the_device_did_in_one_call(diary, way):
    one, profiler = task(way=way), clocks.torch.profiler
    cuda, cpu = profiler.DeviceType.CUDA, profiler.DeviceType.CPU
    profiler.found = [(cpu, False), (cuda, False), (cuda, True), (cuda, False)]
    prepare, run = one.prepare, one.run
    one.prepare = lambda: diary.told.append("prepare") or prepare()
    one.run = lambda prepared: diary.told.append("run") or run(prepared)
    assert CudaClock(CPU).launches(one) == 2
    assert diary.told == ["prepare", "synchronize", "profile", "run", "synchronize", "profiled"]


@pytest.mark.parametrize(
    "error",
    [
        None,
        RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"),
        AssertionError("Legacy CUDA profiling requires use_cpu=True"),
    ],
)
def test_launches_that_nobody_tells_are_not_zero(diary, error):
    clocks.torch.profiler.refuses = error
    assert CudaClock(CPU).launches(task()) is None


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["relu2", "rms_norm", "ssd"])
def test_rows_on_a_gpu(op):
    """Every method of timing, for real: small shapes, right results, times that add up."""
    import dataclasses

    from nemokernels.bench.ceilings import calibrate
    from nemokernels.bench.report import entry
    from nemokernels.bench.rows import rows
    from nemokernels.bench.run import contest, open_clock, place

    clock = open_clock()
    ceilings = calibrate(clock, copy_bytes=1 << 28, size=2048)
    assert 1e11 < ceilings.copy < 2e13 and ceilings.gemm["bfloat16"] > 1e13
    for way, method in (("forward", "graph"), ("backward", "events")):
        row = next(r for r in rows((op,)) if r.way == way)
        small = dataclasses.replace(row.cost, bytes=1e6, flops=0)
        row = dataclasses.replace(row, shape=dict(row.subject.tiny), cost=small)
        with on_gpu.references():
            record = contest(row, clock, ceilings, with_peers=False)
        assert "failed" not in record, record
        place(record, row, ceilings)
        ours, eager = entry(record), entry(record, "torch eager")
        assert ours["method"] == method, ours
        assert 1e-7 < ours["median"] < 1e-2 and 1e-7 < eager["median"] < 1e-1
        assert ours["backend"] == "triton" and ours["config"]
        assert ours["launches"] == 1 if op == "relu2" else ours["launches"] >= 1
