"""Damaged and malicious checkpoints: each is refused with a reason, none loads as something else.

Every mutant starts from a good folder of two shards and an index. A mutant either raises
CheckpointError, before any model memory is allocated, or (where the damage means nothing, such as a
changed space in a header) loads exactly the good values.
"""

import json
import os
import pickle
import random
import shutil
import struct
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemokernels.models import CheckpointError, NemotronHConfig, from_pretrained, names
from nemokernels.models import checkpoint as loading

FIELDS = dict(
    model_type="nemotron_h", vocab_size=24, hidden_size=16, hybrid_override_pattern="ME*-",
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=24,
    mamba_num_heads=2, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=16,
    n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=12, moe_latent_size=None,
)  # fmt: skip
INDEX = "model.safetensors.index.json"
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    folder.mkdir()
    torch.manual_seed(0)
    shapes = dict(names.tensor_shapes(NemotronHConfig.from_dict(FIELDS)))
    values = {n: torch.randn(s).to(names.published_dtype(n, torch.bfloat16))
              for n, s in shapes.items()}  # fmt: skip
    half = list(values)[: len(values) // 2]
    place = {name: FILES[name not in half] for name in values}
    for file in FILES:
        save_file({n: v for n, v in values.items() if place[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "config.json").write_text(json.dumps(FIELDS))
    return folder


class Refusal(str):
    """The message of a CheckpointError."""


def load(folder):
    """The message of the refusal, or the state dict. Fails on any other exception, or slowness."""
    start = time.process_time()  # a hang without work is for the test's own time limit
    try:
        return from_pretrained(folder).state_dict()
    except CheckpointError as error:
        return Refusal(error)
    finally:
        assert time.process_time() - start < 5.0


@pytest.fixture
def try_mutant(good, tmp_path, monkeypatch):
    """Apply a mutation to a copy and load it; a refusal must come before a model is built."""
    built = []
    honest = loading.build
    monkeypatch.setattr(loading, "build", lambda *a, **k: built.append(1) or honest(*a, **k))
    clean = from_pretrained(good).state_dict()
    number = iter(range(10**6))

    def attempt(mutate, *, refuse=None):
        folder = tmp_path / f"mutant{next(number)}"
        shutil.copytree(good, folder)
        mutate(folder)
        built.clear()
        result = load(folder)
        if isinstance(result, Refusal):
            assert not built and str(folder) in result, result
            assert refuse is None or refuse in result, f"{refuse!r} not in: {result}"
        else:
            assert refuse is None, f"loaded, expected a refusal with {refuse!r}"
            assert all(torch.equal(result[name], clean[name]) for name in clean), "other values"
        shutil.rmtree(folder)
        return result

    return attempt


def split(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def edit_header(change):
    def mutate(folder):
        path = folder / FILES[0]
        header, body = split(path.read_bytes())
        changed = change(header, body)
        header, body = (header, body) if changed is None else changed
        path.write_bytes(joined(header, body))

    return mutate


def test_good_loads(good, try_mutant):
    assert not isinstance(try_mutant(lambda folder: None), Refusal)


def test_random_truncations(try_mutant):
    rng = random.Random(1)

    def truncate(folder):
        path = folder / rng.choice(FILES)
        size = path.stat().st_size
        os.truncate(path, rng.choice([0, 1, 7, 8, 9, size - 1, rng.randrange(size)]))

    for _ in range(60):
        try_mutant(truncate, refuse="not a safetensors file")


def test_header_length_lies(try_mutant):
    rng = random.Random(2)
    lies = [0, 1, 2, 2**63, 2**64 - 1, 2**31, 100_000_001, 10**12]

    def lie(folder):
        path = folder / FILES[0]
        data = path.read_bytes()
        true = struct.unpack("<Q", data[:8])[0]
        value = rng.choice([*lies, true + rng.choice([-9, -1, 1, 9]), rng.randrange(2**64)])
        path.write_bytes(struct.pack("<Q", value) + data[8:])

    for _ in range(60):
        try_mutant(lie, refuse="not a safetensors file")


def test_random_header_lies(try_mutant):
    """Offsets that overlap, leave holes or reach past the end; wrong dtypes, shapes, types."""
    rng = random.Random(3)
    wild = [-1, 0, 1, 3, 2**31, 2**53, 2**63, 2**64, 1.5, "8", None, True, [], {}]

    def lie(header, body):
        name = rng.choice(list(header))
        entry = header[name]
        kind = rng.randrange(6)
        if kind == 0:
            entry["data_offsets"][rng.randrange(2)] += rng.choice([-64, -2, -1, 1, 2, 64, 2**40])
        elif kind == 1:
            entry["dtype"] = rng.choice(
                ["F16", "I16", "U16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "F4", "XX", "", 3]
            )
        elif kind == 2:
            entry["shape"] = rng.choice([[], [0], [2**62, 0], entry["shape"] + [1], [-1],
                                         [2**32, 2**32], entry["shape"][:-1]])  # fmt: skip
        elif kind == 3:
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(wild)
        elif kind == 4:
            entry[rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(wild)
        else:
            del entry[rng.choice(["dtype", "shape", "data_offsets"])]

    outcomes = Counter(type(try_mutant(edit_header(lie))).__name__ for _ in range(200))
    assert outcomes["Refusal"] >= 190, outcomes  # the rest left a value as it was


def test_random_header_bytes(try_mutant):
    rng = random.Random(4)

    def flip(folder):
        path = folder / FILES[0]
        data = bytearray(path.read_bytes())
        size = struct.unpack("<Q", data[:8])[0]
        for _ in range(rng.randrange(1, 4)):
            data[8 + rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    outcomes = Counter(type(try_mutant(flip)).__name__ for _ in range(150))
    assert outcomes["Refusal"] >= 100, outcomes


def twice(header, name="backbone.layers.0.mixer.D", **change):
    """The header as text, with a second and different entry for one tensor."""
    text = json.dumps({name: {**header[name], **change}})
    return (json.dumps(header)[:-1] + "," + text[1:]).encode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h, b: h.pop("backbone.layers.0.mixer.D") and None, "not a safetensors file"),
        (lambda h, b: (json.dumps(h)[:-1].encode() + b', "a": 1}', b), "not a safetensors file"),
        (lambda h, b: (b"[]", b), "not a safetensors file"),
        (lambda h, b: (b"[" * 10**6, b), "not a safetensors file"),
        (lambda h, b: (b"\xff\xfe" + json.dumps(h).encode(), b), "not a safetensors file"),
        (lambda h, b: (h, b + b"\0"), "not a safetensors file"),
        (lambda h, b: (twice(h, data_offsets=[0, 4]), b), "not a safetensors file"),
        (lambda h, b: (twice(h, dtype="F16"), b), "mixer.D: "),
    ],
)  # fmt: skip
def test_malformed_headers(try_mutant, change, reason):
    try_mutant(edit_header(change), refuse=reason)


def rewrite(change):
    """Rewrite the first shard with changed tensors, and let the index follow."""

    def mutate(folder):
        values = change(load_file(folder / FILES[0]))
        save_file({name: v.contiguous() for name, v in values.items()}, folder / FILES[0])
        index = json.loads((folder / INDEX).read_text())
        place = {n: f for n, f in index["weight_map"].items() if f != FILES[0]}
        index["weight_map"] = place | dict.fromkeys(values, FILES[0])
        (folder / INDEX).write_text(json.dumps(index))

    return mutate


def test_every_tensor_missing_renamed_transposed_or_of_another_type(good, try_mutant):
    for name, value in load_file(good / FILES[0]).items():
        renamed = name.replace("weight", "wieght").replace("mixer", "mixers")
        try_mutant(rewrite(lambda v, n=name: v.pop(n) is not None and v), refuse=f"{name}: missing")
        try_mutant(rewrite(lambda v, n=name, r=renamed: {r: v.pop(n), **v}),
                   refuse=f"{renamed}: unexpected")  # fmt: skip
        for other in (value.half(), value.to(torch.int32), value.view(torch.int16)):
            if value.dtype == torch.bfloat16:
                try_mutant(rewrite(lambda v, n=name, o=other: {**v, n: o}), refuse=f"{name}: ")
        if value.dim() > 1 and value.shape != value.mT.shape:
            try_mutant(rewrite(lambda v, n=name: {**v, n: v[n].mT}), refuse=f"{name}: ")
        try_mutant(rewrite(lambda v, n=name: {**v, n: v[n][:-1]}), refuse=f"{name}: ")


@pytest.mark.parametrize(
    "name",
    ["extra", "backbone.layers.4.norm.weight", "backbone.layers.1.mixer.experts.3.up_proj.weight",
     "backbone.layers.1.mixer.experts.00.up_proj.weight", "mtp.layers.0.norm.weight",
     "backbone.layers.1.mixer.experts.up_proj", "model.norm_f.weight", "embeddings.weight",
     "backbone.layers.0.mixer.in_proj.bias", "backbone.layers.0.mixer.in_proj.weight_scale",
     "backbone.layers.1.mixer.gate.weight_scale", "language_model.lm_head.weight"],
)  # fmt: skip
def test_extra_tensors(try_mutant, name):
    try_mutant(rewrite(lambda v: {**v, name: torch.ones(())}), refuse=name)


def test_two_prefixes(try_mutant):
    def both(values):
        return {**values, "model.embeddings.weight": values["backbone.embeddings.weight"].clone()}

    try_mutant(rewrite(both), refuse="several prefixes (backbone., model.)")


def edit_index(change):
    def mutate(folder):
        index = json.loads((folder / INDEX).read_text())
        changed = change(index["weight_map"], folder)
        text = changed if isinstance(changed, (str, bytes)) else json.dumps(index)
        (folder / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())

    return mutate


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "./" + FILES[0], "sub/" + FILES[0], "..", ".", "",
     "a\\b", "nul\0.safetensors", "x" * 5000, "absent.safetensors", "\ud800", "~/a", "folder",
     "fifo", "outside", "loop", "dangling", "upwards", "config.json"],
)  # fmt: skip
def test_index_that_leads_elsewhere(try_mutant, file):
    def mutate(folder):
        (folder / "folder").mkdir()
        os.mkfifo(folder / "fifo")
        shutil.copy(folder / FILES[0], folder.parent / "secret.safetensors")
        (folder / "outside").symlink_to(folder.parent / "secret.safetensors")
        (folder / "upwards").symlink_to("../secret.safetensors")
        (folder / "loop").symlink_to("loop")
        (folder / "dangling").symlink_to("nothing")
        os.rename(folder / FILES[0], folder / "spare")
        edit_index(lambda w, f: w.update({n: file for n, s in w.items() if s == FILES[0]}))(folder)

    try_mutant(mutate, refuse=repr(file)[1:40] if file != "config.json" else "config.json")


@pytest.mark.parametrize("kind", ["hub", "outside"])
def test_links_into_the_hub_cache(good, tmp_path, kind):
    """<repo>/snapshots/<revision> may link to <repo>/blobs, and nowhere else."""
    folder = tmp_path / "repo" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    blobs = tmp_path / ("repo/blobs" if kind == "hub" else "repo/others")
    shutil.copytree(good, blobs)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(os.path.relpath(path, folder))
    result = load(folder)
    assert isinstance(result, Refusal) == (kind == "outside")
    assert kind == "hub" or "leads outside" in result


def swap_shards(weight_map, folder):
    os.rename(folder / FILES[0], folder / "x")
    os.rename(folder / FILES[1], folder / FILES[0])
    os.rename(folder / "x", folder / FILES[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_shards, "does not hold it"),
        (lambda w, f: w.pop("lm_head.weight") and None, "does not place it there"),
        (lambda w, f: w.update({"lm_head.weight": FILES[0]}), "does not hold it"),
        (lambda w, f: w.update({"lm_head.weight": 7}), "lm_head.weight maps to 7"),
        (lambda w, f: w.update({"lm_head.weight": [FILES[0]]}), "lm_head.weight maps to"),
        (lambda w, f: w.update({"phantom": FILES[0]}), "phantom"),
        (lambda w, f: w.update({str(i): str(i) for i in range(10**5)}), "names 100002 files"),
        (lambda w, f: w.clear(), "`weight_map`"),
        (lambda w, f: '{"weight_map": []}', "`weight_map`"),
        (lambda w, f: "{}", "`weight_map`"),
        (lambda w, f: "[]", "expected a JSON object"),
        (lambda w, f: "", "not a readable JSON file"),
        (lambda w, f: b"\xff\xfe\x00", "not a readable JSON file"),
        (lambda w, f: "[" * 10**6, "not a readable JSON file"),
        (lambda w, f: '{"weight_map": {"a": "b", "a": "c"}}', "the key 'a' repeats"),
        (lambda w, f: shutil.copy(f / FILES[0], f / "model.safetensors") and None, "both present"),
        (lambda w, f: shutil.copy(f / FILES[0], f / "model-3.safetensors") and None,
         "does not mention"),
        (lambda w, f: os.truncate(f / INDEX, 9) or (f / INDEX).read_bytes(), "not a readable"),
        (lambda w, f: shutil.copy(f / FILES[0], f / FILES[1]) and None, "in both"),
    ],
)  # fmt: skip
def test_malformed_index(try_mutant, change, reason):
    try_mutant(edit_index(change), refuse=reason)


def test_no_weights_and_no_config(try_mutant):
    try_mutant(lambda f: os.remove(f / INDEX), refuse="neither model.safetensors nor")
    try_mutant(lambda f: os.remove(f / "config.json"), refuse="config.json: cannot be opened")
    try_mutant(lambda f: os.remove(f / FILES[1]), refuse=FILES[1])


def test_oversized_json(try_mutant):
    """A sparse file of a terabyte is refused by its size, not read."""
    try_mutant(lambda f: os.truncate(f / "config.json", 10**12), refuse="larger than")


def set_config(text):
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / "config.json").write_bytes(data)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"a"', b"\xff\xfe{}", "{" * 10**5, "{}", '{"a": 1, "a": 2}',
     '{"vocab_size": ' + "9" * 5000 + "}", "\0" * 100, '{"model_type": "llama"}'],
)  # fmt: skip
def test_malformed_config(try_mutant, text):
    try_mutant(set_config(text), refuse="config.json")


