import functools

import pytest
import torch
import torch.nn.functional as F
from largest import Largest

from nemokernels import attention, testing
from nemokernels.ops.attention import op, ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, queries, keys, heads, key-value heads, head size
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 7, 7, 4, 2, 8),
    (1, 5, 12, 6, 2, 3),
    (3, 1, 9, 2, 2, 5),
    (2, 37, 41, 3, 1, 7),
    (0, 4, 4, 2, 1, 8),
    (2, 0, 0, 2, 1, 8),
    (1, 0, 3, 2, 1, 8),
]
BOUNDS = torch.tensor([0, 5, 6, 6, 23, 31], dtype=torch.int32)


RULES = [
    (3, 0, False),
    (1, 0, True),
    (4, 2, False),
    (6, 5, True),
    (10**9, 0, True),
    (None, 9, True),
]


def problem(rows, queries, keys, heads, groups, dim, dtype=torch.float64):
    q = torch.randn(rows, queries, heads, dim, dtype=torch.float64)
    k, v = torch.randn(2, rows, keys, groups, dim, dtype=torch.float64)
    return [t.to(dtype) for t in (q, k, v)]


def by_token(q, k, v, scale=None, window=None, global_tokens=0, alibi_slopes=None):
    """A second formula: every query by itself, over the keys it sees."""
    rows, length, heads, dim = q.shape
    out, share = torch.zeros_like(q), heads // k.shape[2]
    for b in range(rows):
        for i in range(length):
            own = k.shape[1] - length + i
            near = own - (own if window is None else window - 1)
            seen = [j for j in range(own + 1) if j < global_tokens or j >= near]
            for h in range(heads):
                scores = k[b, seen, h // share] @ q[b, i, h] * (scale or dim**-0.5)
                if alibi_slopes is not None:
                    scores = scores - alibi_slopes[h].double() * (own - q.new_tensor(seen))
                out[b, i, h] = scores.softmax(0) @ v[b, seen, h // share]
    return out


def rule(window, global_tokens, alibi, heads=4):
    slopes = torch.linspace(1.3, -0.2, heads) if alibi else None
    return dict(window=window, global_tokens=global_tokens, alibi_slopes=slopes)


def torch_attention(q, k, v, scale=None):
    """torch's own, which aligns top left; the mask aligns it bottom right."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(1, 2)


@pytest.fixture(params=[128, 4, 1], ids=lambda size: f"blocks of {size}")
def block(request, monkeypatch):
    monkeypatch.setattr(ref, "BLOCK", request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_fp64_equals_one_query_at_a_time(shape, scale, block):
    q, k, v = problem(*shape)
    out = attention(q, k, v, scale=scale)
    torch.testing.assert_close(out, by_token(q, k, v, scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1]])
def test_fp64_equals_torch_forward_and_backward(shape, block):
    args = problem(*shape)
    dout = torch.randn_like(args[0])
    got, want = (testing.gradients(fn, args, [dout]) for fn in (attention, torch_attention))
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", RULES)
def test_window_global_tokens_and_alibi(options, block):
    """Forward and gradients, for S = T and S > T."""
    for queries, keys in ((13, 13), (5, 12)):
        args = problem(2, queries, keys, 4, 2, 3)
        dout = torch.randn_like(args[0])
        got, want = (testing.gradients(functools.partial(fn, **rule(*options)), args, [dout])
                     for fn in (attention, by_token))  # fmt: skip
        for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_packed_sequence_has_its_own_window_and_global_tokens(block):
    args, options = problem(1, 31, 31, 4, 2, 8, torch.float32), rule(4, 2, True)
    (out,), grads = testing.gradients(lambda *a: attention(*a, cu_seqlens=BOUNDS, **options), args)
    parts = [testing.gradients(lambda *a: attention(*a, **options), p) for p in pieces(args)]
    assert torch.equal(out, torch.cat([p[0][0] for p in parts], 1))
    for grad, part in zip(grads, zip(*(p[1] for p in parts))):
        assert torch.equal(grad, torch.cat(part, 1))


def test_nan_beyond_the_window_is_not_seen(block):
    """Keys outside it, in a block of their own, touch neither a query nor its gradient."""
    q, k, v = problem(1, 270, 270, 2, 1, 3, torch.float32)
    fn = lambda *a: attention(*a, window=3)  # noqa: E731
    clean = testing.gradients(fn, [q, k, v])
    for t in (q, k, v):
        t[:, :90] = torch.nan
    dirty = testing.gradients(fn, [q, k, v])
    for a, b in zip([*clean[0], *clean[1]], [*dirty[0], *dirty[1]]):
        assert torch.equal(a[:, 130:], b[:, 130:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [(None, 0, False), (3, 1, True)])
def test_gradcheck(packed, options, block):
    shape = (1, 7, 7, 4, 2, 3) if packed else (2, 5, 7, 4, 2, 3)
    bounds = torch.tensor([0, 3, 3, 7], dtype=torch.int32) if packed else None
    args = [t.requires_grad_() for t in problem(*shape)]
    fn = lambda q, k, v: attention(q, k, v, cu_seqlens=bounds, scale=0.7, **rule(*options))  # noqa: E731
    assert torch.autograd.gradcheck(fn, args)


def test_log_sum_exp():
    q, k, v = problem(2, 6, 9, 4, 2, 8)
    _, lse = op.attention(q, k, v, None, None, 0.5, None, 0)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 0.5
    seen = torch.ones(6, 9, dtype=torch.bool).tril(3)
    want = scores.masked_fill(~seen, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse, want, rtol=1e-13, atol=1e-13)


def rounded(q, k, v):
    """Forward by formula with the roundings of the docstring: probabilities once, result once."""
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float().repeat_interleave(2, 2))
    scores = scores * q.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = scores.masked_fill(~seen, float("-inf"))
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    values = v.float().repeat_interleave(2, 2)
    out = torch.einsum("bhij,bjhd->bihd", p.to(v.dtype).float(), values)
    return (out / p.sum(-1).transpose(1, 2)[..., None]).to(q.dtype)


def rounded_gradients(dout, q, k, v):
    out = rounded(q, k, v).float()
    qf, df = q.float(), dout.float()
    kf, vf = (t.float().repeat_interleave(2, 2) for t in (k, v))
    scale = q.shape[-1] ** -0.5
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
    scores = torch.einsum("bihd,bjhd->bhij", qf, kf) * scale
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    dp = torch.einsum("bihd,bjhd->bhij", df, vf)
    ds = p * (dp - (df * out).sum(-1).transpose(1, 2)[..., None])
    p, ds = (t.to(q.dtype).float() for t in (p, ds))
    dq = scale * torch.einsum("bhij,bjhd->bihd", ds, kf)
    dk = scale * torch.einsum("bhij,bihd->bjhd", ds, qf)
    dv = torch.einsum("bhij,bihd->bjhd", p, df)
    fold = lambda t: t.unflatten(2, (-1, 2)).sum(3)  # noqa: E731
    return [t.to(q.dtype) for t in (dq, fold(dk), fold(dv))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision(dtype):
    args = problem(2, 150, 150, 4, 2, 16, dtype)
    dout = torch.randn(2, 150, 4, 16).to(dtype)
    outs, grads = testing.gradients(attention, args, [dout])
    exact = testing.gradients(torch_attention, [t.double() for t in args], [dout.double()])
    testing.assert_matches(outs[0], exact[0][0], rounded(*args), "out")
    for g, w, low, name in zip(grads, exact[1], rounded_gradients(dout, *args), ("dq", "dk", "dv")):
        assert g.dtype == dtype
        testing.assert_matches(g, w, low, name)


def test_probabilities_meet_v_in_its_dtype():
    """The second key's exp(-1e-3) rounds to 1 in bf16, so the sum over v does not see it."""
    k = torch.tensor([[0.0], [-1e-3]]).view(1, 2, 1, 1).bfloat16()
    q = torch.ones(1, 2, 1, 1).bfloat16()
    v = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).bfloat16()
    assert attention(q, k, v, scale=1.0)[0, 1].item() == 0.0
    assert attention(q.float(), k.float(), v.float(), scale=1.0)[0, 1].item() > 0.0


def test_backward_rounds_p_and_ds_before_their_products():
    """Two heads whose p, and ds, differ by less than a bf16 step and whose sums cancel."""
    q = torch.tensor([[0.0, 1.0], [0.5, 1.0]]).expand(1, 2, 2, 2)
    k = torch.tensor([[0.0, 0.0], [0.1, 0.0]]).view(1, 2, 1, 2)
    v = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).view(1, 2, 1, 2)
    dout = torch.zeros(1, 2, 2, 2)
    dout[0, 1, :, 0] = torch.tensor([1.0, -1.0])
    p_dout = q.new_tensor([0.0, 0.004]).view(1, 2, 1, 1) * k.new_tensor([1.0, 0.0])
    fn = lambda *args: attention(*args, scale=1.0)  # noqa: E731
    low = [t.bfloat16() for t in (q, k, v, dout)]
    for args, exact in ((low, False), ([t.float() for t in low], True)):
        _, (_, dk, _) = testing.gradients(fn, args[:3], args[3:])
        _, (_, _, dv) = testing.gradients(fn, [args[0], p_dout.to(args[0]), args[2]], args[3:])
        assert (dk[0, 1, 0, 1] != 0) == exact and (dv[0, 1, 0, 0] != 0) == exact


