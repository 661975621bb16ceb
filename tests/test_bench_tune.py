"""Tables of measured configurations: looked up, found by racing, written; the plan stays pure."""

import dataclasses
import importlib
import json
import sys
import types

import pytest
import torch
from fake_clock import CPU, Clock

from nemokernels import _tuned
from nemokernels._cost import Cost
from nemokernels._registry import FAMILIES
from nemokernels.bench import check, commands, machine, plans, tune
from nemokernels.bench.rows import Subject
from nemokernels.ops.moe_experts import op as moe
from nemokernels.ops.relu2.op import Config as Relu2Config
from nemokernels.ops.w4a16 import op as w4a16

TUNABLE = ("ssd", "state_update", "moe_experts", "rms_norm")
CARD = "NVIDIA H100 80GB HBM3"


def test_bucket_rounds_sizes_and_keeps_the_rest():
    assert _tuned.bucket((1000, 1024, 80, torch.bfloat16, True)) == "1024 1024 128 bfloat16 True"
    assert _tuned.bucket((0, 1)) == "1 1"


def test_difference_and_its_inverse():
    old = moe.Config("triton", moe.Tile(64, 64, 32, 4, 2), moe.Tile(64, 128, 32, 4, 3))
    new = dataclasses.replace(old, rows=dataclasses.replace(old.rows, num_warps=8), tma=True)
    found = _tuned.difference(old, new)
    assert found == {"rows": {"num_warps": 8}, "tma": True}
    assert _tuned.changed(old, json.loads(json.dumps(found))) == new
    assert _tuned.difference(old, old) == {} and _tuned.changed(old, {}) == old
    ssd = importlib.import_module("nemokernels.ops.ssd.op")
    launch = _tuned.changed(ssd.Config("triton"), {"scan": [8, 1]})
    assert launch.scan == (8, 1)
    with pytest.raises(TypeError, match="no_such_field"):
        _tuned.changed(old, {"no_such_field": 1})


@pytest.fixture
def table(monkeypatch):
    entry = {CARD: {"1024 bfloat16": {"block": 512}}}
    monkeypatch.setattr(_tuned, "table", lambda op: entry if op == "relu2" else {})
    monkeypatch.setattr(_tuned, "card", lambda device: CARD)


def test_a_table_changes_its_problem_on_its_card_alone(table, monkeypatch):
    config = Relu2Config("triton", 2048, 4)
    problem = (1000, torch.bfloat16)
    assert _tuned.tuned("relu2", CPU, problem, config) == Relu2Config("triton", 512, 4)
    assert _tuned.tuned("relu2", CPU, (5000, torch.bfloat16), config) == config
    assert _tuned.tuned("ssd", CPU, problem, config) == config
    reference = Relu2Config("reference")
    assert _tuned.tuned("relu2", CPU, problem, reference) is reference
    monkeypatch.setattr(_tuned, "card", lambda device: "NVIDIA H200")
    assert _tuned.tuned("relu2", CPU, problem, config) == config


def test_without_a_table_no_device_is_asked():
    assert _tuned.tuned("relu2", CPU, (1,), Relu2Config("triton", 1)) == Relu2Config("triton", 1)


@pytest.mark.parametrize("op", TUNABLE)
@pytest.mark.parametrize("backward", [False, True])
def test_candidates_differ_from_the_plan_in_fields_json_can_hold(op, backward):
    module = importlib.import_module(f"nemokernels.ops.{op}.op")
    planned = {
        "ssd": lambda: module.Config("triton"),
        "state_update": lambda: module.Config("triton", 16, 128, 4),
        "moe_experts": lambda: module.Config("triton", moe.Tile(64, 64, 64, 4, 3),
                                             moe.Tile(64, 64, 64, 4, 3)),
        "rms_norm": lambda: module.RowConfig("triton", 1, 4096, 132, 4, 2),
    }[op]()  # fmt: skip
    found = list(module.candidates(planned, backward))
    assert 5 <= len(found) <= 40 and len(set(found)) > 4
    for config in found:
        assert config.backend in FAMILIES[op].backends
        fields = json.loads(json.dumps(_tuned.difference(planned, config)))
        assert _tuned.changed(planned, fields) == config


def test_candidates_of_weights_in_nvfp4():
    planned = w4a16.Config("csrc", w4a16.Tile(32, 32, 64, 4, 2))
    found = list(w4a16.candidates(planned, False))
    assert {c.tile.rows for c in found if c.backend == "csrc"} == {8, 16, 32, 256}
    assert any(c.backend == "triton" and c.tile.columns == 64 for c in found)
    for config in found:
        fields = json.loads(json.dumps(_tuned.difference(planned, config)))
        assert _tuned.changed(planned, fields) == config
    assert not list(w4a16.candidates(planned, True))


def test_a_swapped_tile_keeps_its_rows():
    config = moe.Config("triton", moe.Tile(16, 64, 128, 4, 4, True))
    assert {c.rows.rows for c in moe.candidates(config, False)} == {16}


# Racing


@dataclasses.dataclass(frozen=True)
class Knobs:
    backend: str
    warps: int = 4
    stages: int = 2


