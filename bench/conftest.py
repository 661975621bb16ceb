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
    return lambda benchmark, row: record(benchmark, row, *device)


def record(benchmark, row, clock, ceilings, where):
    """Check and time a row, or fail. The call that pytest-benchmark times itself is empty."""
    result = describe(row) | contest(row, clock, ceilings)
    assert "failed" not in result, f"{row.id}: {result['failed']}"
    place(result, row, ceilings)
    benchmark.extra_info.update(result, ceilings=vars(ceilings), **where)
    benchmark.pedantic(lambda: None)
