import pytest
import torch

from nemokernels import attention, attention_with_cache, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOTS, ROOM, HEADS, GROUPS, DIM = 5, 24, 6, 2, 7
OPTIONS = [
    dict(), dict(scale=0.3), dict(window=1), dict(window=5, global_tokens=2),
    dict(alibi_slopes=torch.linspace(0.9, -0.1, HEADS), window=3), dict(window=99),
]  # fmt: skip


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def new_tokens(rows, length, dtype=torch.float64):
    q = torch.randn(rows, length, HEADS, DIM, dtype=torch.float64)
    k, v = torch.randn(2, rows, length, GROUPS, DIM, dtype=torch.float64)
    return [t.to(dtype) for t in (q, k, v)]


def caches(dtype=torch.float64, fill=torch.nan):
    return [torch.full((SLOTS, ROOM, GROUPS, DIM), fill, dtype=dtype) for _ in "kv"]


def run(tokens, cache, lengths, slots, **options):
    return attention_with_cache(*tokens, *cache, lengths, slots=slots, **options)


@pytest.mark.parametrize("steps", [(20,), (1,) * 20, (7, 1, 5, 7), (0, 19, 0, 1)])
@pytest.mark.parametrize("options", OPTIONS)
def test_fp64_equals_attention_over_the_whole_sequence(steps, options):
    """However the sequence is cut into calls. Unwritten cache entries are NaN and never read."""
    q, k, v = new_tokens(3, sum(steps))
    slots, cache, done, outs = int32(4, 0, 2), caches(), 0, []
    for step in steps:
        part = [t[:, done : done + step] for t in (q, k, v)]
        outs.append(run(part, cache, int32(done, done, done), slots, **options))
        done += step
    want = attention(q, k, v, **options)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(cache, (k, v)):
        assert torch.equal(mine[slots, :done], theirs)
        assert mine[slots, done:].isnan().all() and mine[[1, 3]].isnan().all()


def test_rows_have_their_own_lengths():
    """Against dense softmax over cache and new tokens, row by row."""
    lengths, slots = int32(9, 0, 15), int32(1, 3, 0)
    q, k, v = new_tokens(3, 4)
    cache = [torch.randn_like(t) for t in caches()]
    before = [t.clone() for t in cache]
    out = run((q, k, v), cache, lengths, slots)
    for b, (slot, n) in enumerate(zip(slots.tolist(), lengths.tolist())):
        keys, values = (torch.cat([old[slot, :n], new[b]]).repeat_interleave(3, 1)
                        for old, new in zip(before, (k, v)))  # fmt: skip
        scores = torch.einsum("ihd,jhd->hij", q[b], keys) * DIM**-0.5
        seen = torch.ones(4, n + 4, dtype=torch.bool).tril(n)
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        want = torch.einsum("hij,jhd->ihd", p, values)
        torch.testing.assert_close(out[b], want, rtol=1e-12, atol=1e-12)
        assert torch.equal(cache[0][slot, n + 4 :], before[0][slot, n + 4 :])
        assert torch.equal(cache[1][slot, :n], before[1][slot, :n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]])
def test_bits_depend_neither_on_tokens_per_call_nor_on_batch(dtype, cache_dtype, options):
    """Five tokens in one call, five calls of one token, each row by itself: the same bits."""
    tokens = new_tokens(3, 5, dtype)
    start = [torch.randn(SLOTS, ROOM, GROUPS, DIM).to(cache_dtype) for _ in "kv"]
    lengths, slots = int32(3, 11, 17), int32(2, 4, 0)
    together, stepwise, alone = ([t.clone() for t in start] for _ in range(3))
    want = run(tokens, together, lengths, slots, **options)
    steps = [run([t[:, i : i + 1] for t in tokens], stepwise, lengths + i, slots, **options)
             for i in range(5)]  # fmt: skip
    assert torch.equal(torch.cat(steps, 1), want)
    for b in (2, 0, 1):
        row = slice(b, b + 1)
        got = run([t[row] for t in tokens], alone, lengths[row], slots[row], **options)
        assert torch.equal(got, want[row])
    for other in (stepwise, alone):
        assert all(torch.equal(a, b) for a, b in zip(other, together))


