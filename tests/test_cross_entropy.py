import math

import pytest
import torch
import torch.nn.functional as F
from largest import Largest

from nemokernels import linear_cross_entropy, testing
from nemokernels.ops.cross_entropy import ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2, "reduction": "sum"},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "ignore_index": 2},
    {"label_smoothing": 1.0, "reduction": "none"},
]


def dense(hidden, weight, targets, *, z_loss=0.0, ignore_index=-100, reduction="mean", **rest):
    """A second formula: all logits at once, torch's own loss, z-loss added per token."""
    logits = hidden.flatten(0, -2) @ weight.T
    flat = targets.flatten()
    loss = F.cross_entropy(logits, flat, reduction="none", ignore_index=ignore_index, **rest)
    keep = flat != ignore_index
    loss = loss + torch.where(keep, z_loss * logits.logsumexp(-1) ** 2, 0.0)
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / max(1, int(keep.sum()))


def problem(shape=(13,), features=17, classes=41, dtype=torch.float64, ignored=-100):
    hidden = torch.randn(*shape, features, dtype=torch.float64)
    weight = torch.randn(classes, features, dtype=torch.float64)
    targets = torch.randint(classes, shape)
    targets.view(-1)[1::4] = ignored
    return hidden.to(dtype), weight.to(dtype), targets


@pytest.fixture(params=[None, 3], ids=["one block", "blocks of 3 rows"])
def block_rows(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(ref, "rows_per_block", lambda classes, dtype: request.param)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(13,), (2, 5), (1,)])
def test_fp64_equals_dense_formula(shape, options, block_rows):
    hidden, weight, targets = problem(shape, ignored=options.get("ignore_index", -100))
    got = testing.gradients(lambda h, w: linear_cross_entropy(h, w, targets, **options),
                            [hidden, weight])  # fmt: skip
    want = testing.gradients(lambda h, w: dense(h, w, targets, **options), [hidden, weight])
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options, block_rows):
    hidden, weight, targets = problem((5,), 4, 7, ignored=options.get("ignore_index", -100))
    fn = lambda h, w: linear_cross_entropy(h, w, targets, **options)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_does_not_round_its_logits(dtype):
    """From low-precision inputs the loss is as good as float32 arithmetic on the same values."""
    hidden, weight, targets = problem((64,), 96, 501, dtype)
    got = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert got.dtype == torch.float32
    want = dense(hidden.double(), weight.double(), targets, reduction="none")
    plain = dense(hidden.float(), weight.float(), targets, reduction="none")
    testing.assert_matches(got, want, plain)


def rounded_gradients(hidden, weight, targets, dloss):
    """Softmax gradient by formula, rounded where the docstring says: dlogits, and the results."""
    wide = hidden.float() @ weight.float().T
    dlogits = wide.softmax(-1) - F.one_hot(targets.clamp(min=0), weight.shape[0])
    dlogits = (dlogits * (dloss * (targets != -100))[:, None]).to(hidden.dtype).float()
    return (dlogits @ weight.float()).to(hidden.dtype), (dlogits.T @ hidden.float()).to(
        hidden.dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_in_low_precision(dtype):
    hidden, weight, targets = problem((64,), 96, 501, dtype)
    dloss = torch.randn(64)
    fn = lambda h, w: linear_cross_entropy(h, w, targets, reduction="none")  # noqa: E731
    _, got = testing.gradients(fn, [hidden, weight], [dloss])
    exact = lambda h, w: dense(h, w, targets, reduction="none")  # noqa: E731
    _, want = testing.gradients(exact, [hidden.double(), weight.double()], [dloss.double()])
    low = rounded_gradients(hidden, weight, targets, dloss)
    for g, w, l, name in zip(got, want, low, ("dhidden", "dweight")):
        assert g.dtype == dtype
        testing.assert_matches(g, w, l, name)


def test_logit_gradient_is_rounded_before_its_products():
    """Two tokens whose logit gradients differ by less than a bf16 step and cancel in dweight."""
    hidden = torch.tensor([[0.0, 1.0], [1e-3, 1.0]])
    weight, targets = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 1])
    fn = lambda h, w: linear_cross_entropy(h, w, targets, reduction="none")  # noqa: E731
    for dtype in (torch.bfloat16, torch.float32):
        args = [hidden.to(dtype), weight.to(dtype)]
        _, (_, dweight) = testing.gradients(fn, args, [torch.tensor([1.0, -1.0])])
        assert (dweight[0, 1] == 0) == (dtype == torch.bfloat16)


def test_weight_gradient_accumulates_in_float32(monkeypatch):
    """Many blocks, one cast: with bf16 accumulation 2**-9 of one step would be lost each time."""
    monkeypatch.setattr(ref, "rows_per_block", lambda classes, dtype: 1)
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16)
    targets = torch.zeros(600, dtype=torch.int64)
    _, (_, dweight) = testing.gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction="sum"), [hidden, weight]
    )
    assert dweight.flatten().tolist() == [-300.0, 300.0]


def test_ignored_tokens_reach_nothing(block_rows):
    hidden, weight, targets = problem((9,), ignored=-100)
    fn = lambda h, w: linear_cross_entropy(h, w, targets, label_smoothing=0.1, z_loss=0.1)  # noqa: E731
    clean = testing.gradients(fn, [hidden, weight])
    for poison in (torch.nan, torch.inf):
        dirty = hidden.clone()
        dirty[targets == -100] = poison
        got = testing.gradients(fn, [dirty, weight])
        for a, b in zip([*clean[0], *clean[1]], [*got[0], *got[1]]):
            assert torch.equal(a, b)
        assert not got[1][0][targets == -100].any()


