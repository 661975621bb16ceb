import itertools
import math

import pytest
import torch

from nemokernels import _philox, mtp_verify
from nemokernels.ops.mtp_verify import ref

INF, NAN = math.inf, math.nan


def words(seed, request, position, block):
    return [int(w) for w in _philox.philox4x32(seed, torch.tensor([request]), position, block)]


def cut(row, temperature, top_k, top_p):
    """Target probabilities of one row in Python floats, from the definition of the two cuts."""
    p = [math.exp((v - max(row)) / temperature) for v in row]
    if top_k:
        p = [v if sum(o > v for o in p) < top_k else 0.0 for v in p]
    total = sum(p)
    p = [v if sum(o for o in p if o > v) < top_p * total else 0.0 for v in p]
    return [v / sum(p) for v in p]


def by_hand(logits, drafts, probs, length, temperature, top_k, top_p, request, position, seed=77):
    """One request, one draft at a time: (accepted, next token)."""
    for j in range(length + 1):
        row = logits[j].tolist()
        best = row.index(max(row))
        if temperature == 0:
            if j < length and drafts[j] == best:
                continue
            return j, best
        weights = cut(row, temperature, top_k, top_p)
        if j < length:
            x = int(drafts[j])
            q = [float(v == x) for v in range(len(row))] if probs is None else probs[j].tolist()
            if (words(seed, request, position + j, 0)[0] >> 8) * 2.0**-24 * q[x] < weights[x]:
                continue
            weights = [max(a - b, 0.0) for a, b in zip(weights, q)]
        scores = []
        for v, weight in enumerate(weights):
            word = words(seed, request, position + j, 1 + v // 4)[v % 4]
            scores.append(weight / -math.log1p(-min((word + 0.5) * 2.0**-32, 1 - 2.0**-24)))
        return j, scores.index(max(scores))


def problem(batch, drafts, vocab, seed=0, dtype=torch.float64):
    """Logits, drafts that the target often likes, and the distributions they came from."""
    make = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, drafts + 1, vocab, generator=make, dtype=dtype)
    probs = logits[:, :-1].double() / 2 + torch.randn(batch, drafts, vocab, generator=make)
    probs = probs.softmax(-1).to(dtype)
    if not drafts:
        return logits, torch.zeros(batch, 0).long(), probs
    picks = torch.multinomial(probs.view(-1, vocab), 1, generator=make)
    return logits, picks.view(batch, drafts), probs


@pytest.fixture
def any_value(monkeypatch):
    """What is done on a device, where nobody looks at the sums of draft_probs."""
    monkeypatch.setattr(ref, "_check_values", lambda *args: None)


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("with_probs", [False, True])
def test_fp64_equals_a_python_loop(drafts, with_probs):
    logits, picks, probs = problem(40, drafts, 9)
    probs = probs if with_probs else None
    draw = lambda values: torch.tensor(values)[torch.randint(len(values), (40,))]  # noqa: E731
    temperature = draw([0.0, 0.5, 1.0, 3.0]).double()
    top_k, top_p = draw([0, 1, 2, 5, 9, 20]), draw([0.2, 0.7, 0.95, 1.0]).double()
    lengths = torch.randint(drafts + 1, (40,))
    ids, positions = torch.randint(2**40, (40,)), torch.randint(10**6, (40,))
    verdict = mtp_verify(logits, picks, draft_lengths=lengths, draft_probs=probs, seed=77,
                         temperature=temperature, top_k=top_k, top_p=top_p, request_ids=ids,
                         positions=positions)  # fmt: skip
    for b in range(40):
        one = [v[b].item() for v in (lengths, temperature, top_k, top_p, ids, positions)]
        q = None if probs is None else probs[b]
        a, token = by_hand(logits[b], picks[b], q, *one)
        assert (int(verdict.accepted[b]), int(verdict.next_token[b])) == (a, token), b
        emitted = [*picks[b, :a].tolist(), token]
        want = logits[b, : a + 1].log_softmax(-1)[range(a + 1), emitted]
        torch.testing.assert_close(verdict.logprobs[b, : a + 1], want, rtol=1e-12, atol=1e-12)
        assert not verdict.logprobs[b, a + 1 :].any()


