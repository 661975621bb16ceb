"""mamba_step: rings by position, rollback, against the definition and against the separate ops."""

import math

import mamba_steps
import pytest
import torch

from nemokernels import causal_conv1d_update, mamba_step, selective_state_update, testing

F64 = torch.float64


def silu(v):
    return v / (1 + math.exp(-v))


def by_definition(xBC, dt, z, conv_weight, conv_bias, A, D, dt_bias, shape, groups, limits):
    """One sequence (T, C) from its beginning, one number at a time. Returns y and all states."""
    H, P, N = shape
    T, C = xBC.shape
    W = conv_weight.shape[1]
    conv = torch.zeros(T, C, dtype=F64)
    for t in range(T):
        for c in range(C):
            total = conv_bias[c].item()
            for w in range(W):
                if t - (W - 1) + w >= 0:
                    total += conv_weight[c, w].item() * xBC[t - (W - 1) + w, c].item()
            conv[t, c] = silu(total)
    y, states = torch.zeros(T, H, P, dtype=F64), []
    S = torch.zeros(H, P, N, dtype=F64)
    for t in range(T):
        for h in range(H):
            g = h // (H // groups)
            d = math.log1p(math.exp(dt[t, h].item() + dt_bias[h].item()))
            d = min(max(d, limits[0]), limits[1])
            x = conv[t, h * P : (h + 1) * P]
            B = conv[t, H * P + g * N : H * P + (g + 1) * N]
            C_ = conv[t, H * P + (groups + g) * N : H * P + (groups + g + 1) * N]
            S[h] = S[h] * math.exp(d * A[h].item()) + d * torch.outer(x, B)
            for p in range(P):
                gate = silu(z[t, h * P + p].item())
                y[t, h, p] = ((S[h, p] @ C_).item() + D[h].item() * x[p].item()) * gate
        states.append(S.clone())
    return y, states


@pytest.mark.parametrize("calls", [(1, 1, 1, 1, 1, 1, 1), (3, 1, 2, 1), (2, 2, 2, 1)])
@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.4, 0.9)])
def test_fp64_equals_definition(calls, limits):
    """A sequence taken in calls of several tokens, past a turn of both rings."""
    H, P, N, G, W = 4, 3, 5, 2, 4
    most, total = max(calls), sum(calls)
    base = mamba_steps.problem(1, total, H, P, N, G, W, dtype=F64, state_dtype=F64, limits=limits)
    base.conv_state = torch.randn(2, base.xBC.shape[2], W - 1 + most, dtype=F64)
    base.ssm_state = torch.randn(2, most, H, P, N, dtype=F64)  # not zero: length 0 is enough
    want, states = by_definition(
        base.xBC[0], base.dt[0], base.z[0], base.conv_weight, base.conv_bias, base.A, base.D,
        base.dt_bias, (H, P, N), G, limits,
    )  # fmt: skip
    done, got = 0, []
    for tokens in calls:
        part = slice(done, done + tokens)
        call = base.keywords()
        call.update(xBC=base.xBC[:, part], dt=base.dt[:, part], z=base.z[:, part],
                    lengths=torch.tensor([done], dtype=torch.int32),
                    slots=torch.tensor([1], dtype=torch.int32))  # fmt: skip
        got.append(mamba_step(**call))
        done += tokens
    torch.testing.assert_close(torch.cat(got, 1)[0], want, rtol=1e-12, atol=1e-12)
    for t in range(total - most, total):
        torch.testing.assert_close(base.ssm_state[1, t % most], states[t], rtol=1e-12, atol=1e-12)
    for t in range(total - (W - 1), total):
        assert torch.equal(base.conv_state[1, :, t % (W - 1 + most)], base.xBC[0, t])


