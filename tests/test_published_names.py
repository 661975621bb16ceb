"""Checkpoints of the released sizes, with the names, shapes and dtypes that are published of them.

Names are written here a second time, from descriptions of the published files. The files are
sparse: a full header with nothing but zeros behind it.
"""

import json
import os
import struct
from collections import Counter
from math import prod

import pytest
import torch

from nemokernels.models import build, find_variant
from nemokernels.models.checkpoint import open_checkpoint

NAMES = {  # what stands below `mixer.` in a layer, and its shape; sizes are single letters
    "M": {"in_proj.weight": "zh", "conv1d.weight": "c1k", "conv1d.bias": "c", "A_log": "n",
          "D": "n", "dt_bias": "n", "norm.weight": "i", "out_proj.weight": "hi"},
    "*": {"q_proj.weight": "qh", "k_proj.weight": "Kh", "v_proj.weight": "Kh",
          "o_proj.weight": "hq"},
    "-": {"up_proj.weight": "fh", "down_proj.weight": "hf"},
    "E": {"gate.weight": "Eh", "gate.e_score_correction_bias": "E",
          "shared_experts.up_proj.weight": "sh", "shared_experts.down_proj.weight": "hs"},
}  # fmt: skip
BLOCK = {"self_attention.query_key_value": "ah", "self_attention.dense": "hh",
         "mlp.dense_h_to_4h": "gh", "mlp.dense_4h_to_h": "hg"}  # fmt: skip


def hybrid(c):
    """Name -> shape of a Nemotron-H's tensors."""
    h, d = c["hidden_size"], c["head_dim"]
    n, state = c["mamba_num_heads"], c["n_groups"] * c["ssm_state_size"]
    i = n * c["mamba_head_dim"]
    x = c.get("moe_latent_size") or h
    e = c.get("moe_intermediate_size")
    size = {
        "1": 1, "h": h, "n": n, "i": i, "c": i + 2 * state, "z": 2 * i + 2 * state + n,
        "k": c["conv_kernel"], "q": c["num_attention_heads"] * d,
        "K": c["num_key_value_heads"] * d, "f": c.get("intermediate_size"),
        "E": c.get("n_routed_experts"), "s": c.get("moe_shared_expert_intermediate_size"),
    }  # fmt: skip
    found = {"backbone.embeddings.weight": (c["vocab_size"], h), "backbone.norm_f.weight": (h,),
             "lm_head.weight": (c["vocab_size"], h)}  # fmt: skip
    mtp = c.get("mtp_hybrid_override_pattern", "") if c.get("num_nextn_predict_layers") else ""
    pattern = c["hybrid_override_pattern"]
    layers = [(f"backbone.layers.{at}.", letter) for at, letter in enumerate(pattern)]
    layers += [(f"mtp.layers.{at}.", letter) for at, letter in enumerate(mtp)]
    for layer, letter in layers:
        found[layer + "norm.weight"] = (h,)
        for name, letters in NAMES[letter].items():
            found[f"{layer}mixer.{name}"] = tuple(size[one] for one in letters)
        for expert in range(size["E"] if letter == "E" else 0):
            found[f"{layer}mixer.experts.{expert}.up_proj.weight"] = (e, x)
            found[f"{layer}mixer.experts.{expert}.down_proj.weight"] = (x, e)
        if letter == "E" and x != h:
            found[layer + "mixer.fc1_latent_proj.weight"] = (x, h)
            found[layer + "mixer.fc2_latent_proj.weight"] = (h, x)
    if mtp:
        found |= {"mtp.layers.0.enorm.weight": (h,), "mtp.layers.0.hnorm.weight": (h,),
                  "mtp.layers.0.eh_proj.weight": (h, 2 * h),
                  "mtp.layers.1.final_layernorm.weight": (h,)}  # fmt: skip
    return found