def pieces(args, bounds=BOUNDS):
    return [[t[:, a:b] for t in args] for a, b in zip(bounds.tolist(), bounds[1:].tolist())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_separate_bit_for_bit(dtype, block):
    args = problem(1, 31, 31, 4, 2, 8, dtype)
    dout = torch.randn(1, 31, 4, 8).to(dtype)
    fn = lambda q, k, v: attention(q, k, v, cu_seqlens=BOUNDS)  # noqa: E731
    (out,), grads = testing.gradients(fn, args, [dout])
    parts = [testing.gradients(attention, p, [d])
             for p, (d,) in zip(pieces(args), pieces([dout]))]  # fmt: skip
    assert torch.equal(out, torch.cat([p[0][0] for p in parts], 1))
    for grad, part in zip(grads, zip(*(p[1] for p in parts))):
        assert torch.equal(grad, torch.cat(part, 1))


def test_batch_equals_separate_bit_for_bit(block):
    args = problem(3, 19, 23, 4, 2, 8, torch.float32)
    out, grads = testing.gradients(attention, args)
    for b in range(3):
        alone = testing.gradients(attention, [t[b : b + 1] for t in args])
        for x, y in zip([*out, *grads], [*alone[0], *alone[1]]):
            assert torch.equal(x[b : b + 1], y)


def test_nan_stays_in_its_sequence():
    args = problem(1, 31, 31, 4, 2, 8, torch.float32)
    fn = lambda q, k, v: attention(q, k, v, cu_seqlens=BOUNDS)  # noqa: E731
    clean = testing.gradients(fn, args)
    for t in args:
        t[:, 8] = torch.nan
    dirty = testing.gradients(fn, args)
    for a, b in zip([*clean[0], *clean[1]], [*dirty[0], *dirty[1]]):
        for part, (x, y) in enumerate(zip(pieces([a]), pieces([b]))):
            assert torch.equal(x[0], y[0]) if part != 3 else y[0].isnan().any()


def test_later_keys_change_nothing():
    q, k, v = problem(1, 12, 12, 2, 1, 4)
    out = attention(q, k, v)
    k[:, 7:], v[:, 7:] = 1e3, -1e3
    torch.testing.assert_close(attention(q, k, v)[:, :7], out[:, :7], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e18])
