"""FSDP2 over gloo: every gradient equals the single process's; checkpoints reshard."""

import functools
from pathlib import Path

import families
import fsdp_worker
import on_ranks
import pytest
import tiny
import torch
from safetensors.torch import load_file

from nemokernels import testing
from nemokernels.models import from_pretrained
from nemokernels.train.trainer import Trainer

torchrun = functools.partial(on_ranks.torchrun, Path(fsdp_worker.__file__))


OTHERS = [*families.FAMILIES, "vision", "reward"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes wrote, by family. They are started once: that takes longest."""
    out = tmp_path_factory.mktemp("fsdp")
    torchrun(2, out, "train", "nemotron_h", *OTHERS)
    return out


@pytest.fixture(scope="module")
def world2(folder):
    return folder / "nemotron_h"


def single(dtype, out, family="nemotron_h"):
    t = fsdp_worker.trainer(family, out)
    t.model.to(dtype)
    t.backward()
    return {name: p.grad for name, p in t.objective.named_parameters()}


def test_every_gradient_equals_the_single_process(world2, tmp_path):
    got = load_file(world2 / "grads.safetensors")
    exact, plain = single(torch.float64, tmp_path), single(torch.float32, tmp_path)
    assert got.keys() == exact.keys()
    for name in exact:
        testing.assert_matches(got[name], exact[name], plain[name], name)
        assert got[name].abs().max() > 0, name


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family, folder, tmp_path):
    """Gradients, and the model that the ranks export: with a tied head, one weight for both. One
    rank alone has a picture; pairs of responses are split over the ranks."""
    out = folder / family
    got = load_file(out / "grads.safetensors")
    exact, plain = (single(dtype, tmp_path, family) for dtype in (torch.float64, torch.float32))
    assert got.keys() == exact.keys()
    for name in exact:
        testing.assert_matches(got[name], exact[name], plain[name], name)
        alike = (family, name) == ("reward", "model.model.norm.bias")  # it moves both of a pair
        assert alike or got[name].abs().max() > 0, name
    saved, trained = (
        from_pretrained(out / "model-train"),
        load_file(out / "train.safetensors"),
    )
    assert {f"model.{name}" for name in saved.state_dict()} == trained.keys()
    for name, value in saved.state_dict().items():
        assert torch.equal(value, trained[f"model.{name}"]), name


def test_what_is_sharded_and_what_is_not(world2):
    sharded = set((world2 / "sharded.txt").read_text().split())
    whole = set(load_file(world2 / "grads.safetensors")) - sharded
    assert {n.rsplit(".", 1)[-1] if "gate" not in n else "gate" for n in whole} == {
        "A_log", "D", "dt_bias", "gate",
    }  # fmt: skip
    assert any("experts.up_proj" in n for n in sharded)


def test_checkpoint_written_by_two_ranks_loads_in_one(world2):
    settings = tiny.settings()
    t = Trainer(tiny.model(dtype=torch.float32, seed=5), tiny.batches(settings), settings,
                world2 / "run")  # fmt: skip
    assert t.resume() == 3
    want = load_file(world2 / "train.safetensors")
    got = t.objective.state_dict()
    assert [n for n in want if not torch.equal(want[n], got[n])] == []
    t.train_step()


def test_checkpoint_written_by_two_ranks_loads_in_two(world2):
    torchrun(2, world2.parent, "resume", "nemotron_h")
    want, got = load_file(world2 / "train.safetensors"), load_file(world2 / "resume.safetensors")
    assert [n for n in want if not torch.equal(want[n], got[n])] == []


def test_export_from_shards_is_the_whole_model(world2):
    model = from_pretrained(world2 / "model-train", dtype=torch.float32)
    want = load_file(world2 / "train.safetensors")
    got = {f"model.{n}": p for n, p in model.state_dict().items()}
    assert want.keys() == got.keys()
    assert [n for n in want if not torch.equal(want[n], got[n])] == []