def test_greedy_rule_exhaustively():
    """Every target of three rows over three tokens, every pair of drafts, every length."""
    cases = list(itertools.product(range(3), repeat=6))
    rows = torch.tensor([case[:3] for case in cases])
    drafts = torch.tensor([case[3:5] for case in cases])
    lengths = torch.tensor([case[5] for case in cases])
    logits = torch.nn.functional.one_hot(rows, 3).float() - 7
    probs = torch.rand(len(cases), 2, 3)
    for extra in ({}, dict(temperature=0.0, draft_probs=probs, top_k=2, top_p=0.5)):
        verdict = mtp_verify(logits, drafts, draft_lengths=lengths, **extra)
        for case, a, token in zip(cases, verdict.accepted.tolist(), verdict.next_token.tolist()):
            want = next((j for j in range(case[5]) if case[3 + j] != case[j]), case[5])
            assert (a, token) == (want, case[want])


def test_greedy_ties_go_to_the_lower_token():
    logits = torch.tensor([[[1.0, 5, 5, 0], [3, 3, 3, 3]]])
    verdict = mtp_verify(logits, torch.tensor([[1]]))
    assert (verdict.accepted.item(), verdict.next_token.item()) == (1, 0)
    assert mtp_verify(logits, torch.tensor([[2]])).accepted.item() == 0


def chi_square(tokens, p):
    """Assert that ``tokens`` follow ``p``: Pearson's statistic, false alarm below 1e-6.

    Laurent and Massart 2000: P(X >= df + 2 sqrt(df x) + 2x) <= exp(-x) for chi-square X.
    """
    counts = torch.bincount(tokens, minlength=len(p)).double()
    assert not counts[p == 0].any()
    p, counts = p[p > 0], counts[p > 0]
    expected = p * counts.sum()
    assert expected.min() >= 20, "too few samples for the chi-square limit"
    df, x = len(p) - 1, math.log(1e6)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic <= df + 2 * math.sqrt(df * x) + 2 * x


MANY = 200_000
KNOBS = [dict(temperature=0.6), dict(temperature=1.0), dict(temperature=1.7, top_k=4, top_p=0.8)]


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("drafted", ["sampled", "likely", "unlikely"])
def test_emitted_tokens_follow_the_target(drafted, knobs):
    """The first three tokens, wherever they come from, and the first two jointly."""
    logits = 1.2 * torch.rand(1, 3, 6, dtype=torch.float64)
    cuts = (knobs["temperature"], knobs.get("top_k", 0), knobs.get("top_p", 1.0))
    p = torch.tensor([cut(row, *cuts) for row in logits[0].tolist()], dtype=torch.float64)
    probs = None
    if drafted == "sampled":
        probs = torch.randn(1, 2, 6, dtype=torch.float64).softmax(-1)
        picks = torch.stack([torch.multinomial(q, MANY, True) for q in probs[0]], 1)
    else:
        first = p[0].argmax() if drafted == "likely" else p[0].where(p[0] > 0, 2).argmin()
        picks = torch.stack([first, p[1].argmax()]).expand(MANY, 2)
    extra = dict(seed=5, request_ids=torch.arange(MANY), **knobs)
    many = logits.expand(MANY, -1, -1)
    q = None if probs is None else probs.expand(MANY, -1, -1)
    a, token, _ = mtp_verify(many, picks, draft_probs=q, positions=torch.full((MANY,), 9), **extra)
    first = torch.where(a >= 1, picks[:, 0], token)
    chi_square(first, p[0])
    chi_square(torch.where(a >= 2, picks[:, 1], token)[a >= 1], p[1])
    chi_square(token[a == 2], p[2])
    # Where the first draft was rejected, the step that follows draws the second token.
    positions = torch.full((MANY,), 10)
    later = mtp_verify(many[:, 1:2], picks[:, :0], positions=positions, **extra).next_token
    second = torch.where(a >= 2, picks[:, 1], torch.where(a == 1, token, later))
    chi_square(6 * first + second, (p[0][:, None] * p[1]).flatten())

    accept = torch.minimum(p[0], probs[0, 0]).sum() if q is not None else p[0, picks[0, 0]]
    hoeffding = math.sqrt(math.log(2e6) / (2 * MANY))
    assert abs((a >= 1).double().mean() - accept) <= hoeffding


