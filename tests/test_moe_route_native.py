"""The kernel of csrc/moe_route against the reference.

Every test runs twice: the kernel as loops on the CPU, and, with a GPU, as it is.
"""

import math

import pytest
import torch
from fenced import EDGES, fenced
from machine_code import functions_of, needs_nvcc
from scores import not_finite, spread

from nemokernels import testing
from nemokernels._registry import FAMILIES
from nemokernels.ops.moe_route import native, ref

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INF, NAN = math.inf, math.nan


@pytest.fixture
def device(native_device):
    return native_device


def route(device, logits, bias, *rest):
    args = (t if t is None else t.to(device) for t in (logits, bias))
    return [t.cpu() for t in native.forward(*args, *rest)]


def compare(device, logits, bias, top_k, n_group=1, topk_group=1, norm=True, scale=2.5):
    args = (logits, bias, top_k, n_group, topk_group, norm, scale)
    got, low = route(device, *args), ref.forward(*args)
    exact = ref.forward(*testing.to_double(args))
    for name, a, b in zip(("experts", "counts", "offsets", "order"), got[1:], low[1:]):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert torch.equal(low[1], exact[1]) and got[0].dtype == low[0].dtype
    testing.assert_matches(got[0], exact[0], low[0], "weights")


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tokens, experts, top_k",
                         [(0, 9, 3), (1, 1, 1), (5, 7, 7), (13, 32, 32), (33, 33, 3), (3, 130, 6),
                          (2, 257, 8)])  # fmt: skip
def test_sizes(device, tokens, experts, top_k, norm, dtype):
    logits = spread(tokens, experts).to(F32 if experts > 100 else dtype)
    compare(device, logits, None, top_k, norm=norm)
    compare(device, logits, (0.001 * torch.randn(experts)).to(dtype), top_k, norm=norm)


@pytest.mark.parametrize("make", FAMILIES["moe_route"].operators["moe_route"].probes["csrc"])
def test_probes(device, make):
    compare(device, *make(torch.device("cpu"), F32))


@pytest.mark.parametrize("experts, top_k, most", [(128, 6, 341), (512, 22, 93)])
def test_models(device, experts, top_k, most):
    """Of Nemotron 3, up to as many tokens as one launch takes."""
    bias = torch.linspace(0, 1e-5, experts)
    for tokens in (1, 4, 5, 31, 64, most):
        compare(device, spread(tokens, experts), bias, top_k)
    assert most * top_k <= native.SLOTS < (most + 1) * top_k


@pytest.mark.parametrize("experts, top_k, n_group, topk_group",
                         [(8, 4, 2, 1), (15, 4, 5, 3), (24, 5, 3, 2), (6, 2, 6, 2), (32, 8, 32, 9),
                          (12, 3, 4, 4), (256, 8, 8, 4), (510, 7, 3, 2)])  # fmt: skip
def test_groups(device, experts, top_k, n_group, topk_group):
    bias = 0.3 * torch.randn(experts)
    compare(device, spread(9, experts), bias, top_k, n_group, topk_group)
    # Equal scores: lower groups, then lower experts.
    compare(device, torch.zeros(3, experts), None, top_k, n_group, topk_group)


def test_ties_go_to_the_lower_index(device):
    logits = torch.randint(0, 3, (40, 70)).float()
    compare(device, logits, None, 5)
    compare(device, logits.half(), torch.zeros(70), 5, 7, 3)
    bias = torch.full((70,), -0.5)
    bias[::2] = torch.tensor(-0.5).nextafter(torch.tensor(0.0))  # 0 and the next number
    compare(device, torch.zeros(2, 70), bias, 32)


@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (4, 2)])
def test_not_finite(device, n_group, topk_group):
    logits, bias = not_finite()
    args = (logits, bias, 6, n_group, topk_group, True, 2.5)
    for a, b in zip(route(device, *args), ref.forward(*args)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)


def test_nan_of_either_sign_comes_first(device):
    negative = torch.tensor([-0x400000], dtype=torch.int32).view(F32)
    for nan in (negative, -negative):
        bias = torch.zeros(16)
        bias[9:10] = nan
        args = (spread(4, 16), bias, 3, 1, 1, True, 1.0)
        got, want = route(device, *args), ref.forward(*args)
        assert (got[1][:, 0] == 9).all() and torch.equal(got[1], want[1])


@pytest.mark.parametrize("slots", [31, 32, 33, 511, 512, 513, 2047, 2048])
@pytest.mark.parametrize("to", ["all to the last", "in turn", "random"])
def test_sorting(device, slots, to):
    """One expert per token, chosen by a logit above the others."""
    chosen = {"all to the last": torch.full((slots,), 39), "in turn": torch.arange(slots) % 40,
              "random": torch.randint(0, 40, (slots,))}[to]  # fmt: skip
    logits = torch.nn.functional.one_hot(chosen, 40).float()
    compare(device, logits, None, 1)
    assert torch.equal(route(device, logits, None, 1, 1, 1, True, 1.0)[1][:, 0], chosen.int())


def test_strides_and_repeats_give_the_same_bits(device):
    logits, bias = spread(70, 40), 0.1 * torch.randn(40)
    want = route(device, logits, bias, 3, 1, 1, True, 2.5)
    wide = torch.full((70, 83), NAN)
    wide[:, 3:83:2] = logits
    pair = torch.stack((bias, torch.full_like(bias, NAN)), 1).to(device)
    for some in (logits, wide[:, 3:83:2], logits.t().contiguous().t()):
        got = native.forward(some.to(device), pair[:, 0], 3, 1, 1, True, 2.5)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want))


@pytest.mark.parametrize("edge", EDGES)
def test_stays_in_bounds(device, edge):
    for experts, n_group, topk_group in ((33, 1, 1), (130, 5, 3)):
        args = (spread(21, experts), torch.zeros(experts), 3, n_group, topk_group, True, 1.0)
        want = ref.forward(*args)
        inputs = [fenced(t.to(device), edge) for t in args[:2]]
        for a, b in zip(native.forward(*inputs, *args[2:]), want):
            torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize(
    "shape, top_k, groups, message",
    [
        ((3, 513), 2, (1, 1), "at most 512 experts and 2048 slots"),
        ((1025, 4), 2, (1, 1), "at most 512 experts and 2048 slots"),
        ((3, 64), 33, (1, 1), "at most 32 experts per token"),
        ((3, 64), 17, (4, 1), "out of the groups kept"),
        ((3, 64), 2, (5, 1), "at most 32 groups of equal size"),
        ((3, 66), 2, (33, 1), "at most 32 groups of equal size"),
        ((3, 64), 2, (4, 5), "at most 32 groups of equal size"),
        ((3, 64), 2, (4, 0), "at most 32 groups of equal size"),
    ],
)
def test_what_does_not_fit_is_refused(device, shape, top_k, groups, message):
    with pytest.raises(RuntimeError, match=message):
        route(device, torch.zeros(shape), None, top_k, *groups, True, 1.0)
    if groups == (1, 1):
        assert native.barred(*shape, top_k, 1).startswith("csrc takes up to")


@needs_nvcc
def test_machine_code_keeps_scores_in_registers(build_cache):
    found = functions_of("moe_route.cu")
    assert len(found) == 5  # experts per lane: 1, 2, 4, 8 and 16
    for code in found:
        for needed in ("REDUX.MAX.S32", "REDUX.MIN.S32", "MATCH", "UCGABAR_ARV", "UCGABAR_WAIT"):
            assert needed in code, needed
        assert "LDL" not in code and "STL" not in code  # local memory
