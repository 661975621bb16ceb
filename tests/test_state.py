"""Prefill, decode, drafts and their rollback against the model without a state."""

import contextlib
from types import SimpleNamespace

import hybrids
import pytest
import torch

from nemokernels import testing
from nemokernels.models import State, exact

SLOT = torch.int32


@pytest.fixture(scope="module")
def model():
    return hybrids.model("M*-EME", "*E", moe_latent_size=16)


@pytest.fixture(scope="module")
def wide():
    return hybrids.model("M*-EME", "*E", moe_latent_size=16, dtype=torch.float64)


def slots(*values):
    return torch.tensor(values, dtype=SLOT)


def decode(model, state, tokens, rows=None, counts=None):
    out = model(tokens, state=state, slots=rows, decode=True)
    state.accept(counts)
    return out


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("first", [0, 1, 2, 7, 8, 9, 16, 18])
def test_prefill_split_anywhere(wide, first):
    tokens = hybrids.tokens(2, 19)
    state = wide.new_state(2, 19)
    parts = [wide(tokens[:, :first], state=state), wide(tokens[:, first:], state=state)]
    assert_close(torch.cat(parts, 1), wide(tokens))
    assert state.lengths.tolist() == [19, 19]


def test_prefill_in_three_parts_of_unequal_sequences(wide):
    lengths = [(3, 5, 1), (0, 2, 9), (4, 0, 3)]
    rows = [hybrids.tokens(1, sum(n), seed=i) for i, n in enumerate(lengths)]
    state, got = wide.new_state(5, 20), [[] for _ in rows]
    starts = [0, 0, 0]
    for part in range(3):
        sizes = [n[part] for n in lengths]
        pieces = [r[0, s : s + n] for r, s, n in zip(rows, starts, sizes)]
        bounds = torch.tensor([0, *sizes]).cumsum(0).int()
        out = wide(torch.cat(pieces)[None], state=state, slots=slots(4, 0, 2), cu_seqlens=bounds)
        for i, piece in enumerate(out[0].split(sizes)):
            got[i].append(piece)
        starts = [s + n for s, n in zip(starts, sizes)]
    for row, parts in zip(rows, got):
        assert_close(torch.cat(parts), wide(row)[0])
    assert state.lengths.tolist() == [11, 0, 7, 0, 9]


def test_decode_token_by_token(wide):
    tokens = hybrids.tokens(3, 12)
    state = wide.new_state(3, 12)
    out = torch.cat([decode(wide, state, tokens[:, t : t + 1]) for t in range(12)], 1)
    assert_close(out, wide(tokens))


def test_decode_in_float32_is_as_good_as_the_whole_forward(model, wide):
    tokens = hybrids.tokens(2, 14)
    state = model.new_state(2, 14, draft_tokens=2)
    parts = [model(tokens[:, :5], state=state)]
    parts += [decode(model, state, tokens[:, t : t + 3]) for t in (5, 8, 11)]
    testing.assert_matches(torch.cat(parts, 1), wide(tokens), model(tokens))


def test_e4m3_keys_and_values():
    """With a checkpoint's scales; codes and outputs do not depend on how the tokens come."""
    wide = hybrids.model("M*-").double()
    scales = (0.02, 0.5)
    name = next(n for n, m in wide.named_modules() if hasattr(m, "k_proj"))
    given = {f"{name}.{leaf}_proj": scale for leaf, scale in zip("kv", scales)}
    wide.quantization = SimpleNamespace(kv_scales=given)
    tokens = hybrids.tokens(2, 12)
    filled, stepped, split = (wide.new_state(2, 12, kv_dtype=torch.float8_e4m3fn) for _ in "123")
    assert filled.kv_scales[1] == scales and filled.conv[0].dtype == torch.float64
    want = wide(tokens, state=filled)
    got = torch.cat([decode(wide, stepped, tokens[:, t : t + 1]) for t in range(12)], 1)
    again = torch.cat([wide(tokens[:, :1], state=split), wide(tokens[:, 1:], state=split)], 1)
    for kept in ("keys", "values"):
        a, b, c = (getattr(state, kept)[1].double() for state in (filled, stepped, split))
        assert torch.equal(a, b) and torch.equal(a, c) and a.any()
    assert_close(got[:, 1:], again[:, 1:])  # the first prefill attends to what it was given
    error = (want - again).abs().max()  # E4M3 has three bits after the leading one
    assert 0 < error < want.abs().max() / 16


