"""Experts over 2 and 4 ranks give what one process gives, forward and backward."""

from pathlib import Path
from types import SimpleNamespace

import expert_parallel_worker
import fsdp_worker
import on_ranks
import pytest
import torch
from safetensors.torch import load_file

from nemokernels import testing
from nemokernels.models import exact
from nemokernels.models.mixers import Experts

WORKER = Path(expert_parallel_worker.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("experts")
    on_ranks.torchrun(WORKER, 4, out)
    return out


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", expert_parallel_worker.CASES)
def test_equals_the_single_process(results, name, world):
    low, want = expert_parallel_worker.run(name), expert_parallel_worker.run(name, wide=True)
    for first in range(0, 4, world):
        ranks = range(first, first + world)
        parts = [load_file(results / f"{name} {world} {rank}.safetensors") for rank in ranks]
        got = {what: torch.cat([part[what] for part in parts]) for what in want}
        assert torch.equal(got["y"], low["y"])
        for what, value in got.items():
            assert value.dtype == low[what].dtype
            if value.dtype == torch.float64:
                torch.testing.assert_close(value, want[what], rtol=1e-12, atol=1e-12)
            else:
                testing.assert_matches(value, want[what], low[what], what)
        idle = want["dup"].flatten(1).abs().amax(1) == 0
        assert (got["dup"][idle] == 0).all() and (got["ddown"][idle] == 0).all()


def test_experts_must_split_evenly_and_not_in_exact_mode():
    experts = Experts(6, 4, 8, dtype=torch.float32)
    mesh = SimpleNamespace(size=lambda: 4, get_local_rank=lambda: 0)
    with pytest.raises(ValueError, match="6 experts cannot be split evenly over 4 ranks"):
        experts.split(mesh)
    experts.mesh = mesh
    with exact(), pytest.raises(ValueError, match="exact mode computes one row at a time"):
        experts(torch.ones(1, 4), None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    on_ranks.torchrun(Path(fsdp_worker.__file__), 4, out, "train", *fsdp_worker.CHANGES)
    return out


def single(out, dtype):
    t = fsdp_worker.trainer("nemotron_h", out)
    t.model.to(dtype)
    t.backward()
    counts = torch.cat(t.model.expert_counts)
    return {name: p.grad for name, p in t.objective.named_parameters()}, counts


@pytest.mark.parametrize("kind", fsdp_worker.CHANGES)
def test_gradients_of_the_sharded_trainer(kind, trained, tmp_path):
    got = load_file(trained / kind / "grads.safetensors")
    (exact, counts), (plain, _) = (single(tmp_path, d) for d in (torch.float64, torch.float32))
    assert got.keys() == exact.keys()
    assert torch.equal(load_file(trained / kind / "counts.safetensors")["counts"], counts)
    for name in exact:
        testing.assert_matches(got[name], exact[name], plain[name], name)
        assert got[name].abs().max() > 0, name


@pytest.mark.parametrize("kind", fsdp_worker.CHANGES)
def test_checkpoint_and_export_know_nothing_of_the_ranks(kind, trained, tmp_path):
    """One process continues from the four; its export has the same bytes."""
    out = trained / kind
    one, want = fsdp_worker.trainer("nemotron_h", out / "run"), load_file(out / "train.safetensors")
    assert one.resume() == 3
    got = one.objective.state_dict()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    one.export(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (out / "model-train" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    one.train_step()
