"""The bench's machinery with a made-up clock: who is timed, what is written, what is refused."""

import dataclasses
import itertools
import json
import re
import sys

import pytest
import torch
from fake_clock import CARD, CPU, LIMITS, Clock, document, put_on_a_card, tiny
from rich.console import Console

from nemokernels._registry import FAMILIES
from nemokernels.bench import ceilings, compare, machine, peers, plans, report, run
from nemokernels.bench.ceilings import Ceilings
from nemokernels.bench.check import Judge, Task
from nemokernels.bench.clock import Runner, Stats, race
from nemokernels.ops.relu2 import op as relu2_op
from nemokernels.ops.ssd import op as ssd_op


@pytest.fixture
def on_a_card(monkeypatch):
    put_on_a_card(monkeypatch)


# Statistics and turns


def test_stats_of_a_known_sample():
    assert Stats.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Stats(3.0, 1.0, 5)
    assert Stats.of([2.0, 4.0]) == Stats(3.0, 1.0, 2)


def runners(*names):
    def named(name):
        def function():
            return torch.zeros(1)

        function.__name__ = name
        return function

    row = tiny("relu2")[0]
    return {name: Runner(Task(named(name), row, {})) for name in names}


def test_everyone_in_turn():
    clock = Clock({"a": 0.05, "b": 0.05, "c": 0.05})
    race(runners("a", "b", "c"), clock, seconds=0.2, least=7)
    assert clock.log == ["a", "b", "c"] * 7


def test_a_race_is_long_enough_and_ends():
    counts = {}
    for name, seconds in (("short", 1e-6), ("medium", 0.01), ("long", 0.15), ("endless", 5.0)):
        counts[name] = race(runners(name), Clock({name: seconds}))[name].n
    assert counts == {"short": 100, "medium": 20, "long": 7, "endless": 3}


def test_a_slow_one_does_not_shorten_the_others():
    stats = race(runners("slow", "fast"), Clock({"slow": 3.0, "fast": 0.01}))
    assert (stats["slow"].n, stats["fast"].n) == (3, 20)


def test_drift_of_the_card_hits_all_alike():
    stats = race(runners("a", "b"), Clock({"a": 1e-3, "b": 1e-3}, drift=0.01))
    assert stats["b"].median / stats["a"].median == pytest.approx(1, abs=0.02)


def test_ceilings_from_times(monkeypatch):
    monkeypatch.setattr(
        ceilings, "race", lambda runners, clock: {k: Stats(2.0, 0, 3) for k in runners}
    )
    found = ceilings.calibrate(Clock(), copy_bytes=1000, size=32)
    assert found.copy == 1000.0  # read and written
    assert set(found.gemm) | set(found.missing) == {
        "bfloat16",
        "float16",
        "float32",
        "float8_e4m3fn",
        "float4_e2m1fn_x2",
    }
    assert found.gemm["bfloat16"] == 32**3
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_better_ceiling_counts():
    a, b = Ceilings(2.0, {"bfloat16": 5.0}, {}), Ceilings(3.0, {"bfloat16": 4.0}, {})
    assert a.best(b) == b.best(a) == Ceilings(3.0, {"bfloat16": 5.0}, {})
    assert a.drift(b) == {"copy": 0.5, "bfloat16": pytest.approx(-0.2)}


# A run


def test_a_run_is_complete_and_json(on_a_card):
    made = document(ops=("relu2", "ssd"))
    made = json.loads(json.dumps(made))
    assert made["schema"] == run.SCHEMA and made["card"] == CARD and made["commit"]
    assert set(made["versions"]) >= {"torch", "triton", "cuda", "python", "nemokernels"}
    assert made["ceilings"]["before"]["copy"] == 3.0e12 and made["power"]
    for record, row in zip(made["rows"], tiny("relu2", "ssd")):
        assert record["id"] == row.id and record["shape"] == row.shape
        assert record["floor"] == row.cost.floor(LIMITS.copy, LIMITS.gemm)
        assert record["checked"] == "float64 reference at full size"
        ours = report.entry(record)
        assert ours["roofline"] == pytest.approx(record["floor"] / ours["median"])
        assert ours["backend"] == "reference" and ours["error"] <= 1 and ours["memory"] == 4096
        assert {"median", "mad", "n", "method", "version"} <= set(ours)
        assert report.entry(record, "torch eager") and report.entry(record, "torch.compile")
        assert ours["launches"] == 3
    absent = [e for e in made["rows"][1]["entries"] if "not_measured" in e]
    assert {e["name"] for e in absent} == {"mamba_ssm", "fla"}
    assert all("is not installed" in e["not_measured"] for e in absent)


