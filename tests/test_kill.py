"""SIGKILL at any instant of training loses at most one save interval and changes no bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

WORKER = Path(__file__).with_name("kill_worker.py")
STEPS, KILLS = 24, 4


def start(out):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent)}
    command = [sys.executable, str(WORKER), str(out), str(STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def steps(lines):
    return [int(line.split()[1]) for line in lines if line.startswith("step")]


def test_killed_runs_end_where_an_uninterrupted_one_does(tmp_path):
    whole = start(tmp_path / "whole")
    assert steps(whole.communicate(timeout=240)[0].splitlines()) == list(range(1, STEPS + 1))
    instants, done = random.Random(0), 0
    for _ in range(KILLS):
        run = start(tmp_path / "killed")
        resumed = int(run.stdout.readline().split()[1])
        # The step that was printed last may have been saved or not; nothing before it is lost.
        assert resumed in (done, done + 1, max(done - 1, 0))
        time.sleep(instants.uniform(0.02, 0.6))
        run.send_signal(signal.SIGKILL)
        done = max([resumed, *steps(run.stdout.read().splitlines())])
        run.wait()
    last = start(tmp_path / "killed")
    assert last.wait(timeout=240) == 0
    assert not list((tmp_path / "killed/checkpoints").glob("*.incomplete"))
    want, got = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "killed")
    )
    assert want.keys() == got.keys()
    assert [name for name in want if not want[name].equal(got[name])] == []