@pytest.mark.parametrize("sizes", [(1, 3, 2, 4), (4, 4, 4), (2, 1, 1, 3)])
def test_prefill_and_decode_alternate(wide, sizes):
    tokens = hybrids.tokens(2, sum(sizes) + 11)
    state = wide.new_state(2, 40, draft_tokens=3)
    parts, at = [wide(tokens[:, :6], state=state)], 6
    for size in sizes:
        parts.append(decode(wide, state, tokens[:, at : at + size]))
        at += size
    parts.append(wide(tokens[:, at : at + 3], state=state))  # after a decode call of several tokens
    parts.append(decode(wide, state, tokens[:, at + 3 :]))
    assert_close(torch.cat(parts, 1), wide(tokens))


@pytest.mark.parametrize("ssm_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_rollback_equals_never_having_drafted(model, kept, ssm_dtype):
    """Bit for bit: drafts rejected now change nothing later."""
    tokens, junk = hybrids.tokens(2, 20), hybrids.tokens(2, 20, seed=9)
    with exact():
        plain, drafting = (
            model.new_state(2, 30, draft_tokens=3, ssm_dtype=ssm_dtype) for _ in range(2)
        )
        for state in (plain, drafting):
            model(tokens[:, :7], state=state)
        for at in (7, 7 + kept):
            true = tokens[:, at : at + kept]
            want = torch.cat([decode(model, plain, t) for t in true.split(1, 1)], 1)
            drafts = torch.cat([true, junk[:, : 4 - kept]], 1)
            got = decode(model, drafting, drafts, counts=[kept, kept])
            assert torch.equal(got[:, :kept], want)
        rest = tokens[:, 7 + 2 * kept : 10 + 2 * kept]
        assert torch.equal(model(rest, state=plain), model(rest, state=drafting))
    assert torch.equal(plain.lengths, drafting.lengths)


def test_rollback_in_default_mode(model):
    """Same calls, same bits: rejected drafts leave no trace with batched products either."""
    tokens, junk = hybrids.tokens(2, 12), hybrids.tokens(2, 12, seed=9)
    outs = []
    for drafts in (tokens[:, 7:9], junk[:, :2]):
        state = model.new_state(2, 20, draft_tokens=2)
        model(tokens[:, :6], state=state)
        decode(model, state, torch.cat([tokens[:, 6:7], drafts], 1), counts=[1, 1])
        outs.append(decode(model, state, tokens[:, 9:12]))
    assert torch.equal(*outs)


def test_rows_accept_different_counts(wide):
    tokens, junk = hybrids.tokens(3, 12), hybrids.tokens(3, 12, seed=5)
    state = wide.new_state(4, 20, draft_tokens=3)
    rows = slots(2, 3, 0)
    wide(tokens[:, :4], state=state, slots=rows)
    counts = [1, 4, 2]
    draft = torch.stack(
        [torch.cat([t[4 : 4 + n], j[n:4]]) for t, j, n in zip(tokens, junk, counts)]
    )
    decode(wide, state, draft, rows, counts)
    assert state.lengths.tolist() == [6, 0, 5, 8]
    follow = torch.stack([t[4 + n : 6 + n] for t, n in zip(tokens, counts)])
    got = decode(wide, state, follow, rows)
    full = wide(tokens)
    want = torch.stack([f[4 + n : 6 + n] for f, n in zip(full, counts)])
    assert_close(got, want)


def test_exact_mode_ignores_batch_and_number_of_tokens(model):
    tokens = hybrids.tokens(5, 11)
    with exact():
        together, alone = model.new_state(5, 16, draft_tokens=3), model.new_state(5, 16)
        a = torch.cat([model(tokens[:, :7], state=together),
                       decode(model, together, tokens[:, 7:11])], 1)  # fmt: skip
        for i, row in enumerate(tokens):
            parts = [model(row[None, :7], state=alone, slots=slots(i))]
            for t in range(7, 11):
                parts.append(decode(model, alone, row[None, t : t + 1], slots(i)))
            assert torch.equal(torch.cat(parts, 1)[0], a[i])


def test_exact_mode_changes_no_more_than_rounding(model, wide):
    tokens = hybrids.tokens(2, 9)
    with exact():
        slow = model(tokens)
    testing.assert_matches(slow, wide(tokens), model(tokens))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, exact])
