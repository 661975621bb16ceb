"""Training on one process: loss falls, resume is exact, faults stop before the weights change."""

import json
import os

import pytest
import tiny
import torch

from nemokernels.train import checkpoint
from nemokernels.train.checkpoint import ResumeError
from nemokernels.train.trainer import Trainer


def trainer(out, **changes):
    settings = tiny.settings(**changes)
    return Trainer(tiny.model(dtype=torch.float32), tiny.batches(settings), settings, out)


def run(t, save_every=4):
    reports = []
    t.run(save_every=save_every, on_step=reports.append)
    return reports


def weights(t):
    return {name: tensor.clone() for name, tensor in t.objective.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_loss_falls_and_mtp_learns(tmp_path):
    reports = run(trainer(tmp_path, steps=40, lr=1e-2, decay=10))
    first, last = reports[0].losses, reports[-1].losses
    assert len(first) == 3  # next token, depth 1, depth 2
    assert all(b < 0.7 * a for a, b in zip(first, last))
    assert reports[-1].load_max >= 1.0


def test_resume_is_exact(tmp_path):
    whole = trainer(tmp_path / "whole")
    uninterrupted = run(whole)
    part = trainer(tmp_path / "part")
    for _ in range(8):
        part.train_step()
    part.save()
    torch.manual_seed(99)  # resuming must not depend on the generator's state
    again = trainer(tmp_path / "part")
    assert again.resume() == 8
    resumed = run(again)
    assert [r.losses for r in resumed] == [r.losses for r in uninterrupted[8:]]
    assert [r.grad_norm for r in resumed] == [r.grad_norm for r in uninterrupted[8:]]
    assert_same_bits(weights(again), weights(whole))


def test_micro_batches_add_up(tmp_path):
    whole, split = trainer(tmp_path), trainer(tmp_path, micro_batches=2)
    for t in (whole, split):
        t.model.double()
        t.backward()
    for (name, a), (_, b) in zip(
        whole.objective.named_parameters(), split.objective.named_parameters()
    ):
        # label counts are float32, so the two losses are divided by the very same numbers
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_every_parameter_gets_a_gradient_and_moves(tmp_path):
    t = trainer(tmp_path, windows=8)
    before = weights(t)
    for _ in range(3):
        t.train_step()
    after = weights(t)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == set()


def test_balancing_counts_every_choice_once(tmp_path):
    t = trainer(tmp_path)
    t.backward()
    tokens = t.settings.windows * t.settings.seq_len
    counts = [int(r.expert_counts.sum()) for r in t.model.routers()]
    top_k = tiny.CONFIG["num_experts_per_tok"]
    # one MoE layer in the trunk; the MTP block's runs once per depth
    assert counts == [tokens * top_k, 2 * tokens * top_k]
    bias = [r.e_score_correction_bias.clone() for r in t.model.routers()]
    counts = [r.expert_counts.clone().float() for r in t.model.routers()]
    t._balance()
    for router, old, count in zip(t.model.routers(), bias, counts):
        step = t.settings.balance_rate * torch.sign(count.mean() - count)
        assert torch.equal(router.e_score_correction_bias, old + step)
        assert int(router.expert_counts.sum()) == 0


def test_non_finite_gradient_changes_no_weight(tmp_path):
    t = trainer(tmp_path)
    before = weights(t)
    handle = t.model.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError):
        t.train_step()
    handle.remove()
    assert_same_bits(weights(t), before)


def test_checkpoint_holds_no_pickle_and_is_renamed_last(tmp_path):
    t = trainer(tmp_path)
    t.train_step()
    path = t.save()
    assert {p.suffix for p in path.iterdir()} <= {".safetensors", ".json"}
    assert [p.name for p in path.parent.iterdir()] == ["step-00000001"]


def test_only_the_newest_checkpoints_stay(tmp_path):
    run(trainer(tmp_path), save_every=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000012"]


def test_interrupted_save_is_ignored_and_cleaned(tmp_path):
    t = trainer(tmp_path)
    t.train_step()
    t.save()
    broken = tmp_path / "checkpoints" / "step-00000099.incomplete"
    broken.mkdir()
    (broken / "half.safetensors").write_bytes(b"\x00" * 10)
    again = trainer(tmp_path)
    assert again.resume() == 1
    again.train_step()
    again.save()
    assert not broken.exists()


def test_refuses_another_run(tmp_path):
    t = trainer(tmp_path)
    t.train_step()
    t.save()
    with pytest.raises(ResumeError, match="seq_len was 32, now 16"):
        trainer(tmp_path, seq_len=16).resume()


def test_says_in_words_what_makes_it_another_run():
    """Of two models only the fields that differ; of digests, what they are of."""
    model = {"hidden_size": 8, "layers": 2, "rope": {"base": 1}}
    before = {"model": model, "tokens": "c7c3", "seed": 0}
    now = {"model": {**model, "layers": 3, "rope": {"base": 2}}, "tokens": "c7c3", "seed": 0}
    assert checkpoint.differences(before, before) == []
    assert checkpoint.differences(before, now) == ["layers was 2, now 3", "base was 1, now 2"]
    now.update(model=model, tokens="eb19", seed=1)
    assert checkpoint.differences(before, now) == [
        "seed was 0, now 1", "the text, or how it is tokenised, is another"]  # fmt: skip
    assert checkpoint.differences({"model": [1]}, now)[0].startswith("model was [1], now {")


@pytest.mark.parametrize("damage", ["truncate", "remove", "state"])
def test_refuses_a_damaged_checkpoint(tmp_path, damage):
    t = trainer(tmp_path)
    t.train_step()
    path = t.save()
    shard = next(path.glob("*.safetensors"))
    if damage == "truncate":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "remove":
        shard.unlink()
    else:
        (path / "state.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ResumeError, match=path.name):
        trainer(tmp_path).resume()


def test_unwritable_folder_is_an_os_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    t = trainer(blocked)
    with pytest.raises(OSError):
        t.save()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=0), "steps must be at least 1"),
        (dict(warmup=9, decay=9), "must fit into steps"),
        (dict(lr=1e-5, min_lr=1e-4), "min_lr <= lr"),
        (dict(windows=3, micro_batches=2), "multiple of ranks x micro_batches"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **change)


def test_export_loads_as_the_same_model(tmp_path):
    from nemokernels.models import from_pretrained

    t = trainer(tmp_path)
    t.train_step()
    t.export(tmp_path / "model")
    t.export(tmp_path / "model")  # a rerun writes it again
    loaded = from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert_same_bits(dict(loaded.state_dict()), dict(t.model.state_dict()))


def test_latest_ignores_what_is_not_a_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    for name in ("step-1", "step-00000003.incomplete", "step-00000002", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).name == "step-00000002"
