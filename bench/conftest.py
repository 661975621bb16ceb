"""``pytest bench``: the rows as pytest-benchmark tests, on the GPU at hand.

Its own timer, the host's, is bookkeeping; the device's figures are in ``extra_info``.
"""

import pytest
import torch

from nemokernels.bench.ceilings import calibrate
from nemokernels.bench.machine import facts
from nemokernels.bench.run import contest, describe, open_clock, place


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", metafunc.module.ROWS, ids=lambda row: row.id)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="not measured: torch sees no CUDA device here"))


@pytest.fixture(scope="session")
def device():
    """The clock, the ceilings, and where they were taken."""
    clock = open_clock()
    return clock, calibrate(clock), facts(clock.device)


@pytest.fixture
def measure(device):
    clock, ceilings, where = device

    def run(benchmark, row):
        record = describe(row) | contest(row, clock, ceilings)
        assert "failed" not in record, record["failed"]
        place(record, row, ceilings)
        benchmark.extra_info.update(record, ceilings=vars(ceilings), **where)
        seconds = record["entries"][0]["median"]
        benchmark.pedantic(lambda: seconds, rounds=1)

    return run
