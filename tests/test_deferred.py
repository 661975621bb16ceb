"""A model sharded on meta gets the bits of the whole one, and no rank holds or reads more."""

from pathlib import Path

import deferred_worker
import families
import on_ranks
import pytest
import quantized
import tiny
import torch
from safetensors.torch import load_file

from nemokernels.models import build, deferred, from_pretrained, init, save_pretrained
from nemokernels.train.trainer import Trainer

KINDS = ["fresh", "fresh experts", "read", "read experts"]


def whole(name, out):
    if name.startswith("read"):
        return from_pretrained(out / "saved", dtype=torch.float32)
    torch.manual_seed(3)
    return build(tiny.config(), dtype=torch.float32)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deferred")
    save_pretrained(tiny.model(seed=9, dtype=torch.bfloat16), folder / "saved")
    on_ranks.torchrun(Path(deferred_worker.__file__), 2, folder)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_values_are_those_of_the_whole_model(name, out):
    want = whole(name, out).state_dict()
    for rank in range(2):
        got = load_file(out / f"{name} {rank}.safetensors")
        got.pop("facts")
        assert got.keys() == want.keys()
        assert [n for n in want if not torch.equal(got[n], want[n])] == []


@pytest.mark.parametrize("name", KINDS)
def test_a_rank_holds_its_part_and_reads_no_more(name, out):
    model = whole(name, out)
    total = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    read = []
    for rank in range(2):
        peak, held, elements = load_file(out / f"{name} {rank}.safetensors")["facts"].tolist()
        assert total / 2 <= held < 0.53 * total  # routers and the like are whole
        # Its part, one tensor beside it, and buffers.
        assert held <= peak < held + 1.2 * largest + 20_000
        read.append(elements)
    count = sum(p.numel() for p in model.state_dict().values())
    if name.startswith("read"):
        assert all(count / 2 <= elements < 0.53 * count for elements in read)


@pytest.mark.parametrize("name", ["fresh", "read"])
def test_one_process_too(name, out, tmp_path):
    t = deferred_worker.trainer(out / "saved" if name == "read" else None, tmp_path)
    want, got = whole(name, out).state_dict(), t.model.state_dict()
    assert [n for n in want if not torch.equal(got[n], want[n])] == []
    assert all(int(c.sum()) == 0 for c in t.model.expert_counts)
    t.train_step()


def test_experts_are_drawn_one_by_one(monkeypatch):
    """So that beside its part a rank needs memory for one of them."""
    model, drawn = build(tiny.config(), device="meta", dtype=torch.float32), []
    monkeypatch.setattr(init, "_rule", lambda *_: lambda tensor: drawn.append(tuple(tensor.shape)))
    monkeypatch.setattr(init, "reset_buffers", lambda model: None)
    model.reset_parameters()
    assert drawn.count((32, 24)) == drawn.count((24, 32)) == 2 * 8
    assert (8, 32, 24) not in drawn and (320, 48) in drawn


def test_a_model_on_meta_needs_its_values(tmp_path):
    settings = tiny.settings()
    model = build(tiny.config(), device="meta", dtype=torch.float32)
    with pytest.raises(ValueError, match="a model on meta needs `fill`"):
        Trainer(model, tiny.batches(settings), settings, tmp_path)


def assert_filled(folder):
    """What `deferred` gives in one process is what `from_pretrained` gives."""
    model, fill = deferred(folder)
    model.to_empty(device="cpu")
    init.reset_buffers(model)
    fill(model)
    want = from_pretrained(folder, dtype=torch.float32)
    got = model.state_dict()
    assert got.keys() == want.state_dict().keys()
    for name, value in want.state_dict().items():
        assert torch.equal(got[name], value), name
    assert model.file_dtypes == want.file_dtypes and model.file_trunk == want.file_trunk
    assert model.kept.keys() == want.kept.keys()


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_read_alike(family, tmp_path):
    save_pretrained(families.model(family, dtype=torch.bfloat16), tmp_path / "a")
    assert_filled(tmp_path / "a")


def test_quantised_layers_are_dequantised_alike(tmp_path):
    values, layers = quantized.plain(), {}
    for module, algorithm in zip(quantized.LINEAR, ("FP8", "NVFP4", "FP8", "NVFP4")):
        quantized.quantise(values, module, algorithm)
        layers[module] = algorithm
    assert_filled(quantized.write(tmp_path / "a", values, quantized.mixed(layers)))


def test_fp8_layers_too(tmp_path):
    """Their scales begin at one, on meta as elsewhere, and a step has the same bits."""
    states = []
    for model, fill in (deferred_worker.fresh(), (whole("fresh", tmp_path), None)):
        settings = tiny.settings(fp8="delayed", fp8_ends=0)
        t = Trainer(model, tiny.batches(settings), settings, tmp_path, fill=fill)
        t.train_step()
        states.append(t.objective.state_dict())
    assert any(name.endswith("scale") for name in states[0])
    assert states[0].keys() == states[1].keys()
    assert [n for n in states[0] if not torch.equal(states[0][n], states[1][n])] == []