def test_extreme_scores_stay_finite(scale):
    args = problem(1, 9, 9, 2, 1, 4, torch.float32)
    outs, grads = testing.gradients(attention, [args[0] * scale, *args[1:]])
    assert all(t.isfinite().all() for t in (*outs, *grads))


def test_any_strides():
    q, k, v = problem(2, 6, 6, 4, 2, 8)
    dout = torch.randn_like(q)
    wide = torch.cat([q, k, v], 2)
    views = list(wide.split([4, 2, 2], 2))
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    strided = [torch.stack([t, t], -1)[..., 0] for t in (q, k, v)]
    want = testing.gradients(attention, [q, k, v], [dout])
    spread = torch.stack([dout, dout], -1)[..., 1]
    for args in (views, heads_first, strided):
        leaves = [t.detach().requires_grad_() for t in args]
        out = attention(*leaves)
        grads = torch.autograd.grad(out, leaves, spread)
        for a, b in zip([out, *grads], [*want[0], *want[1]]):
            assert a.is_contiguous() and torch.equal(a, b)
    expanded = attention(
        q[:1].expand(3, -1, -1, -1), *(t[:1].expand(3, -1, -1, -1) for t in (k, v))
    )
    assert torch.equal(expanded, want[0][0][:1].expand(3, -1, -1, -1))


def test_scores_are_never_whole():
    """No tensor of either pass is as large as a quarter of the T x T scores."""
    q, k, v = problem(1, 600, 600, 2, 1, 4, torch.float32)
    with Largest() as largest:
        out, lse = ref.forward(q, k, v, None, None, 0.5, None, 0)
        ref.backward(out, q, k, v, out, lse, None, None, 0.5, None, 0)
    assert 2 * ref.BLOCK * 500 * 4 < largest.bytes < 2 * 600 * 600 * 4 / 4


