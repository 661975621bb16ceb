import dataclasses
import json

import families
import pytest
from families import SCALING, block, config
from transformers import LlamaConfig, MistralConfig
from transformers import NemotronConfig as HFNemotronConfig

from nemokernels.models import (
    ConfigError,
    DecoderConfig,
    NemotronHConfig,
    list_variants,
    names,
    read_config,
)
from nemokernels.models.decoder_config import Block, Llama3Scaling
from nemokernels.models.families import parse_config

LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 64)
VARIANTS = {(v.hub_id or v.name).rpartition("/")[2]: v.config for v in list_variants()}


def blocks(name, text):
    """Compare with a summary: `first-last:A or -/FFN width or -`."""
    found = []
    for entry in text.split():
        span, _, what = entry.partition(":")
        attention, _, ffn = what.partition("/")
        first, _, last = span.partition("-")
        kv, width = (8 if attention == "A" else None), (None if ffn == "-" else int(ffn))
        found += [Block(kv, width)] * (int(last or first) - int(first) + 1)
    assert VARIANTS[name].blocks == tuple(found)


def test_blocks_of_the_searched_nets():
    blocks(
        "Llama-3_3-Nemotron-Super-49B-v1",
        "0:A/14336 1-5:A/28672 6-7:-/14336 8-10:A/28672 11:-/17920 12-41:A/28672 42:-/7168 "
        "43-44:-/14336 45:-/7168 46:-/28672 47:-/7168 48:-/14336 49-51:-/7168 52:A/28672 "
        "53:-/7168 54-55:-/5632 56:-/7168 57-59:-/5632 60-61:-/7168 62-63:-/2816 64-65:-/5632 "
        "66-67:-/2816 68:-/5632 69-70:-/2816 71-79:A/28672",
    )
    ultra = VARIANTS["Llama-3_1-Nemotron-Ultra-253B-v1"]
    assert sum(b == Block(None, None) for b in ultra.blocks) == 81
    assert sum(b.kv_heads is None and b.ffn is not None for b in ultra.blocks) == 17
    wide = {125: 399360, 134: 425984, 143: 343040, 149: 301056}
    assert {i: b.ffn for i, b in enumerate(ultra.blocks) if (b.ffn or 0) > 60000} == wide
    assert (len(ultra.kv_heads), ultra.depth) == (64, 64 + 81)


def test_widths_follow_the_multiplier():
    """int(2 * mult * 32 / 3), rounded up to a multiple of 256."""
    got = config("nemotron-nas")
    assert got.blocks == (Block(2, 256), Block(None, 256), Block(None, None), Block(4, None),
                          Block(1, 256))  # fmt: skip
    for mult, width in ((12.0, 256), (12.046, 256), (12.047, 512), (24.0, 512), (24.1, 768)):
        got = config("nemotron-nas", num_hidden_layers=1, block_configs=[block(1, mult)])
        assert got.blocks[0].ffn == width, mult


def test_tensors_of_absent_parts_are_absent_with_their_norms():
    got = {name.removeprefix("model.layers.") for name, _ in
           names.tensor_shapes(config("nemotron-nas"))}  # fmt: skip
    layers = {n for n in got if n[0].isdigit()}
    assert {n.split(".")[1] for n in layers if n.startswith("1.")} == {
        "post_attention_layernorm", "mlp"}  # fmt: skip
    assert not {n for n in layers if n.startswith("2.")}
    assert {n.split(".")[1] for n in layers if n.startswith("3.")} == {
        "input_layernorm", "self_attn"}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "spelling", "want"),
    [
        ("nemotron", dict(head_dim=..., kv_channels=16), dict(head_dim=16)),
        ("nemotron", dict(rope_percent=0.25), dict(partial_rotary_factor=0.25)),
        ("nemotron", dict(rope_percentage=0.25), dict(partial_rotary_factor=0.25)),
        ("nemotron", dict(norm_eps=..., layer_norm_eps=3e-6), dict(norm_eps=3e-6)),
        ("nemotron", {}, dict(partial_rotary_factor=0.5, initializer_range=0.0134)),
        ("llama", {}, dict(partial_rotary_factor=1.0, norm_eps=1e-3, rope_scaling=LLAMA3)),
        ("llama", dict(head_dim=...), dict(head_dim=8)),
        ("llama", dict(num_key_value_heads=None), dict(num_key_value_heads=4)),
        ("llama", dict(rope_theta=...), dict(rope_theta=10000.0)),
        ("llama", dict(rope_scaling=None), dict(rope_scaling=None)),
        ("llama", dict(rope_scaling={"type": "default"}), dict(rope_scaling=None)),
        ("llama", dict(rope_theta=..., rope_scaling=...,
                       rope_parameters={**SCALING, "rope_theta": 7.0}),
         dict(rope_theta=7.0, rope_scaling=LLAMA3)),
        ("nemotron", dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0,
                                           "partial_rotary_factor": 0.25}),
         dict(partial_rotary_factor=0.25, rope_scaling=None)),
        ("llama", dict(layer_types=["full_attention"] * 3), {}),
        ("nemotron-nas", dict(num_key_value_heads=None, intermediate_size=None), dict(depth=6)),
    ],
)  # fmt: skip
def test_spellings(family, spelling, want):
    got = config(family, **spelling)
    assert {name: getattr(got, name) for name in want} == want


