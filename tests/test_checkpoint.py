import errno
import json
import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemokernels.models import (
    CheckpointError,
    NemotronHConfig,
    build,
    checkpoint_spec,
    from_pretrained,
    list_variants,
    names,
    save_pretrained,
    saving,
)
from nemokernels.models import checkpoint as loading
from nemokernels.models.files import Shards

FIELDS = dict(
    model_type="nemotron_h", vocab_size=48, hidden_size=32, hybrid_override_pattern="ME*-",
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=48,
    mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=16, n_groups=2, chunk_size=16,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=48, moe_latent_size=16, num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E", unknown_field={"kept": [1, 2]},
)  # fmt: skip


def tensors(fields=FIELDS, dtype=torch.bfloat16):
    """Random values for every tensor of the checkpoint; correction biases in float32."""
    shapes = names.tensor_shapes(NemotronHConfig.from_dict(fields))
    return {n: torch.randn(s).to(names.published_dtype(n, dtype)) for n, s in shapes}


def write(folder, values, fields=FIELDS, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(values, folder / "model.safetensors")
        return folder
    placed = {name: f"model-{i % shards:05d}.safetensors" for i, name in enumerate(values)}
    for file in set(placed.values()):
        save_file({n: v for n, v in values.items() if placed[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def unstacked(name, index):
    """``...experts.up_proj`` and 3: ``...experts.3.up_proj.weight``."""
    stack, leaf = name.rsplit(".", 1)
    return f"{stack}.{index}.{leaf}.weight"


def in_memory(model):
    """The model's tensors under their published names."""
    out = {}
    for name, value in model.state_dict().items():
        parts = enumerate(value) if names.is_stack(name) else [(None, value)]
        out |= {name if i is None else unstacked(name, i): v for i, v in parts}
    return out


def stored_bytes(folder):
    out = {}
    for path in folder.glob("*.safetensors"):
        for name, value in load_file(path).items():
            out[name] = (value.dtype, value.shape, value.contiguous().view(torch.uint8).tolist())
    return out


@pytest.mark.parametrize(
    "variant", [v for v in list_variants() if v.config and not v.part], ids=lambda v: v.name
)
def test_spec_has_the_published_counts(variant):
    spec = checkpoint_spec(variant.name)
    assert len(spec) == variant.tensors
    assert sum(math.prod(tensor.shape) for tensor in spec.values()) == variant.parameters
    model = build(variant.name, device="meta")
    held = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, tensor in spec.items():
        target, index = names.stacked(name) or (name, None)
        assert held[target] == tensor.shape or held[target][1:] == tensor.shape
        assert index is None or index < held[target][0]
    assert held.keys() == {(names.stacked(name) or (name, None))[0] for name in spec}


def test_super_has_the_published_bytes():
    """Its card gives 42,683 tensors, 123,611,033,088 elements and 247,222,108,160 bytes."""
    spec = checkpoint_spec("NVIDIA-Nemotron-3-Super-120B-A12B-BF16")
    assert len(spec) == 42_683
    assert sum(math.prod(s.shape) for s in spec.values()) == 123_611_033_088
    assert sum(math.prod(s.shape) * s.dtype.itemsize for s in spec.values()) == 247_222_108_160
    assert sum(s.dtype == torch.float32 for s in spec.values()) == 41


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_every_value_arrives(tmp_path, shards, dtype):
    values = tensors()
    model = from_pretrained(write(tmp_path / "a", values, shards=shards), dtype=dtype)
    held = in_memory(model)
    assert held.keys() == values.keys() and not model.training
    for name, value in values.items():
        want = dtype or value.dtype
        want = torch.promote_types(want, torch.float32) if names.is_wide(name) else want
        assert held[name].dtype == want, name
        assert torch.equal(held[name], value.to(want)), name
    assert not any(v.is_meta for v in [*model.parameters(), *model.buffers()])
    assert not any(v.is_floating_point() and v.isnan().any() for v in model.state_dict().values())
    assert model.config.to_dict()["unknown_field"] == {"kept": [1, 2]}


def rename(values, wrapper, trunk, stack):
    out = {}
    for name, value in values.items():
        target, index = names.stacked(name) or (name, None)
        if stack and index is not None:
            target = target if index == 0 else None
            value = torch.stack([values[unstacked(target, e)] for e in range(4)]) if target else 0
        else:
            target = name
        if target:
            out[wrapper + target.replace("backbone.", trunk, 1)] = value
    return out


@pytest.mark.parametrize("wrapper", ["", "language_model."])
@pytest.mark.parametrize("trunk", ["backbone.", "model."])
@pytest.mark.parametrize("stack", [False, True])
def test_every_layout_loads_the_same(tmp_path, wrapper, trunk, stack):
    values = tensors()
    plain = from_pretrained(write(tmp_path / "plain", values)).state_dict()
    renamed = rename(values, wrapper, trunk, stack)
    fields = FIELDS
    if wrapper:
        renamed["vision_model.blocks.0.weight"] = torch.zeros(3)
        fields = {"model_type": "multimodal", "llm_config": FIELDS}
    other = from_pretrained(write(tmp_path / "other", renamed, fields)).state_dict()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("wide", ["nothing", "gate", "norms"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_load_then_save_reproduces_every_byte(tmp_path, wide, dtype):
    values = tensors()
    for name in values:
        if (wide == "gate" and name.endswith(("gate.weight", "A_log"))) or (
            wide == "norms" and name.endswith("norm.weight")
        ):
            values[name] = torch.randn_like(values[name], dtype=torch.float32)
    source = write(tmp_path / "a", values, shards=2)
    model = from_pretrained(source, dtype=dtype)
    save_pretrained(model, tmp_path / "b", max_shard_bytes=20_000)
    assert stored_bytes(tmp_path / "b") == stored_bytes(source)
    again = from_pretrained(tmp_path / "b")
    save_pretrained(again, tmp_path / "c")
    assert stored_bytes(tmp_path / "c") == stored_bytes(source)


def test_a_changed_dtype_is_written_as_it_is(tmp_path):
    model = from_pretrained(write(tmp_path / "a", tensors()))
    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(weight.float() + 1e-6)
    save_pretrained(model, tmp_path / "b")
    assert stored_bytes(tmp_path / "b")["lm_head.weight"][0] == torch.bfloat16
    model.float()
    save_pretrained(model, tmp_path / "c")
    stored = stored_bytes(tmp_path / "c")
    assert stored["lm_head.weight"][0] == stored["backbone.norm_f.weight"][0] == torch.float32
    assert stored["backbone.layers.0.mixer.A_log"][0] == torch.bfloat16  # as loaded


def test_a_fresh_model_is_written_as_the_spec_says(tmp_path):
    model = build(NemotronHConfig.from_dict(FIELDS), dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "a")
    stored = stored_bytes(tmp_path / "a")
    spec = checkpoint_spec(model.config)
    assert {n: (d, tuple(s)) for n, (d, s, _) in stored.items()} == {
        n: (t.dtype, t.shape) for n, t in spec.items()
    }
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_and_index(tmp_path):
    model = build(NemotronHConfig.from_dict(FIELDS), dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "a", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    spec = checkpoint_spec(model.config)
    assert index["weight_map"].keys() == spec.keys()
    assert index["metadata"]["total_size"] == sum(
        math.prod(t.shape) * t.dtype.itemsize for t in spec.values()
    )
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors"
                     for i in range(1, len(files) + 1)]  # fmt: skip
    for file in files:
        with safe_open(tmp_path / "a" / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]
        assert sum(sizes) <= 10_000 or len(sizes) == 1


def test_a_shard_is_full_to_the_byte(tmp_path):
    model = build(NemotronHConfig.from_dict(FIELDS), dtype=torch.bfloat16)
    sizes = [math.prod(t.shape) * t.dtype.itemsize for t in checkpoint_spec(model.config).values()]
    for short, first in [(0, 5), (1, 4)]:
        folder = tmp_path / str(short)
        save_pretrained(model, folder, max_shard_bytes=sum(sizes[:5]) - short)
        assert len(load_file(min(folder.glob("*-00001-of-*.safetensors")))) == first


def test_transformers_reads_and_writes_the_same(tmp_path):
    from transformers import AutoModelForCausalLM

    fields = {**FIELDS, "num_nextn_predict_layers": 0, "mtp_hybrid_override_pattern": ""}
    values = tensors(fields)
    ours = from_pretrained(write(tmp_path / "a", values, fields))
    save_pretrained(ours, tmp_path / "b", max_shard_bytes=20_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    held = {n.replace("model.", "backbone.", 1): v for n, v in theirs.state_dict().items()}
    mine = ours.state_dict()
    assert held.keys() == mine.keys()
    for name, value in held.items():
        assert torch.equal(mine[name].to(value.dtype), value), name
    theirs.save_pretrained(tmp_path / "c")
    back = in_memory(from_pretrained(tmp_path / "c"))
    assert all(torch.equal(back[name].to(value.dtype), value) for name, value in values.items())


def test_each_tensor_is_read_once(tmp_path, monkeypatch):
    read = []
    honest = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, t: read.append(t.name) or honest(self, t))
    values = tensors()
    from_pretrained(write(tmp_path / "a", values))
    assert sorted(read) == sorted(values)


def test_nothing_is_allocated_before_the_headers_agree(tmp_path, monkeypatch):
    values = tensors()
    del values["lm_head.weight"]
    monkeypatch.setattr(loading, "build", lambda *a, **k: pytest.fail("built a model"))
    with pytest.raises(CheckpointError, match="lm_head.weight: missing"):
        from_pretrained(write(tmp_path / "a", values))


def test_all_problems_are_in_one_message(tmp_path):
    values = tensors()
    values["backbone.norm_f.weight"] = values["backbone.norm_f.weight"][:-1].clone()
    values["lm_head.weight"] = values["lm_head.weight"].half()
    values["backbone.layers.0.mixer.A_log"] = values["backbone.layers.0.mixer.A_log"].half()
    values["backbone.layers.9.norm.weight"] = torch.zeros(32)
    values["mtp.layers.0.mixer.k_proj.k_scale"] = torch.ones(())
    del values["backbone.layers.1.mixer.experts.2.up_proj.weight"]
    with pytest.raises(CheckpointError) as error:
        from_pretrained(write(tmp_path / "a", values))
    text = str(error.value)
    assert "6 problems" in text and str(tmp_path / "a") in text
    assert "norm_f.weight: model.safetensors stores shape (31,), expected (32,)" in text
    assert "lm_head.weight: model.safetensors stores torch.float16, expected torch.bfloat16" in text
    assert "mixer.A_log: model.safetensors stores torch.float16" in text
    assert "backbone.layers.9.norm.weight: unexpected" in text
    assert "k_scale: a scale without its quantised layer" in text
    assert "experts.2.up_proj.weight: missing" in text


def test_a_long_list_is_cut(tmp_path):
    values = {name: v for name, v in tensors().items() if "experts" not in name}
    with pytest.raises(CheckpointError, match=r"20 problems|and \d+ more"):
        from_pretrained(write(tmp_path / "a", values))


@pytest.mark.parametrize("call", ["folder", "meta", "dtype"])
def test_bad_arguments(tmp_path, call):
    folder = write(tmp_path / "a", tensors())
    with pytest.raises((CheckpointError, ValueError, TypeError)) as error:
        if call == "folder":
            from_pretrained(tmp_path / "nowhere")
        elif call == "meta":
            from_pretrained(folder, device="meta")
        else:
            from_pretrained(folder, dtype=torch.int32)
    assert {"folder": "not a folder", "meta": "`device` is meta", "dtype": "`dtype` is"}[
        call
    ] in str(error.value)


def test_saving_refuses(tmp_path):
    model = build(NemotronHConfig.from_dict(FIELDS), dtype=torch.bfloat16)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder, reason in [("full", "not an empty folder"), ("file", "not an empty folder"),
                           ("file/below", r"cannot be written \(File exists\)")]:  # fmt: skip
        with pytest.raises(CheckpointError, match=reason):
            save_pretrained(model, tmp_path / folder)
    with pytest.raises(ValueError, match="on meta"):
        save_pretrained(build(model.config, device="meta"), tmp_path / "b")
    with pytest.raises(ValueError, match="max_shard_bytes"):
        save_pretrained(model, tmp_path / "b", max_shard_bytes=0)
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("step", ["save_file", "_write_file", "_sync", "rename"])
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, step):
    model = build(NemotronHConfig.from_dict(FIELDS), dtype=torch.bfloat16)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if step == "rename" else saving, step, full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_pretrained(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_appears_whole(tmp_path, monkeypatch):
    """The last thing that happens to the name is the rename of a synced, complete folder."""
    model = build(NemotronHConfig.from_dict(FIELDS), dtype=torch.bfloat16)
    (tmp_path / "a").mkdir()
    seen, synced, rename_, sync = [], [], os.rename, saving._sync

    def watch(source, target):
        seen.append(sorted(p.name for p in source.iterdir()))
        assert {p.name for p in synced} >= {"model.safetensors", source.name}
        assert target == tmp_path / "a" and not any(target.iterdir())
        rename_(source, target)

    monkeypatch.setattr(saving, "_sync", lambda path: synced.append(path) or sync(path))
    monkeypatch.setattr(os, "rename", watch)
    save_pretrained(model, tmp_path / "a")
    assert seen == [["config.json", "model.safetensors"]] and synced[-1] == tmp_path
    assert sorted(os.listdir(tmp_path)) == ["a"]