def test_launches_are_counted_once_and_after_the_times(on_a_card):
    clock = Clock()
    run.run(tiny("moe_route"), clock, say=lambda _: None)
    assert clock.log[-1] == "launches" and clock.log.count("launches") == 1


def test_a_wrong_row_has_no_time(on_a_card, monkeypatch):
    row = tiny("relu2")[0]
    wrong = dataclasses.replace(
        row.subject, ours=lambda x: x.relu() ** 2 + 1, exact=row.subject.ours
    )
    clock = Clock()
    made = run.run([dataclasses.replace(row, subject=wrong)], clock, say=lambda _: None)
    record = made["rows"][0]
    assert record["failed"].startswith("wrong: result 0: error") and record["entries"] == []
    assert clock.log == [] and "median" not in json.dumps(record)


def test_a_row_this_device_cannot_run_says_why(on_a_card):
    row, told, clock = tiny("nvfp4_gemm")[0], [], Clock()
    record = run.run([row], clock, say=told.append)["rows"][0]
    assert record["not_measured"] == "needs a CUDA device, this is cpu" and not record["entries"]
    assert "floor" not in record and clock.log == []
    assert f"{row.id}: not measured: needs a CUDA device, this is cpu" in told


def test_a_row_that_crashes_does_not_stop_the_run(on_a_card):
    first, second = tiny("relu2", "rms_norm")

    def crash(x):
        raise RuntimeError("kernel exploded\nand more")

    broken = dataclasses.replace(first, subject=dataclasses.replace(first.subject, ours=crash))
    made = run.run([broken, second], Clock(), say=lambda _: None)
    assert made["rows"][0]["failed"] == "RuntimeError: kernel exploded"
    assert report.entry(made["rows"][1])


def test_a_wrong_or_crashing_peer_costs_only_itself(on_a_card, monkeypatch):
    def crash():
        def peer(x):
            raise ValueError("no such shape")

        return peer

    row = tiny("relu2")[0]
    found = {"mamba_ssm": lambda: lambda x: x, "fla": crash}
    subject = dataclasses.replace(row.subject, peers=found)
    monkeypatch.setattr(peers, "version", lambda name: "1.2")
    made = run.run([dataclasses.replace(row, subject=subject)], Clock(), say=lambda _: None)
    entries = {e["name"]: e for e in made["rows"][0]["entries"]}
    assert "wrong: result 0" in entries["mamba_ssm"]["not_measured"]
    assert entries["fla"]["not_measured"] == "ValueError: no such shape"
    assert entries["mamba_ssm"]["version"] == "1.2" and "median" not in entries["mamba_ssm"]
    assert report.entry(made["rows"][0]) and report.entry(made["rows"][0], "torch eager")


def test_peers_can_be_left_out(on_a_card):
    made = document(ops=("ssd",), with_peers=False)
    assert [e["name"] for e in made["rows"][0]["entries"]] == [
        "nemokernels", "torch eager", "torch.compile",
    ]  # fmt: skip


def test_time_runs_out(on_a_card, monkeypatch):
    ticks = itertools.count(0, 50)
    monkeypatch.setattr(run.time, "monotonic", lambda: next(ticks))
    made = document(minutes=1.5)
    assert report.entry(made["rows"][0])
    assert made["rows"][1]["not_measured"] == "1.5 minutes were over"
    assert "1.5 minutes were over" in shown(made)


