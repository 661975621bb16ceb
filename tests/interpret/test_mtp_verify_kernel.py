"""The Triton kernels of mtp_verify, interpreted, against the reference."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from nemokernels import testing
from nemokernels.ops.mtp_verify import kernel, op, ref

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INF, NAN = math.inf, math.nan
NAMES = ("logits", "drafts", "draft_lengths", "draft_probs", "temperature", "top_k", "top_p",
         "seed", "request_ids", "positions")  # fmt: skip
SMALL = op.Config("triton", 16, 1, 32, 1, 8, 1)  # several blocks of everything


def problem(batch, count, vocab, dtype=F32, **changed):
    """Drafts that the target often likes; ids and positions past 32 bits and near their end."""
    logits = (2 * torch.randn(batch, count + 1, vocab)).to(dtype)
    probs = (logits[:, :-1].float() / 2 + torch.randn(batch, count, vocab)).softmax(-1)
    picks = torch.zeros(batch, count).long()
    if count and batch:
        picks = torch.multinomial(probs.view(-1, vocab), 1).view(batch, count)
    values = dict.fromkeys(NAMES)
    values.update(
        logits=logits, drafts=picks, draft_probs=probs, temperature=torch.ones(batch),
        seed=torch.tensor([-3]), request_ids=torch.randint(-(2**62), 2**62, (batch,)),
        positions=torch.randint(2**31 - 5, 2**32 - count, (batch,)),
    )  # fmt: skip
    return tuple({**values, **changed}[name] for name in NAMES)


def compare(args, config=None):
    """Tokens exactly, log-probabilities within the budget; returns what the kernels gave."""
    config = config or op.plan(args[0].shape[2], "", ("triton",))
    got, low = kernel.verify(*args, config), ref.forward(*args)
    wide = [t.double() if name == "logits" else t for name, t in zip(NAMES, args)]
    assert torch.equal(got[0], low[0]) and torch.equal(got[1], low[1])
    assert [t.dtype for t in got] == [torch.int32, torch.int64, F32]
    # The oracle's own decisions may differ, so it is asked about the tokens that were emitted.
    drafts = args[1].long().clamp(0, args[0].shape[2] - 1)
    want = ref.log_probabilities(wide[0], drafts, low[0].long(), low[1])
    testing.assert_matches(got[2], want, low[2], "logprobs")
    return got


def drawn(values, count):
    return torch.tensor(values)[torch.randint(len(values), (count,))]


@pytest.fixture
def any_value(monkeypatch):
    """What is done on a device, where nobody looks at the values of tensors."""
    monkeypatch.setattr(ref, "_check_values", lambda *args: None)


@pytest.mark.parametrize("vocab, drafts", [(1, 1), (3, 2), (16, 0), (37, 3)])
@pytest.mark.parametrize("drafted", ["greedily", "sampled"])
@pytest.mark.parametrize("config", [None, SMALL])
def test_sampled(vocab, drafts, drafted, config):
    batch = 6
    args = problem(
        batch, drafts, vocab, temperature=drawn([0.0, 0.5, 1.0, 3.0], batch),
        draft_lengths=torch.randint(-1, drafts + 1, (batch,)), seed=torch.randint(2**62, (batch,)),
    )  # fmt: skip
    if drafted == "greedily":
        likely = args[0][:, :-1].argmax(-1)
        args = (args[0], likely, args[2], None, *args[4:])
    compare(args, config)


@pytest.mark.parametrize("dtype, lengths", [(F32, None), (F16, torch.int32), (BF16, torch.int64)])
def test_greedy(dtype, lengths):
    logits = torch.randint(-3, 4, (12, 4, 50)).to(dtype)  # many ties: the lowest index wins
    drafts = logits[:, :3].argmax(-1).int()
    drafts[torch.rand(12, 3) < 0.2] = 7
    if lengths is not None:
        lengths = torch.randint(-2, 4, (12,), dtype=lengths)
    args = problem(12, 3, 50, logits=logits, drafts=drafts, draft_lengths=lengths,
                   temperature=None, draft_probs=None)  # fmt: skip
    assert len(set(compare(args, SMALL)[0].tolist())) > 2


@pytest.mark.parametrize("ties, dtype", [(False, F32), (True, BF16)])
@pytest.mark.parametrize("knobs", ["k", "p", "kp"])
def test_cuts(knobs, ties, dtype, any_value):
    """With and without equal probabilities, and values past their range."""
    batch, vocab = 4, 45
    args = dict(zip(NAMES, problem(batch, 1, vocab, dtype)))
    if ties:
        args["logits"] = torch.randint(-3, 4, (batch, 2, vocab)).to(dtype)
    args["temperature"] = drawn([0.5, 1.0, 2.0], batch)
    args["top_k"] = torch.randint(-1, vocab + 5, (batch,)) if "k" in knobs else None
    args["top_p"] = torch.rand(batch).clamp(min=0.05) if "p" in knobs else None
    if "p" in knobs:
        args["top_p"][:3] = torch.tensor([1.0, 0.0, 2.0])
    compare(tuple(args.values()), SMALL if ties else None)


EVEN = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0]).log()  # ties, and one excluded
ODD = torch.linspace(-3.0, 0.0, 16).sin() * 7.1  # no bit of its exponentials is like another's
SHARES = torch.tensor([0.49, 0.51, 0.74, 0.76, 0.87, 0.88, 0.9, 0.99])


@pytest.mark.parametrize("row", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("knob", ["top_k", "top_p"])
def test_thresholds(knob, row):
    """Every k, and shares on both sides of every step."""
    vocab = len(row)
    values = torch.arange(vocab + 2) if knob == "top_k" else SHARES
    batch = len(values)
    args = problem(batch, 0, vocab, logits=row.expand(batch, 1, vocab), **{knob: values})
    logits, _, _, _, temperature, top_k, top_p, *_ = args
    peak = row.max().expand(batch, 1, 1).contiguous()
    least, mass = torch.empty(2, batch, 1)
    kernel.mtp_verify_cut_kernel[(batch,)](
        logits, None, temperature, top_k, top_p, peak, least, mass, 1, vocab, logits.stride(0),
        logits.stride()[1:], ROWS=1, HAS_LENGTHS=False, HAS_TOP_K=knob == "top_k",
        HAS_TOP_P=knob == "top_p", BLOCK=16, BLOCKS=1, BLOCK_CUT=4,
    )  # fmt: skip
    p = torch.from_numpy(np.exp((row - row.max()).numpy()))  # the interpreter's, to the last bit
    want = ref.target(logits, logits.amax(-1), temperature, top_k, top_p)[:, 0]
    kept = p * (p >= least)
    assert torch.equal(kept > 0, want > 0)
    torch.testing.assert_close(kept.sum(-1), mass[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_without_distribution_ends_its_request_alone(temperature, any_value):
    logits = torch.randn(8, 3, 40)
    drafts = logits[:, :2].argmax(-1)
    probs = torch.full((8, 2, 40), 1e-9)
    logits[1, 0, 39], logits[2, 1], logits[3, 2] = NAN, NAN, -INF
    logits[4, 1, drafts[4, 1]], logits[5, 0, :39] = INF, -INF
    drafts[5, 0] = 39
    args = problem(8, 2, 40, logits=logits, drafts=drafts, draft_probs=probs,
                   temperature=torch.full((8,), temperature))  # fmt: skip
    got = compare(args, SMALL)
    assert got[0].tolist() == [2, 0, 1, 2, 1, 2, 2, 2]
    assert (got[1] == -1).tolist() == [b in (1, 2, 3, 4) for b in range(8)]


def test_impossible_drafts_and_an_empty_residual(any_value):
    logits = torch.tensor([1.0, 0, 0.5, -INF]).expand(6, 2, 4)
    for draft, q in ((-1, None), (4, None), (-(2**40), 0.0), (0, 0.0), (3, 0.25), (3, None),
                     (0, 0.9), (1, NAN)):  # fmt: skip
        probs = None if q is None else torch.full((6, 1, 4), q)
        args = problem(6, 1, 4, logits=logits, drafts=torch.full((6, 1), draft),
                       draft_probs=probs)  # fmt: skip
        _, token, _ = compare(args)
        assert (token != 3).all()


def test_rows_and_requests_that_do_not_count_are_not_read():
    args = dict(zip(NAMES, problem(5, 3, 20, temperature=torch.tensor([1.0, 0, 1, 1, 1]))))
    args["draft_lengths"] = torch.tensor([0, 1, 2, 3, -1])
    args["top_p"] = torch.full((5,), 0.9)
    clean = compare(tuple(args.values()), SMALL)
    for b in range(5):
        n = max(b if b < 4 else -1, -1)
        args["logits"][b, n + 1 :], args["drafts"][b, max(n, 0) :] = NAN, -9
        args["draft_probs"][b, max(n, 0) :] = NAN
    got = compare(tuple(args.values()), SMALL)
    assert all(torch.equal(a, b) for a, b in zip(got, clean))
    assert (got[0][4], got[1][4]) == (-1, 0) and not got[2][4].any()


def test_the_batch_changes_no_bit():
    args = problem(5, 2, 40, top_k=torch.randint(0, 40, (5,)), draft_lengths=drawn([0, 1, 2], 5),
                   temperature=drawn([0.0, 0.8, 1.0], 5))  # fmt: skip
    whole = kernel.verify(*args, SMALL)
    pick = lambda t, i: t if t is None or t.shape[0] == 1 else t[i]  # noqa: E731
    for b in range(5):
        alone = kernel.verify(*(pick(t, slice(b, b + 1)) for t in args), SMALL)
        assert all(torch.equal(a[0], w[b]) for a, w in zip(alone, whole))


def test_any_strides():
    args = problem(3, 2, 17, top_p=torch.full((6,), 0.8)[::2], seed=torch.arange(6)[::2])
    want = kernel.verify(*args, SMALL)
    logits, drafts, lengths, probs, *rest = args
    turned = logits.mT.contiguous().mT, drafts.T.contiguous().T, lengths
    got = kernel.verify(*turned, torch.stack([probs, probs], -1)[..., 0], *rest, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("batch, drafts", [(0, 0), (0, 2), (1, 0)])
def test_empty(batch, drafts):
    compare(problem(batch, drafts, 1))


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1e30])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([0.0, 3e4, -3e4, 2.9e4]).expand(6, 1, 4)
    compare(problem(6, 0, 4, logits=logits, temperature=torch.full((6,), temperature)))


@triton.jit
def exponential_kernel(word_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, kernel._exponential(tl.load(word_ptr + lane).to(tl.uint32)))


def test_noise_to_the_last_digits():
    words = torch.cat([torch.randint(2**32, (2000,)), 2 ** torch.arange(32), 2**32 - 1 - 2
                       ** torch.arange(16)])  # fmt: skip
    out = torch.empty(2048)
    exponential_kernel[(1,)](words, out, N=2048)
    u = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    want = -torch.log1p(-u.double())
    assert ((out - want).abs() <= 4 * 2.0**-24 * want).all()


def test_plan():
    everywhere = ("triton", "reference")
    assert op.plan(131072, "", everywhere) == op.Config("triton", 8192, 8, 8192, 16, 2048, 4)
    assert op.plan(1, "", everywhere).block == 16
    assert op.plan(9, "float64", everywhere).reason == "float64"
    with pytest.raises(RuntimeError, match="float64"):
        op.plan(9, "float64", ("triton",))