def test_without_drafts_it_samples():
    logits = torch.tensor([0.0, 1, 2, -INF, 0.5]).expand(MANY, 1, 5)
    verdict = mtp_verify(logits, torch.zeros(MANY, 0).long(), temperature=1.0, seed=1)
    chi_square(verdict.next_token, logits[0, 0].softmax(-1))


def test_noise_over_a_large_vocabulary_is_exponential():
    noise = ref.exponential(torch.tensor([9]), torch.arange(3), torch.tensor([4, 4, 5]), 33_333)
    assert noise.shape == (3, 33_333) and noise.min() > 0 and noise.max() < 17
    # Dvoretzky-Kiefer-Wolfowitz: the empirical distribution is off by more with chance 1e-6.
    flat = noise.flatten().double().sort().values
    steps = torch.arange(1, len(flat) + 1) / len(flat)
    assert (steps + torch.expm1(-flat)).abs().max() <= math.sqrt(math.log(2e6) / (2 * len(flat)))
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[1], noise[2])
    # A word that float32 rounds to 2**32, and a race that only underflow would tie.
    top = ref.exponential(torch.tensor([0]), torch.tensor([27_838_773]), torch.tensor([0]), 4)
    assert 16.6 < top[0, 0] < 17
    assert ref.race(torch.tensor([[0.0, 1e-45]]), torch.tensor([[1.0, 16.0]])).item() == 1


def test_top_k_and_top_p_keep_the_sets_of_the_definition():
    logits = torch.randint(-3, 4, (60, 1, 12)).double()  # many ties
    top_k = torch.randint(0, 14, (60,))
    top_p = torch.rand(60, dtype=torch.float64).clamp(min=0.05)
    top_p[::5] = 1.0
    p = ref.target(logits, logits.amax(-1), torch.full((60,), 0.75), top_k, top_p)
    for b in range(60):
        want = cut(logits[b, 0].tolist(), 0.75, int(top_k[b]), float(top_p[b]))
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(p[b, 0], want, rtol=1e-12, atol=0)


def test_top_p_boundary_and_out_of_range_values():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[None, None].double()

    def keep(k, p):
        knobs = torch.ones(1), torch.tensor([k]), torch.tensor([p], dtype=torch.float64)
        return (ref.target(logits, logits.amax(-1), *knobs) > 0).sum().item()

    assert [keep(0, p) for p in (-1.0, 0.0, 0.4, 0.6)] == [1, 1, 1, 2]
    assert [keep(0, p) for p in (0.76, 0.9, 1.0, 2.0)] == [4, 4, 4, 4]
    assert [keep(k, 1.0) for k in (-1, 0, 1, 2, 3, 4, 99)] == [4, 4, 1, 2, 4, 4, 4]
    assert keep(2, 0.66) == 1 and keep(2, 0.67) == 2  # of the mass that top-k left


def test_top_p_adds_up_in_float64():
    """The first two hold more than the share by less than float32 can tell beside one."""
    logits = torch.tensor([0.0, -25.0, -26.0]).mul(math.log(2))[None, None]
    share = (1 + 2.0**-26) / (1 + 2.0**-25 + 2.0**-26)
    knobs = torch.ones(1), None, torch.tensor([share], dtype=torch.float64)
    assert (ref.target(logits, logits.amax(-1), *knobs) > 0).tolist() == [[[True, True, False]]]


def test_the_batch_a_request_sits_in_changes_nothing():
    logits, picks, probs = problem(12, 3, 50, dtype=torch.float32)
    lengths = torch.tensor([3, 0, 1, 2] * 3, dtype=torch.int32)
    ids, positions = torch.randint(2**62, (12,)), torch.randint(2**31, (12,))
    temperature, top_k = torch.rand(12) * 2, torch.randint(0, 40, (12,), dtype=torch.int32)

    def verify(i, most=3):
        return mtp_verify(logits[i, : most + 1], picks[i, :most], draft_lengths=lengths[i],
                          draft_probs=probs[i, :most], temperature=temperature[i],
                          top_k=top_k[i], top_p=0.9, seed=3, request_ids=ids[i],
                          positions=positions[i])  # fmt: skip

    whole, order = verify(torch.arange(12)), torch.randperm(12)
    for got, want in zip(verify(order), whole):
        assert torch.equal(got, want[order])
    for b in range(12):
        most = int(lengths[b])
        got = verify(torch.tensor([b]), most)
        assert torch.equal(got.accepted[0], whole.accepted[b])
        assert torch.equal(got.next_token[0], whole.next_token[b])
        assert torch.equal(got.logprobs[0], whole.logprobs[b, : most + 1])


