"""The end of a process that was one of several."""

from pathlib import Path

import leave_worker
import on_ranks

from nemokernels.train import parallel


def test_no_thread_aborts_it():
    """What would abort needs the interpreter to shut down, and then does so now and then."""
    said = on_ranks.torchrun(Path(leave_worker.__file__), 4)
    assert said.count("last words") == 4 and "shutting down" not in said


def test_a_process_by_itself_goes_on():
    parallel.leave()
