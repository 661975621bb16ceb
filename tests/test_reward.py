"""Reward models: what the head reads, saving, pairwise training, for every family."""

import copy
import json

import families
import hybrids
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from nemokernels.models import (
    CheckpointError,
    ConfigError,
    RewardConfig,
    RewardModel,
    attribute_loss,
    build,
    from_pretrained,
    generate,
    names,
    pairwise_loss,
    save_pretrained,
)
from nemokernels.models.families import parse_config
from nemokernels.train.data import DataError
from nemokernels.train.preference import PairObjective, Pairs
from nemokernels.train.trainer import Trainer

FAMILIES = ["nemotron_h", *families.FAMILIES]


def language(family, dtype=torch.float64, **changes):
    if family == "nemotron_h":
        return hybrids.model("M*-E", "*E", dtype=dtype, **changes)
    return families.model(family, dtype=dtype, **changes)


def reward(family, dtype=torch.float64, **options):
    torch.manual_seed(1)
    return RewardModel.on(language(family, dtype), "rm.head", **{"outputs": 5, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_reads_the_last_hidden_state(family):
    """Padded rows and packed sequences, against the language model's hidden states."""
    plain, model = language(family), reward(family, bias=True)
    tokens, ends = hybrids.tokens(3, 12), torch.tensor([11, 4, 0])
    with torch.no_grad():
        torch.nn.init.normal_(model.lm_head.bias)
        hidden = torch.stack([plain.hidden(row[None, : end + 1])[0, -1]
                              for row, end in zip(tokens, ends)])  # fmt: skip
        want = hidden @ model.rm.head.weight.T + model.rm.head.bias
        rows = model(tokens, ends=ends)
        bounds = torch.tensor([0, 12, 17, 18], dtype=torch.int32)
        packed = torch.cat([row[: end + 1] for row, end in zip(tokens, ends)])[None]
        assert rows.shape == (3, 5)
        for got in (rows, model(packed, cu_seqlens=bounds),
                    model(packed, cu_seqlens=bounds, ends=ends)):  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(tokens)[0], want[0], rtol=1e-9, atol=1e-9)
        earlier = model(packed, cu_seqlens=bounds, ends=torch.tensor([4, 4, 0]))
        torch.testing.assert_close(earlier[0], model(tokens[:1, :5])[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_reproduces_every_byte(family, tmp_path):
    model = reward(family, torch.bfloat16, bias=True)
    save_pretrained(model, tmp_path / "a")
    loaded = from_pretrained(tmp_path / "a")
    assert isinstance(loaded, RewardModel) and loaded.config.outputs == 5 and loaded.config.bias
    save_pretrained(loaded, tmp_path / "b")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architectures"] == ["RewardModel"]
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert {"rm.head.weight", "rm.head.bias"} <= stored.keys()
    assert not any(name.startswith(("lm_head", "mtp")) for name in stored)
    assert stored.keys() == {name for name, _ in names.tensor_shapes(model.config)}
    tokens = hybrids.tokens(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), from_pretrained(tmp_path / "b")(tokens))


@pytest.mark.parametrize(("outputs", "bias"), [(1, False), (5, True), (9, False)])
def test_a_checkpoint_that_does_not_name_its_head(tmp_path, outputs, bias):
    model = reward("nemotron", torch.float32, outputs=outputs, bias=bias)
    save_pretrained(model, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    data = json.loads(path.read_text())
    del data["reward_head"], data["architectures"]
    path.write_text(json.dumps(data))
    loaded = from_pretrained(tmp_path / "a", reward_head="rm.head")
    assert (loaded.config.outputs, loaded.config.bias) == (outputs, bias)
    written = loaded.config.to_dict()["reward_head"]
    assert loaded.config == RewardConfig.from_dict(loaded.config.backbone, written)
    tokens = hybrids.tokens(1, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))
    with pytest.raises(CheckpointError, match="no matrix 'score.weight'"):
        from_pretrained(tmp_path / "a", reward_head="score")
    with pytest.raises(CheckpointError, match="rm.head.weight: unexpected"):
        from_pretrained(tmp_path / "a")


def test_a_language_models_head_is_not_taken_for_a_reward(tmp_path):
    save_pretrained(language("llama", torch.float32), tmp_path / "a")
    values = load_file(tmp_path / "a" / "model.safetensors")
    values["score.weight"] = torch.randn(1, 32)
    save_file(values, tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head.weight: unexpected"):
        from_pretrained(tmp_path / "a", reward_head="score")


def test_scalar_reward_of_the_attributes():
    """0.3 helpfulness + 0.74 correctness + 0.46 coherence + 0.47 complexity - 0.33 verbosity."""
    five = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5]])
    want = 0.3 * 4 + 0.74 * 3 + 0.46 * 2 + 0.47 * 1 - 0.33 * 0.5
    assert abs(reward("llama").scalar(five.double()).item() - want) < 1e-12
    nine = torch.cat([torch.tensor([[9.0, -9.0, 7.0, 5.0]]), five], 1)
    assert abs(reward("llama", outputs=9).scalar(nine.double()).item() - want) < 1e-12
    assert reward("llama", outputs=1).scalar(torch.tensor([[2.5], [3]])).tolist() == [2.5, 3]
    two = reward("llama", outputs=2, weights=(1, -2))
    assert two.scalar(torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16)).dtype == torch.float32
    assert two.config.to_dict()["reward_head"]["weights"] == [1.0, -2.0]