def test_padding_rows_touch_nothing(model, mode):
    tokens = hybrids.tokens(4, 10)
    state = model.new_state(3, 16, draft_tokens=1)
    rows = slots(1, -1, 2, -1)
    with mode():
        model(tokens[:, :6], state=state, slots=rows)
        assert state.lengths.tolist() == [0, 6, 6]
        before = state.snapshot()
        model(tokens[:, 6:8], state=state, slots=rows, decode=True)
        state.accept([2, 7, 1, 0])
        assert state.lengths.tolist() == [0, 8, 7]
        for old, new in zip(before, state.snapshot()):
            assert torch.equal(old[0], new[0])
        got = decode(model, state, tokens[::2, 8:9], slots(1, 2))
        alone = model.new_state(1, 16, draft_tokens=1)
        model(tokens[2:3, :6], state=alone)
        decode(model, alone, tokens[2:3, 6:8], counts=[1])
    if mode is exact:
        with exact():
            assert torch.equal(got[1:], decode(model, alone, tokens[2:3, 8:9]))
    only_padding = model(tokens[:2, :1], state=state, slots=slots(-1, -1), decode=True)
    state.accept()
    assert only_padding.isfinite().all() and state.lengths.tolist() == [0, 9, 8]
    assert state.all_lengths[-1] == 0  # what padding rows read as their length


def test_snapshot_restore_and_fork(model):
    tokens = hybrids.tokens(1, 12)
    state = model.new_state(2, 16, draft_tokens=2)
    model(tokens[:, :6], state=state)
    saved = state.snapshot()
    want = decode(model, state, tokens[:, 6:9])
    state.restore(saved)
    model(tokens[:, 9:12], state=state, decode=True)  # abandoned, not accepted
    state.restore(saved)
    state.fork(0, 1)
    assert torch.equal(decode(model, state, tokens[:, 6:9]), want)
    assert torch.equal(decode(model, state, tokens[:, 6:9], slots(1)), want)
    assert state.lengths.tolist() == [9, 9]


def test_reset_slot_starts_anew(model):
    tokens = hybrids.tokens(2, 9)
    state = model.new_state(2, 16, draft_tokens=2)
    model(tokens[:, :5], state=state)
    decode(model, state, tokens[:, 5:8], counts=[3, 2])
    kept = [t[1].clone() for t in state.snapshot()]
    state.mtp_lengths.fill_(4)
    state.reset([0])
    assert state.lengths.tolist() == [0, 7] and state.mtp_lengths.tolist() == [0, 4]
    kept[-1] = torch.tensor(4)
    fresh = model.new_state(1, 16, draft_tokens=2)
    want = model(tokens[:1, :5], state=fresh)
    assert torch.equal(model(tokens[:1, :5], state=state, slots=slots(0)), want)
    assert all(torch.equal(t[1], k) for t, k in zip(state.snapshot(), kept))