def decoder(c):
    """Of llama, mistral, nemotron and nemotron-nas."""
    h, layers, plain = c["hidden_size"], c["num_hidden_layers"], c["model_type"] == "nemotron"
    leaves = ("weight", "bias") if plain else ("weight",)
    found = {"model.embed_tokens.weight": (c["vocab_size"], h),
             "lm_head.weight": (c["vocab_size"], h)}  # fmt: skip
    found |= {f"model.norm.{leaf}": (h,) for leaf in leaves}
    q = c["num_attention_heads"] * c["head_dim"]
    same = {"attention": {"kv": c.get("num_key_value_heads")},
            "ffn": {"width": c.get("intermediate_size")}}  # fmt: skip
    for index, block in enumerate(c.get("block_configs") or [same] * layers):
        layer = f"model.layers.{index}."
        if not block["attention"].get("no_op"):
            group = block["attention"].get("n_heads_in_group")
            kv = (c["num_attention_heads"] // group if group else block["attention"]["kv"]) * c[
                "head_dim"
            ]
            found |= {f"{layer}input_layernorm.{leaf}": (h,) for leaf in leaves}
            for leaf, shape in (("q", (q, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, q))):
                found[f"{layer}self_attn.{leaf}_proj.weight"] = shape
        if not block["ffn"].get("no_op"):
            mult = block["ffn"].get("ffn_mult")
            f = int(2 * mult * h / 3) + -int(2 * mult * h / 3) % 256 if mult else None
            f = f or block["ffn"]["width"]
            found |= {f"{layer}post_attention_layernorm.{leaf}": (h,) for leaf in leaves}
            found |= {f"{layer}mlp.up_proj.weight": (f, h), f"{layer}mlp.down_proj.weight": (h, f)}
            if not plain:
                found[f"{layer}mlp.gate_proj.weight"] = (f, h)
    return found


def bloom(c):
    h = c["hidden_size"]
    size = {"h": h, "a": 3 * h, "g": 4 * h}
    found = {"word_embeddings.weight": (c["vocab_size"], h)}
    norms = ["word_embeddings_layernorm", "ln_f"]
    for index in range(c["n_layer"]):
        norms += [f"h.{index}.input_layernorm", f"h.{index}.post_attention_layernorm"]
        for name, letters in BLOCK.items():
            shape = tuple(size[one] for one in letters)
            found[f"h.{index}.{name}.weight"], found[f"h.{index}.{name}.bias"] = shape, shape[:1]
    found |= {f"{norm}.{leaf}": (h,) for norm in norms for leaf in ("weight", "bias")}
    return {f"transformer.{name}": shape for name, shape in found.items()}


def sees(c):
    """Of the vision-language model; seven class and register tokens stand for their number."""
    found = {f"language_model.{name}": shape for name, shape in hybrid(c["llm_config"]).items()}
    radio, h = "vision_model.radio_model.", c["llm_config"]["hidden_size"]
    patches = radio + "model.patch_generator."
    found |= {patches + "embedder.weight": (1280, 768), patches + "pos_embed": (1, 16384, 1280),
              patches + "cls_token.token": (7, 1280), radio + "summary_idxs": (2,),
              radio + "input_conditioner.norm_mean": (3, 1, 1),
              radio + "input_conditioner.norm_std": (3, 1, 1),
              "mlp1.0.weight": (5120,), "mlp1.1.weight": (20480, 5120),
              "mlp1.3.weight": (h, 20480)}  # fmt: skip
    for index in range(32):
        for name, shape in (("norm1", (1280,)), ("norm2", (1280,)), ("attn.qkv", (3840, 1280)),
                            ("attn.proj", (1280, 1280)), ("mlp.fc1", (5120, 1280)),
                            ("mlp.fc2", (1280, 5120))):  # fmt: skip
            found[f"{radio}model.blocks.{index}.{name}.weight"] = shape
            found[f"{radio}model.blocks.{index}.{name}.bias"] = shape[:1]
    return found


HYBRIDS = ["Nemotron 3 Nano 30B-A3B", "Nemotron 3.5 Lightning 30B-A3B",
           "Nemotron 3 Super 120B-A12B", "Nemotron 3 Ultra 550B-A55B", "Nemotron 3 Nano 4B",
           "Nemotron-H 4B", "Nemotron-H 8B", "Nemotron-H 47B", "Nemotron-H 56B",
           "Nemotron-Nano-9B-v2", "Nemotron-Nano-12B-v2", "Nemotron Elastic 12B",
           "Star Elastic 30B"]  # fmt: skip
