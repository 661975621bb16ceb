"""What the tests of several processes share."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(worker: Path, world: int, *args) -> None:
    """Run the file under torchrun with so many processes and fail with what it said."""
    done = launch(world, worker, *args, PYTHONPATH=str(worker.parent))
    assert done.returncode == 0, done.stderr[-4000:]


def launch(world: int, *program, **env: str) -> subprocess.CompletedProcess:
    """torchrun on this machine: a file, or ``-m`` and a module, and its arguments."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}", *map(str, program)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
