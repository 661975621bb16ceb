"""A clock that tells the times it was given, and runs of the bench on it."""

import dataclasses

import torch

from nemokernels.bench import machine, run
from nemokernels.bench.ceilings import Ceilings
from nemokernels.bench.clock import Runner
from nemokernels.bench.rows import rows

CPU = torch.device("cpu")
LIMITS = Ceilings(3.0e12, {"bfloat16": 784e12, "float32": 400e12, "float8_e4m3fn": 1e15}, {})
CARD = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "driver": "580.1"}


class Clock:
    """Seconds by the name of the function; ``drift`` makes every sample a little longer."""

    device = CPU

    def __init__(self, seconds=None, drift=0.0):
        self.seconds, self.drift, self.log, self.captured = seconds or {}, drift, [], {}

    def ready(self, task, bytes):
        name = getattr(task.function, "__name__", "?")
        task.run(task.prepare())
        self.captured[name] = bytes
        return Runner(task, method="events" if bytes is None else "graph")

    def sample(self, runner):
        name = getattr(runner.task.function, "__name__", "?")
        self.log.append(name)
        return self.seconds.get(name, 1e-3) * (1 + self.drift * len(self.log))

    def peak(self, task):
        return 4096

    def launches(self, task):
        self.log.append("launches")
        return 3


def put_on_a_card(monkeypatch):
    """Answer what only a GPU could."""
    monkeypatch.setattr(machine, "card", lambda device: dict(CARD))
    monkeypatch.setattr(machine, "power", lambda device: {"power.draw": "612 W"})
    monkeypatch.setattr(run, "calibrate", lambda clock: LIMITS)
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda **inputs: f(**inputs))


def tiny(*names, way="forward"):
    chosen = [next(r for r in rows((name,)) if r.way == way) for name in names]
    return [dataclasses.replace(r, shape=dict(r.subject.tiny)) for r in chosen]


def document(seconds=1e-3, ops=("relu2", "rms_norm"), **options):
    return run.run(tiny(*ops), Clock(dict(relu2=seconds, ours=seconds)), say=lambda _: None,
                   **options)  # fmt: skip