@pytest.mark.parametrize("family", families.DECODERS)
def test_unknown_fields_survive(family, tmp_path):
    extra = {"bos_token_id": None, "eos_token_id": [1, 2], "nested": {"a": [1]}}
    got = config(family, **extra)
    assert got.extra == extra
    written = got.to_dict()
    assert {key: written[key] for key in extra} == extra
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = read_config(tmp_path / "config.json")
    assert dataclasses.replace(again, extra=extra) == got


@pytest.mark.parametrize(
    ("family", "peer"),
    [("llama", LlamaConfig), ("mistral", MistralConfig), ("nemotron", HFNemotronConfig)],
)
def test_transformers_reads_what_is_written_and_back(family, peer, tmp_path):
    ours = config(family)
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    theirs = peer.from_pretrained(tmp_path)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "sliding_window",
                 "intermediate_size", "num_key_value_heads"):  # fmt: skip
        assert getattr(theirs, name, None) == getattr(ours, name, None), name
    assert getattr(theirs, ours.family.norm_field) == ours.norm_eps
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    theirs.save_pretrained(tmp_path / "again")
    again = read_config(tmp_path / "again" / "config.json")
    assert dataclasses.replace(again, extra={}) == dataclasses.replace(ours, extra={})


def test_the_model_type_chooses():
    assert type(parse_config(families.FIELDS["mistral"])) is DecoderConfig
    fields = dict(vocab_size=8, hidden_size=8, intermediate_size=8, hybrid_override_pattern="-")
    assert type(parse_config(fields)) is NemotronHConfig
    for wrong in ("gpt2", None, ["llama"], 3):
        with pytest.raises(ConfigError, match="`model_type` is .*expected one of nemotron_h, "):
            parse_config({**fields, "model_type": wrong})
    with pytest.raises(ConfigError, match="config must be a JSON object, got list"):
        parse_config([])


def changed(part, **fields):
    """The block list with other fields in one part of its second entry."""
    entry = block(2, 1.0)
    other = {**entry, part: {**entry[part], **fields}}
    return dict(num_hidden_layers=2, block_configs=[entry, other])