def test_pairwise_loss():
    chosen, rejected = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    margin = torch.rand(7, dtype=torch.float64)
    want = torch.log1p(torch.exp(rejected + margin - chosen))
    torch.testing.assert_close(pairwise_loss(chosen, rejected, margin), want)
    assert pairwise_loss(torch.tensor(3.0), torch.tensor(3.0)).item() == pytest.approx(0.6931472)
    assert pairwise_loss(torch.tensor(-1e4), torch.tensor(0.0)).item() == 1e4  # no overflow


def test_attribute_loss_ignores_what_has_no_label():
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    labels = torch.tensor([[0, -100], [1, 1]])
    loss = attribute_loss(rewards, labels)
    assert loss.item() == pytest.approx((1 + 4 + 9) / 3)
    loss.backward()
    assert rewards.grad[0, 1] == 0 and (rewards.grad != 0).sum() == 3
    assert attribute_loss(rewards, torch.full((2, 2), -100)).item() == 0


def pairs(vocabulary=96, **changes):
    """The chosen response ends in an even token, the rejected one in an odd one."""
    generator = torch.Generator().manual_seed(0)
    sequences = [], []
    for pair in range(8):
        for side, rows in enumerate(sequences):
            length = 3 + (pair + side) % 4
            row = torch.randint(0, vocabulary, (length,), generator=generator)
            row[-1] = row[-1] // 2 * 2 + side
            rows.append(row.tolist())
    return Pairs(*sequences, **{"windows": 4, "seq_len": 8, "seed": 0, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_pairwise_training(family, tmp_path):
    """The loss on repeated pairs halves within 50 steps of the common trainer."""
    model = reward(family, torch.float32, outputs=1)
    settings = tiny.settings(steps=50, lr=1e-2, windows=4, seq_len=8, decay=10)
    data = pairs(margins=[0.1] * 8)
    batch = data.at(0)
    data.at = lambda *_: batch
    trainer = Trainer(model, data, settings, tmp_path, objective=PairObjective)
    reports = [trainer.train_step() for _ in range(50)]
    first, last = reports[0].losses, reports[-1].losses
    assert last[0] <= first[0] / 2 and last[1] == 0
    trainer.export(tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_objective_is_the_mean_loss_of_all_pairs():
    model, data = reward("nemotron_h"), pairs(margins=[0.0, 0.5] * 4)
    objective, parts = PairObjective(model), []
    batch = data.at(1)
    rewards = model.scalar(model(batch.tokens, cu_seqlens=batch.cu_seqlens))
    want = F.softplus(rewards[1::2] + batch.margins - rewards[0::2]).mean()
    totals = sum(objective.label_counts(data.at(1, rank, 2)) for rank in (0, 1))
    for rank in (0, 1):
        parts.append(objective(data.at(1, rank, 2), totals)[1])
    loss, wrong = sum(parts)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-9, atol=1e-9)
    share = (rewards[0::2] <= rewards[1::2]).double().mean()
    assert wrong.item() == pytest.approx(share.item())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert objective(batch, totals)[1][1] == 1  # equal rewards are no ranking


def test_every_pair_is_seen_once_per_epoch_and_stays_together():
    data = pairs(margins=[i / 8 for i in range(8)])
    seen = []
    for step in (0, 1):
        for rank in (0, 1):
            batch = data.at(step, rank, 2)
            rows = batch.tokens[0].split(batch.cu_seqlens.diff().tolist())
            assert [int(row[-1]) % 2 for row in rows] == [0, 1] * 2
            for index, margin in enumerate(batch.margins.tolist()):
                pair = round(margin * 8)
                assert torch.equal(rows[2 * index], data.sequences[2 * pair])
                seen.append(pair)
    assert sorted(seen) == list(range(8))
    assert not torch.equal(data.at(0).tokens, data.at(2).tokens)


def test_it_takes_the_trunk_over_and_drops_the_mtp_block():
    model = language("nemotron_h")
    made = RewardModel.on(model, "score")
    assert made.backbone is model.backbone and made.trunk is model.trunk
    assert not made.training and RewardModel.on(language("llama").train(), "score").training
    assert made.mtp is None and made.config.mtp_pattern == "" and made.config.hidden_size == 32
    assert made.lm_head is made.score and made.score.weight.shape == (1, 32)
    assert made.fsdp_units() == list(model.backbone.layers)
    assert {n for n in made.state_dict() if not n.startswith("backbone.")} == {"score.weight"}
    assert copy.deepcopy(made.config) == made.config and hash(made.config)
    built = build(made.config, dtype=torch.float64)
    assert built.state_dict().keys() == made.state_dict().keys()
    assert 0 < built.score.weight.std() < 0.1


def test_dtypes_of_the_language_models_file_survive(tmp_path):
    save_pretrained(language("nemotron_h", torch.bfloat16), tmp_path / "a")
    name, path = "backbone.layers.0.mixer.A_log", tmp_path / "a" / "model.safetensors"
    values = load_file(path)
    save_file({**values, name: values[name].float()}, path)
    save_pretrained(RewardModel.on(from_pretrained(tmp_path / "a"), "score"), tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors")[name].dtype == torch.float32


def test_the_released_reward_model():
    """The 340B base without its LM head, and a head of five."""
    base, H = 341_029_195_776, 18_432
    for outputs in (5, 9):
        head = {"head": "rm_head", "outputs": outputs}
        model = build("Nemotron-4 340B Reward", device="meta", reward_head=head)
        count = sum(tensor.numel() for tensor in model.state_dict().values())
        assert count == base - 256_000 * H + outputs * H
        assert names.element_count(model.config) == count
    with pytest.raises(ValueError, match="needs reward_head, which are not public"):
        build("Nemotron-4 340B Reward", device="meta")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({}, "`reward_head.head` is missing"),
        ([], "`reward_head` must be a JSON object"),
        ({"head": 3}, "`reward_head.head` must be of type str"),
        ({"head": "a..b"}, "`reward_head.head` is 'a..b', expected a module's name"),
        ({"head": "../x"}, "expected a module's name"),
        ({"head": "s", "outputs": 0}, "`reward_head.outputs` must be from 1"),
        ({"head": "s", "outputs": 3}, "`reward_head.weights` must be 3 numbers, got None"),
        ({"head": "s", "weights": [1, 2]}, "`reward_head.weights` must be 1 numbers"),
        ({"head": "s", "weights": ["a"]}, "`reward_head.weights` must be 1 numbers"),
        ({"head": "s", "bias": 1}, "`reward_head.bias` must be of type bool"),
        ({"head": "s", "rank": 1}, r"`reward_head` holds \['rank'\]"),
    ],
)
def test_bad_heads(head, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**families.FIELDS["llama"], "reward_head": head})


