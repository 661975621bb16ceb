"""The Triton kernels of moe_route, interpreted, against the reference."""

import math

import pytest
import torch
from scores import not_finite, spread

from nemokernels import _triton, testing
from nemokernels.ops.moe_route import kernel, op, ref

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INF, NAN = math.inf, math.nan


def config_of(tokens, experts, top_k, n_group=1):
    lanes = _triton.next_power_of_2(n_group) * _triton.next_power_of_2(experts // n_group)
    return op.plan(tokens, lanes, top_k, "", ("triton",), 2)


def compare(logits, bias, top_k, n_group=1, topk_group=1, norm=True, scale=2.5, config=None):
    """Both launchers against the reference; returns the forward's outputs."""
    args = (logits, bias, top_k, n_group, topk_group, norm, scale)
    config = config or config_of(*logits.shape, top_k, n_group)
    got, low = kernel.forward(*args, config), ref.forward(*args)
    exact = ref.forward(*testing.to_double(args))
    for name, a, b in zip(("experts", "counts", "offsets", "order"), got[1:], low[1:]):
        assert a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b), name
    assert torch.equal(low[1], exact[1])
    assert got[0].dtype == low[0].dtype and got[0].is_contiguous()
    testing.assert_matches(got[0], exact[0], low[0], "weights")
    args = (torch.randn_like(low[0]), logits, low[1], norm, scale)
    dlogits, plain = kernel.backward(*args, config), ref.backward(*args)
    assert dlogits.dtype == plain.dtype and dlogits.is_contiguous()
    testing.assert_matches(dlogits, ref.backward(*testing.to_double(args)), plain, "dlogits")
    return got


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tokens, experts, top_k", [(1, 1, 1), (5, 7, 7), (13, 12, 3), (3, 130, 6)])
def test_sizes(tokens, experts, top_k, has_bias, norm, dtype):
    bias = (0.001 * torch.randn(experts)).to(dtype) if has_bias else None
    compare(spread(tokens, experts, F32 if experts > 100 else dtype), bias, top_k, norm=norm)


@pytest.mark.parametrize("experts, top_k", [(128, 6), (512, 22)])
def test_models(experts, top_k):
    compare(spread(5, experts), torch.linspace(0, 1e-4, experts), top_k)


@pytest.mark.parametrize("experts, top_k, n_group, topk_group",
                         [(8, 4, 2, 1), (15, 4, 5, 3), (24, 5, 3, 2), (6, 2, 6, 2), (16, 8, 8, 4),
                          (12, 3, 4, 4)])  # fmt: skip
def test_groups(experts, top_k, n_group, topk_group):
    bias = 0.3 * torch.randn(experts)
    compare(spread(9, experts), bias, top_k, n_group, topk_group)
    # Equal scores: lower groups, then lower experts.
    compare(torch.zeros(3, experts), None, top_k, n_group, topk_group)


def test_ties_go_to_the_lower_index():
    logits = torch.randint(0, 3, (40, 24)).float()
    compare(logits, None, 5)
    compare(logits.half(), torch.zeros(24), 5, 4, 2)
    bias = torch.full((24,), -0.5)
    bias[::2] = torch.tensor(-0.5).nextafter(torch.tensor(0.0))  # 0 and the next number
    compare(torch.zeros(2, 24), bias, 13)


@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (4, 2)])
def test_not_finite(n_group, topk_group):
    logits, bias = not_finite()
    config = config_of(8, 16, 6, n_group)
    args = (logits, bias, 6, n_group, topk_group, True, 2.5)
    got, want = kernel.forward(*args, config), ref.forward(*args)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)
    dweights = torch.randn(8, 6)
    got = kernel.backward(dweights, logits, got[1], True, 2.5, config)
    want = ref.backward(dweights, logits, want[1], True, 2.5)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got == 0, want == 0)
    assert got[[0, 3, 4, 6, 7]].isfinite().all() and got[1].isnan().sum() == 6


def test_nan_of_either_sign_comes_first():
    negative = torch.tensor([-0x400000], dtype=torch.int32).view(F32)
    for nan in (negative, -negative):
        bias = torch.zeros(16)
        bias[9:10] = nan
        args = (spread(4, 16), bias, 3, 1, 1, True, 1.0)
        got, want = kernel.forward(*args, config_of(4, 16, 3)), ref.forward(*args)
        assert (got[1][:, 0] == 9).all() and torch.equal(got[1], want[1])


