import pytest
import torch

from nemokernels import causal_conv1d_fn, causal_conv1d_update, testing

F64 = torch.float64


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def problem(rows=3, dim=5, tokens=2, width=4, length=3, slots=None, dtype=F64):
    return (
        torch.randn(rows, dim, tokens, dtype=dtype),
        torch.randn(slots or rows, dim, length, dtype=dtype),
        torch.randn(dim, width, dtype=dtype),
        torch.randn(dim, dtype=dtype),
    )


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize("tokens", [0, 1, 2, 9])
def test_continues_the_convolution(width, extra, tokens):
    x, state, weight, bias = problem(tokens=tokens, width=width, length=width - 1 + extra)
    joined = torch.cat((state, x), -1)
    want = causal_conv1d_fn(joined, weight, bias, activation="silu")[..., state.shape[-1] :]
    got = causal_conv1d_update(x, state, weight, bias, "silu")
    assert torch.equal(got, want)
    assert torch.equal(state, joined[..., -state.shape[-1] :])


def test_one_token_without_a_time_axis():
    x, state, weight, bias = problem(tokens=1)
    other = state.clone()
    got = causal_conv1d_update(x[..., 0], state, weight, bias)
    assert torch.equal(got, causal_conv1d_update(x, other, weight, bias)[..., 0])
    assert torch.equal(state, other)


@pytest.mark.parametrize("length", [3, 4, 7])
@pytest.mark.parametrize("tokens", [1, 2, 6, 9])
def test_ring_equals_shifting(length, tokens):
    x, _, weight, bias = problem(tokens=3 * tokens)
    ring, shifted = torch.zeros(3, 5, length, dtype=F64), torch.zeros(3, 5, length, dtype=F64)
    start = int32([0, 5, 14])
    for step in x.split(tokens, -1):
        want = causal_conv1d_update(step, shifted, weight, bias, "silu")
        got = causal_conv1d_update(step, ring, weight, bias, "silu", start)
        assert torch.equal(got, want)
        start = start + tokens
    for row in range(3):
        assert torch.equal(ring[row].roll(-(int(start[row]) % length), -1), shifted[row])


@pytest.mark.parametrize("mode", ["plain", "ring", "speculative"])
def test_slots_and_padding(mode):
    x, state, weight, bias = problem(4, tokens=2, length=4, slots=6)
    slots, position = int32([5, -1, 0, 3]), int32([2, 1, 3, 1])
    ring = position if mode == "ring" else None
    accepted = position.clamp(max=2) if mode == "speculative" else None
    live = slots >= 0
    part = lambda v: None if v is None else v[live]  # noqa: E731
    separate = state[slots[live].long()].clone()
    want = causal_conv1d_update(
        x[live], separate, weight, bias, "silu", part(ring), num_accepted_tokens=part(accepted)
    )
    before = state.clone()
    x[1] = torch.nan
    got = causal_conv1d_update(
        x, state, weight, bias, "silu", ring, slots, num_accepted_tokens=accepted
    )
    assert torch.equal(got[live], want) and (got[1] == 0).all()
    assert torch.equal(state[slots[live].long()], separate)
    assert torch.equal(state[[1, 2, 4]], before[[1, 2, 4]])


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_rejected_drafts_leave_no_trace(width, drafts):
    """Every way of accepting drafts gives the outputs of never having drafted, bit for bit."""
    dim, steps = 5, 6
    stream = torch.randn(3, dim, 40, dtype=F64)
    weight, bias = torch.randn(dim, width, dtype=F64), torch.randn(dim, dtype=F64)
    want = causal_conv1d_fn(stream, weight, bias, activation="silu")
    state = torch.full((3, dim, width - 1 + drafts), torch.nan, dtype=F64)
    state[..., : width - 1] = stream[..., : width - 1]
    position, accepted = torch.full((3,), width - 1), torch.ones(3, dtype=torch.int32)
    for _ in range(steps):
        counts = torch.randint(1, drafts + 2, (3,), dtype=torch.int32)
        x = torch.randn(3, dim, drafts + 1, dtype=F64)
        for row, (p, n) in enumerate(zip(position.tolist(), counts.tolist())):
            x[row, :, :n] = stream[row, :, p : p + n]
        y = causal_conv1d_update(x, state, weight, bias, "silu", num_accepted_tokens=accepted)
        for row, (p, n) in enumerate(zip(position.tolist(), counts.tolist())):
            assert torch.equal(y[row, :, :n], want[row, :, p : p + n])
        position, accepted = position + counts, counts