DECODERS = ["Llama-3.1-Nemotron-Nano-8B-v1", "Llama-3.1-Nemotron-Nano-4B-v1.1",
            "Llama-3.3-Nemotron-Super-49B-v1", "Llama-3.1-Nemotron-Ultra-253B-v1",
            "Nemotron-4 15B", "Nemotron-4 340B Base", "Nemotron-4 340B Instruct", "Minitron 4B",
            "Minitron 8B", "Mistral-NeMo-Minitron-8B"]  # fmt: skip
RELEASED = {**dict.fromkeys(HYBRIDS, hybrid), **dict.fromkeys(DECODERS, decoder),
            "BLOOM-560m": bloom, "BLOOM-176B": bloom,
            "Nemotron-Nano-V2-VL 12B": sees}  # fmt: skip
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I64": 8}


def bfloat16(shapes):
    """name -> (dtype, shape) as published: the routers' biases in float32."""
    wide = {"e_score_correction_bias": "F32", "summary_idxs": "I64"}
    return {name: (wide.get(name.rpartition(".")[2], "BF16"), shape)
            for name, shape in shapes.items()}  # fmt: skip


def write(folder, fields, tensors, **other):
    """A folder of shards with these tensors, every value zero; wide ones first, as is usual."""
    shards, end = [{}], 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -BYTES[item[1][0]]):
        size = prod(shape) * BYTES[dtype]
        if shards[-1] and end + size > 5e9:
            shards.append({})
            end = 0
        place = [end, end := end + size]
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
    index = {}
    for number, header in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        end = max(entry["data_offsets"][1] for entry in header.values())
        os.truncate(folder / file, 8 + len(text) + end)
        index |= dict.fromkeys(header, file)
    other = {"config": fields, "model.safetensors.index": {"weight_map": index}, **other}
    for name, content in other.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def fields(name):
    """The config.json of a released model, as far as it is public."""
    variant = find_variant(name)
    return variant.config.to_dict() if variant.config else dict(variant.fields)


def check_every_tensor_has_its_place(opened, tensors):
    """Every tensor is read once or carried along, and the model has nothing besides."""
    config, plan = opened.config, opened.plan
    read = Counter(source.tensor.name for source in plan.sources)
    assert set(read.values()) == {1} and not read.keys() & plan.kept.keys()
    assert read.keys() | plan.kept.keys() == {n for n in tensors if not n.endswith("_scale")
                                              and not n.endswith("_scale_2")}  # fmt: skip
    meta = build(config, device="meta", dtype=plan.dtype).state_dict()
    assert {name: tuple(value.shape) for name, value in meta.items()} == plan.shapes
    assert plan.dtype == torch.bfloat16


@pytest.mark.parametrize("name", RELEASED)
def test_every_published_tensor_has_its_place(name, tmp_path):
    data = fields(name)
    tensors = bfloat16(RELEASED[name](data))
    with open_checkpoint(write(tmp_path, data, tensors)) as opened:
        check_every_tensor_has_its_place(opened, tensors)


def test_bloom_without_its_prefix(tmp_path):
    data = fields("BLOOM-560m")
    tensors = {n.removeprefix("transformer."): t for n, t in bfloat16(bloom(data)).items()}
    with open_checkpoint(write(tmp_path, data, tensors)) as opened:
        check_every_tensor_has_its_place(opened, tensors)


