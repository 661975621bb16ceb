"""Nemotron-H models whose layers differ in size: `block_configs`."""

import json

import hybrids
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from nemokernels.models import (
    ConfigError,
    build,
    checkpoint_spec,
    from_pretrained,
    generate,
    save_pretrained,
)
from nemokernels.models.families import parse_config
from nemokernels.train.trainer import Trainer

SMALL = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "moe_shared_expert_intermediate_size": 20}  # fmt: skip
BLOCKS = [
    {"block_type": "mamba"},
    {"block_type": "moe", **SMALL},
    {"block_type": "attention", "replace_with_linear": False},
    {"block_type": "mlp", "intermediate_size": 72},
    {"block_type": "moe", "n_routed_experts": 6, "moe_intermediate_size": None},
    {"block_type": "mlp"},
]
MTP = [{"block_type": "attention"}, {"block_type": "moe", "n_routed_experts": 5}]


def fields(blocks=BLOCKS, mtp=MTP, **changes):
    both = {"block_configs": blocks, "mtp_block_configs": mtp, "num_nextn_predict_layers": 1}
    data = {**hybrids.FIELDS, "model_type": "nemotron_h_puzzle", **both, **changes}
    return {name: value for name, value in data.items() if value is not ...}


def model(dtype=None, **changes):
    torch.manual_seed(0)
    made = build(parse_config(fields(**changes)), dtype=dtype)
    hybrids.redraw(sorted(made.state_dict().items()))
    return made.eval()