def test_accepted_counts_are_clamped():
    x, state, weight, bias = problem(length=5)
    for wild, tame in ((0, 1), (-7, 1), (9, 3)):
        a, b = state.clone(), state.clone()
        got = causal_conv1d_update(x, a, weight, num_accepted_tokens=int32([wild] * 3))
        want = causal_conv1d_update(x, b, weight, num_accepted_tokens=int32([tame] * 3))
        assert torch.equal(got, want) and torch.equal(a, b)


def test_shorter_speculation_keeps_the_tail_and_none_keeps_all():
    x, state, weight, _ = problem(tokens=1, length=6)
    before = state.clone()
    causal_conv1d_update(x, state, weight, num_accepted_tokens=int32([2, 1, 4]))
    assert torch.equal(state[..., 3:], before[..., 3:]) and torch.equal(state[..., 2:3], x)
    before = state.clone()
    causal_conv1d_update(x[..., :0], state, weight, num_accepted_tokens=int32([1, 1, 1]))
    assert torch.equal(state, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    x, state, weight, bias = problem(dim=16, dtype=dtype)
    wide = [t.double() for t in (x, state, weight, bias)]
    exact = causal_conv1d_update(*wide, "silu")
    got = causal_conv1d_update(x, state, weight, bias, "silu")
    testing.assert_matches(got, exact, exact.to(dtype))
    assert torch.equal(state.double(), wide[1])


def test_any_strides():
    x, state, weight, bias = problem(length=4)
    views = [
        (x.transpose(1, 2).contiguous().transpose(1, 2), state.mT.contiguous().mT),
        (torch.stack((x, x), -1)[..., 0], torch.stack((state, state), 2)[:, :, 1]),
        (x.flip(1).flip(1), state.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
    ]
    want_state = state.clone()
    want = causal_conv1d_update(x, want_state, weight, bias)
    for x_view, state_view in views:
        got = causal_conv1d_update(x_view, state_view, weight, bias)
        assert torch.equal(got, want) and torch.equal(state_view, want_state)


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2)])
def test_empty(shape):
    state = torch.randn(shape[0], shape[1], 4)
    got = causal_conv1d_update(torch.randn(shape), state, torch.randn(shape[1], 4))
    assert got.shape == shape


def test_gradients_are_refused():
    x, state, weight, _ = problem()
    with pytest.raises(RuntimeError, match="has no gradient"):
        causal_conv1d_update(x.requires_grad_(), state, weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.ones(2)), ValueError, r"`x` has shape \(2,\), expected \(B, dim\) or"),
        (dict(x=torch.ones(2, 8).int()), TypeError, "`x` is torch.int32"),
        (dict(weight=torch.ones(8, 6)), ValueError, "`weight` has 6 taps"),
        (dict(bias=torch.ones(3)), ValueError, "`bias` has shape"),
        (dict(conv_state=torch.ones(3, 8, 3)), ValueError, "`conv_state` has shape"),
        (dict(conv_state=torch.ones(8, 3).expand(2, 8, 3)), ValueError, "`conv_state` share mem"),
        (dict(conv_state=torch.ones(2, 8, 2)), ValueError, "`conv_state` keeps 2 entries"),
        (dict(conv_state=torch.ones(2, 8, 3).half()), TypeError, "`conv_state` is torch.float16"),
        (dict(cache_seqlens=int32([0])), ValueError, "`cache_seqlens` has shape"),
        (dict(conv_state_indices=torch.zeros(2)), TypeError, "`conv_state_indices` is"),
        (dict(num_accepted_tokens=int32([1] * 3)), ValueError, "`num_accepted_tokens` has shape"),
        (dict(x=torch.ones(2, 8, 2), num_accepted_tokens=int32([1, 1])), ValueError, "at most 1"),
        (dict(cache_seqlens=int32([1, 1]), num_accepted_tokens=int32([1, 1])), ValueError,
         "exclude each other"),
        (dict(activation="gelu"), ValueError, "`activation` is 'gelu'"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    good = {"x": torch.ones(2, 8), "conv_state": torch.ones(2, 8, 3), "weight": torch.ones(8, 4)}
    with pytest.raises(error, match=message):
        causal_conv1d_update(**{**good, **change})