def test_random_config_values(try_mutant):
    """Sizes must match the tensors; the rest is either refused or does not touch the values."""
    rng = random.Random(5)
    wild = [-1, 0, 1, 3, 17, 2**24, 2**31, 2**63, 10**30, 1.5, 1e308, float("inf"), float("nan"),
            "16", "", None, True, False, [], [16], {}, {"a": 1}, "ME*-" * 2000,
            "M" * 10**6]  # fmt: skip
    sizes = [key for key, value in FIELDS.items() if type(value) is int
             and key not in ("chunk_size", "num_experts_per_tok")]  # fmt: skip
    others = ["layer_norm_epsilon", "time_step_limit", "routed_scaling_factor", "chunk_size",
              "num_experts_per_tok", "n_group", "topk_group", "conv_kernel", "layers_block_type",
              "num_nextn_predict_layers", "mtp_hybrid_override_pattern", "num_hidden_layers",
              "tie_word_embeddings", "quantization_config", "llm_config", "torch_dtype",
              "moe_latent_size", "hybrid_override_pattern", "model_type"]  # fmt: skip
    for key in sizes:
        for value in rng.sample(wild, 8):
            if value != FIELDS[key] and value is not True:
                try_mutant(set_config(json.dumps({**FIELDS, key: value})), refuse="")
    for _ in range(150):
        key, value = rng.choice(others), rng.choice(wild)
        try_mutant(set_config(json.dumps({**FIELDS, key: value})))


def test_a_model_too_large_to_list_is_refused_at_once(try_mutant):
    huge = {**FIELDS, "n_routed_experts": 2**24, "hybrid_override_pattern": "ME*-" * 1000}
    try_mutant(set_config(json.dumps(huge)), refuse="describes")


def test_no_pickle(good, tmp_path, monkeypatch):
    """Nothing unpickles, and a folder with only pickled weights is refused."""
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(torch, "load", None)
    from_pretrained(good)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert "neither model.safetensors nor" in load(tmp_path)
