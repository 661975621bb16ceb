"""Two runs against each other, and the command: what is refused, what turns red, what is shown."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_clock import CARD, LIMITS, Clock, document, put_on_a_card, tiny

from nemokernels.bench import commands, compare, conftest, report
from nemokernels.bench.rows import rows
from nemokernels.train import cli


@pytest.fixture
def on_a_card(monkeypatch):
    put_on_a_card(monkeypatch)


# Comparison


def pair(on_a_card, change=lambda made: None):
    old, new = document(), document()
    change(new)
    return old, new


def slower(by, mad=0.0):
    def change(made):
        ours = report.entry(made["rows"][0])
        ours["median"] *= 1 + by
        ours["roofline"] /= 1 + by
        ours["mad"] = mad * ours["median"]

    return change


def test_equal_runs_are_equal(on_a_card):
    assert compare.compare(*pair(on_a_card)) == []


@pytest.mark.parametrize("by, mad, red", [
    (0.02, 0.0, False), (0.05, 0.0, True), (0.05, 0.02, False), (0.08, 0.02, True),
    (-0.5, 0.0, False),
])  # fmt: skip
def test_a_drop_turns_it_red(on_a_card, by, mad, red):
    worse = compare.compare(*pair(on_a_card, slower(by, mad)))
    assert bool(worse) == red
    assert not red or "roofline" in worse[0] and "allowed" in worse[0]


def test_the_spread_of_either_run_counts(on_a_card):
    old, new = pair(on_a_card, slower(0.05))
    report.entry(old["rows"][0])["mad"] = 0.02 * report.entry(old["rows"][0])["median"]
    assert compare.compare(old, new) == []


def test_missing_and_failed_rows_are_red(on_a_card):
    old, new = pair(on_a_card, lambda made: made["rows"].pop())
    assert compare.compare(old, new) == [f"{old['rows'][1]['id']}: missing (no such row)"]
    old, new = pair(on_a_card)
    new["rows"][0] |= {"entries": [], "failed": "wrong: result 0"}
    assert compare.compare(old, new) == [f"{old['rows'][0]['id']}: missing (wrong: result 0)"]
    assert compare.compare(new, old) == []  # a new row is no harm


def test_other_cards_and_formats_are_refused(on_a_card, tmp_path, capsys):
    old, new = pair(on_a_card, lambda made: made["card"].update(name="NVIDIA H200"))
    with pytest.raises(compare.Incomparable, match="H100.*H200.*cannot be compared"):
        compare.compare(old, new)
    old, new = pair(on_a_card, lambda made: made.update(schema=0))
    with pytest.raises(compare.Incomparable, match="schema"):
        compare.compare(old, new)
    (tmp_path / "bad.json").write_text("{}")
    assert compare.main([str(tmp_path / "bad.json")] * 2) == 2
    assert "not a bench result" in capsys.readouterr().err
    assert compare.main([]) == 2


def test_exit_codes_of_a_comparison(on_a_card, tmp_path, capsys):
    old, new = pair(on_a_card, slower(0.5))
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, made in zip(paths, (old, new)):
        path.write_text(json.dumps(made))
    assert compare.main([str(p) for p in paths]) == 1
    assert "1 worse of 2 rows" in capsys.readouterr().out
    assert compare.main([str(paths[0])] * 2) == 0


# The command


def command(capsys, *args):
    code = cli.main(["bench", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_without_a_gpu_nothing_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = command(capsys, "ssd", "--out", tmp_path)
    assert code == 1 and "not measured: torch sees no CUDA device here" in err
    assert out == "" and not list(tmp_path.iterdir())


def test_the_command_writes_prints_and_fails_on_a_wrong_row(
    on_a_card, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(commands, "open_clock", Clock)
    monkeypatch.setattr(commands, "rows", lambda names, quick: tiny(*names))
    code, out, _ = command(capsys, "relu2", "rms_norm", "--out", tmp_path, "--no-peers")
    assert code == 0 and "written to" in out and "roofline" in out
    (found,) = (tmp_path / "nvidia-h100-80gb-hbm3").glob("*.json")
    assert len(json.loads(found.read_text())["rows"]) == 2
    assert found.with_suffix(".png").exists()
    code, out, _ = command(capsys, "--compare", found, found)
    assert code == 0 and "0 worse of 2 rows" in out

    row = tiny("relu2")[0]
    subject = dataclasses.replace(row.subject, ours=torch.relu, exact=row.subject.ours)
    wrong = dataclasses.replace(row, subject=subject)
    monkeypatch.setattr(commands, "rows", lambda *_, **__: [wrong])
    assert command(capsys, "--out", tmp_path)[0] == 1


def test_an_unknown_op_is_an_error_of_the_user(capsys):
    code, _, err = command(capsys, "sdd")
    assert code == 2 and "no bench for op 'sdd'" in err


def test_a_row_under_pytest_fills_extra_info_or_fails(on_a_card):
    class Benchmark:
        def __init__(self):
            self.extra_info, self.calls = {}, 0

        def pedantic(self, function):
            self.calls += 1
            function()

    benchmark, row = Benchmark(), tiny("relu2")[0]
    conftest.record(benchmark, row, Clock(), LIMITS, {"commit": "abc", "card": CARD})
    info = json.loads(json.dumps(benchmark.extra_info))
    assert benchmark.calls == 1 and info["id"] == row.id and info["commit"] == "abc"
    assert info["ceilings"]["copy"] == LIMITS.copy and info["entries"][0]["roofline"] > 0
    subject = dataclasses.replace(row.subject, ours=torch.relu, exact=row.subject.ours)
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="relu2 forward .*: wrong: result 0"):
        conftest.record(benchmark, dataclasses.replace(row, subject=subject), Clock(), LIMITS, {})
    assert benchmark.extra_info == {} and benchmark.calls == 0


def test_the_suite_is_collected_and_skipped_without_a_gpu():
    """In a process of its own: pytest-benchmark, and the conftest of the bench."""
    where = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "bench/bench_relu2.py", "bench/bench_ssd.py"],
        cwd=where, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    expected = len(rows(("relu2", "ssd")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{expected} skipped" in done.stdout and "not measured: torch sees" in done.stdout