@pytest.mark.parametrize(("seed", "kind"), [(None, torch.float32), (8, torch.float16),
                                            (8, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_separate_operators(dtype, seed, kind):
    """One token after a full turn, bit for bit: convolution update, then state update."""
    p = mamba_steps.problem(3, spare=2, dtype=dtype, state_dtype=kind, seed=seed, without=("z",))
    p.lengths = torch.tensor([9, 4, 5], dtype=torch.int32)
    H, P, N, G = 4, 6, 10, 2
    conv, M = p.conv_state.clone(), p.ssm_state.shape[1]
    ring = causal_conv1d_update(p.xBC.transpose(1, 2), conv, p.conv_weight, p.conv_bias, "silu",
                                p.lengths, p.slots)  # fmt: skip
    x, B, C = ring.transpose(1, 2).split([H * P, G * N, G * N], -1)
    states, at = p.ssm_state.clone().flatten(0, 1), p.slots.clamp(min=0) * M
    source = torch.where(p.slots < 0, -1, at + (p.lengths - 1) % M)
    target = torch.where(p.slots < 0, -1, at + p.lengths % M)
    y = selective_state_update(
        states, x[:, 0].unflatten(-1, (H, P)), p.dt[:, 0, :, None], p.A[:, None, None],
        B[:, 0].unflatten(-1, (G, N)), C[:, 0].unflatten(-1, (G, N)), p.D[:, None], None,
        p.dt_bias[:, None], True, source, dst_state_batch_indices=target, seed=seed,
    )  # fmt: skip
    assert torch.equal(mamba_step(**p.keywords())[:, 0], y)
    assert torch.equal(p.conv_state, conv) and torch.equal(p.ssm_state.flatten(0, 1), states)


@pytest.mark.parametrize("accepted", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rejected_drafts_were_never_there(accepted, dtype):
    """The next call gives the same bits whether the rejected tokens had been computed or not."""
    drafted = mamba_steps.problem(3, 3, dtype=dtype)
    plain = drafted.clone()
    mamba_step(**drafted.keywords())
    short = plain.keywords()
    for name in ("xBC", "dt", "z"):
        short[name] = short[name][:, :accepted]
    mamba_step(**short)
    ends = []
    for p in (drafted, plain):
        torch.manual_seed(1)
        after = p.keywords()
        for name in ("xBC", "dt", "z"):
            after[name] = torch.randn_like(after[name])
        after["lengths"] = p.lengths + accepted
        ends.append(mamba_step(**after))
    assert torch.equal(*ends)


def test_a_row_has_the_same_bits_in_any_batch():
    whole = mamba_steps.problem(4, 2)
    alone = whole.clone()
    y = mamba_step(**whole.keywords())
    for row in range(4):
        own = alone.keywords()
        for name in ("xBC", "dt", "z", "lengths", "slots"):
            own[name] = own[name][row : row + 1]
        assert torch.equal(mamba_step(**own), y[row : row + 1])
    assert torch.equal(alone.ssm_state, whole.ssm_state)


def test_padding_rows():
    p = mamba_steps.problem(4, 2)
    p.xBC[1] = torch.nan
    before = p.clone()
    y = mamba_step(**p.keywords())
    assert (y[1] == 0).all() and y[[0, 2, 3]].ne(0).any((1, 2, 3)).all()
    for slot in (1, 3, 4):
        assert torch.equal(p.ssm_state[slot], before.ssm_state[slot])
        assert torch.equal(p.conv_state[slot], before.conv_state[slot])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_where_it_says(dtype):
    """The budget is what rounding the inputs, the convolved values and the state costs."""
    p = mamba_steps.problem(4, 2, dtype=dtype, state_dtype=dtype)
    exact, plain = p.clone(double=True), p.clone()
    want = mamba_step(**exact.keywords())
    got = mamba_step(**plain.keywords())
    assert got.dtype == dtype
    again = p.clone()
    testing.assert_matches(mamba_step(**again.keywords()), want, got)


def test_stochastic_rounding_depends_on_slot_and_seed_alone():
    p = mamba_steps.problem(4, 1, dtype=torch.float16, state_dtype=torch.float16, seed=3)
    same, other = p.clone(), p.clone()
    mamba_step(**p.keywords())
    order = torch.tensor([3, 2, 1, 0])
    moved = same.keywords()
    for name in ("xBC", "dt", "z", "lengths", "slots"):
        moved[name] = moved[name][order]
    mamba_step(**moved)
    assert torch.equal(same.ssm_state, p.ssm_state)
    mamba_step(**{**other.keywords(), "seed": 4})
    assert not torch.equal(other.ssm_state, p.ssm_state)


def test_any_strides():
    p = mamba_steps.problem(3, 2)
    odd = p.clone()
    odd.xBC = torch.cat([p.xBC, p.xBC], -1)[..., : p.xBC.shape[2]]
    odd.conv_state = p.conv_state.transpose(1, 2).contiguous().transpose(1, 2)
    odd.ssm_state = p.ssm_state.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(mamba_step(**odd.keywords()), mamba_step(**p.keywords()))
    assert torch.equal(odd.ssm_state, p.ssm_state) and torch.equal(odd.conv_state, p.conv_state)


@pytest.mark.parametrize("rows, tokens", [(0, 1), (2, 0), (0, 0)])
def test_empty(rows, tokens):
    p = mamba_steps.problem(rows, tokens)
    before = p.clone()
    assert mamba_step(**p.keywords()).shape == (rows, tokens, 4, 6)
    assert torch.equal(p.ssm_state, before.ssm_state)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(ssm_state=torch.ones(4, 4, 6, 10)), ValueError, "`ssm_state` has shape"),
        (
            dict(ssm_state=torch.ones(4, 2, 4, 6, 1).expand(4, 2, 4, 6, 10)),
            ValueError,
            "`ssm_state` share memory",
        ),
        (dict(conv_state=torch.ones(64, 5).expand(4, 64, 5)), ValueError, "`conv_state` share mem"),
        (dict(ngroups=3), ValueError, "`ngroups` is 3, expected a divisor of the 4 heads"),
        (dict(xBC=torch.ones(2, 2, 63)), ValueError, "`xBC` has shape .* = \\(any, any, 64\\)"),
        (dict(dt=torch.ones(2, 2, 3)), ValueError, "`dt` has shape"),
        (dict(z=torch.ones(2, 1, 24)), ValueError, "`z` has shape"),
        (dict(conv_weight=torch.ones(64, 5)), ValueError, "`conv_weight` has 5 taps"),
        (dict(conv_bias=torch.ones(24)), ValueError, "`conv_bias` has shape"),
        (dict(conv_state=torch.ones(4, 64, 4)), ValueError, "keeps 4 entries, .* W - 1 \\+ T = 5"),
        (dict(conv_state=torch.ones(3, 64, 5)), ValueError, "`conv_state` has shape"),
        (dict(conv_state=torch.ones(4, 64, 5).half()), TypeError, "`conv_state` is torch.float16"),
        (dict(ssm_state=torch.ones(4, 1, 4, 6, 10)), ValueError, "`ssm_state` keeps 1 states"),
        (dict(A=None), TypeError, "`A` must be a torch.Tensor"),
        (dict(A=torch.ones(4, 6)), ValueError, "`A` has shape"),
        (dict(D=torch.ones(5)), ValueError, "`D` has shape"),
        (dict(lengths=ints(1, 2, 3)), ValueError, "`lengths` has shape"),
        (dict(lengths=torch.ones(2)), TypeError, "`lengths` is torch.float32"),
        (dict(lengths=ints(1, -2)), ValueError, "`lengths` must not be negative"),
        (dict(slots=ints(1, 1)), ValueError, "`slots` must not repeat a slot"),
        (dict(slots=ints(1, 4)), ValueError, "`slots` holds .* expected below 4"),
        (dict(dt_limit=(0.5, 0.1)), ValueError, "`dt_limit` is \\(0.5, 0.1\\)"),
        (dict(seed=1), ValueError, "`seed` asks for stochastic rounding"),
        (dict(xBC=torch.ones(2, 2, 64, requires_grad=True)), RuntimeError, "has no gradient"),
    ],
)
def test_bad_input(change, error, message):
    p = mamba_steps.problem(2, 2)
    p.slots = ints(0, 1)
    before = p.clone()
    with pytest.raises(error, match=f"mamba_step.*{message}"):
        mamba_step(**{**p.keywords(), **change})
    assert torch.equal(p.ssm_state, before.ssm_state)
    assert torch.equal(p.conv_state, before.conv_state)


def test_bad_input_more_rows_than_slots():
    p = mamba_steps.problem(6, 1, without=("slots",))
    p.ssm_state, p.conv_state = p.ssm_state[:5], p.conv_state[:5]
    with pytest.raises(ValueError, match="`ssm_state` has 5 slots, fewer than the 6 rows"):
        mamba_step(**p.keywords())