def test_strides_give_the_same_bits():
    logits, bias = spread(7, 12), 0.1 * torch.randn(12)
    config = config_of(7, 12, 3)
    dweights = torch.randn(7, 3)

    def run(logits, bias, dweights):
        out = kernel.forward(logits, bias, 3, 1, 1, True, 2.5, config)
        return *out, kernel.backward(dweights, logits, out[1], True, 2.5, config)

    want = run(logits, bias, dweights)
    wide = torch.full((7, 30), NAN)
    wide[:, 3:27:2] = logits
    turned = logits.t().contiguous().t()
    strided_bias, turned_dweights = torch.stack((bias, bias), 1)[:, 0], dweights.t().clone().t()
    for some in (wide[:, 3:27:2], turned):
        got = run(some, strided_bias, turned_dweights)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_the_gradient_of_what_is_no_expert_stays_in_bounds():
    logits, dweights, config = spread(6, 12), torch.randn(6, 3), config_of(6, 12, 3)
    chosen = torch.tensor([[1, 5, 9]]).repeat(6, 1).int()
    want = ref.backward(dweights, logits, chosen, False, 2.5)
    chosen[0, 1], chosen[2, 0], chosen[3, 2] = -1, 12, 2**31 - 1
    want[0, 5] = want[2, 1] = want[3, 9] = 0
    got = kernel.backward(dweights, logits, chosen, False, 2.5, config)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def in_pieces(rows, top_k, programs=1):
    """A piece is what so many programs choose, each for so many tokens."""
    return op.Config("triton", rows, 1, 16, programs * rows * top_k)


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 129, 450])
@pytest.mark.parametrize("programs", [1, 2, 6])
def test_sorting(tokens, programs):
    config = op.Config("triton", 64, 1, 64, programs * 64)
    for chosen in (torch.randint(0, 20, (tokens,)), torch.full((tokens,), 19),
                   torch.arange(tokens) % 3):  # fmt: skip
        logits = 9.0 * torch.nn.functional.one_hot(chosen, 20).float()
        _, experts, *got = kernel.forward(logits, None, 1, 1, 1, False, 1.0, config)
        assert torch.equal(experts[:, 0], chosen.int())
        want = ref.group_rows(chosen, 20)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want))


def test_sorting_in_more_pieces_than_are_scanned_at_once():
    compare(spread(2 * (kernel.SCAN_ROWS + 2) - 1, 20), None, 2, config=in_pieces(2, 2))


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("tokens", [4, 5, 11, 12, 13, 25])
def test_pieces(tokens, programs):
    """Below, at and above what a program of four tokens chooses, and a piece of several."""
    config = in_pieces(4, 3, programs)
    compare(spread(tokens, 12), 0.01 * torch.randn(12), 3, config=config)
    compare(spread(tokens, 15), None, 3, 5, 3, config=config)
    compare(torch.zeros(tokens, 16), None, 3, config=config)  # all to the first three
    counts = compare(spread(tokens, 3), None, 3, config=config)[2]
    assert counts.tolist() == [tokens] * 3


@pytest.mark.parametrize("experts, top_k, n_group, tokens",
                         [(128, 6, 1, 9), (512, 22, 1, 3), (256, 8, 8, 5)])  # fmt: skip
def test_pieces_of_the_models(experts, top_k, n_group, tokens):
    rows = op.plan(tokens, experts, top_k, "", ("triton",), 132).rows
    bias = torch.linspace(0, 1e-4, experts)
    for programs in (1, 2):
        compare(spread(tokens, experts), bias, top_k, n_group, max(n_group // 2, 1),
                config=in_pieces(rows, top_k, programs))  # fmt: skip


def test_pieces_as_planned():
    config = config_of(49, 32, 22)
    assert config.piece < 49 * 22
    compare(spread(49, 32), None, 22, config=config)


def test_many_tokens_that_are_not_numbers():
    logits = spread(30, 12)
    logits[3, 5] = logits[4] = logits[-1, 7] = NAN
    args = (logits, None, 3, 1, 1, True, 2.5)
    got, want = kernel.forward(*args, in_pieces(4, 3, 2)), ref.forward(*args)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:]))
    assert torch.equal(got[0].isnan(), want[0].isnan()) and got[2].sum() == 90


def test_the_counts_keep_nothing_else():
    """Outputs share no memory, and none keeps the table of the pieces; a repeat has their bits."""
    args = (spread(30, 12), None, 3, 1, 1, True, 2.5, in_pieces(4, 3))
    first, again = kernel.forward(*args), kernel.forward(*args)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert [t.untyped_storage().nbytes() for t in first] == [4 * t.numel() for t in first]
    assert len({t.data_ptr() for t in first}) == 5


def test_no_tokens():
    out = kernel.forward(torch.zeros(0, 5), None, 2, 1, 1, True, 1.0, config_of(0, 5, 2))
    assert [t.shape for t in out] == [(0, 2), (0, 2), (5,), (5,), (0,)]
    assert (out[2] == 0).all() and (out[3] == 0).all()
    assert kernel.backward(out[0], torch.zeros(0, 5), out[1], True, 1.0, config_of(0, 5, 2)).shape \
        == (0, 5)  # fmt: skip


def test_plan():
    everywhere = ("triton", "reference")
    assert op.plan(16384, 128, 6, "", everywhere, 132) == op.Config("triton", 4, 4, 64, 384)
    assert op.plan(16384, 512, 22, "", everywhere, 132) == op.Config("triton", 1, 1, 64, 1408)
    assert op.plan(1024, 512, 22, "", everywhere, 132).piece == 5 * 22  # of two blocks, 128
    assert op.plan(300, 32, 22, "", everywhere, 132).piece == 4 * 22  # no less than a program's
    assert op.plan(64, 128, 6, "", everywhere, 132).piece == 384
    assert op.plan(0, 128, 6, "", everywhere, 132).piece == 64
    for tokens, lanes, top_k in ((171, 128, 6), (999, 16, 3), (5000, 64, 7), (2**26, 512, 22)):
        config, slots = op.plan(tokens, lanes, top_k, "", everywhere, 132), tokens * top_k
        assert config.piece % (config.rows * top_k) == 0 and config.piece < slots
        assert _triton.cdiv(slots, config.piece) <= 4 * 132
    assert "2048 experts, got 4096" in op.plan(8, 4096, 6, "", everywhere, 132).reason
    with pytest.raises(RuntimeError, match="got float64"):
        op.plan(8, 128, 6, "got float64", ("triton",), 132)