def test_a_lost_device_ends_the_run_and_keeps_what_is_there(on_a_card, monkeypatch):
    first, second = tiny("relu2", "rms_norm")
    real = run.contest

    def contest(row, *args, **kwargs):
        if row is second:
            return {"failed": "AcceleratorError: illegal access", "fatal": "illegal access"}
        return real(row, *args, **kwargs)

    monkeypatch.setattr(run, "contest", contest)
    made = run.run([first, second, first], Clock(), say=lambda _: None)
    assert len(made["rows"]) == 2 and report.entry(made["rows"][0])["roofline"]
    assert "the device is lost" in shown(made)


def test_short_forwards_are_captured_with_their_bytes(on_a_card, monkeypatch):
    """A reference may wait for the device, so it never is."""
    clock = Clock()
    row = tiny("relu2")[0]
    run.contest(row, clock, LIMITS)
    assert clock.captured["relu2"] is None and clock.captured["eager"] is None  # floor above 100 us
    short = dataclasses.replace(row, cost=dataclasses.replace(row.cost, bytes=3e6))
    run.contest(short, clock, LIMITS)
    assert clock.captured["relu2"] is None and clock.captured["eager"] == 3e6
    monkeypatch.setattr(plans, "backend", lambda seen: "triton")
    run.contest(short, clock, LIMITS)
    assert clock.captured["relu2"] == 3e6
    backward = dataclasses.replace(short, way="backward")
    run.contest(backward, clock, LIMITS)
    assert clock.captured["relu2"] is None


def test_floors_are_made_from_the_better_ceilings(on_a_card, monkeypatch):
    fast = Ceilings(6.0e12, LIMITS.gemm, {})
    found = iter((LIMITS, fast))
    monkeypatch.setattr(run, "calibrate", lambda clock: next(found))
    made = document(ops=("relu2",))
    assert made["rows"][0]["floor"] == tiny("relu2")[0].cost.floor(6.0e12, {})
    assert made["ceilings"]["drift"]["copy"] == 1.0


def test_a_peer_that_breaks_while_it_is_made_ready_costs_only_itself(on_a_card):
    class Clock_(Clock):
        def ready(self, task, bytes):
            if task.function.__name__ == self.breaks:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().ready(task, bytes)

    clock = Clock_()
    clock.breaks = "eager"
    record = run.contest(tiny("relu2")[0], clock, LIMITS)
    reason = next(e for e in record["entries"] if e["name"] == "torch eager")["not_measured"]
    assert "out of memory" in reason and report.entry(record) and "failed" not in record
    clock.breaks = "relu2"
    assert run.contest(tiny("relu2")[0], clock, LIMITS)["failed"] == "out of memory"


def test_every_backend_is_proven_before_a_clock_is_opened(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(run._backends, "usable", lambda family, device: order.append(family))
    monkeypatch.setattr(run, "CudaClock", lambda device: order.append("clock"))
    run.open_clock()
    assert order == [*FAMILIES, "clock"]


def test_the_reference_judges_and_a_writing_peer_hurts_nobody():
    """Inside a judge every plan is the reference; a gradient that is written into is a copy."""
    row = tiny("relu2", way="backward")[0]
    seen = []

    def ours(x):
        seen.append(relu2_op.plan(x.numel(), "", ("triton", "reference")).backend)
        return row.subject.ours(x)

    subject = dataclasses.replace(row.subject, exact=ours)
    judge = Judge(dataclasses.replace(row, subject=subject), CPU)
    assert set(seen) == {"reference"}

    class Rude(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.relu() ** 2

        @staticmethod
        def backward(ctx, dy):
            return dy.mul_(0)

    kept = judge.grad.clone()
    judge.task(lambda x: Rude.apply(x)).once()
    assert torch.equal(judge.grad, kept)


@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f].backends])
def test_every_op_with_kernels_plans_where_the_bench_looks(family):
    """A choice made elsewhere would not be seen, nor could the reference be forced."""
    modules = [m for n, m in sys.modules.items() if re.fullmatch(r"nemokernels\.ops\.\w+\.op", n)]
    mine = [m for m in modules if any(v is FAMILIES[family] for v in vars(m).values())]
    assert mine and all(any(name.startswith("plan") for name in vars(m)) for m in mine)