def test_bounded_step_holds_in_decode_too():
    model = hybrids.model("M*M", dtype=torch.float64, time_step_limit=[0.2, 0.9])
    tokens = hybrids.tokens(2, 9)
    state = model.new_state(2, 9)
    parts = [model(tokens[:, :4], state=state)]
    parts += [decode(model, state, tokens[:, t : t + 1]) for t in range(4, 9)]
    assert_close(torch.cat(parts, 1), model(tokens))
    free = hybrids.model("M*M", dtype=torch.float64)
    assert (free(tokens) - model(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mtp_keeps_its_own_cache(wide, depth):
    """Prefill, then verified tokens and chained drafts, equals the block over whole rows."""
    tokens = hybrids.tokens(2, 16)
    hidden = wide.hidden(tokens[:, :-1])
    want = wide.mtp_hidden(hidden, tokens[:, 1:])
    state = wide.new_state(2, 20)
    got = [wide.mtp_hidden(hidden[:, :6], tokens[:, 1:7], state=state)]
    for start, stop in ((6, 9), (9, 10), (10, 15)):
        part = wide.mtp_hidden(
            hidden[:, start:stop], tokens[:, start + 1 : stop + 1], state=state, decode=True
        )
        state.advance_mtp([stop - start] * 2)
        got.append(part)
        for _ in range(depth - 1):  # drafts on its own output, then forgotten
            part = wide.mtp_hidden(part[:, -1:], tokens[:, :1], state=state, decode=True)
            state.advance_mtp([1, 1])
        state.advance_mtp([1 - depth] * 2)
    assert_close(torch.cat(got, 1), want)
    assert state.mtp_lengths.tolist() == [15, 15] and state.lengths.tolist() == [0, 0]


def test_dtypes_and_shapes(model):
    state = model.new_state(3, 10, draft_tokens=2)
    assert {t.dtype for t in (*state.conv.values(), *state.keys.values())} == {torch.float32}
    assert state.ssm[0].shape == (3, 3, 6, 8, 16) and state.conv[0].shape == (3, 112, 6)
    assert state.keys[1].shape == state.values[6].shape == (3, 10, 2, 12)
    assert set(state.conv) == {0, 4} and set(state.keys) == {1, 6}
    half = hybrids.model("M*", dtype=torch.bfloat16).new_state(1, 4)
    assert half.conv[0].dtype == half.keys[1].dtype == torch.bfloat16
    assert half.ssm[0].dtype == torch.float32
    other = hybrids.model("M*", mamba_ssm_cache_dtype="float16").new_state(1, 4)
    assert other.ssm[0].dtype == torch.float16


def test_bfloat16_model_runs(model):
    half = hybrids.model("M*-EME", "*E", dtype=torch.bfloat16, moe_latent_size=16)
    tokens = hybrids.tokens(2, 9)
    state = half.new_state(2, 12, draft_tokens=2)
    parts = [half(tokens[:, :6], state=state), decode(half, state, tokens[:, 6:9])]
    got, want = torch.cat(parts, 1), half(tokens)
    assert got.dtype == torch.bfloat16
    # A routing tie may fall the other way: compare typical, not worst, tokens.
    assert ((got - want).float().norm(dim=-1) / want.float().norm(dim=-1)).median() < 0.05


def test_empty_batches(model):
    state = model.new_state(2, 8)
    assert model(hybrids.tokens(0, 3), state=state).shape == (0, 3, 96)
    assert model(hybrids.tokens(2, 0), state=state).shape == (2, 0, 96)
    assert decode(model, state, hybrids.tokens(0, 1)).shape == (0, 1, 96)
    assert state.lengths.tolist() == [0, 0]


def test_no_gradient_is_recorded(model):
    state = model.new_state(1, 8)
    assert not model(hybrids.tokens(1, 3), state=state).requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s, t: m(t, slots=slots(0)), "`slots` and `decode` need a `state`"),
        (lambda m, s, t: m(t, decode=True), "`slots` and `decode` need a `state`"),
        (lambda m, s, t: m(hybrids.tokens(3, 2), state=s), "3 rows, but 2 slots"),
        (lambda m, s, t: m(t, state=s, slots=slots(0, 1)), r"`slots` has shape \(2,\)"),
        (lambda m, s, t: m(t, state=s, slots=slots(5)), "`slots` has 5, but there are 2"),
        (lambda m, s, t: m(hybrids.tokens(2, 2), state=s, slots=slots(1, 1)), "repeats a slot"),
        (lambda m, s, t: m(t, state=s, slots=slots(5), decode=True), "`slots` has 5, but"),
        (
            lambda m, s, t: m(t, state=s, cu_seqlens=slots(0, 3)),
            r"must ascend from 0 to 2, got \[0, 3",
        ),
        (lambda m, s, t: m(t, state=s, cu_seqlens=slots(0, 3, 2)), "`cu_seqlens` must ascend"),
        (lambda m, s, t: m(t, state=s, cu_seqlens=slots()), "`cu_seqlens` is empty"),
        (lambda m, s, t: m(t.expand(2, 2), state=s, cu_seqlens=slots(0, 4)), "expected 1 with `cu"),
        (lambda m, s, t: m(hybrids.tokens(1, 9), state=s), "slot 0 would hold 9 tokens, but"),
        (lambda m, s, t: m(hybrids.tokens(1, 3), state=s, decode=True), "expected 1 to draft_tok"),
        (lambda m, s, t: m(hybrids.tokens(1, 0), state=s, decode=True), "expected 1 to draft_tok"),
        (lambda m, s, t: m(t, state=s, decode=True, cu_seqlens=slots(0, 2)), "`cu_seqlens` excl"),
        (lambda m, s, t: s.accept(), "there is no decode call to accept"),
        (lambda m, s, t: (m(t, state=s, decode=True), m(t, state=s)), "awaits `accept`"),
        (lambda m, s, t: (m(t, state=s, decode=True), s.snapshot()), "awaits `accept`"),
        (lambda m, s, t: (m(t, state=s, decode=True), s.accept([3])), "must be from 1 to 2"),
        (lambda m, s, t: (m(t, state=s, decode=True), s.accept([0])), "must be from 1 to 2"),
        (lambda m, s, t: (m(t, state=s, decode=True), s.accept([1, 1])), "`counts` has shape"),
        (lambda m, s, t: m.new_state(0, 4), "`slots` must be an integer of at least 1, got 0"),
        (lambda m, s, t: m.new_state(1, 4, draft_tokens=-1), "`draft_tokens` must be an integer"),
    ],
)
def test_misuse(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, model.new_state(2, 8, draft_tokens=1), hybrids.tokens(1, 2))


def test_wrong_types(model):
    with pytest.raises(TypeError, match="`ssm_dtype` is torch.int32"):
        model.new_state(1, 4, ssm_dtype=torch.int32)
    with pytest.raises(TypeError, match="`slots` is torch.int64"):
        model(hybrids.tokens(1, 2), state=State(model.config, 1, 4), slots=torch.tensor([0]))
