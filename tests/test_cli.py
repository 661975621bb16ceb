"""The command line: what a user types, what they see when it is wrong."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

import nemokernels
from nemokernels.models import save_pretrained
from nemokernels.train import cli, demo, log
from nemokernels.train.data import Corpus
from nemokernels.train.log import Log, read
from nemokernels.train.trainer import Report


def run(capsys, *args):
    code = cli.main([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in Hugging Face layout, and text to train on."""
    path = tmp_path_factory.mktemp("cli")
    save_pretrained(tiny.model(dtype=torch.float32), path / "model")
    tiny.tokenizer().save(str(path / "model" / "tokenizer.json"))
    (path / "text.txt").write_text("\n".join(tiny.TEXTS))
    return path


def test_env_json_names_every_op(capsys):
    code, out, _ = run(capsys, "env", "--json")
    data = json.loads(out)
    assert code == 0 and data["nemokernels"] == nemokernels.__version__
    assert {"ssd", "causal_conv1d", "moe_experts", "rms_norm"} <= set(data["ops"])
    for entry in data["ops"].values():
        assert entry["chosen"] and all(entry["rejected"].values())


def test_env_and_selftest_print_every_op(capsys):
    code, out, _ = run(capsys, "env")
    assert code == 0 and "causal_conv1d" in out and "compiled library" in out
    code, out, _ = run(capsys, "selftest")
    assert code == 0 and "passed" in out and "failed" not in out


def test_version_is_printed(capsys):
    assert run(capsys, "--version") == (0, f"nemokernels {nemokernels.__version__}\n", "")