def test_no_plan_escapes_the_bench():
    """Else its kernel would be held to itself where the reference is meant."""
    modules = [m for n, m in sys.modules.items() if n.startswith("nemokernels.ops.")]
    with_plans = [(m, vars(m)["plan"]) for m in modules if "plan" in vars(m)]
    assert len(with_plans) >= 18
    with plans.watched():
        assert [m.__name__ for m, plan in with_plans if m.plan is plan] == []


# Plans


def test_plans_are_seen_and_changed():
    problem = (1, 100, 4, 64, 128, (torch.bfloat16,), None, ("triton", "reference"), (9, 0), 132)
    original = ssd_op.plan
    with plans.watched() as seen:
        config = ssd_op.plan(*problem)
        ssd_op.plan(*problem)
    assert seen == [("ssd", config)] and plans.backend(seen) == "triton"
    assert plans.as_data(seen)[0]["op"] == "ssd" and plans.as_data(seen)[0]["chunk"] == 64
    with plans.watched(plans.to_reference) as seen:
        assert ssd_op.plan(*problem).backend == "reference"
    assert ssd_op.plan is original and plans.backend([]) == "reference"


@pytest.mark.parametrize("op", ["relu2", "causal_conv1d", "attention", "moe_experts"])
def test_every_kind_of_configuration_has_a_reference(op):
    import importlib

    module = importlib.import_module(f"nemokernels.ops.{op}.op")
    config = plans.to_reference(op, module.Config("triton"))
    assert config.backend == "reference" and plans.as_data([(op, config)])[0]["backend"]


# Table, file, plot


def shown(made):
    console = Console(width=220, record=True, file=open("/dev/null", "w"))
    report.show(made, console)
    return console.export_text()


def test_the_table_says_it_all(on_a_card):
    made = document(seconds=1e-3, ops=("causal_conv1d", "relu2"))
    for record in made["rows"]:
        report.entry(record, "torch eager")["median"] = 2e-3
        report.entry(record, "torch.compile")["median"] = 3e-3
    text = shown(made)
    assert "NVIDIA H100" in text and "copy 3.00 TB/s" in text and "bfloat16 784" in text
    assert "45%" in text and "93%" in text  # 0.447 of 1 ms; the goal
    assert "torch eager 2" in text and "2.00x" in text
    made["rows"][0]["goal"] = 0.00427  # of so little that microseconds are its limit
    assert "0.43%" in shown(made)
    assert "not measured: causal_conv1d: causal-conv1d is not installed" in text
    found = [line.split("│")[3].strip() for line in text.splitlines() if " reference " in line]
    assert "launches" in text and found == ["3", "3"]
    report.entry(made["rows"][0])["launches"] = None
    assert re.search(r"reference +│ +- │", shown(made))


def test_a_row_without_a_figure_says_why(on_a_card):
    made = document()
    made["rows"][0] |= {"entries": [], "failed": "wrong: result 0 [is] off"}
    assert "wrong: result 0 [is] off" in shown(made)


def test_files_and_plot(on_a_card, tmp_path):
    made = document(ops=("relu2", "ssd"))
    path = report.save(made, tmp_path)
    report.plot(made, path.with_suffix(".png"))
    assert path.parent == tmp_path / "nvidia-h100-80gb-hbm3"
    assert json.loads(path.read_text()) == json.loads(json.dumps(made))
    assert path.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in path.parent.iterdir() if p.suffix not in (".json", ".png")] == []


def test_a_run_that_is_killed_leaves_what_it_had(on_a_card, tmp_path):
    def die(text):
        if "rms_norm" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(tiny("relu2", "rms_norm"), Clock(), say=die,
                save=lambda made: report.save(made, tmp_path))  # fmt: skip
    (path,) = tmp_path.rglob("*.json")
    made = compare.load(path)
    assert len(made["rows"]) == 1 and report.entry(made["rows"][0])["roofline"] > 0
    assert compare.compare(made, made) == [] and "copy 3.00" in shown(made)


def test_power_is_parsed_and_may_be_absent(monkeypatch):
    assert len(machine.commit().rstrip("+")) == 40
    fields = ("power.draw", "clocks.sm")
    assert machine.parse(fields, "612.1 W, 1755 MHz\n") == {
        "power.draw": "612.1 W", "clocks.sm": "1755 MHz",
    }  # fmt: skip
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.query(CPU, fields) == {}
