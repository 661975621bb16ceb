"""The backward of a whole mixer: the kernels write into slices of one gradient, interpreted."""

from functools import partial

import pytest
import torch

from nemokernels import _backends, _triton
from nemokernels._registry import filling
from nemokernels.ops.causal_conv1d import op as conv1d
from nemokernels.ops.gated_rms_norm import op as gated_norm
from nemokernels.ops.ssd import mixer, op

# The same kernels with outputs of their own, which are copied into place.
APART = mixer.Legs(
    filling(gated_norm.backward_cuda, dz=3),
    conv1d.forward_cuda,
    filling(partial(op.backward_cuda, joined=True), ddt=1, dz=4),
    filling(conv1d.backward_cuda, dx=0),
)
SIZES = mixer.Sizes(4, 8, 2, 16)
OPTIONS = (8, True, 0.0, float("inf"), None)
SEQ_IDX = [[0] * 5 + [-1] * 3 + [0] * 4 + [3] * 8, [1] * 20]


@pytest.fixture(autouse=True)
def on_a_card(monkeypatch):
    monkeypatch.setattr(_backends, "usable", lambda family, device: ("triton",))
    monkeypatch.setattr(_triton, "processors", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def problem(batch, tokens, norm, seq_idx=None, cu_seqlens=None, bias=True, dtype=torch.float16):
    s, channels = SIZES, 96
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state = (rows, s.heads, s.headdim, s.state)
    randn = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    A, D, dt_bias = -torch.rand(4) - 0.5, *torch.randn(2, 4)
    gated, features = norm in (True, False), 100 if norm == "outside" else 132
    return (
        randn(batch, tokens, s.inner), torch.randn(state), randn(batch, tokens, features),
        randn(channels, 4), randn(channels) if bias else None, A, D, dt_bias,
        randn(s.inner) if gated else None, torch.randn(state),
        None if seq_idx is None else torch.tensor(seq_idx, dtype=torch.int32),
        None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
        randn(batch, tokens, s.inner), torch.rand(batch, tokens, s.groups) + 0.5 if gated
        else randn(0), s.heads, s.headdim, s.groups, True, norm is True, *OPTIONS,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("norm", "options"),
    [(False, {}), (True, dict(seq_idx=SEQ_IDX)), (None, dict(bias=False)),
     (None, dict(seq_idx=SEQ_IDX)), (None, dict(batch=1, cu_seqlens=[0, 7, 7, 17])),
     (False, dict(batch=1, cu_seqlens=[0, 7, 7, 17])), (False, dict(batch=0)),
     (None, dict(tokens=0)), (True, dict(tokens=1)), ("outside", {})],
)  # fmt: skip
def test_slices_get_the_bits_of_tensors_of_their_own(norm, options):
    """Every element of the gradient is written: fresh memory is NaN here."""
    args = problem(**{"batch": 2, "tokens": 20, "norm": norm, **options})
    got, want = mixer.backward(mixer.KERNELS, *args), mixer.backward(APART, *args)
    assert got[0].isfinite().all() and got[0].is_contiguous()
    for a, b in zip(got, want):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_an_input_at_an_odd_element():
    args = list(problem(2, 20, False))
    want = mixer.backward(mixer.KERNELS, *args)
    for i in (0, 2, 3, 12):
        odd = args[i].new_zeros(args[i].numel() + 1)[1:].view(args[i].shape)
        args[i] = odd.copy_(args[i])
    assert all(map(torch.equal, mixer.backward(mixer.KERNELS, *args), want))
