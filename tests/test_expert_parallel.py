"""Experts over 2 and 4 ranks give what one process gives, forward and backward."""

import json
from pathlib import Path
from types import SimpleNamespace

import expert_parallel_worker as worker
import fsdp_worker
import on_ranks
import pytest
import torch
from safetensors.torch import load_file

from nemokernels import moe_experts, testing
from nemokernels.models import exact, expert_parallel
from nemokernels.models.mixers import Experts


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("experts")
    on_ranks.torchrun(Path(worker.__file__), 4, out)
    return out


def in_parts(name, ranks):
    """What one process gives with the ranks' cast points: each part of the experts sums a token's
    slots and rounds, as it does the gradient of x; the parts are added up in float32."""
    (x, up, down, dy), route = worker.problem(name)
    wide, local = route.weights.dtype, worker.EXPERTS // ranks
    total = {what: 0.0 for what in ("y", "dx", "dup", "ddown", "dweights")}
    for rank in range(ranks):
        here = route.experts // local == rank
        leaves = [t.clone().requires_grad_() for t in (x, up, down, route.weights)]
        y = moe_experts(*leaves[:3], route._replace(weights=leaves[3] * here))
        y.backward(dy)
        parts = y.detach(), *(t.grad for t in leaves)
        for what, part in zip(total, parts):  # of the matrices and weights all but one are zero
            total[what] = total[what] + part.to(wide)
    return {what: t.to(wide if what == "dweights" else x.dtype) for what, t in total.items()}


def gathered(results, name, ranks, what):
    parts = [load_file(results / f"{name} {len(ranks)} {rank}.safetensors") for rank in ranks]
    return torch.cat([part[what] for part in parts])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", worker.CASES)
def test_equals_the_single_process(results, name, world):
    """To rounding in float64, else with the budget of the same roundings in one process."""
    low, want = in_parts(name, world), worker.run(name, wide=True)
    for first in range(0, 4, world):
        for what in want:
            got = gathered(results, name, range(first, first + world), what)
            assert got.dtype == low[what].dtype
            if got.dtype == torch.float64:
                torch.testing.assert_close(got, want[what], rtol=1e-12, atol=1e-12)
            else:
                testing.assert_matches(got, want[what], low[what], what)
            if what in ("dup", "ddown"):
                idle = want[what].flatten(1).abs().amax(1) == 0
                assert (got[idle] == 0).all()


@pytest.mark.parametrize("world", [2, 4])
def test_cast_points(results, world):
    """Wide sums are exact here: the stated roundings decide each bit."""
    low, once = in_parts("integers", world), worker.run("integers")
    for first in range(0, 4, world):
        for what, want in low.items():
            got = gathered(results, "integers", range(first, first + world), what)
            assert torch.equal(got, want), what
    assert not torch.equal(low["y"], once["y"]) and not torch.equal(low["dx"], once["dx"])


def test_sums_are_added_up_in_the_order_of_the_ranks():
    """1e8 - 1e8 + 1 in float32 is 1, 1 + 1e8 - 1e8 is 0; a token need not have a row everywhere."""
    rows = torch.tensor([1e8, 1.0, -1e8, 1e8, 3.0, -1e8, 1.0])[:, None]
    tokens = torch.tensor([0, 1, 0, 1, 3, 1, 0])
    total = expert_parallel._token_sum(rows, tokens, 4, [2, 3, 2])
    assert total.tolist() == [[1.0], [0.0], [0.0], [3.0]]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", worker.CASES)
def test_a_token_travels_once_to_a_rank(results, name, world):
    """And with it, forward, a weight and a number per slot; kept is what arrived."""
    (x, *_), route = worker.problem(name)
    X, F, local = worker.WIDTH, worker.INNER, worker.EXPERTS // world
    parts = route.experts.split(worker.split(name, world))
    holders = [[{e // local for e in token} for token in part.tolist()] for part in parts]
    for rank in range(4):
        seen = json.loads((results / f"{name} {world} {rank}.json").read_text())
        here = rank % world
        rows, slots = sum(map(len, holders[here])), parts[here].numel()
        came = sum(here in ranks for part in holders for ranks in part)
        entries = int((route.experts // local == here).sum())
        there, back = ([rows, X], [came, X]), ([came, X], [rows, X])
        one_each = ([slots], [entries])
        forward = [([world, 2],) * 2, there, one_each, one_each, back]
        backward = [there, back, one_each[::-1]]
        assert [tuple(pair) for pair in seen["exchanges"]] == forward + backward
        weights = entries * route.weights.itemsize + 2 * local * X * F * x.itemsize
        floats, integers = seen["kept"]
        assert floats == (came * X + entries * F) * x.itemsize + weights
        assert integers <= 8 * (rows + slots) + 4 * (entries + local + came + 1)


def test_no_row_per_slot_is_made(results):
    """A token whose eight experts live on four ranks has four rows at most, anywhere."""
    for rank in range(4):
        seen = json.loads((results / f"largest {rank}.json").read_text())
        assert 0 < seen["largest"] <= seen["copy"] / 2
        assert seen["same"] == [[8.0] * 64] * 5


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
