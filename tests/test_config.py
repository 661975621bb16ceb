import dataclasses
import json
import math

import pytest
from hybrids import FIELDS, config
from transformers import NemotronHConfig as HFConfig

from nemokernels.models import ConfigError, NemotronHConfig, list_variants, read_config

PATTERN = "M*-EM"
SPELLINGS = {
    "hybrid_override_pattern": PATTERN,
    "layers_block_type": ["mamba", "attention", "mlp", "moe", "mamba"],
    "layer_types": ["linear_attention", "full_attention", "mlp", "moe", "linear_attention"],
}
MTP_SPELLINGS = [
    {"mtp_hybrid_override_pattern": "*E"},
    {"mtp_layers_block_type": ["attention", "moe"]},
    {"mtp_layers_block_type": ["full_attention", "moe"]},
]


def read(**changes):
    data = {**FIELDS, "hybrid_override_pattern": PATTERN, **changes}
    return NemotronHConfig.from_dict({k: v for k, v in data.items() if v is not ...})


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_the_layer_list(name):
    got = read(**{"hybrid_override_pattern": ..., name: SPELLINGS[name]})
    assert got.pattern == PATTERN and got.to_dict()["num_hidden_layers"] == 5


def test_spellings_may_stand_together_if_they_agree():
    assert read(**SPELLINGS).pattern == PATTERN
    with pytest.raises(ConfigError, match="`hybrid_override_pattern` says.*`layer_types` says"):
        read(layer_types=["mlp"])


@pytest.mark.parametrize("fields", MTP_SPELLINGS)
def test_every_spelling_of_the_mtp_block(fields):
    assert read(num_nextn_predict_layers=1, **fields).mtp_pattern == "*E"
    assert read(num_nextn_predict_layers=2, **fields).mtp_pattern == "*E"
    assert read(num_nextn_predict_layers=0, **fields).mtp_pattern == ""
    assert read(**fields).mtp_pattern == ""


def test_mtp_block_defaults_to_attention_and_experts():
    assert read(num_nextn_predict_layers=1).mtp_pattern == "*E"


def test_old_spellings():
    assert read(head_dim=..., attention_head_dim=12).head_dim == 12
    for name in ("rms_norm_eps", "norm_eps"):
        assert read(layer_norm_epsilon=..., **{name: 3e-6}).layer_norm_epsilon == 3e-6
    with pytest.raises(ConfigError, match="`norm_eps` is 0.5 but `layer_norm_epsilon` is"):
        read(norm_eps=0.5, layer_norm_epsilon=1e-5)
    with pytest.raises(ConfigError, match="`attention_head_dim` is 16 but `head_dim` is 12"):
        read(attention_head_dim=16)


@pytest.mark.parametrize(
    "written",
    [[0, math.inf], [0.0, "Infinity"], [0, "inf"], [0.0, {"__float__": "Infinity"}], [0, 1e308]],
)
def test_step_limit_spellings_of_infinity(written):
    assert read(time_step_limit=written).time_step_limit == (0.0, math.inf)


def test_step_limit():
    assert read().time_step_limit == (0.0, math.inf)
    assert read(time_step_limit=[0.001, 0.5]).time_step_limit == (0.001, 0.5)


def test_unknown_fields_survive():
    extra = {"bos_token_id": 1, "rope_theta": 10000, "nested": {"a": [1]}}
    got = read(**extra)
    assert got.extra == extra
    assert NemotronHConfig.from_dict(got.to_dict()) == dataclasses.replace(
        got, extra={**extra, "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"}
    )


@pytest.mark.parametrize("variant", [v for v in list_variants() if v.config], ids=lambda v: v.name)
def test_written_config_reads_back(variant, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(variant.config.to_dict()))
    again = read_config(path)
    same = {f.name for f in dataclasses.fields(again)} - {"extra"}
    assert all(getattr(again, name) == getattr(variant.config, name) for name in same)


@pytest.mark.parametrize("mtp", ["", "*E"])
def test_transformers_reads_what_is_written_and_back(mtp, tmp_path):
    ours = config("M*-EME", mtp, moe_latent_size=16, chunk_size=32, n_group=2, topk_group=1,
                  time_step_limit=[0.0, "Infinity"], bos_token_id=5)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    theirs = HFConfig.from_pretrained(tmp_path)
    assert theirs.hybrid_override_pattern == ours.pattern
    assert (theirs.num_nextn_predict_layers, theirs.bos_token_id) == (bool(mtp), 5)
    assert theirs.mtp_hybrid_override_pattern == "*E"
    written = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) is not None}
    written -= {"extra", "time_step_limit"}
    for name in written - {"mtp_hybrid_override_pattern"}:
        assert getattr(theirs, name) == getattr(ours, name), name
    theirs.save_pretrained(tmp_path / "again")
    again = read_config(tmp_path / "again" / "config.json")
    assert (again.pattern, again.mtp_pattern) == (ours.pattern, ours.mtp_pattern)
    for name in written | {"time_step_limit"}:
        assert getattr(again, name) == getattr(ours, name), name


