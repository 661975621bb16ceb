"""mamba2: a Nemotron-H of Mamba-2 layers alone; its own names, defaults and three choices."""

import dataclasses
import json
import math

import families
import hybrids
import pytest
import torch
import transformers

from nemokernels.models import (
    CheckpointError,
    ConfigError,
    NemotronH,
    build,
    from_pretrained,
    read_config,
)


@pytest.mark.parametrize("changes", [{}, dict(use_bias=True, time_step_limit=(0.1, 0.5))])
def test_transformers_reads_what_is_written_and_back(changes, tmp_path):
    ours = families.config("mamba2", bos_token_id=5, **changes)
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.Mamba2Config and theirs.bos_token_id == 5
    for name in ("num_heads", "head_dim", "state_size", "n_groups", "num_hidden_layers", "expand",
                 "chunk_size", "use_bias", "use_conv_bias", "residual_in_fp32"):  # fmt: skip
        assert getattr(theirs, name) == ours.to_dict()[name], name
    theirs.save_pretrained(tmp_path / "again")
    again = read_config(tmp_path / "again" / "config.json")
    assert dataclasses.replace(again, extra={}) == dataclasses.replace(ours, extra={})


def test_defaults_are_those_of_transformers():
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim",
              "state_size", "n_groups")  # fmt: skip
    theirs = transformers.Mamba2Config()
    fields = {name: getattr(theirs, name) for name in needed}
    ours = families.parse_config({"model_type": "mamba2", **fields})
    assert ours.pattern == "M" * 64
    for name, value in ours.to_dict().items():
        if name not in ("architectures", "time_step_limit"):
            assert getattr(theirs, name) == value, name
    assert ours.time_step_limit == tuple(theirs.time_step_limit) == (0.0, math.inf)


def test_it_is_the_hybrid_with_one_kind_of_layer():
    ours = families.model("mamba2", residual_in_fp32=False, dtype=torch.float64)
    twin = hybrids.model("MMM", dtype=torch.float64, layer_norm_epsilon=1e-3, mamba_num_heads=4,
                         mamba_head_dim=16)  # fmt: skip
    twin.load_state_dict(ours.state_dict())
    tokens = hybrids.tokens(2, 30)
    assert isinstance(ours, NemotronH) and torch.equal(ours(tokens), twin(tokens))


@pytest.mark.parametrize(
    ("wide", "dtype", "stream"),
    [(True, torch.bfloat16, torch.float32), (False, torch.bfloat16, torch.bfloat16),
     (True, torch.float64, torch.float64)],
)  # fmt: skip
def test_the_residual_stream_is_wide_if_asked(wide, dtype, stream):
    model = families.model("mamba2", dtype=dtype, residual_in_fp32=wide)
    seen = []
    model.backbone.norm_f.register_forward_hook(lambda m, args, out: seen.append(args))
    assert model(hybrids.tokens(1, 5)).dtype == dtype
    x, residual = seen[0]
    assert (x.dtype, residual.dtype) == (dtype, stream)


def test_other_layers_are_refused():
    with pytest.raises(ConfigError, match="`hybrid_override_pattern` of a mamba2 is 'MM-'"):
        dataclasses.replace(families.config("mamba2"), hybrid_override_pattern="MM-",
                            intermediate_size=8)  # fmt: skip


def test_biases_start_at_zero():
    model = build(families.config("mamba2", use_bias=True))
    biases = [t for n, t in model.state_dict().items() if n.endswith("proj.bias")]
    assert len(biases) == 6 and all(bool((b == 0).all()) for b in biases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(use_bias=True), "layers.0.mixer.in_proj.bias: missing"),
        (dict(use_conv_bias=False), "layers.0.mixer.conv1d.bias: unexpected"),
        (dict(tie_word_embeddings=True), "lm_head.weight: unexpected"),
        (dict(state_size=8), r"in_proj.weight: .* \(196, 32\), expected \(164, 32\)"),
        (dict(num_hidden_layers=4), "layers.3.mixer.A_log: missing"),
        (dict(model_type="nemotron_h"), "`residual_in_fp32` is True; only False is"),
    ],
)
def test_a_configuration_that_disagrees_with_its_tensors(change, message, tmp_path):
    families.save_with_other_fields("mamba2", tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=...), "`num_heads` is missing"),
        (dict(state_size=None), "`state_size` is missing"),
        (dict(num_hidden_layers=...), "`num_hidden_layers` is missing"),
        (dict(num_hidden_layers="3"), "`num_hidden_layers` must be of type int"),
        (dict(num_hidden_layers=5000), "`num_hidden_layers` is 5000, at most 4096"),
        (dict(head_dim=True), "`head_dim` must be of type int"),
        (dict(head_dim=8), "`num_heads` x `head_dim` is 32, but `hidden_size` x `expand` is 64"),
        (dict(expand=1.5), "`expand` must be of type int"),
        (dict(hidden_act="gelu"), "`hidden_act` is 'gelu'; only 'silu' is supported"),
        (dict(n_groups=3), "not a multiple of `n_groups` 3"),
        (dict(residual_in_fp32="yes"), "`residual_in_fp32` must be of type bool"),
        (dict(conv_kernel=5), "`conv_kernel` must be 2, 3 or 4, got 5"),
    ],
)
def test_bad_field(change, message):
    with pytest.raises(ConfigError, match=message):
        families.config("mamba2", **change)