def test_autocast_casts_q_k_v():
    args = problem(1, 9, 9, 2, 1, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(args[0], args[1].bfloat16(), args[2])
    assert torch.equal(got, attention(*(t.bfloat16() for t in args)))


def test_compiles_with_dynamic_length():
    packed = lambda q, k, v, n: attention(q, k, v, cu_seqlens=n)  # noqa: E731
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 14):
        args = problem(1, length, length, 4, 2, 8, torch.float32)
        args.append(torch.tensor([0, 3, length], dtype=torch.int32))
        got, want = testing.gradients(compiled, args), testing.gradients(packed, args)
        for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]]):
            assert torch.equal(a, b)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=1.0), TypeError, "`q` must be a torch.Tensor"),
        (dict(q=torch.ones(1, 6, 32)), ValueError, r"`q` has shape \(1, 6, 32\), expected \(B, T"),
        (dict(q=torch.ones(1, 6, 3, 8)), ValueError, "`q` has 3 heads of size 8, expected a"),
        (dict(q=torch.ones(1, 6, 0, 8)), ValueError, "`q` has 0 heads of size 8"),
        (dict(q=torch.ones(1, 7, 4, 8)), ValueError, "`k` has 6 tokens, expected at least the 7"),
        (dict(q=torch.ones(1, 6, 4, 8).int()), TypeError, "`q` is torch.int32"),
        (dict(k=torch.ones(2, 6, 2, 8)), ValueError, r"`k` has shape \(2, 6, 2, 8\)"),
        (dict(k=torch.ones(1, 6, 2, 8).half()), TypeError, "`k` is torch.float16, expected one of"),
        (dict(v=torch.ones(1, 6, 2, 8).half()), TypeError, "`v` is torch.float16, expected one of"),
        (dict(v=torch.ones(1, 6, 2, 9)), ValueError, r"`v` has shape \(1, 6, 2, 9\)"),
        (dict(v=torch.ones(1, 6, 2, 8, device="meta")), ValueError, "`v` is on meta"),
        (dict(scale=0.0), ValueError, "`scale` must be positive and finite, got 0.0"),
        (dict(scale=float("nan")), ValueError, "`scale` must be positive and finite, got nan"),
        (dict(window=0), ValueError, "`window` must be at least 1, got 0"),
        (dict(global_tokens=-1), ValueError, "`global_tokens` must not be negative, got -1"),
        (dict(alibi_slopes=1.0), TypeError, "`alibi_slopes` must be a torch.Tensor"),
        (dict(alibi_slopes=torch.ones(2)), ValueError, r"`alibi_slopes` has shape \(2,\)"),
        (dict(alibi_slopes=torch.ones(4).half()), TypeError, "`alibi_slopes` is torch.float16"),
        (dict(alibi_slopes=torch.ones(4, device="meta")), ValueError, "`alibi_slopes` is on meta"),
        (dict(alibi_slopes=torch.ones(4, requires_grad=True)), ValueError,
         "`alibi_slopes` requires a gradient; it has none"),
        (dict(cu_seqlens=torch.tensor([0, 6])), TypeError, "`cu_seqlens` is torch.int64"),
        (dict(cu_seqlens=int32()), ValueError, "`cu_seqlens` is empty"),
        (dict(cu_seqlens=int32(0, 5)), ValueError, "`cu_seqlens` must ascend from 0 to 6"),
        (dict(cu_seqlens=int32(1, 6)), ValueError, "`cu_seqlens` must ascend from 0 to 6"),
        (dict(cu_seqlens=int32(0, 5, 3, 6)), ValueError, r"`cu_seqlens` .* got \[0, 5, 3, 6\]"),
        (dict(cu_seqlens=int32(0, 5), q=torch.ones(1, 5, 4, 8)), ValueError,
         "`k` has 6 tokens, expected the 5 of q with cu_seqlens"),
        (dict(cu_seqlens=int32(0, 6), q=torch.ones(2, 6, 4, 8), k=torch.ones(2, 6, 2, 8),
              v=torch.ones(2, 6, 2, 8)), ValueError, "`q` has batch 2, expected 1"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    good = {"q": torch.ones(1, 6, 4, 8), "k": torch.ones(1, 6, 2, 8), "v": torch.ones(1, 6, 2, 8)}
    with pytest.raises(error, match=message):
        attention(**{**good, **change})