def test_sizes_are_those_of_the_layer():
    config = parse_config(fields())
    assert (config.pattern, config.mtp_pattern) == ("ME*-E-", "*E")
    assert [c.n_routed_experts for c in config.layers] == [8, 4, 8, 8, 6, 8, 8, 5]
    assert [c.num_experts_per_tok for c in config.layers] == [3, 2, 3, 3, 3, 3, 3, 3]
    state = build(config, device="meta").state_dict()
    shapes = {
        "backbone.layers.1.mixer.experts.up_proj": (4, 16, 32),
        "backbone.layers.1.mixer.shared_experts.down_proj.weight": (32, 20),
        "backbone.layers.1.mixer.gate.weight": (4, 32),
        "backbone.layers.3.mixer.up_proj.weight": (72, 32),
        "backbone.layers.4.mixer.experts.up_proj": (6, 24, 32),
        "backbone.layers.5.mixer.up_proj.weight": (56, 32),
        "mtp.layers.1.mixer.gate.e_score_correction_bias": (5,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    count = sum(tensor.shape[0] if ".experts." in name and tensor.dim() == 3 else 1
                for name, tensor in state.items())  # fmt: skip
    assert len(checkpoint_spec(config)) == count


def test_a_layer_computes_what_it_computes_in_a_uniform_model():
    """Every layer, taken out and put into a model whose layers all have its sizes."""
    ours = model(torch.float64)
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    for index, (letter, own) in enumerate(zip(ours.config.pattern, ours.config.layers)):
        sizes = {name: getattr(own, name) for name in (*SMALL, "intermediate_size")}
        uniform = hybrids.model(letter, dtype=torch.float64, **sizes)
        layer = uniform.backbone.layers[0]
        layer.load_state_dict(ours.backbone.layers[index].state_dict())
        tokens = torch.zeros(1, 7, dtype=torch.long)
        run = uniform._run(tokens, None, None, None, False, mtp=False)
        assert torch.equal(ours.backbone.layers[index](x, None, run)[0], layer(x, None, run)[0])


def test_saving_reproduces_every_byte_and_the_blocks(tmp_path):
    made = model(torch.bfloat16)
    save_pretrained(made, tmp_path / "a")
    loaded = from_pretrained(tmp_path / "a")
    save_pretrained(loaded, tmp_path / "b")
    a, b = tmp_path / "a", tmp_path / "b"
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert json.loads((a / "config.json").read_text()) == json.loads(
        (b / "config.json").read_text()
    )
    assert loaded.config.block_configs == tuple(BLOCKS)
    assert loaded.config.to_dict()["model_type"] == "nemotron_h_puzzle"
    assert (
        load_file(tmp_path / "a" / "model.safetensors").keys()
        == checkpoint_spec(made.config).keys()
    )


def test_names_begin_as_in_the_file(tmp_path):
    save_pretrained(model(torch.bfloat16), tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    values = {name.replace("backbone.", "model."): v for name, v in load_file(path).items()}
    save_file(values, path)
    save_pretrained(from_pretrained(tmp_path / "a"), tmp_path / "b")
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert again.keys() == values.keys()
    assert all(torch.equal(again[name], value) for name, value in values.items())


def test_speculation_says_what_plain_decoding_says():
    made, prompts = model(), [[5, 6, 7, 8], [9, 10]]
    plain = generate(made, prompts, max_new_tokens=8, exact=True)
    drafted = generate(made, prompts, max_new_tokens=8, exact=True, speculate=2)
    assert plain.tokens == drafted.tokens and drafted.drafted > 0


def test_it_trains_and_balances_routers_of_different_sizes(tmp_path):
    blocks = [{"block_type": "moe", "n_routed_experts": 4}, {"block_type": "attention"},
              {"block_type": "moe"}]  # fmt: skip
    mtp = [{"block_type": "moe", "n_routed_experts": 3}]
    changes = {"hybrid_override_pattern": "E*E", "mtp_hybrid_override_pattern": "E"}
    data = {**tiny.CONFIG, "model_type": "nemotron_h_puzzle", **changes,
            "block_configs": blocks, "mtp_block_configs": mtp}  # fmt: skip
    settings = tiny.settings(steps=30, lr=1e-2)
    torch.manual_seed(0)
    network = build(parse_config(data), dtype=torch.float32)
    trainer = Trainer(network, tiny.batches(settings), settings, tmp_path)
    first = trainer.train_step()
    biases = [router.e_score_correction_bias for router in trainer.model.routers()]
    assert [len(bias) for bias in biases] == [4, 8, 3] and all(bias.any() for bias in biases)
    last = [trainer.train_step() for _ in range(29)][-1]
    assert last.losses[0] < 0.7 * first.losses[0] and 1 <= last.load_max <= 8


def test_patterns_may_stand_beside_the_blocks_if_they_agree():
    assert parse_config(fields(hybrid_override_pattern="ME*-E-")).pattern == "ME*-E-"
    with pytest.raises(ConfigError, match="`block_configs.block_type` says 'ME\\*-E-'"):
        parse_config(fields(hybrid_override_pattern="ME*-EM"))


def test_what_every_layer_says_for_itself_may_be_missing():
    blocks = [{"block_type": "moe", **SMALL}, {"block_type": "mlp", "intermediate_size": 8}]
    absent = dict.fromkeys((*SMALL, "intermediate_size"), ...)
    config = parse_config(fields(blocks, ..., num_nextn_predict_layers=0, **absent))
    assert [c.n_routed_experts for c in config.layers] == [4, None]
    with pytest.raises(ConfigError, match=r"`block_configs\[1\]`: `intermediate_size` is missing"):
        parse_config(fields([blocks[0], {"block_type": "mlp"}], ..., num_nextn_predict_layers=0,
                            **absent))  # fmt: skip


def test_mtp_layers_without_entries_have_the_common_sizes():
    config = parse_config(fields(mtp=..., mtp_hybrid_override_pattern="E"))
    assert config.layers[-1].n_routed_experts == 8
    assert parse_config(fields(num_nextn_predict_layers=0)).mtp_block_configs is None


def changed(**change):
    return [{**BLOCKS[0], **change}, *BLOCKS[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_configs=changed(replace_with_linear=True)),
         r"`block_configs\[0\].replace_with_linear` is True; a layer may only have its own"),
        (dict(block_configs=changed(hidden_size=64)), r"`block_configs\[0\].hidden_size` is 64"),
        (dict(block_configs=changed(mamba_num_heads=2)), r"\[0\].mamba_num_heads` is 2"),
        (dict(block_configs=changed(block_type="gru")), "holds 'gru', expected one of"),
        (dict(block_configs=[{}] * 6), r"`block_configs\[0\].block_type` is missing"),
        (dict(block_configs=[*BLOCKS[:5], {"block_type": "moe", "n_routed_experts": 2}]),
         r"`block_configs\[5\]`: `num_experts_per_tok` is 3, but a token chooses among 2"),
        (dict(block_configs=changed(n_routed_experts="4")),
         r"`block_configs\[0\]`: `n_routed_experts` must be of type int"),
        (dict(block_configs=changed(moe_intermediate_size=0)), "must be from 1 to"),
        (dict(block_configs="moe"), "`block_configs` must be a list, got 'moe'"),
        (dict(block_configs=[3]), r"`block_configs\[0\]` must be a JSON object, got int"),
        (dict(block_configs=[]), "`hybrid_override_pattern` is empty"),
        (dict(mtp_block_configs=[]), "`mtp_hybrid_override_pattern` is empty"),
        (dict(block_configs=..., hybrid_override_pattern="M"), "nemotron_h_puzzle has them"),
        (dict(block_configs=..., hybrid_override_pattern="M", model_type="nemotron_h"),
         "`mtp_block_configs` needs `block_configs`"),
        (dict(model_type="nemotron_h"), "nemotron_h has no `block_configs`"),
        (dict(num_hidden_layers=5), "`num_hidden_layers` is 5 but 6 are listed"),
    ],
)  # fmt: skip
def test_bad_blocks(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(fields(**change))


def test_blocks_may_repeat_what_all_layers_have():
    assert parse_config(fields(changed(mamba_num_heads=6))).layers[0].mamba_num_heads == 6
    repeated = changed(n_shared_experts=1)
    assert parse_config(fields(repeated, n_shared_experts=1)).layers[0].pattern == "M"
    with pytest.raises(ConfigError, match=r"\[0\].n_shared_experts` is 1; a layer may only have"):
        parse_config(fields(repeated))