def test_rolled_back_equals_never_drafted():
    """A rejected draft leaves entries past the length; the next call overwrites or ignores them."""
    tokens, draft = new_tokens(2, 3, torch.float32), new_tokens(2, 4, torch.float32)
    start = [torch.randn(SLOTS, ROOM, GROUPS, DIM) for _ in "kv"]
    clean, drafted = ([t.clone() for t in start] for _ in range(2))
    lengths, slots = int32(6, 2), int32(0, 3)
    run(draft, drafted, lengths, slots)
    assert torch.equal(run(tokens, drafted, lengths, slots), run(tokens, clean, lengths, slots))


def test_padding_rows():
    """A negative slot: cache untouched, output zero, whatever the row holds; others unchanged."""
    tokens = new_tokens(4, 2, torch.float32)
    start = [torch.randn(SLOTS, ROOM, GROUPS, DIM) for _ in "kv"]
    with_pads, without = ([t.clone() for t in start] for _ in range(2))
    for t in tokens:
        t[1] = torch.nan
    out = run(tokens, with_pads, int32(3, 10**6, 22, -5), int32(4, -1, 1, -7))
    kept = run([t[[0, 2]] for t in tokens], without, int32(3, 22), int32(4, 1))
    assert torch.equal(out[[0, 2]], kept) and not out[[1, 3]].any()
    assert all(torch.equal(a, b) for a, b in zip(with_pads, without))


def test_nan_stays_in_its_slot_and_after_its_position():
    tokens = new_tokens(2, 4, torch.float32)
    cache = [torch.randn(SLOTS, ROOM, GROUPS, DIM) for _ in "kv"]
    clean = run(tokens, [t.clone() for t in cache], int32(3, 3), int32(0, 1))
    tokens[1][1, 2], tokens[2][1, 2] = torch.nan, torch.nan
    out = run(tokens, cache, int32(3, 3), int32(0, 1))
    assert torch.equal(out[0], clean[0]) and torch.equal(out[1, :2], clean[1, :2])
    assert out[1, 2:].isnan().all()


def test_keys_the_window_hides_are_not_read():
    cache = caches(torch.float32)
    for t in cache:
        t[0, :1], t[0, 5:9] = 1.0, 2.0
    out = run(new_tokens(1, 2, torch.float32), cache, int32(9), int32(0), window=5, global_tokens=1)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision(dtype):
    tokens = new_tokens(2, 6, dtype)
    cache = [torch.randn(SLOTS, ROOM, GROUPS, DIM).to(dtype) for _ in "kv"]
    lengths, slots = int32(18, 0), int32(0, 1)
    wide = run([t.double() for t in tokens], [t.double() for t in cache], lengths, slots)
    low = torch.zeros_like(tokens[0])
    for b, n in enumerate(lengths.tolist()):
        keys, values = (torch.cat([old[b, :n], new[b]]).float().repeat_interleave(3, 1)
                        for old, new in zip(cache, tokens[1:]))  # fmt: skip
        scores = torch.einsum("ihd,jhd->hij", tokens[0][b].float(), keys) * DIM**-0.5
        seen = torch.ones(6, n + 6, dtype=torch.bool).tril(n)
        scores = scores.masked_fill(~seen, float("-inf"))
        p = torch.exp(scores - scores.amax(-1, keepdim=True))
        out = torch.einsum("hij,jhd->ihd", p.to(dtype).float(), values)
        low[b] = (out / p.sum(-1).T[..., None]).to(dtype)
    testing.assert_matches(run(tokens, cache, lengths, slots), wide, low)


