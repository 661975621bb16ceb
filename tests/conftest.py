import os

# One thread per worker: two workers share two cores, and reductions keep one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from nemokernels import _build, _ext, testing

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if "all_of_csrc" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="a minute of compiling; `make csrc-all` does it")
        for item in items:
            if "all_of_csrc" in item.keywords:
                item.add_marker(skip)
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
def build_cache(tmp_path_factory, monkeypatch):
    """Compiled objects, shared by workers and runs: each is named by the hash of its inputs."""
    folder = tmp_path_factory.getbasetemp().parent / "nemokernels-build"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """csrc/ compiled for the CPU, loaded. Named by its sources' hash: workers and runs share it."""
    folder = tmp_path_factory.getbasetemp().parent / "nemokernels-build"
    folder.mkdir(exist_ok=True)
    torch.ops.load_library(_build.build_host(folder))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def native_device(request):
    """Where the kernels of csrc/ run: as loops on the CPU and, with a GPU, as they are."""
    if request.param == "cpu":
        request.getfixturevalue("host_library")
    else:
        assert _ext.reason(torch.device("cuda")) is None
    return torch.device(request.param)


@pytest.fixture
def hopper_device(native_device):
    """The same, of kernels that are written for sm_90 alone."""
    if native_device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90, for which these kernels are written")
    return native_device


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1234)
