"""README and CONTRIBUTING say what is there: their code runs, the tables are complete."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import hybrids
import pytest
import tiny
import torch

import nemokernels
from nemokernels._registry import FAMILIES
from nemokernels.models import (
    from_pretrained,
    list_variants,
    megatron_shapes,
    save_pretrained,
)
from nemokernels.models.families import CONFIGS, parse_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_op_example_runs_and_is_short():
    scope = {}
    exec(BLOCKS[0], scope)
    assert scope["y"].shape == (2, 1000, 8, 64) and scope["x"].grad.isfinite().all()
    assert len(BLOCKS[0].splitlines()) <= 12


def test_model_example_runs(tmp_path):
    save_pretrained(tiny.model(dtype=torch.float32), tmp_path / "model")
    tiny.tokenizer().save(str(tmp_path / "model/tokenizer.json"))
    code = BLOCKS[1].replace("folder/with/safetensors", str(tmp_path / "model"))
    scope = {}
    exec(code.replace('"cuda"', '"cpu"').replace("256", "4"), scope)
    assert len(scope["result"].tokens[0]) == 4


def test_megatron_example_runs(tmp_path, monkeypatch):
    model = hybrids.model("M-", mlp_hidden_act="gelu")
    shapes = megatron_shapes(model.config)
    (tmp_path / "mp_rank_00").mkdir()
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"model": tensors, "args": None}, tmp_path / "mp_rank_00/model_optim_rng.pt")
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[2].replace('"nvidia/mamba2-hybrid-8b-3t-4k"', "config")
    exec(code, {"config": model.config})
    values = from_pretrained("hybrid-8b").state_dict()
    assert torch.equal(values["lm_head.weight"], tensors["output_layer.weight"])


def test_variant_of_the_example():
    text = re.search(r"```json\n(.*?)```", CONTRIBUTING, re.S)[1]
    entry, (same,) = json.loads(text), [v for v in list_variants() if v.name == "Minitron 8B"]
    assert entry["name"] == same.name and entry["hub_id"] == same.hub_id
    assert (entry["parameters"], entry["tensors"]) == (same.parameters, same.tensors)
    ours = dataclasses.replace(parse_config(entry["config"]), extra={})
    assert ours == dataclasses.replace(same.config, extra={})
    assert len(text.splitlines()) <= 10


@pytest.mark.parametrize("model_type", CONFIGS)
def test_model_table_has_every_model_type(model_type):
    assert re.search(rf"^\|.*`{model_type}`.*\|.*\|$", README, re.M)


@pytest.mark.parametrize("family", FAMILIES)
def test_op_table_has_every_op_and_its_backends(family):
    row = next((line for line in README.splitlines() if f"`{family}`" in line), None)
    assert row is not None and row.startswith("|"), f"{family} is not in the op table"
    words = {"triton": "Triton", "csrc": "CUDA"}
    for backend, word in words.items():
        assert (word in row) == (backend in FAMILIES[family].backends), f"{family}: {backend}"


def test_dependency_table_has_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in {r for group in groups for r in group}:
        name = re.match(r"[A-Za-z0-9_-]+", requirement).group()
        assert name in README, f"{name} is missing from the dependency table"


def test_a_stranger_finds_the_way():
    """Short, and in this order; what it links to is there."""
    headings = re.findall(r"^## (.*)$", README, re.M)
    assert headings[:3] == ["Install", "Use an op", "Use a model"]
    assert len(README.splitlines()) <= 200
    for name in re.findall(r"\]\((\S+?)\)", README):
        assert (ROOT / name).is_file(), name


def test_names_in_the_tables_are_exported():
    """Of the ops: what is written as code in the second column."""
    rows = re.findall(r"^\| `\w+`.*?\| (.*?) \| .*\|$", README.split("## Use a model")[0], re.M)
    names = {name for row in rows for name in re.findall(r"`([A-Za-z]\w*)`", row)}
    assert len(names) > 30 and not {n for n in names if n not in nemokernels.__all__}