def test_gradient_of_an_ignored_loss_is_dropped():
    hidden, weight, targets = problem((9,))
    dloss = torch.ones(9, dtype=torch.float64)
    dloss[targets == -100] = torch.nan
    fn = lambda h, w: linear_cross_entropy(h, w, targets, reduction="none")  # noqa: E731
    _, (dhidden, dweight) = testing.gradients(fn, [hidden, weight], [dloss])
    assert dhidden.isfinite().all() and dweight.isfinite().all()


def test_nan_token_that_counts_shows_and_stays_in_its_row():
    hidden, weight, targets = problem((8,))
    hidden[2] = torch.nan
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert loss.isnan().tolist() == [i == 2 for i in range(8)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(4,), (0,), (2, 0)])
def test_no_token_counts(shape, reduction):
    hidden = torch.randn(*shape, 6)
    fn = lambda h, w: linear_cross_entropy(  # noqa: E731
        h, w, torch.full(shape, -100), reduction=reduction
    )
    (loss,), grads = testing.gradients(fn, [hidden, torch.randn(5, 6)])
    assert loss.shape == (shape if reduction == "none" else ()) and not loss.any()
    assert all(g is not None and not g.any() for g in grads)


def test_one_class_and_no_features():
    assert linear_cross_entropy(torch.randn(3, 4), torch.randn(1, 4), torch.zeros(3).long()) == 0
    loss = linear_cross_entropy(torch.ones(3, 0), torch.ones(7, 0), torch.arange(3))
    assert loss.item() == pytest.approx(math.log(7))


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e18])
def test_extreme_logits(scale):
    hidden = torch.tensor([[scale, 0.0], [-scale, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([0, 0])
    fn = lambda h, w: linear_cross_entropy(h, w, targets, reduction="none")  # noqa: E731
    (loss,), grads = testing.gradients(fn, [hidden, weight])
    want = math.log(3) if scale < 1 else 2 * scale
    assert loss[1].item() == pytest.approx(want) and all(g.isfinite().all() for g in grads)


def test_any_strides_and_integer_types():
    hidden, weight, targets = problem((6, 4))
    want = linear_cross_entropy(hidden, weight, targets, reduction="none")
    views = (
        hidden.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([hidden, hidden], -1)[..., 0],
    )
    for view in views:
        got = linear_cross_entropy(view, weight.T.contiguous().T, targets.int(), reduction="none")
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    row = linear_cross_entropy(hidden[:, :1].expand(6, 4, 17), weight, targets, reduction="none")
    torch.testing.assert_close(row[:, 0], want[:, 0], rtol=1e-13, atol=1e-13)


def test_logits_are_never_whole():
    """The largest tensor either pass makes stays under the byte budget."""
    hidden, weight = torch.randn(2500, 2), torch.randn(20000, 2)
    targets = torch.randint(20000, (2500,))
    assert 2500 * 20000 * 4 > 2 * ref.LOGITS_BYTES
    with Largest() as largest:
        lse, *_ = ref.forward(hidden, weight, targets, -100, 0, 20000, False)
        ref.backward(lse, lse, None, hidden, weight, targets, lse, -100, 0, 20000)
    assert ref.LOGITS_BYTES // 2 < largest.bytes <= ref.LOGITS_BYTES


def test_autocast_casts_hidden_and_weight():
    hidden, weight, targets = problem((9,), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight.bfloat16(), targets)
    want = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        exact = linear_cross_entropy(hidden.double(), weight.double(), targets)
    assert exact == linear_cross_entropy(hidden.double(), weight.double(), targets)


def test_compiles_with_dynamic_length():
    def loss(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, z_loss=0.1, label_smoothing=0.1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 12):
        args = problem((tokens,), dtype=torch.float32)
        got, want = testing.gradients(compiled, args), testing.gradients(loss, args)
        for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]]):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=[1.0]), TypeError, "`hidden` must be a torch.Tensor"),
        (dict(hidden=torch.tensor(1.0)), ValueError, "`hidden` needs at least one axis"),
        (dict(hidden=torch.ones(3, 8).int()), TypeError, "`hidden` is torch.int32"),
        (
            dict(weight=torch.ones(5, 7)),
            ValueError,
            r"`weight` has shape \(5, 7\), expected \(V, D",
        ),
        (dict(weight=torch.ones(0, 8)), ValueError, "`weight` has no rows"),
        (dict(weight=torch.ones(5, 8).half()), TypeError, "`weight` is torch.float16"),
        (dict(weight=torch.ones(5, 8, device="meta")), ValueError, "`weight` is on meta"),
        (dict(targets=torch.ones(4).long()), ValueError, r"`targets` has shape \(4,\), expected"),
        (dict(targets=torch.ones(3)), TypeError, "`targets` is torch.float32"),
        (dict(targets=torch.tensor([0, 5, 1])), ValueError, "`targets` holds 5 at token 1"),
        (dict(targets=torch.tensor([0, 1, -1])), ValueError, "`targets` holds -1 at token 2"),
        (dict(label_smoothing=1.5), ValueError, "`label_smoothing` must be in"),
        (dict(z_loss=-1.0), ValueError, "`z_loss` must not be negative"),
        (dict(reduction="avg"), ValueError, "`reduction` must be one of mean, sum, none"),
    ],
)
def test_bad_input(change, error, message):
    good = {"hidden": torch.ones(3, 8), "weight": torch.ones(5, 8), "targets": torch.arange(3)}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**good, **change})
