"""The Triton kernels of causal_conv1d, interpreted, against the reference."""

import conv1d
import pytest
import torch
from conv1d import ints, problem

from nemokernels import testing
from nemokernels.ops.causal_conv1d import kernel, op, ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def small(chunk=8, block_t=4, block_d=8):
    return op.Config("triton", chunk, block_t, block_d, 1)


def compare(function, *args, config=None):
    return conv1d.compare(kernel, "cpu", function, *args, config=config or small())


@pytest.mark.parametrize("mode", ["rows", "seq_idx", "cu_seqlens"])
@pytest.mark.parametrize(
    "width, dtype, silu, initial",
    [(2, F16, True, True), (3, F32, False, True), (4, BF16, True, True), (4, F32, True, False)],
)
def test_forward_and_backward(mode, width, dtype, silu, initial):
    batch = 1 if mode == "cu_seqlens" else 2
    x, weight, bias, *packing, dy = problem(batch, 13, 9, width, dtype, mode, initial=initial)
    args = (x, weight, bias if initial else None, *packing, silu)
    y, states = compare("forward", *args, True)
    dfinal = torch.randn(states.shape).to(dtype)
    compare("backward", dy, dfinal, *args)
    y_only, none = compare("forward", *args, False)
    assert torch.equal(y_only, y) and none.shape[0] == 0
    compare("backward", dy, dfinal[:0], *args)


@pytest.mark.parametrize("chunk, block_t, block_d", [(4, 4, 16), (16, 16, 32), (8, 2, 8)])
def test_blocks(chunk, block_t, block_d):
    x, weight, bias, *packing, dy = problem(2, 11, 20, 4, F32, "seq_idx")
    args, config = (x, weight, bias, *packing, True), small(chunk, block_t, block_d)
    _, states = compare("forward", *args, True, config=config)
    compare("backward", dy, states, *args, config=config)


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("mode", ["rows", "seq_idx", "cu_seqlens"])
def test_sequences_shorter_than_the_filter(tokens, mode):
    batch = 1 if mode == "cu_seqlens" else 3
    x, weight, bias, *packing, dy = problem(batch, tokens, 8, 4, F32, mode)
    args = (x, weight, bias, *packing, True)
    _, states = compare("forward", *args, True)
    compare("backward", dy, torch.randn(states.shape), *args)


@pytest.mark.parametrize(
    "ids",
    [[[0, 0, -1], [-1, -1, -1], [-1, 2, 2], [1, -1, 1]], [[0, -1], [-1, -1], [-1, 2], [1, 1]]],
)
def test_rows_that_end_or_begin_in_padding(ids):
    """No state is carried out of them, and no gradient back in."""
    x, weight, bias, _, initial, _, dy = problem(4, len(ids[0]), 8, 4, F32)
    args = (x, weight, bias, ints(ids), initial, None, True)
    _, states = compare("forward", *args, True)
    assert (states[:2] == 0).all()
    compare("backward", dy, torch.randn(states.shape), *args)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 5, 0), (2, 0, 8)])
def test_empty(shape):
    x, weight, bias, *packing, dy = problem(*shape, 4, F32)
    args = (x, weight, bias, *packing, True)
    _, states = compare("forward", *args, True)
    compare("backward", dy, states, *args)


def test_strides_and_dtypes():
    x, weight, bias, seq_idx, initial, _, dy = problem(2, 9, 8, 4, F16, "seq_idx", BF16)
    wide = torch.randn(2, 9, 20).half()
    wide[..., 5:13], x = x, wide[..., 5:13]
    dy = dy.transpose(0, 1).contiguous().transpose(0, 1)
    weight, initial = weight.T.contiguous().T, initial.transpose(1, 2).contiguous().transpose(1, 2)
    args = (x, weight, bias, seq_idx.T.contiguous().T, initial, None, True)
    _, states = compare("forward", *args, True)
    compare("backward", dy, states, *args)