def test_new_tokens_are_attended_as_the_cache_stores_them():
    tokens = new_tokens(1, 3, torch.float32)
    cache = caches(torch.bfloat16)
    out = run(tokens, cache, int32(0), int32(2))
    rounded = [tokens[0], *(t.bfloat16().float() for t in tokens[1:])]
    assert torch.equal(cache[0][2, :3], tokens[1][0].bfloat16())
    testing.assert_matches(out, attention(*(t.double() for t in rounded)), attention(*rounded))


def test_e4m3_cache():
    """Against a plain float64 cache of the values that the codes stand for; ml_dtypes rounds."""
    import ml_dtypes

    tokens, scales = new_tokens(2, 4), (0.013, 1.7)
    tokens[1][0, 0], tokens[2][1, 1] = 1e3, -1e4  # saturate
    cache = [torch.randn(SLOTS, ROOM, GROUPS, DIM).to(torch.float8_e4m3fn) for _ in "kv"]
    stood_for = [t.double() * scale for t, scale in zip(cache, scales)]
    lengths, slots = int32(11, 0), int32(3, 1)
    options = dict(window=9, global_tokens=2, k_scale=scales[0], v_scale=scales[1])
    out = run(tokens, cache, lengths, slots, **options)
    wide = [tokens[0]]
    for i, scale in enumerate(scales):
        codes = (tokens[1 + i] / scale).clamp(-448, 448).float().numpy()
        codes = codes.astype(ml_dtypes.float8_e4m3fn).astype("float64")
        wide.append(torch.from_numpy(codes) * scale)
        for b, (slot, n) in enumerate(zip((3, 1), (11, 0))):
            assert torch.equal(cache[i][slot, n : n + 4].double() * scale, wide[-1][b])
    del options["k_scale"], options["v_scale"]
    want = run(wide, stood_for, lengths, slots, **options)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_products_take_operands_in_the_dtype_of_q():
    """Differences below a bf16 step in p, in a float32 k and in a float32 v: unseen by a bf16 q."""
    for q, cached, new in (
        (1.0, (-1e-3, 1.0), (0.0, -1.0)),
        (64.0, (1.003, 1.0), (1.0, -1.0)),
        (1.0, (0.0, 1.001), (0.0, -1.0)),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            cache = [torch.full((1, 2, 1, 1), value) for value in cached]
            tokens = [torch.full((1, 1, 1, 1), value, dtype=dtype) for value in (q, *new)]
            out = run(tokens, cache, int32(1), int32(0), scale=1.0)
            assert (out == 0) == (dtype == torch.bfloat16)


def test_any_strides():
    tokens = new_tokens(2, 3)
    start = [torch.randn_like(t) for t in caches()]
    plain = [t.clone() for t in start]
    # slots x heads x positions in memory, and every second element of the last axis
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in start]
    spread = [torch.stack([t, t], -1)[..., 0] for t in start]
    args = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tokens]
    want = run(tokens, plain, int32(4, 8), int32(3, 1))
    for cache in (views, spread):
        assert torch.equal(run(args, cache, int32(4, 8), int32(3, 1)), want)
        assert all(torch.equal(a, b) for a, b in zip(cache, plain))