def quantised(shapes, algorithm_of):
    """The tensors of ModelOpt's containers; ``algorithm_of`` a module says its container."""
    found = {}
    for name, (dtype, shape) in bfloat16(shapes).items():
        module = name.removesuffix(".weight")
        algorithm = algorithm_of(module)
        scalar = [] if algorithm in (None, "W4A16_NVFP4") else ["input_scale"]
        if algorithm is None:
            found[name] = (dtype, shape)
        elif algorithm == "FP8":
            found[name] = ("F8_E4M3", shape)
            scalar.append("weight_scale")
        else:
            rows, columns = shape
            found[name] = ("U8", (rows, columns // 2))
            found[f"{module}.weight_scale"] = ("F8_E4M3", (rows, columns // 16))
            scalar.append("weight_scale_2")
        found |= {f"{module}.{leaf}": ("F32", ()) for leaf in scalar}
        if module.endswith((".k_proj", ".v_proj")) and module.startswith("backbone."):
            found[f"{module}.{module[-6]}_scale"] = ("F32", ())
    return found


def test_nano_in_nvfp4(tmp_path):
    """One algorithm and a list of what it leaves out."""
    data = fields("Nemotron 3 Nano 30B-A3B")
    shapes = hybrid(data)
    attention = [f"backbone.layers.{index}.mixer.{leaf}_proj" for leaf in "qkvo"
                 for index in (5, 12, 19, 26, 33, 42)]  # fmt: skip
    before = [f"backbone.layers.{index}.mixer.{leaf}_proj" for leaf in ("in", "out")
              for index in (4, 11, 18, 25, 32, 41)]  # fmt: skip
    convolutions = [n.removesuffix(".weight") for n in shapes if n.endswith("conv1d.weight")]
    excluded = ["lm_head", *attention, *before, *convolutions]

    def algorithm(module):
        projection = module.endswith("_proj")
        return "NVFP4" if projection and module not in excluded else None

    tensors = quantised(shapes, algorithm)
    expert = "backbone.layers.1.mixer.experts.0.up_proj."
    assert tensors[expert + "weight"] == ("U8", (1856, 1344))
    assert tensors[expert + "weight_scale"] == ("F8_E4M3", (1856, 168))
    declared = {"producer": {"name": "modelopt", "version": "0.29.0"},
                "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8",
                                 "group_size": 16, "exclude_modules": excluded}}  # fmt: skip
    with open_checkpoint(write(tmp_path, data, tensors, hf_quant_config=declared)) as opened:
        layers = opened.plan.quantization.layers
        assert Counter(layers.values()) == {"NVFP4": 23 * (2 * 128 + 2) + 2 * 23 - len(before)}
        check_every_tensor_has_its_place(opened, without_kv_scales(tensors))


def test_lightning_in_mixed_precision(tmp_path):
    """Two algorithms and a list of every layer: 5,981 of them, and 72 that are left out."""
    data = fields("Nemotron 3.5 Lightning 30B-A3B")
    shapes = hybrid(data)
    modules = [n.removesuffix(".weight") for n in shapes if n.startswith("backbone.layers.")]
    layers = {m: {"quant_algo": "FP8"} for m in modules if m.endswith((".in_proj", ".out_proj"))}
    narrow = [m for m in modules if "experts." in m]
    layers |= {m: {"quant_algo": "W4A16_NVFP4", "group_size": 16} for m in (*narrow, "lm_head")}
    excluded = [m for m in modules if m.endswith((".gate", ".conv1d", "q_proj", "k_proj", "v_proj",
                                                  "o_proj"))]  # fmt: skip
    excluded += ["backbone.embeddings", "mtp*"]
    assert (len(layers), len(excluded)) == (5981, 72)
    tensors = quantised(shapes, lambda module: layers.get(module, {}).get("quant_algo"))
    declared = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8",
                "quantized_layers": layers, "exclude_modules": excluded}  # fmt: skip
    both = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": excluded,
            "quantized_layers": layers, "producer": {"name": "modelopt", "version": "0.44.0rc5"},
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "config_groups": {"group_0": {"targets": list(layers)}}}  # fmt: skip
    folder = write(tmp_path, {**data, "quantization_config": both}, tensors,
                   hf_quant_config={"quantization": declared})  # fmt: skip
    with open_checkpoint(folder) as opened:
        found = Counter(opened.plan.quantization.layers.values())
        assert found == {"W4A16_NVFP4": 5935, "FP8": 46}
        assert len(opened.plan.quantization.kv_scales) == 12
        check_every_tensor_has_its_place(opened, without_kv_scales(tensors))


def without_kv_scales(tensors):
    return {n: t for n, t in tensors.items() if not n.endswith(("k_scale", "v_scale"))}