def test_packed_equals_separate():
    x, weight, bias, _, initial, cu, dy = problem(1, 14, 8, 4, BF16, "cu_seqlens")
    launch = {"config": small()}
    y, states = kernel.forward(x, weight, bias, None, initial, cu, True, True, **launch)
    dx, _, _, dinitial = kernel.backward(dy, states, x, weight, bias, None, initial, cu, True,
                                         **launch)  # fmt: skip
    bounds = cu.tolist()
    assert (y[:, bounds[-1] :] == 0).all() and (dx[:, bounds[-1] :] == 0).all()
    for s, (lo, hi) in enumerate(zip(bounds, bounds[1:])):
        own = (x[:, lo:hi], weight, bias, None, initial[s : s + 1], None, True)
        y_s, state = kernel.forward(*own, True, **launch)
        dx_s, _, _, d_s = kernel.backward(dy[:, lo:hi], states[s : s + 1], *own, **launch)
        assert torch.equal(y[:, lo:hi], y_s) and torch.equal(states[s : s + 1], state)
        assert torch.equal(dx[:, lo:hi], dx_s) and torch.equal(dinitial[s : s + 1], d_s)


@pytest.mark.parametrize("mode", ["seq_idx", "cu_seqlens"])
def test_nan_of_a_neighbour_does_not_spread(mode):
    x, weight, bias, *_, dy = problem(1, 12, 8, 4, F32)
    seq_idx = ints([[0] * 4 + [1] * 4 + [-1] * 4]) if mode == "seq_idx" else None
    cu = ints([0, 4, 8]) if mode == "cu_seqlens" else None
    x[:, :4] = dy[:, :4] = torch.nan
    x[:, 8:] = dy[:, 8:] = torch.nan
    args = (x, weight, bias, seq_idx, None, cu, True)
    y, _ = kernel.forward(*args, True, config=small())
    dx, *_ = kernel.backward(dy, x[:0, :3], *args, config=small())
    for out in (y, dx):
        assert out[:, :4].isnan().any() and out[:, 4:8].isfinite().all() and (out[:, 8:] == 0).all()


@pytest.mark.parametrize("mode", ["plain", "ring", "speculative"])
@pytest.mark.parametrize("width, dtype", [(2, F16), (3, BF16), (4, F32)])
def test_update(mode, width, dtype):
    for tokens, extra in ((1, 0), (3, 2), (0, 2), (9, 4), (5, 1)):
        if mode == "speculative" and tokens > extra + 1:
            continue
        x, state = torch.randn(4, tokens, 9).to(dtype), torch.randn(6, 9, width - 1 + extra)
        state = state.to(dtype)
        state = state.mT.contiguous().mT if tokens == 3 else state
        weight, bias = torch.randn(9, width).to(dtype), torch.randn(9)
        position, slots = ints([0, 7, 2, 1]), ints([5, -1, 0, 3])
        ring = position if mode == "ring" else None
        accepted = position if mode == "speculative" else None
        args = (weight, bias, True, ring, slots, accepted)
        plain, native, exact_state = state.clone(), state.clone(), state.double()
        low = ref.update(x, plain, *args)
        exact = ref.update(x.double(), exact_state, *testing.to_double(args))
        got = kernel.update(x, native, *args, config=small())
        testing.assert_matches(got, exact, low)
        assert torch.equal(native, plain) and (got[1] == 0).all()


def test_update_of_a_slot_that_does_not_exist_shows():
    state, x, weight = torch.zeros(2, 8, 3), torch.ones(2, 1, 8), torch.ones(8, 4)
    y = kernel.update(x, state, weight, None, False, None, ints([2, 1]), None, config=small())
    assert y[0].isnan().all() and (y[1] == 1).all() and (state[0] == 0).all()


@pytest.mark.parametrize("state_len", [1, 3, 6])
def test_varlen_states(state_len):
    args = torch.randn(14, 9).mT.contiguous().mT, ints([0, 4, 4, 5, 13]), state_len
    assert torch.equal(kernel.varlen_states(*args, config=small()), ref.varlen_states(*args))