@pytest.mark.parametrize(("rows", "length"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(rows, length):
    cache = caches()
    slots = torch.arange(rows, dtype=torch.int32)
    out = run(new_tokens(rows, length), cache, torch.zeros_like(slots), slots)
    assert out.shape == (rows, length, HEADS, DIM) and all(t.isnan().all() for t in cache)


def test_a_cache_may_be_filled_to_its_end():
    tokens = new_tokens(1, ROOM)
    out = run(tokens, caches(), int32(0), int32(0))
    torch.testing.assert_close(out, attention(*tokens), rtol=1e-12, atol=1e-12)


def test_autocast_casts_the_tokens_but_not_the_cache():
    tokens, cache = new_tokens(1, 2, torch.float32), caches(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(tokens, cache, int32(0), int32(0))
    again = caches(torch.float32)
    want = run([t.bfloat16() for t in tokens], again, int32(0), int32(0))
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)
    assert cache[0].dtype == torch.float32 and torch.equal(cache[0][0, :2], again[0][0, :2])


def test_compiles():
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (2, 3):
        tokens = new_tokens(2, length, torch.float32)
        start = [torch.randn(SLOTS, ROOM, GROUPS, DIM) for _ in "kv"]
        one, two = ([t.clone() for t in start] for _ in range(2))
        got = compiled(tokens, one, int32(4, 8), int32(3, 1))
        assert torch.equal(got, run(tokens, two, int32(4, 8), int32(3, 1)))
        assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_gradients_are_refused():
    tokens = [t.requires_grad_() for t in new_tokens(1, 2)]
    with pytest.raises(RuntimeError, match="no gradient"):
        run(tokens, caches(), int32(0), int32(0))
    with torch.no_grad():
        run(tokens, caches(), int32(0), int32(0))


GOOD = {
    "q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 3, 2, 8), "v": torch.ones(2, 3, 2, 8),
    "k_cache": torch.zeros(4, 9, 2, 8), "v_cache": torch.zeros(4, 9, 2, 8),
    "lengths": int32(0, 1), "slots": int32(1, 0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=None), TypeError, "`q` must be a torch.Tensor"),
        (dict(q=torch.ones(2, 3, 3, 8)), ValueError, "`q` has 3 heads of size 8"),
        (dict(k=torch.ones(2, 4, 2, 8), v=torch.ones(2, 4, 2, 8)), ValueError,
         "`k` has 4 tokens, expected the 3 of q"),
        (dict(v=torch.ones(2, 3, 1, 8)), ValueError, r"`v` has shape \(2, 3, 1, 8\)"),
        (dict(k_cache=torch.zeros(4, 9, 1, 8)), ValueError, r"`k_cache` has shape \(4, 9, 1, 8\)"),
        (dict(k_cache=torch.zeros(4, 9, 2, 8).int()), TypeError, "`k_cache` is torch.int32"),
        (dict(v_cache=torch.zeros(4, 8, 2, 8)), ValueError, r"`v_cache` has shape \(4, 8, 2, 8\)"),
        (dict(v_cache=torch.zeros(4, 9, 2, 8).half()), TypeError, "`v_cache` is torch.float16"),
        (dict(lengths=int32(0)), ValueError, r"`lengths` has shape \(1,\), expected \(B,\)"),
        (dict(lengths=torch.tensor([0, 1])), TypeError, "`lengths` is torch.int64"),
        (dict(lengths=int32(0, 7)), ValueError, "`lengths` holds 7 at row 1; with 3 new tokens "
         "expected 0 to 6, the cache holds 9"),
        (dict(lengths=int32(-1, 0)), ValueError, "`lengths` holds -1 at row 0"),
        (dict(slots=int32(0, 4)), ValueError, "`slots` holds 4 at row 1, expected below 4"),
        (dict(slots=int32(2, 2)), ValueError, "`slots` holds 2 twice"),
        (dict(slots=torch.tensor([0.0, 1.0])), TypeError, "`slots` is torch.float32"),
        (dict(slots=int32(0, 1).to("meta")), ValueError, "`slots` is on meta"),
        (dict(scale=-1.0), ValueError, "`scale` must be positive"),
        (dict(k_scale=0.0), ValueError, "`k_scale` must be positive and finite, got 0.0"),
        (dict(v_scale=float("inf")), ValueError, "`v_scale` must be positive and finite, got inf"),
        (dict(v_scale=2.0), ValueError, "`v_scale` is 2.0, expected 1 with a cache of"),
        (dict(window=-2), ValueError, "`window` must be at least 1, got -2"),
        (dict(alibi_slopes=torch.ones(2)), ValueError, r"`alibi_slopes` has shape \(2,\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(change, error, message):
    args = {name: value.clone() for name, value in GOOD.items()}
    with pytest.raises(error, match=message):
        attention_with_cache(**{**args, **change})
    assert not args["k_cache"].any() and not args["v_cache"].any()
