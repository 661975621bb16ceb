"""Options of the trainer that must not change a result, and the balance of its experts."""

import families
import pytest
import tiny
import torch

from nemokernels.train.trainer import Trainer


def trainer(out, dtype=torch.float64, model=None, **changes):
    settings = tiny.settings(**changes)
    t = Trainer(model or tiny.model(dtype=torch.float32), tiny.batches(settings), settings, out)
    t.model.to(dtype)
    return t


def gradients(t):
    t.backward()
    return {name: p.grad for name, p in t.objective.named_parameters()}


@pytest.mark.parametrize("family", ["nemotron_h", "nemotron-nas", "bloom", "hymba", "mamba"])
def test_recomputed_layers_have_the_same_bits(family, tmp_path):
    results = []
    for again in (False, True):
        changes = dict(vocab_size=320, tie_word_embeddings=True)
        own = family == "nemotron_h"
        model = None if own else families.model(family, dtype=torch.float32, **changes)
        t = trainer(tmp_path, torch.float32, model, recompute=again)
        counts = {f"counts {i}": c for i, c in enumerate(t.model.expert_counts)}
        results.append({**gradients(t), **counts})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("fp8", ["delayed", "current"])
def test_recomputed_layers_in_fp8(fp8, tmp_path):
    """Scales too are what they are without."""
    states = []
    for again in (False, True):
        t = trainer(tmp_path, torch.float32, fp8=fp8, fp8_ends=0, recompute=again, micro_batches=2)
        for _ in range(2):
            t.train_step()
        states.append(t.objective.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_recomputation_keeps_fewer_activations(tmp_path):
    kept = []
    for again in (False, True):
        t, total = trainer(tmp_path, recompute=again), 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        batch = next(t._micro_batches())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            t.objective(batch, t.objective.label_counts(batch))
        kept.append(total)
    assert kept[1] < 0.5 * kept[0]


def test_auxiliary_loss_is_a_mean_over_the_windows_of_a_step(tmp_path):
    """It is linear in its coefficient and does not know how a step is cut into parts."""
    none, one, two, parts = (
        gradients(trainer(tmp_path, balance_coefficient=c, micro_batches=m))
        for c, m in ((0.0, 1), (0.5, 1), (1.0, 1), (0.5, 4))
    )
    routers = [name for name in none if name.endswith("gate.weight")]
    assert len(routers) == 2
    for name in none:
        torch.testing.assert_close(parts[name], one[name], rtol=1e-9, atol=1e-12, msg=name)
        twice = 2 * (one[name] - none[name])
        torch.testing.assert_close(two[name] - none[name], twice, rtol=1e-7, atol=1e-10)
    assert all((one[name] - none[name]).abs().max() > 1e-4 for name in routers)
    head = "model.lm_head.weight"
    torch.testing.assert_close(one[head], none[head], rtol=0, atol=0)


def test_bias_moves_by_the_counts_of_all_micro_batches(tmp_path):
    whole, parts = (trainer(tmp_path, micro_batches=m) for m in (1, 4))
    for t in (whole, parts):
        t.backward()
    for a, b in zip(whole.model.routers(), parts.model.routers()):
        counts = b.expert_counts.double()
        assert torch.equal(a.expert_counts, b.expert_counts)
        old, step = b.e_score_correction_bias.clone(), 1e-3 * torch.sign(counts.mean() - counts)
        assert step.unique().numel() > 1
        b.want = old + step
    parts._balance()
    for router in parts.model.routers():
        assert torch.equal(router.e_score_correction_bias, router.want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(expert_parallel=0), "expert_parallel must be at least 1, got 0"),
        (dict(expert_parallel=2), r"expert_parallel \(2\) must divide the number of ranks \(1\)"),
        (dict(balance_coefficient=-1.0), "balance_coefficient is -1.0, expected >= 0"),
    ],
)
def test_bad_settings(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)