def test_seed_request_and_position_each_change_the_draw():
    logits, none = torch.zeros(1, 1, 1000), torch.zeros(1, 0).long()

    def draw(seed=0, request=0, position=0):
        ids, positions = torch.tensor([request]), torch.tensor([position])
        return mtp_verify(logits, none, temperature=1.0, seed=seed, request_ids=ids,
                          positions=positions).next_token.item()  # fmt: skip

    changes = [{}, dict(seed=1), dict(seed=2**32), dict(request=1), dict(request=2**32),
               dict(position=1), dict(position=2**31)]  # fmt: skip
    assert len({draw(**change) for change in changes}) == len(changes)
    assert draw() == draw()
    assert draw(seed=2**64 - 1) == draw(seed=torch.tensor([-1]))
    seeds, ids = torch.tensor([0, 1]), torch.tensor([0, 0])
    two = mtp_verify(logits.expand(2, -1, -1), none.expand(2, 0), temperature=1.0, seed=seeds,
                     request_ids=ids)  # fmt: skip
    assert two.next_token.tolist() == [draw(), draw(seed=1)]


def test_scalars_mean_the_same_for_every_request():
    logits, picks, _ = problem(6, 2, 20, dtype=torch.float32)
    one = mtp_verify(logits, picks, temperature=0.8, top_k=5, top_p=0.7)
    fill = lambda v: torch.full((6,), v)  # noqa: E731
    all_ = mtp_verify(logits, picks, draft_lengths=fill(2), temperature=fill(0.8), top_k=fill(5),
                      top_p=fill(0.7), request_ids=torch.arange(6), positions=fill(0))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(one, all_))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_distribution_ends_its_request_alone(temperature, any_value):
    logits, picks, probs = problem(8, 2, 10, dtype=torch.float32)
    picks = logits[:, :2].argmax(-1)
    extra = dict(draft_probs=torch.full((8, 2, 10), 1e-9), temperature=temperature)
    clean = mtp_verify(logits, picks, **extra)
    assert clean.accepted.tolist() == [2] * 8
    logits[1, 0, picks[1, 0]], logits[2, 1], logits[3, 2] = NAN, NAN, -INF
    logits[4, 1, picks[4, 1]], logits[5, 0, :9] = INF, -INF
    logits[5, 0, 9], picks[2, 1], picks[5, 0] = -2.0, 0, 9
    got = mtp_verify(logits, picks, **extra)
    assert got.accepted.tolist() == [2, 0, 1, 2, 1, 2, 2, 2]
    assert (got.next_token == -1).tolist() == [b in (1, 2, 3, 4) for b in range(8)]
    assert torch.equal(got.next_token[[0, 5, 6, 7]], clean.next_token[[0, 5, 6, 7]])
    for b in range(8):
        nan = got.logprobs[b].isnan().tolist()
        assert nan == [b in (1, 2, 3, 4) and j == got.accepted[b] for j in range(3)]


def test_excluded_tokens_are_never_emitted():
    logits = torch.zeros(2000, 2, 8)
    logits[..., [1, 6]] = -INF
    ids = torch.arange(2000)
    ids[0] = 14_883_995  # its first uniform number is exactly zero
    assert ref.acceptance(torch.tensor([0]), ids, torch.zeros(2000).long(), 1)[0] == 0
    for probs in (None, torch.full((2000, 1, 8), 1 / 8)):
        verdict = mtp_verify(logits, torch.ones(2000, 1).long(), draft_probs=probs,
                             temperature=1.0, request_ids=ids)  # fmt: skip
        assert not verdict.accepted.any()
        assert not torch.isin(verdict.next_token, torch.tensor([1, 6])).any()


