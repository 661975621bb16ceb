"""The plain-torch twins of the causal_conv1d functions, which carry causal-conv1d's own names."""

import pytest
import torch

from nemokernels import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)


def leaves(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_autograd_gradients(packed, activation):
    """Autograd through the plain forward, against the operator's own backward."""
    x, weight, bias, initial = leaves((2, 5, 9), (5, 4), (5,), (2, 5, 3))
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [2] * 7 + [-1] * 2], dtype=torch.int32)
    seq_idx = seq_idx if packed else None
    args = (x, weight, bias)
    y, states = causal_conv1d_fn(*args, seq_idx, initial, True, activation=activation)
    y_ref, states_ref = causal_conv1d_ref(*args, initial, True, None, activation, seq_idx)
    assert torch.equal(y, y_ref) and torch.equal(states, states_ref)
    dy, dstates = torch.randn_like(y), torch.randn_like(states)
    inputs = (x, weight, bias, initial)
    got = torch.autograd.grad((y, states), inputs, (dy, dstates))
    want = torch.autograd.grad((y_ref, states_ref), inputs, (dy, dstates))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_final_states_out_receives_the_states():
    x, weight = torch.randn(2, 3, 6), torch.randn(3, 4)
    out = torch.empty(2, 3, 3)
    _, states = causal_conv1d_ref(x, weight, None, None, True, out)
    assert states is out and torch.equal(out, x[..., 3:])
    assert causal_conv1d_ref(x, weight).shape == x.shape


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5)])
def test_update(shape, ring):
    x, state, weight = torch.randn(shape), torch.randn(3, 4, 6), torch.randn(4, 4)
    lengths = torch.tensor([0, 5, 13], dtype=torch.int32) if ring else None
    ours, plain = state.clone(), state.clone()
    y = causal_conv1d_update(x, ours, weight, None, "silu", lengths)
    assert torch.equal(y, causal_conv1d_update_ref(x, plain, weight, None, "silu", lengths))
    assert torch.equal(ours, plain) and not torch.equal(ours, state)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_varlen_states(dtype):
    x, bounds = torch.randn(9, 2), torch.tensor([0, 2, 2, 9], dtype=dtype)
    want = torch.zeros(3, 2, 4)
    want[0, :, 2:], want[2] = x[:2].T, x[5:].T
    assert torch.equal(causal_conv1d_varlen_states(x, bounds, 4), want)
    assert torch.equal(causal_conv1d_varlen_states_ref(x, bounds, 4), want)


def test_bad_activation():
    with pytest.raises(ValueError, match="causal_conv1d_ref: `activation` is 'relu'"):
        causal_conv1d_ref(torch.ones(1, 2, 3), torch.ones(2, 4), activation="relu")