@pytest.fixture
def op(monkeypatch):
    """An op with a plan, whose result is wrong at 16 warps and which does not compile at 32."""
    module = types.ModuleType("nemokernels.ops.fake.op")
    monkeypatch.setitem(sys.modules, "nemokernels.ops.fake", types.ModuleType("fake"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.plan = lambda: Knobs("triton")
    module._plan = lambda n: _tuned.tuned("fake", CPU, (n,), module.plan())
    module.candidates = lambda config, backward: [
        *(dataclasses.replace(config, warps=w) for w in (4, 8, 16, 32)),
        *(dataclasses.replace(config, stages=s) for s in (1, 3)),
    ]
    module.used = []

    def ours(x):
        config = module._plan(x.numel())
        module.used.append(config)
        if config.warps == 32:
            raise RuntimeError("out of resource: shared memory")
        return x.double().to(x.dtype) * (2 if config.warps != 16 else 3)

    subject = Subject("fake", "fake", lambda make, n: dict(x=make.randn(n)), ours,
                      eager=lambda x: 2 * x, exact=lambda x: 2 * x, tiny={"n": 10})  # fmt: skip
    module.rows = [
        subject.row(label, cost=Cost(1), n=n) for label, n in (("a", 10), ("b", 12), ("c", 100))
    ]
    return module


class Racing(Clock):
    """8 warps and 3 stages are fastest; a stage is worth less than warps."""

    def sample(self, runner):
        config = runner.task._copied[2]
        return {4: 1.0, 8: 0.5}.get(config.warps, 0.1) * {1: 1.2, 2: 1.0, 3: 0.9}[config.stages]


def test_the_fastest_right_one_wins(op):
    said = []
    found = tune.tune(op.rows, Racing(), say=said.append)
    assert found == {"fake": {"16": {"warps": 8, "stages": 3}, "128": {"warps": 8, "stages": 3}}}
    assert any("shared memory" in line for line in said)
    assert any("error" in line for line in said)  # 16 warps: wrong
    assert not any(line.startswith(op.rows[1].id) for line in said)  # as row a: one kind
    assert op._plan(10) == Knobs("triton")  # nothing is left forced
    assert _tuned.tuned.__module__ == "nemokernels._tuned"


def test_what_was_found_is_saved_after_every_row_and_time_ends_it(op, monkeypatch):
    saved, now = [], iter([0.0, 0.0, 59.0, 61.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
    said, best = [], {"warps": 8, "stages": 3}
    found = tune.tune(op.rows, Racing(), say=said.append, minutes=1, save=saved.append)
    assert found == {"fake": {"16": best}} and saved == [found]
    assert said[-1] == f"{op.rows[2].id}: 1 minutes were over"


def test_a_table_has_the_last_word_in_what_is_seen(op, monkeypatch):
    op._plan = lambda n: dataclasses.replace(op.plan(), warps=1)
    with plans.watched() as seen:
        op._plan(10)
    assert seen == [("fake", Knobs("triton", 1))]
    with plans.watched(lambda name, config: Knobs("triton", 2)):
        assert op._plan(10) == Knobs("triton", 2)


def test_chance_is_no_gain(op):
    class Noise(Clock):
        times = iter([1.0, 1.3, 0.7] * 1000)

        def sample(self, runner):
            return next(self.times) * (0.95 if runner.task._copied[2].warps == 8 else 1.0)

    assert tune.tune(op.rows[:1], Noise(), say=lambda _: None) == {"fake": {}}


def test_an_op_without_candidates_or_kernels(op):
    del op.candidates
    with pytest.raises(ValueError, match="op 'fake' offers no candidates"):
        tune.tune(op.rows, Racing())
    op.candidates = lambda config, backward: []
    op.plan = lambda: Knobs("reference")
    said = []
    assert tune.tune(op.rows[:1], Racing(), say=said.append) == {"fake": {}}
    assert "nothing to tune" in said[0]


def test_forced_configurations_reach_copies_and_backwards(op):
    task = check.Judge(op.rows[0], CPU).task(op.rows[0].subject.ours)
    task = tune.Forced(task, "fake", Knobs("triton"), Knobs("triton", 8))
    op.used.clear()
    task.copy().run(None)
    task.once()
    assert op.used == [Knobs("triton", 8)] * 2


# Writing


def test_tables_are_merged(tmp_path):
    found = {"fake": {"16": {"warps": 8}}, "other": {}}
    assert tune.write(found, CARD, tmp_path) == [tmp_path / "fake-tuned.json"]
    tune.write({"fake": {"16": {"stages": 3}, "32": {"warps": 1}}}, CARD, tmp_path)
    tune.write({"fake": {"16": {"warps": 2}}}, "NVIDIA H200", tmp_path)
    assert json.loads((tmp_path / "fake-tuned.json").read_text()) == {
        CARD: {"16": {"warps": 8, "stages": 3}, "32": {"warps": 1}},
        "NVIDIA H200": {"16": {"warps": 2}},
    }


def test_the_command_tunes(op, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(commands, "open_clock", Racing)
    monkeypatch.setattr(commands, "rows", lambda names, quick: op.rows)
    monkeypatch.setattr(machine, "card", lambda device: {"name": CARD})
    assert commands.bench(("fake",), tune=True, out=tmp_path) == 0
    assert (tmp_path / "fake-tuned.json").exists() and "written to" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--tune needs the names of ops"):
        commands.bench(tune=True)


def test_tables_lie_in_the_package():
    assert _tuned.path("ssd").parent.joinpath("op.py").exists()
    assert _tuned.table("ssd") == json.loads(
        _tuned.path("ssd").read_text() if _tuned.path("ssd").exists() else "{}"
    )