def test_impossible_drafts_are_rejected_and_the_target_drawn_from(any_value):
    """Outside the vocabulary, or with probability zero under its own q."""
    logits, zeros = torch.tensor([1.0, 0, 0.5]).expand(MANY, 2, 3), torch.zeros(MANY, 1, 3)
    for draft, probs in ((-1, None), (3, None), (-5, zeros), (0, zeros)):
        picks = torch.full((MANY, 1), draft)
        verdict = mtp_verify(logits, picks, draft_probs=probs, temperature=1.0, seed=2)
        assert not verdict.accepted.any()
        chi_square(verdict.next_token, logits[0, 0].softmax(-1))


def test_nothing_left_of_the_residual_draws_from_the_target(any_value):
    """q above p everywhere, as rounding may have it: still a token of the target."""
    logits, probs = torch.tensor([[0.0, 0.0, -INF]]).expand(500, 2, 3), torch.full((500, 1, 3), 0.9)
    verdict = mtp_verify(logits, torch.zeros(500, 1).long(), draft_probs=probs, temperature=1.0)
    rejected = verdict.accepted == 0
    assert 0 < rejected.sum() < 500
    assert set(verdict.next_token[rejected].tolist()) == {0, 1}


def test_pad_requests_emit_nothing():
    logits, picks, probs = problem(5, 2, 7, dtype=torch.float32)
    lengths = torch.tensor([2, -1, 1, -3, 0])
    extra = dict(draft_lengths=lengths, draft_probs=probs, temperature=1.0)
    clean = mtp_verify(logits, picks, **extra)
    logits[[1, 3]] = NAN
    got = mtp_verify(logits, picks, **extra)
    assert all(torch.equal(a, b) for a, b in zip(got, clean))
    assert got.accepted[[1, 3]].tolist() == [-1, -1]
    assert got.next_token[[1, 3]].tolist() == [0, 0] and not got.logprobs[[1, 3]].any()


def test_rows_past_the_length_are_not_read():
    logits, picks, probs = problem(4, 3, 7, dtype=torch.float32)
    lengths = torch.tensor([0, 1, 2, 3])
    extra = dict(draft_lengths=lengths, temperature=0.9, top_k=4, top_p=0.9)
    clean = mtp_verify(logits, picks, draft_probs=probs, **extra)
    for b in range(4):
        logits[b, b + 1 :], probs[b, b:], picks[b, b:] = NAN, NAN, -9
    got = mtp_verify(logits, picks, draft_probs=probs, **extra)
    assert all(torch.equal(a, b) for a, b in zip(got, clean))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_widened_first(dtype):
    logits, picks, probs = problem(30, 2, 40, dtype=torch.float32)
    extra = dict(draft_probs=probs, temperature=0.7, top_k=20, top_p=0.9)
    low = logits.to(dtype)
    got, want = (mtp_verify(x, picks, **extra) for x in (low, low.float()))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert [t.dtype for t in got] == [torch.int32, torch.int64, torch.float32]


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1e30])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([0.0, 3e4, -3e4, 2.9e4]).expand(64, 1, 4)
    token = mtp_verify(logits, torch.zeros(64, 0).long(), temperature=temperature).next_token
    assert set(token.tolist()) == ({1} if temperature < 1 else {0, 1, 2, 3})


def test_any_strides():
    logits, picks, probs = problem(6, 2, 9, dtype=torch.float32)
    extra = dict(temperature=0.8, top_p=0.9)
    want = mtp_verify(logits, picks, draft_probs=probs, **extra)
    got = mtp_verify(logits.mT.contiguous().mT, picks.T.contiguous().T,
                     draft_probs=torch.stack([probs, probs], -1)[..., 0], **extra)  # fmt: skip
    assert torch.equal(got.accepted, want.accepted) and torch.equal(got.next_token, want.next_token)
    torch.testing.assert_close(got.logprobs, want.logprobs)


@pytest.mark.parametrize(("batch", "drafts"), [(0, 0), (0, 2), (1, 0)])
def test_empty_sizes(batch, drafts):
    logits, picks = torch.zeros(batch, drafts + 1, 1), torch.zeros(batch, drafts).long()
    for temperature in (None, 1.0):
        verdict = mtp_verify(logits, picks, temperature=temperature)
        assert [t.shape for t in verdict] == [(batch,), (batch,), (batch, drafts + 1)]
