"""Damaged checkpoints of every family: one line that names the tensor or file, and no model."""

import itertools
import json
import os
import re
import shutil

import families
import pytest
import test_blocks
import torch
import vl
from safetensors.torch import load_file, save_file

from nemokernels.models import CheckpointError, RewardModel, from_pretrained, save_pretrained
from nemokernels.models import checkpoint as loading

INDEX = "model.safetensors.index.json"
MODELS = {
    **{family: lambda f=family: families.model(f, dtype=torch.bfloat16) for family in
       families.FAMILIES},
    "nemotron_h_puzzle": lambda: test_blocks.model(dtype=torch.bfloat16),
    "reward": lambda: RewardModel.on(families.model("nemotron", dtype=torch.bfloat16), "score"),
    "vision": lambda: vl.model(dtype=torch.bfloat16),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def good(request, tmp_path_factory):
    """A checkpoint of two shards or more."""
    folder = tmp_path_factory.mktemp(request.param) / "good"
    model = MODELS[request.param]()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    save_pretrained(model, folder, max_shard_bytes=size // 2 + 100)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def refusal(good, tmp_path, monkeypatch):
    """What loading a mutant says, in one line after the folder and the count."""
    monkeypatch.setattr(loading, "build", lambda *a, **k: pytest.fail("a model was built"))
    number = itertools.count()

    def attempt(mutate):
        folder = tmp_path / f"mutant{next(number)}"
        shutil.copytree(good, folder)
        mutate(folder)
        with pytest.raises(CheckpointError) as caught:
            from_pretrained(folder)
        shutil.rmtree(folder)
        head, *lines = str(caught.value).splitlines()
        assert str(folder) in head and len(lines) <= 1, caught.value
        assert not lines or head == f"{folder}: 1 problem"
        return lines[0] if lines else head

    return attempt


def place(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def rewrite(change, name):
    """Change the tensors of the shard that holds ``name``; the index follows."""

    def mutate(folder):
        path = place(folder, name)
        values = load_file(path)
        change(values)
        os.remove(path)
        if values:
            save_file({key: value.contiguous() for key, value in values.items()}, path)
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        index = {key: file for key, file in index.items() if file != path.name}
        index |= dict.fromkeys(values, path.name)
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))

    return mutate


def one_of_each(folder):
    """A tensor of every name, layers and experts aside."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    leaves = {re.sub(r"\.\d+\.", ".", name): name for name in index}
    return {name: load_file(folder / index[name])[name] for name in leaves.values()}


def test_a_tensor_is_missing_renamed_or_of_another_shape_or_dtype(good, refusal):
    for name, value in one_of_each(good).items():
        assert f"{name}: missing" in refusal(rewrite(lambda v, n=name: v.pop(n), name))
        wide = rewrite(lambda v, n=name: v.update({n: v[n].to(torch.float16)}), name)
        assert f"{name}: " in refusal(wide)
        longer = torch.cat([value, value[-1:]])
        said = refusal(rewrite(lambda v, n=name, t=longer: v.update({n: t}), name))
        assert name in said and ("shape" in said or "not a square grid" in said)


def test_a_tensor_too_many(good, refusal):
    name = next(iter(one_of_each(good)))
    for extra in ("extra", name + ".bias", f"{name.rpartition('.')[0]}.weight_scale"):
        said = refusal(rewrite(lambda v, e=extra: v.update({e: torch.ones(3)}), name))
        assert f"{extra}: " in said


def test_a_shard_is_cut_short_empty_or_gone(good, refusal):
    for path in good.glob("*.safetensors"):
        file, size = path.name, path.stat().st_size
        for left in (0, 7, 20, size // 2, size - 1):
            said = refusal(lambda f, n=left, file=file: os.truncate(f / file, n))
            assert f"{file}: not a safetensors file" in said
        assert file in refusal(lambda folder, file=file: os.remove(folder / file))