NAS, LLAMA = "nemotron-nas", "llama"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (LLAMA, dict(vocab_size=...), "`vocab_size` is missing"),
        (LLAMA, dict(rms_norm_eps=...), "`rms_norm_eps` is missing"),
        ("nemotron", dict(norm_eps=None), "`norm_eps` is missing"),
        (LLAMA, dict(intermediate_size=...), "`intermediate_size` is missing"),
        (LLAMA, dict(hidden_size="32"), "`hidden_size` must be of type int, got '32'"),
        (LLAMA, dict(head_dim=..., hidden_size=33), "`head_dim` is missing"),
        (LLAMA, dict(head_dim=..., hidden_size="32"), "`hidden_size` must be of type int"),
        (LLAMA, dict(head_dim=..., num_attention_heads=0), "`num_attention_heads` must be from 1"),
        (LLAMA, dict(head_dim=0), "`head_dim` must be from 1"),
        (LLAMA, dict(head_dim=13), "`partial_rotary_factor` 1.0 of `head_dim` 13 must be an even"),
        (LLAMA, dict(num_key_value_heads=3), "`num_attention_heads` is 4, not a multiple of"),
        (LLAMA, dict(num_hidden_layers=5000), "`num_hidden_layers` is 5000, at most 4096"),
        (LLAMA, dict(num_hidden_layers=0), "`num_hidden_layers` must be from 1"),
        (LLAMA, dict(hidden_act="gelu"), "`hidden_act` is 'gelu'; only 'silu' is supported"),
        ("nemotron", dict(hidden_act="silu"), "`hidden_act` is 'silu'; only 'relu2'"),
        (LLAMA, dict(attention_bias=True), "`attention_bias` is True; only False is supported"),
        (LLAMA, dict(mlp_bias=True), "`mlp_bias` is True"),
        (LLAMA, dict(sliding_window=128), "`sliding_window` is 128; only None is supported"),
        ("mistral", dict(sliding_window=...), "`sliding_window` is 4096; only None is supported"),
        (LLAMA, dict(layer_types=["sliding_attention"]), "`layer_types` is \\['sliding_att"),
        (LLAMA, dict(layer_types=3), "`layer_types` is 3"),
        (LLAMA, dict(tie_word_embeddings="yes"), "`tie_word_embeddings` must be of type bool"),
        (LLAMA, dict(norm_eps=1e-6), "`rms_norm_eps` is 0.001 but `norm_eps` is 1e-06"),
        (LLAMA, dict(rope_theta=0.0), "`rope_theta` must be above 0"),
        (LLAMA, dict(rope_theta="big"), "`rope_theta` must be of type float"),
        (LLAMA, dict(partial_rotary_factor=1.5), "`partial_rotary_factor` 1.5 of"),
        (LLAMA, dict(partial_rotary_factor=0.0), "`partial_rotary_factor` 0.0 of"),
        (LLAMA, dict(rope_scaling="llama3"), "`rope_scaling` must be a JSON object, got str"),
        (LLAMA, dict(rope_scaling={"type": "yarn", "factor": 2.0}), "of type 'yarn'; only default"),
        (LLAMA, dict(rope_scaling={**SCALING, "beta": 1}), "`rope_scaling` has .*'beta'.*expected"),
        (LLAMA, dict(rope_scaling={"rope_type": "llama3"}), "`rope_scaling` has \\[\\], expected"),
        (LLAMA, dict(rope_scaling={"factor": 2.0}), "`rope_scaling` has \\['factor'\\], expected"),
        (LLAMA, dict(rope_scaling={**SCALING, "factor": 0.0}), "`factor` must be above 0"),
        (LLAMA, dict(rope_scaling={**SCALING, "factor": "8"}), "`factor` must be of type float"),
        (LLAMA, dict(rope_scaling={**SCALING, "low_freq_factor": 4.0}), "must be below"),
        (LLAMA, dict(rope_scaling={**SCALING, "type": "default"}), "`type` is 'default' but `rope"),
        (LLAMA, dict(rope_parameters={"rope_theta": 5.0}), "`rope_theta` is 100.0 and 5.0"),
        (LLAMA, dict(block_configs=families.BLOCKS), "`block_configs` is what nemotron-nas"),
        (NAS, dict(block_configs=...), "`block_configs` is what nemotron-nas"),
        (NAS, dict(block_configs={"a": 1}), "`block_configs` must be a list"),
        (NAS, dict(num_hidden_layers=4), "`num_hidden_layers` is 4 but `block_configs` has 5"),
        (NAS, dict(num_hidden_layers=1, block_configs=[block()]), "neither attention nor FFN"),
        (NAS, dict(num_hidden_layers=1, block_configs=[3]), r"`block_configs\[0\]` must be a JSON"),
        (NAS, dict(num_hidden_layers=1, block_configs=[{**block(2, 1.0), "mamba": {}}]),
         r"`block_configs\[0\]` holds \['mamba'\], expected attention and ffn"),
        (NAS, dict(num_hidden_layers=1, block_configs=[{"ffn": {"ffn_mult": 1.0}}]),
         r"`block_configs\[0\].attention` must be a JSON object"),
        (NAS, changed("attention", replace_with_linear=True),
         r"`block_configs\[1\].attention.replace_with_linear` is True; only null and false"),
        (NAS, changed("ffn", replace_with_linear=True),
         r"`block_configs\[1\].ffn.replace_with_linear` is True; only null and false"),
        (NAS, changed("attention", window_length=128), r"\.window_length` is 128; only null"),
        (NAS, changed("ffn", moe={"experts": 4}), r"ffn\.moe` is .*only null and false"),
        (NAS, changed("ffn", sparsify=0), r"ffn\.sparsify` is 0; only null and false"),
        (NAS, changed("ffn", no_op="yes"), r"ffn\.no_op` must be of type bool"),
        (NAS, changed("ffn", ffn_mult=None), r"ffn\.ffn_mult` must be of type float, got None"),
        (NAS, changed("ffn", ffn_mult=-1.0), r"ffn\.ffn_mult` must be from 0"),
        (NAS, changed("ffn", ffn_mult=0.0), r"ffn\.ffn_mult: the width` must be from 1"),
        (NAS, changed("ffn", ffn_mult=float("nan")), r"ffn\.ffn_mult` must be from 0"),
        (NAS, changed("ffn", ffn_mult=1e6), r"ffn\.ffn_mult: the width` must be from 1"),
        (NAS, changed("attention", n_heads_in_group=0), r"n_heads_in_group` must be from 1"),
        (NAS, changed("attention", n_heads_in_group=3), r"is 3, which does not divide"),
    ],
)  # fmt: skip
def test_bad_field(family, change, message):
    with pytest.raises(ConfigError, match=message):
        config(family, **change)
