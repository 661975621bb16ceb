"""FP8 in the trainer: sharded over gloo the scales are those of one process; checkpoints; CLI."""

from pathlib import Path

import fp8_worker
import on_ranks
import pytest
import torch
from safetensors.torch import load_file

from nemokernels.models import Fp8Linear, fp8_report, from_pretrained
from nemokernels.train.checkpoint import ResumeError

WORKER = Path(fp8_worker.__file__)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    on_ranks.torchrun(WORKER, 4, folder)
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_scales_are_those_of_one_process(world, out):
    """After every micro-batch, bit for bit: the model is in float64, its maxima in float32."""
    record, weights = fp8_worker.steps(fp8_worker.model(), 0, 1)
    got = load_file(out / f"steps{world}.safetensors")
    assert got.keys() == {*record, *weights}
    for name, want in record.items():
        assert torch.equal(got[name], want), name
    for name, want in weights.items():
        torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12)
    scales = [v for n, v in record.items() if n.endswith("up_proj.fp8_state.scale")]
    assert len({s[0].item() for s in scales}) > 6 and len({s[1].item() for s in scales}) > 3


def test_checkpoint_of_four_ranks_continues_in_one(out):
    t = fp8_worker.trainer(out / "run")
    assert t.resume() == 2
    want, got = load_file(out / "trainer.safetensors"), t.objective.state_dict()
    assert want.keys() == got.keys()
    assert [n for n in want if not torch.equal(want[n], got[n])] == []
    assert any(n.endswith("fp8_state.scale") and (v != 1).all() for n, v in got.items())
    t.train_step()


def test_sharded_trainer_agrees_with_one_process(out, tmp_path):
    t = fp8_worker.trainer(tmp_path)
    for _ in range(2):
        t.train_step()
    want, got = load_file(out / "trainer.safetensors"), t.objective.state_dict()
    for name in want:
        if name.endswith("scale"):  # float32: a code may round the other way here and there
            torch.testing.assert_close(got[name], want[name], rtol=0.02, atol=0)


def test_export_knows_nothing_of_fp8(out):
    model = from_pretrained(out / "model", dtype=torch.float32)
    assert not [m for m in model.modules() if isinstance(m, Fp8Linear)]
    want = load_file(out / "trainer.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, want[f"model.{name}"]), name


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_loss_falls(scaling, tmp_path):
    t = fp8_worker.trainer(tmp_path, scaling)
    losses = [t.train_step().losses[0] for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.products.keys() == {"forward", "dgrad", "wgrad"}
               for p in fp8_report(t.model) if p.promised)  # fmt: skip


def test_another_recipe_is_another_run(out):
    with pytest.raises(ResumeError, match="fp8 was 'delayed', now 'current'"):
        fp8_worker.trainer(out / "run", "current").resume()
    with pytest.raises(ResumeError, match="fp8 was 'delayed', now None"):
        fp8_worker.trainer(out / "run", "off").resume()


def test_a_layer_that_does_not_run_stops_the_first_step(tmp_path):
    t = fp8_worker.trainer(tmp_path)
    mixer = next(m for m in t.model.modules() if hasattr(m, "q_proj"))
    lost = mixer.k_proj
    mixer.k_proj = torch.nn.Linear(48, 32, bias=False)
    mixer.spare = lost
    with pytest.raises(RuntimeError, match="mixer.spare: forward, dgrad, wgrad has not run"):
        t.train_step()
