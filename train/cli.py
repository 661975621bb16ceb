"""The command line of nemokernels: one function per command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

import nemokernels
from nemokernels.bench.commands import bench
from nemokernels.models import CheckpointError, ConfigError
from nemokernels.train import report
from nemokernels.train.checkpoint import ResumeError
from nemokernels.train.commands import generate, train
from nemokernels.train.data import DataError
from nemokernels.train.demo import demo
from nemokernels.train.model_commands import models, slice_

# Errors that a user can cause and fix. Any other is a bug here and keeps its traceback.
USER_ERRORS = (CheckpointError, ConfigError, DataError, ResumeError, OSError, ValueError)


def env(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> int:
    """Print versions, devices, the compiled library, and every op's backend with the reason.

    Args:
        as_json: print JSON.
    """
    if as_json:
        print(json.dumps(report.facts(), indent=1))
    else:
        report.print_env(Console())
    return 0


def selftest() -> int:
    """Check every backend that can run here against the reference, and record the verdicts."""
    return 0 if report.run_selftest(Console()) else 1


def build(archs: tuple[str, ...] = (), jobs: int | None = None) -> int:
    """Compile the CUDA kernels with nvcc for this machine's GPU or for the architectures given.

    Args:
        archs: for example 90a 100a; 100a and 120a need CUTLASS's headers.
        jobs: how many compilers run at a time, by default one per processor; one that reads CUTLASS
            takes up to 6 GB.
    """
    from nemokernels._build import build

    path = build(list(archs) or None, verbose=True, jobs=jobs)
    Console().print(f"built {path}", highlight=False)
    return 0


COMMANDS = {
    "env": env,
    "selftest": selftest,
    "demo": demo,
    "train": train,
    "generate": generate,
    "models": models,
    "slice": slice_,
    "bench": bench,
    "build": build,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 on success, 1 if a check failed, 2 after an error of the user's."""
    args = sys.argv[1:] if argv is None else argv
    if list(args) == ["--version"]:
        print(f"nemokernels {nemokernels.__version__}")
        return 0
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="nemokernels",
            description="Fused GPU primitives for NVIDIA's Nemotron models. "
            "--version prints the version.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except USER_ERRORS as error:
        print(f"nemokernels: {_reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nemokernels: interrupted", file=sys.stderr)
        return 130


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
