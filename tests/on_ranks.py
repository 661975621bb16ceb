"""What the tests of several processes share."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(worker: Path, world: int, *args) -> str:
    """Run the file under torchrun with so many processes. Return what it said, or fail with it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}", str(worker), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
