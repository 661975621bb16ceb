"""linear_cross_entropy with its vocabulary split over 2 and 4 ranks equals the single process."""

from pathlib import Path
from types import SimpleNamespace

import on_ranks
import pytest
import torch
import vocabulary_worker
from safetensors.torch import load_file

from nemokernels import linear_cross_entropy, testing

WORKER = Path(vocabulary_worker.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("vocabulary")
    on_ranks.torchrun(WORKER, 4, out)
    return out


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", vocabulary_worker.CASES)
def test_equals_the_single_process(results, name, world):
    ranks = [load_file(results / f"{name} {world} {rank}.safetensors") for rank in range(4)]
    low, want = vocabulary_worker.run(name), vocabulary_worker.run(name, wide=True)
    for first in range(0, 4, world):
        group = ranks[first : first + world]
        for what in ("loss", "dhidden"):
            assert all(torch.equal(r[what], group[0][what]) for r in group)
        got = {**group[0], "dweight": torch.cat([r["dweight"] for r in group])}
        for what, value in got.items():
            assert value.dtype == low[what].dtype
            if value.dtype == torch.float64:
                torch.testing.assert_close(value, want[what], rtol=1e-12, atol=1e-12)
            else:
                testing.assert_matches(value, want[what], low[what], what)


@pytest.mark.parametrize("name", vocabulary_worker.COMPILED)
def test_compiles_as_one_graph(results, name):
    for rank in range(4):
        want = load_file(results / f"{name} 2 {rank}.safetensors")
        for what, value in load_file(results / f"{name} {rank}.safetensors").items():
            assert torch.equal(value, want[what]), what


@pytest.mark.parametrize(
    ("rank", "change", "message"),
    [
        (0, dict(vocab_size=None), "`vocab_size` is None, expected it with `group`"),
        (0, dict(group=None), "`vocab_size` is 10, expected it with `group`"),
        (0, dict(vocab_size=0), "`vocab_size` must be at least 1, got 0"),
        (0, dict(weight=torch.ones(2, 8)), "`weight` has 2 rows on rank 0 of 4, expected 3 of 10"),
        (3, dict(), "`weight` has 3 rows on rank 3 of 4, expected 1 of 10"),
        (3, dict(vocab_size=8), "`weight` has 3 rows on rank 3 of 4, expected 2 of 8"),
    ],
)
def test_bad_input(rank, change, message):
    group = SimpleNamespace(size=lambda: 4, rank=lambda: rank)
    good = {"hidden": torch.ones(3, 8), "weight": torch.ones(3, 8), "targets": torch.arange(3)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**good, "group": group, "vocab_size": 10, **change})