def test_help_reads_without_a_model(capsys):
    for command, words in (
        ((), "--version"),
        (("train",), "AdamW"),
        (("generate",), "--speculate"),
        (("demo",), "--steps"),
        (("bench",), "leave out the peer libraries"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--help"])
        assert stop.value.code == 0
        out, err = capsys.readouterr()
        assert words in " ".join(out.split()) and not err and "``" not in out


def test_train_then_generate(capsys, folder, tmp_path):
    args = ["--model", folder / "model", "--data", folder / "text.txt", "--out", tmp_path / "run"]
    sizes = ["--steps", 3, "--seq-len", 32, "--windows", 2, "--save-every", 2]
    code, out, err = run(capsys, "train", *args, *sizes)
    assert code == 0 and "continues" not in out, err
    assert (tmp_path / "run/loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [r.step for r in read(tmp_path / "run/log.jsonl")] == [1, 2, 3]
    code, out, err = run(capsys, "train", *args, *sizes[2:], "--steps", 4)  # a rerun continues
    assert code == 0 and "continues after step 3 of 4" in out, err
    assert [r.step for r in read(tmp_path / "run/log.jsonl")] == [1, 2, 3, 4]
    ask = [tmp_path / "run/model", "--prompt", "item", "the", "--max-new-tokens", 5, "--json"]
    code, out, err = run(capsys, "generate", *ask, "--speculate", 2)
    answer = json.loads(out)
    assert code == 0 and len(answer["texts"]) == 2 and answer["drafted"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "/absent", "--prompt", "x"], "/absent: no such folder"),
        (["generate", "{f}/model", "--prompt"], "--prompt names no text"),
        (["generate", "{f}/model", "--prompt", "caf\udce9"], "--prompt: not UTF-8 text"),
        (["train", "--model", "/absent.json", "--data", "{f}/text.txt", "--out", "{t}/o",
          "--steps", "1"], "/absent.json: cannot be opened (No such file"),
        (["train", "--model", "no-such-variant", "--data", "{f}/text.txt", "--out", "{t}/o",
          "--steps", "1"], "no variant 'no-such-variant'"),
        (["train", "--model", "Minitron 8B", "--data", "{f}/text.txt", "--out", "{t}/o", "--steps",
          "1"], "Minitron 8B is a model's name, beside which lies no tokenizer.json"),
        (["generate", "{f}/model", "--prompt", "x", "--temperature", "-1"],
         "generate: `temperature` must be finite"),
        (["train", "--model", "no-such-variant", "--data", "{f}/text.txt", "--out", "{t}/o",
          "--steps", "1", "--tokenizer", "{f}/model/tokenizer.json"], "no-such-variant"),
        (["train", "--model", "{f}/model", "--data", "/absent", "--out", "{t}/o", "--steps", "1"],
         "/absent: no such file or folder"),
        (["train", "--model", "{f}/model", "--data", "{f}/text.txt", "--out", "{t}/o",
          "--steps", "0"], "steps must be at least 1"),
        (["train", "--model", "{f}/model", "--data", "{t}/latin1", "--out", "{t}/o", "--steps",
          "1"], "not UTF-8"),
        (["train", "--model", "{f}/model", "--data", "{f}/text.txt", "--out", "{t}/latin1/o",
          "--steps", "1", "--seq-len", "32", "--windows", "2"],
         "nemokernels: {t}/latin1/o: Not a directory"),
        (["train", "--model", "{f}/model", "--data", "{f}/text.txt", "--out", "{t}/o", "--steps",
          "1", "--tokenizer", "{f}/text.txt"], "not a tokenizer.json"),
        (["demo", "--data", "/absent", "--out", "{t}/o"], "/absent: no such file or folder"),
        (["demo", "--steps", "0", "--out", "{t}/o"], "steps must be at least 1, got 0"),
        (["bench", "--compare", "/absent", "/absent"], "/absent: cannot be opened"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(capsys, folder, tmp_path, args, message):
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    *args, message = (a.format(f=folder, t=tmp_path) for a in (*args, message))
    code, _, err = run(capsys, *args)
    assert code == 2
    assert (
        err.startswith(("nemokernels: ", "nemokernels bench: "))
        and err.count("\n") == 1
        and message in err
    )
    assert not (tmp_path / "o").exists()


def test_console_script_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "nemokernels.train.cli", "generate", "/absent", "--prompt", "x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr


def report(step, loss):
    return Report(step, [loss, loss + 1], 1e-3, 1.0, 64, 0.5, 1.0)


def test_demo_verdicts_can_fail():
    good = {"tokens": [[1, 2]], "drafted": 9, "mean_accepted_length": 1.8}
    reports = [report(1, 8.0), report(2, 4.0)]
    assert all(demo.verdicts(reports, good, good).values())
    weak = [report(1, 8.0), report(2, 5.7)]
    assert not all(demo.verdicts(weak, good, good).values())
    for change in (dict(drafted=0), dict(mean_accepted_length=1.3), dict(tokens=[[1, 3]])):
        assert not all(demo.verdicts(reports, good, {**good, **change}).values())


def test_demo_prompts_are_not_empty():
    """However few texts there are, and however short."""
    tokenizer = tiny.tokenizer()
    for texts in (["a"], ["a", "bc"], tiny.TEXTS[:9]):
        corpus = Corpus.from_texts(tokenizer, texts)
        prompts = demo.beginnings(tokenizer, corpus)
        assert len(prompts) == min(4, len(texts))
        assert all(p and p[0] == t[0] for p, t in zip(prompts, texts))


def test_log_drops_what_a_lost_checkpoint_had_written(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path, step=0, steps=3, show=True) as written:
        for step in (1, 2, 3):
            written(report(step, 1.0))
    path.write_text(path.read_text() + '{"step": 4, "los')
    with Log(path, step=2, steps=3, show=True) as written:
        written(report(3, 0.5))
    assert [(r.step, r.losses[0]) for r in read(path)] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_log_writes_lines_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    """The first step's, then one every ten seconds; ranks that show nothing write none."""
    clock = iter((100.0, 100.0, 109.9, 110.0, 110.0))  # asked twice where a line is written
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Log(tmp_path / "log.jsonl", step=0, steps=3, show=True) as shown:
        for step in (1, 2, 3):
            shown(report(step, float(step)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert lines == ["step 1/3  loss 1.000  128 tok/s", "step 3/3  loss 3.000  128 tok/s"]
    with Log(tmp_path / "log.jsonl", step=0, steps=3, show=False) as hidden:
        hidden(report(1, 1.0))
    assert not capsys.readouterr().out