def test_misuse():
    model = reward("llama")
    tokens = hybrids.tokens(2, 4)
    with pytest.raises(ValueError, match="`ends` must lie inside sequences of .4, 4. tokens"):
        model(tokens, ends=torch.tensor([4, 0]))
    with pytest.raises(ValueError, match="`ends` must lie inside"):
        model(tokens[:1], cu_seqlens=torch.tensor([0, 0, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="sequences of 65 tokens, but 64 positions were learned"):
        reward("mt-nlg")(hybrids.tokens(1, 65))
    with pytest.raises(ValueError, match="`ends` has shape"):
        model(tokens, ends=torch.tensor([1]))
    with pytest.raises(ValueError, match="gives rewards, not logits"):
        generate(model, [[1, 2]], max_new_tokens=1)
    with pytest.raises(ConfigError, match="a RewardConfig cannot have a reward head"):
        RewardConfig(model.config, "again")
    with pytest.raises(ConfigError, match="`reward_head.head` is 'model', which the model has"):
        RewardModel.on(language("llama"), "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(margins=[0.0]), "8 chosen, 8 rejected sequences, 1 margins"),
        (dict(windows=9), "8 pairs, fewer than one step needs"),
        (dict(seq_len=4), "sequences have 3 to 6 tokens, expected 1 to 4"),
    ],
)
def test_bad_pairs(change, message):
    with pytest.raises(DataError, match=message):
        pairs(**change)
