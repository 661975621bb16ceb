import math
import random

import pytest
import torch
from hybrids import model as make_model

from nemokernels.models import generate, generation
from nemokernels.models.generation import _Decoder

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 1, 2, 3, 4], [0, 0]]


def small(seed=0, dtype=torch.float64, pattern="ME*-", mtp="*E", **changes):
    return make_model(pattern, mtp, seed=seed, dtype=dtype, vocab_size=12, **changes)


def naive(model, prompt, steps):
    """Greedy decoding without any state: the whole sequence anew for every token."""
    tokens, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(steps):
            logits = model(torch.tensor([tokens]))[0, -1]
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1).max()))
    return tokens[len(prompt) :], logprobs


@pytest.fixture
def oracle(monkeypatch):
    """Replace the drafts by a known continuation, each draft spoilt with some probability."""

    def use(answers, spoil, seed=0):
        rng = random.Random(seed)

        def draft(self, requests, hidden, width):
            rows = []
            for request in requests:
                known = answers[request.slot]
                start = len(request.tokens) - request.prompt_length
                row = (known + [0] * 99)[start : start + width]
                rows.append([(t + 1) % 12 if rng.random() < spoil else t for t in row])
            return self.tensor(rows)

        monkeypatch.setattr(_Decoder, "draft", draft)

    return use


@pytest.mark.parametrize("pattern", ["ME*-", "M*", "*-", "MM"])
@pytest.mark.parametrize("speculate", [0, 1, 3])
def test_greedy_equals_decoding_without_state(pattern, speculate):
    model = small(pattern=pattern, mtp="*E")
    out = generate(model, PROMPTS, max_new_tokens=9, speculate=speculate)
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs):
        want, want_logprobs = naive(model, prompt, 9)
        assert tokens == want
        assert logprobs == pytest.approx(want_logprobs, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("speculate", [1, 3])
def test_exact_speculation_changes_no_bit(dtype, seed, speculate, oracle):
    """Same tokens and same log-probabilities, bit for bit, whatever part of the drafts stands."""
    model = small(seed, dtype, pattern=["ME*-", "MEM*", "*M", "M-E"][seed])
    plain = generate(model, PROMPTS, max_new_tokens=7, exact=True)
    own = generate(model, PROMPTS, max_new_tokens=7, exact=True, speculate=speculate)
    assert own.tokens == plain.tokens and own.logprobs == plain.logprobs
    oracle(plain.tokens, spoil=0.3, seed=seed)
    mixed = generate(model, PROMPTS, max_new_tokens=7, exact=True, speculate=speculate)
    assert mixed.tokens == plain.tokens and mixed.logprobs == plain.logprobs
    assert 0 < mixed.accepted < mixed.drafted


@pytest.mark.parametrize("ssm_dtype", ["bfloat16", "float16"])
def test_exact_with_a_narrow_ssm_state(ssm_dtype, oracle):
    model = small(5, torch.float32, pattern="MM*", mamba_ssm_cache_dtype=ssm_dtype)
    plain = generate(model, PROMPTS, max_new_tokens=8, exact=True)
    oracle(plain.tokens, spoil=0.3)
    drafted = generate(model, PROMPTS, max_new_tokens=8, exact=True, speculate=3)
    assert drafted.tokens == plain.tokens and drafted.logprobs == plain.logprobs


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("speculate", [0, 2])
def test_exact_requests_do_not_see_each_other(temperature, speculate):
    model = small(1, torch.float32)
    keys = dict(max_new_tokens=8, exact=True, temperature=temperature, top_k=8, top_p=0.95,
                seed=7, speculate=speculate)  # fmt: skip
    together = generate(model, PROMPTS, **keys)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], request_ids=[i], **keys)
        assert alone.tokens[0] == together.tokens[i] and alone.logprobs[0] == together.logprobs[i]
    turned = generate(model, PROMPTS[::-1], request_ids=[3, 2, 1, 0], **keys)
    assert turned.tokens[::-1] == together.tokens
    assert (turned.steps, turned.drafted, turned.accepted) == (
        together.steps, together.drafted, together.accepted
    )  # fmt: skip