def test_sizes_of_absent_layer_kinds_may_be_missing():
    fields = ("vocab_size", "hidden_size", "intermediate_size")
    got = NemotronHConfig.from_dict(
        {k: FIELDS[k] for k in fields} | {"hybrid_override_pattern": "--"}
    )
    assert got.mamba_num_heads is None and "head_dim" not in got.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hybrid_override_pattern=...), "`hybrid_override_pattern` is missing"),
        (dict(hybrid_override_pattern=""), "`hybrid_override_pattern` is empty"),
        (dict(hybrid_override_pattern="MXM"), "`hybrid_override_pattern` may hold 'M\\*-E', got"),
        (dict(hybrid_override_pattern="M" * 5000), "`hybrid_override_pattern` has 5000 layers"),
        (dict(hybrid_override_pattern=7), "`hybrid_override_pattern` must be a string or a list"),
        (dict(layers_block_type=["gru"]), "`layers_block_type` holds 'gru', expected one of mamba"),
        (dict(layers_block_type=["moe", 3]), "`layers_block_type` must be a string or a list"),
        (dict(num_hidden_layers=4), "`num_hidden_layers` is 4 but 5 are listed"),
        (dict(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="ME"),
         "`mtp_hybrid_override_pattern` may hold '\\*-E', got 'ME'"),
        (dict(num_nextn_predict_layers=1, mtp_hybrid_override_pattern=""),
         "`mtp_hybrid_override_pattern` is empty"),
        (dict(num_nextn_predict_layers=-1), "`num_nextn_predict_layers` must be from 0"),
        (dict(vocab_size=...), "`vocab_size` is missing"),
        (dict(hidden_size=...), "`hidden_size` is missing"),
        (dict(mamba_num_heads=...), "`mamba_num_heads` is missing; the pattern has 'M' layers"),
        (dict(num_key_value_heads=...), "`num_key_value_heads` is missing"),
        (dict(intermediate_size=None), "`intermediate_size` is missing"),
        (dict(n_routed_experts=...), "`n_routed_experts` is missing"),
        (dict(hidden_size="32"), "`hidden_size` must be of type int, got '32'"),
        (dict(hidden_size=True), "`hidden_size` must be of type int, got True"),
        (dict(hidden_size=32.0), "`hidden_size` must be of type int, got 32.0"),
        (dict(hidden_size=0), "`hidden_size` must be from 1 to"),
        (dict(hidden_size=-8), "`hidden_size` must be from 1 to"),
        (dict(vocab_size=1 << 40), "`vocab_size` must be from 1 to"),
        (dict(vocab_size=10**5000), "`vocab_size` must be from 1 to"),
        (dict(head_dim=[12]), "`head_dim` must be of type int"),
        (dict(moe_latent_size=0), "`moe_latent_size` must be from 1 to"),
        (dict(conv_kernel=7), "`conv_kernel` must be 2, 3 or 4, got 7"),
        (dict(n_groups=4), "`mamba_num_heads` is 6, not a multiple of `n_groups` 4"),
        (dict(num_key_value_heads=3), "`num_attention_heads` is 4, not a multiple of"),
        (dict(n_group=3), "`n_routed_experts` is 8, not a multiple of `n_group` 3"),
        (dict(topk_group=2), "`topk_group` 2 exceeds 1 groups"),
        (dict(n_group=4, num_experts_per_tok=3), "`num_experts_per_tok` is 3, but a token chooses"),
        (dict(num_experts_per_tok=9), "`num_experts_per_tok` is 9, but a token chooses among 8"),
        (dict(layer_norm_epsilon=-1.0), "`layer_norm_epsilon` must be from 0"),
        (dict(layer_norm_epsilon=math.nan), "`layer_norm_epsilon` must be from 0"),
        (dict(routed_scaling_factor="2.5"), "`routed_scaling_factor` must be of type float"),
        (dict(norm_topk_prob=1), "`norm_topk_prob` must be of type bool, got 1"),
        (dict(time_step_limit=[0.5, 0.1]), "`time_step_limit` must be 0 <= low <= high"),
        (dict(time_step_limit=[0, "x"]), "`time_step_limit` must be 0 <= low <= high"),
        (dict(time_step_limit=[0, math.nan]), "`time_step_limit` must be 0 <= low <= high"),
        (dict(time_step_limit=0.1), "`time_step_limit` must be \\[low, high\\]"),
        (dict(time_step_min=0.2), "`time_step_max` is 0.1, below `time_step_min` 0.2"),
        (dict(mamba_ssm_cache_dtype="int8"), "`mamba_ssm_cache_dtype` must be float32"),
        (dict(model_type="llama"), "`model_type` is 'llama'; nemotron_h has no `block"),
        (dict(tie_word_embeddings=True), "`tie_word_embeddings` is True; only False is supported"),
        (dict(mlp_bias=True), "`mlp_bias` is True"),
        (dict(mlp_hidden_act="silu"), "`mlp_hidden_act` is 'silu', expected one of relu2, gelu"),
        (dict(mlp_hidden_act="gelu"), "`mlp_hidden_act` is 'gelu'; only 'relu2'"),
        (dict(mlp_hidden_act=["gelu"]), "`mlp_hidden_act` must be of type str"),
        (dict(n_shared_experts=2), "`n_shared_experts` is 2; only 1 is supported"),
    ],
)  # fmt: skip
def test_bad_field(change, message):
    if "layers_block_type" in change:
        change["hybrid_override_pattern"] = ...
    with pytest.raises(ConfigError, match=message):
        read(**change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not readable JSON"),
        (b"\xff\xfe{}", "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b"[]", "config must be a JSON object, got list"),
        (b"{}", "config.json: `hybrid_override_pattern` is missing"),
    ],
)
def test_bad_file(text, message, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "config.json")


def test_absent_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json: cannot be opened \(No such file"):
        read_config(tmp_path / "config.json")


def test_is_immutable_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().hidden_size = 1
    assert len({config(), config(), config("M")}) == 2
