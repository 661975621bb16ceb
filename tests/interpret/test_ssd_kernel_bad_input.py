"""The chunk scan's Triton kernels, interpreted: odd memory, and values that are not finite."""

from dataclasses import replace

import pytest
import torch
from scans import INPUTS, inputs

from nemokernels.ops.ssd import kernel, op

CONFIG = op.Config("triton", chunk=16, span=32, square=16)
OPTIONS = (True, 0.0, float("inf"))


@pytest.mark.parametrize("tma", [False, True])
def test_inputs_whose_elements_share_memory(tma):
    """Expanded, as autograd hands over gradients; no descriptor can say that a stride is 0."""
    made = inputs(batch=2, groups=2, without=("z",), dtype=torch.float16)
    for name in ("x", "B", "dt"):
        made[name] = made[name][:1].expand(2, *made[name].shape[1:])
    made["C"] = made["C"][..., :1].expand(made["C"].shape)
    config = replace(CONFIG, tma=tma, tma_met=tma)

    def run(change):
        args = [None if made[n] is None else change(made[n]) for n in INPUTS]
        got = kernel.forward(*args, *OPTIONS, config=config)
        ones = [change(torch.ones((), dtype=t.dtype).expand(t.shape)) for t in got[:2]]
        return *got, *kernel.backward(*ones, *args, got[2], *OPTIONS, config=config)

    assert all(map(torch.equal, run(lambda t: t), run(lambda t: t.contiguous())))


SIZES = dict(heads=4, groups=2, without=("z",), cu_seqlens=[0, 9, 23], length=23)


def results(made, douts):
    args = [made[n] for n in INPUTS]
    got = kernel.forward(*args, *OPTIONS, config=CONFIG)
    return *got[:2], *kernel.backward(*douts, *args, got[2], *OPTIONS, config=CONFIG)


@pytest.fixture(scope="module")
def clean():
    torch.manual_seed(0)
    made = inputs(**SIZES, dtype=torch.float16)
    douts = torch.randn(1, 23, 4, 16).half(), torch.randn(2, 4, 16, 16)
    return made, douts, results(made, douts)


@pytest.mark.parametrize(
    ("name", "value"),
    [("x", torch.nan), ("x", torch.inf), ("dt", torch.nan), ("dt", torch.inf), ("B", torch.nan),
     ("C", -torch.inf), ("D", torch.nan), ("initial_states", torch.inf)],
)  # fmt: skip
def test_what_is_not_finite_comes_out_and_stays_in_its_sequence(clean, name, value):
    """And in its head, or the heads of its group. At token 11, the third of the second sequence."""
    made, douts, want = clean
    at = {"D": (3,), "initial_states": (1, 3, 2, 2)}.get(name, (0, 11, 1 if name in "BC" else 3))
    made = {**made, name: made[name].clone()}
    made[name][at] = value
    got = results(made, douts)
    out, final, dx, ddt = got[:4]
    assert not out[:, 11, 3].isfinite().all()
    if name in ("x", "dt", "B"):  # what enters the state is seen by all that follow
        assert not out[:, 22, 3].isfinite().all() and not final[1, 3].isfinite().all()
    assert not all(grad.isfinite().all() for grad in got[2:])

    apart = [0, 1] if name in "BC" else [0, 1, 2]
    for one, other in zip((out, dx, ddt), want[:1] + want[2:4]):
        assert torch.equal(one[:, :, apart], other[:, :, apart])
        assert name == "D" or torch.equal(one[:, :9], other[:, :9])
    assert torch.equal(final[:, apart], want[1][:, apart]) and torch.equal(final[0], want[1][0])