def test_seed_and_request_id_pick_the_sample():
    model = small(2)
    keys = dict(max_new_tokens=12, temperature=1.0)
    same = [PROMPTS[0]] * 3
    out = generate(model, same, seed=1, **keys)
    assert len({tuple(t) for t in out.tokens}) == 3
    assert generate(model, same, seed=1, **keys).tokens == out.tokens
    assert generate(model, same, seed=2, **keys).tokens != out.tokens
    twins = generate(model, same, seed=1, request_ids=[5, 5, 6], **keys).tokens
    assert twins[0] == twins[1] != twins[2]


@pytest.mark.parametrize("speculate", [0, 2])
def test_samples_follow_the_model(speculate):
    """Counts of the first three tokens of many samples against their exact probabilities."""
    model = make_model("M*", "*E", seed=3, dtype=torch.float64, vocab_size=4)
    many = 1200
    out = generate(model, [[1, 2]] * many, max_new_tokens=3, temperature=1.3, speculate=speculate)
    statistic = 0.0
    with torch.no_grad():
        for code in range(64):
            tokens = [code // 16, code // 4 % 4, code % 4]
            logits = model(torch.tensor([[1, 2, *tokens[:2]]]))[0, 1:] / 1.3
            p = math.exp(sum(float(logits.log_softmax(-1)[i, t]) for i, t in enumerate(tokens)))
            statistic += (out.tokens.count(tokens) - many * p) ** 2 / (many * p)
    # Chi-square with 63 degrees of freedom: mean 63, deviation sqrt(126); five of them.
    assert statistic < 63 + 5 * math.sqrt(126)


@pytest.mark.parametrize("speculate", [1, 2, 4])
def test_drafts_are_those_of_the_block_without_state(speculate, monkeypatch):
    """Every draft equals the one computed from the whole sequence: the cache is right."""
    model, seen = small(4), []
    honest = generation.mtp_verify

    def spy(logits, drafts, **keys):
        verdict = honest(logits, drafts, **keys)
        seen.append((drafts.tolist(), keys["positions"].tolist(), keys["request_ids"].tolist(),
                     keys["draft_lengths"].tolist()))  # fmt: skip
        return verdict

    monkeypatch.setattr(generation, "mtp_verify", spy)
    out = generate(model, PROMPTS, max_new_tokens=9, speculate=speculate)
    checked = 0
    for drafts, positions, ids, lengths in seen:
        for row, position, i, length in zip(drafts, positions, ids, lengths):
            tokens = (PROMPTS[i] + out.tokens[i])[:position]
            with torch.no_grad():
                hidden = model.hidden(torch.tensor([tokens]))[:, :-1]
                following = torch.tensor([tokens[1:]])
                for depth, draft in enumerate(row[:length]):
                    # Depth k sees the block's own hidden state at the last position only.
                    state_free = model.mtp_hidden(hidden, following)
                    want = int(model.lm_head(state_free[:, -1]).argmax())
                    assert draft == want, (i, position, depth)
                    hidden = torch.cat([hidden, state_free[:, -1:]], 1)
                    following = torch.cat([following, torch.tensor([[draft]])], 1)
                    checked += 1
    assert checked == out.drafted > 0


@pytest.mark.parametrize("speculate", [1, 3, 8])
def test_perfect_drafts_all_stand(oracle, speculate):
    model = small(6)
    plain = generate(model, PROMPTS, max_new_tokens=11)
    assert (plain.steps, plain.drafted, plain.accepted) == (4 * 10, 0, 0)
    assert plain.tokens_per_step == 1.0
    oracle(plain.tokens, spoil=0.0)
    out = generate(model, PROMPTS, max_new_tokens=11, speculate=speculate)
    assert out.tokens == plain.tokens
    steps = math.ceil(10 / (speculate + 1))
    assert (out.steps, out.drafted, out.accepted) == (4 * steps, 4 * (10 - steps), 4 * (10 - steps))
    assert out.tokens_per_step == 10 / steps
    oracle(plain.tokens, spoil=1.0)
    none = generate(model, PROMPTS, max_new_tokens=11, speculate=speculate)
    assert none.tokens == plain.tokens and none.accepted == 0 and none.steps == plain.steps


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("perfect", [False, True])
def test_requests_end_at_their_own_end_token(oracle, speculate, perfect):
    model = small(7)
    plain = generate(model, PROMPTS, max_new_tokens=14).tokens
    if perfect:
        oracle(plain, spoil=0.0)
    for ends in ([3], [0, 5], [plain[0][0]], list(range(12))):
        out = generate(model, PROMPTS, max_new_tokens=14, speculate=speculate, eos=ends)
        for got, logprobs, full in zip(out.tokens, out.logprobs, plain):
            stop = next((i + 1 for i, t in enumerate(full) if t in ends), 14)
            assert got == full[:stop] and len(logprobs) == stop
    single = generate(model, PROMPTS, max_new_tokens=14, speculate=speculate, eos=3)
    assert single.tokens == generate(model, PROMPTS, max_new_tokens=14, eos=[3]).tokens


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("speculate", [0, 5])
def test_lengths(most, speculate):
    model = small(8)
    out = generate(model, PROMPTS, max_new_tokens=most, speculate=speculate)
    assert [len(t) for t in out.tokens] == [most] * 4
    assert out.drafted <= 4 * max(0, most - 2)
    assert generate(model, [], max_new_tokens=3).tokens == []


def test_leaves_the_model_as_it_was():
    model = small(9).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generate(model, PROMPTS, max_new_tokens=4, speculate=2)
    assert model.training and all(m.training for m in model.modules())
    assert not any(row.any() for row in model.expert_counts)
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_request_without_a_distribution_is_named():
    model = small(10)
    with torch.no_grad():
        model.backbone.embeddings.weight[7] = torch.nan
    with pytest.raises(FloatingPointError, match="request 1 at position 2"):
        generate(model, [[1, 2], [1, 7]], max_new_tokens=3)
    assert len(generate(model, [[1, 2]], max_new_tokens=1).tokens[0]) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(model=torch.nn.Linear(1, 1)), TypeError, "`model` must be a CausalLM"),
        (dict(prompts=[[1], []]), ValueError, r"`prompts\[1\]` is empty"),
        (dict(prompts=[[12]]), ValueError, r"`prompts\[0\]` holds 12, expected a token below 12"),
        (dict(prompts=[[-1]]), ValueError, r"`prompts\[0\]` holds -1"),
        (dict(prompts=[5, 6]), TypeError, r"`prompts\[0\]` must be a list of token ids, got int"),
        (dict(prompts=["text"]), TypeError, r"`prompts\[0\]` holds 't'"),
        (dict(max_new_tokens=0), ValueError, "`max_new_tokens` must be at least 1"),
        (dict(max_new_tokens=1.5), TypeError, "`max_new_tokens` must be an int"),
        (dict(speculate=-1), ValueError, "`speculate` must be at least 0"),
        (dict(request_ids=[1, 2]), ValueError, "`request_ids` must have one id per prompt"),
        (dict(eos="</s>"), TypeError, "`eos` holds '<'"),
        (dict(temperature=-1.0), ValueError, "`temperature` must be finite, not negative, got -1"),
        (dict(temperature=float("inf")), ValueError, "`temperature` must be finite"),
        (dict(temperature=float("nan")), ValueError, "`temperature` must be finite"),
        (dict(temperature="hot"), TypeError, "`temperature` must be float, got str"),
        (dict(temperature=None), TypeError, "`temperature` must be float, got NoneType"),
        (dict(temperature=torch.ones(1)), TypeError, "`temperature` must be float, got Tensor"),
        (dict(top_p=0.0), ValueError, r"`top_p` must be in \(0, 1\], got 0"),
        (dict(top_p=1.5), ValueError, "`top_p`"),
        (dict(top_k=-2), ValueError, "`top_k` must be at least 0, got -2"),
        (dict(top_k=2.0), TypeError, "`top_k` must be int"),
        (dict(top_k=True), TypeError, "`top_k` must be int, got bool"),
        (dict(seed=-1), ValueError, "`seed` must be in"),
        (dict(seed=2**64), ValueError, "`seed` must be in"),
        (dict(seed=0.5), TypeError, "`seed` must be int"),
        (dict(temperature=-1.0, prompts=[]), ValueError, "`temperature`"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"generate: {message}"):
        generate(**{"model": small(), "prompts": [[1]], "max_new_tokens": 1, **change})


def test_drafting_needs_an_mtp_block():
    with pytest.raises(ValueError, match="has no MTP block"):
        generate(small(mtp=""), [[1]], max_new_tokens=1, speculate=1)
