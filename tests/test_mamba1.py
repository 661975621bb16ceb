"""Mamba-1 models: configurations, initial values, the 8B of the Mamba study."""

import dataclasses
import math

import families
import pytest
import torch
import torch.nn.functional as F

from nemokernels.models import ConfigError, MambaConfig, build, exact, find_variant, names

FIELDS = families.FIELDS["mamba"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(state_size=...), "`state_size` is missing"),
        (dict(hidden_size="32"), "`hidden_size` must be of type int, got '32'"),
        (dict(num_hidden_layers=5000), "`num_hidden_layers` is 5000, at most 4096"),
        (dict(num_hidden_layers=0), "`num_hidden_layers` must be from 1"),
        (dict(time_step_rank="full"), "`time_step_rank` must be of type int, got 'full'"),
        (dict(expand=1.5), "`expand` must be of type int"),
        (dict(conv_kernel=5), "`conv_kernel` must be 2, 3 or 4, got 5"),
        (dict(intermediate_size=48), "`intermediate_size` is 48, but .* is 64"),
        (dict(time_step_min=0.2), "`time_step_max` is 0.1, below `time_step_min` 0.2"),
        (dict(hidden_act="gelu"), "`hidden_act` is 'gelu'; only 'silu' is supported"),
        (dict(layer_norm_epsilon=float("nan")), "`layer_norm_epsilon` must be from 0"),
        (dict(use_bias=1), "`use_bias` must be of type bool"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ConfigError, match=message):
        families.config("mamba", **change)


def test_fields_left_out_have_transformers_defaults():
    config = MambaConfig.from_dict({k: FIELDS[k] for k in (
        "vocab_size", "hidden_size", "num_hidden_layers", "state_size")})  # fmt: skip
    assert (config.time_step_rank, config.d_inner, config.conv_kernel) == (2, 64, 4)
    assert config.tie_word_embeddings and config.residual_in_fp32 and not config.use_bias


def test_unknown_fields_survive():
    config = families.config("mamba", intermediate_size=64, use_cache=False)
    assert config.extra == {"intermediate_size": 64, "use_cache": False}
    assert MambaConfig.from_dict(config.to_dict()).extra["use_cache"] is False


def test_initial_values():
    torch.manual_seed(0)
    config = families.config("mamba", hidden_size=64, time_step_rank=16, tie_word_embeddings=True)
    config = dataclasses.replace(config, rescale_prenorm_residual=True)
    model = build(config, dtype=torch.float32)
    mixer = model.backbone.layers[1].mixer
    assert torch.equal(mixer.A_log, torch.tensor([1.0, 2, 3, 4]).log().expand(128, 4))
    assert bool((mixer.D == 1).all()) and mixer.A_log.dtype == torch.float32
    bound = mixer.dt_proj.weight.abs().max()
    assert 0.24 < bound <= 0.25
    steps = F.softplus(mixer.dt_proj.bias)
    assert 0.001 <= steps.min() < 0.002 and 0.05 < steps.max() <= 0.1001
    assert mixer.out_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(3), rel=0.1)
    assert mixer.x_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_narrow_model_keeps_decays_in_float32():
    made, cast = families.model("mamba", dtype=torch.bfloat16), families.model("mamba").bfloat16()
    for mixer in (model.backbone.layers[0].mixer for model in (made, cast)):
        assert mixer.A_log.dtype == mixer.D.dtype == torch.float32
        assert mixer.x_proj.weight.dtype == mixer.dt_proj.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("ssm_dtype", [torch.float32, torch.bfloat16])
def test_exact_mode_decodes_several_tokens_as_one_by_one(ssm_dtype):
    """Bit for bit, also where the state is rounded after every token."""
    model, tokens = families.model("mamba"), torch.tensor([[5, 6, 7, 8, 9, 10]])
    results = []
    with torch.no_grad(), exact():
        for sizes in ((3,), (1, 1, 1), (2, 1)):
            state = model.new_state(1, 8, draft_tokens=2, ssm_dtype=ssm_dtype)
            out = [model(tokens[:, :3], state=state)]
            for step in tokens[:, 3:].split(sizes, 1):
                out.append(model(step, state=state, decode=True))
                state.accept()
            results.append(torch.cat(out, 1))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_sum_of_the_layers_is_float32():
    model, seen = families.model("mamba").bfloat16(), []
    model.backbone.norm_f.register_forward_pre_hook(lambda _, args: seen.append(args[1].dtype))
    model(torch.tensor([[1, 2, 3]]))
    narrow = families.model("mamba", residual_in_fp32=False).bfloat16()
    narrow.backbone.norm_f.register_forward_pre_hook(lambda _, args: seen.append(args[1].dtype))
    narrow(torch.tensor([[1, 2, 3]]))
    assert seen == [torch.float32, torch.bfloat16]


def test_the_study_model_asks_for_what_is_not_known():
    variant = find_variant("Mamba-1 8B")
    assert variant.config is None and "time_step_rank" in variant.arguments
    with pytest.raises(ValueError, match="Mamba-1 8B needs .*state_size.*, which are not public"):
        build("Mamba-1 8B", device="meta", num_hidden_layers=2)
    given = dict(num_hidden_layers=2, state_size=16, time_step_rank=256, expand=2, conv_kernel=4,
                 use_conv_bias=True, use_bias=False, residual_in_fp32=True,
                 layer_norm_epsilon=1e-5)  # fmt: skip
    model = build("Mamba-1 8B", device="meta", **given)
    assert model.backbone.embeddings.weight.shape == model.lm_head.weight.shape == (256000, 4096)
    counted = sum(math.prod(shape) for _, shape in names.tensor_shapes(model.config))
    assert counted == sum(t.numel() for t in model.state_dict().values())
