"""Train the tiny model to the end, saving every step; killed and restarted by test_kill.py."""

import sys
from pathlib import Path

import tiny
import torch

from nemokernels.train.trainer import Trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = tiny.settings(steps=int(sys.argv[2]))
    out = Path(sys.argv[1])
    t = Trainer(tiny.model(dtype=torch.float32), tiny.batches(settings), settings, out)
    t.resume()
    print("started", t.step, flush=True)
    t.run(save_every=1, on_step=lambda report: print("step", report.step, flush=True))
    t.export(out / "model")
