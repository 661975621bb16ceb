import os

# One thread per worker: two workers share two cores, and reductions keep one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from nemokernels import testing

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _reproducible():
    """The same random numbers for every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    """torch.empty returns NaN in every test, so that an unwritten element is seen."""
    with testing.poisoned_empty():
        yield


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1234)
