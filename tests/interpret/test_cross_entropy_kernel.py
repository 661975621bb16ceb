"""The Triton kernels of linear_cross_entropy, interpreted, against the reference."""

import pytest
import torch

from nemokernels import testing
from nemokernels.ops.cross_entropy import kernel, op, ref

F32, F16 = torch.float32, torch.float16
IGNORE = -7


def problem(tokens=37, features=24, here=90, first=0, classes=None, dtype=F32):
    classes = classes or first + here
    hidden, weight = torch.randn(tokens, features).to(dtype), torch.randn(here, features).to(dtype)
    targets = torch.randint(classes, (tokens,))
    targets[1::5] = IGNORE
    return hidden, weight, targets, first, classes


def config(classes=32, tma=False, tile=(16, 32, 16)):
    tile = op.Tile(*tile, 1, 1)
    return op.Config("triton", tile, tile, classes, tma)


def both(hidden, weight, targets, first, classes, sums, how):
    """What the kernels give, the reference, and the reference in float64: outputs, gradients."""
    labels = IGNORE, first, classes
    keep = targets != IGNORE
    grads = [torch.randn(hidden.shape[0]) for _ in range(3)]
    grads[2] = grads[2] if sums else None

    def run(forward, backward, wide, *config):
        h, w = (t.double() if wide else t for t in (hidden, weight))
        out = forward(h, w, targets, *labels, sums, *config)
        g = [t.double() if wide and t is not None else t for t in grads]
        return *out, *backward(*g, h, w, targets, out[0], *labels, *config)

    got = run(kernel.forward, kernel.backward, False, how)
    low, want = (run(ref.forward, ref.backward, wide) for wide in (False, True))
    assert not torch.cat([t[~keep].flatten() for t in got[:4]]).any()
    return got, low, want


def compare(*args):
    names = "lse", "chosen", "total", "dhidden", "dweight"
    for name, got, low, want in zip(names, *both(*args)):
        assert got.dtype == low.dtype and got.is_contiguous()
        testing.assert_matches(got, want, low, name)


@pytest.mark.parametrize(
    "tokens, features, here", [(1, 1, 1), (16, 16, 32), (37, 24, 90), (5, 3, 33)]
)
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("sums", [False, True])
def test_sizes(tokens, features, here, dtype, sums):
    compare(*problem(tokens, features, here, dtype=dtype), sums, config())


@pytest.mark.parametrize("classes", [32, 64, 1000])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_blocks_of_classes_and_descriptors(classes, tma, dtype):
    compare(*problem(dtype=dtype), True, config(classes, tma))


def test_more_rows_of_tiles_than_follow_each_other(monkeypatch):
    monkeypatch.setattr(kernel, "GROUP", 2)
    compare(*problem(16 * 5 - 3, 8, 70), True, config())


@pytest.mark.parametrize("tma", [False, True])
def test_a_shard_of_the_vocabulary(tma):
    compare(*problem(first=40, classes=150), True, config(tma=tma))


def test_more_blocks_than_one_step_joins():
    hidden, weight, targets, *rest = problem(17, 3, 32 * 32 + 40)
    weight[-3:] *= 9  # the peak of some tokens is in the last step
    compare(hidden, weight, targets, *rest, True, config(2000))


@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_far_from_zero(scale):
    """All logits far below zero: nothing may be relative to a peak that is not there."""
    hidden, weight, targets, *rest = problem()
    compare(-hidden.abs() * scale, weight.abs(), targets, *rest, False, config())


def test_any_strides_and_integer_types():
    hidden, weight, targets, *rest = problem()
    turned = hidden.T.contiguous().T, weight.T.contiguous().T
    spread = torch.stack([targets.int()] * 2, 1)[:, 0]
    got = both(hidden, weight, targets, *rest, True, config())[0]
    torch.manual_seed(0)
    problem()
    want = both(hidden, weight, targets, *rest, True, config())[0]
    torch.manual_seed(0)
    problem()
    again = both(*turned, spread, *rest, True, config())[0]
    wide = torch.cat([hidden, hidden], 1)[:, :24], torch.cat([weight, weight], 1)[:, :24]
    torch.manual_seed(0)
    problem()
    strided = both(*wide, targets, *rest, True, config(tma=True))[0]
    assert len(got) == 5
    for a, b, c in zip(want, again, strided):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("tma", [False, True])
def test_ignored_tokens_reach_nothing(poison, tma):
    hidden, *rest = problem()
    dirty = hidden.clone()
    dirty[rest[1] == IGNORE] = poison
    results = []
    for h in (hidden, dirty):
        torch.manual_seed(1)
        results.append(both(h, *rest, True, config(tma=tma))[0])
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_targets_that_are_no_class():
    """NaN in their token and in the weights, and nothing is read or written out of bounds."""
    hidden, weight, targets, first, classes = problem(first=10, classes=200)
    targets[[0, 5, 9]] = torch.tensor([-1, 200, 2**40])
    wrong = torch.zeros(37, dtype=torch.bool)
    wrong[[0, 5, 9]] = True
    labels = IGNORE, first, classes
    lse, chosen, total = kernel.forward(hidden, weight, targets, *labels, True, config())
    assert chosen.isnan().equal(wrong) and lse.isfinite().all() and total.isfinite().all()
    one = torch.ones(37)
    dhidden, dweight = kernel.backward(
        one, one, None, hidden, weight, targets, lse, *labels, config()
    )
    assert dhidden.isnan().all(1).equal(wrong) and dweight.isnan().all()


def test_infinities_and_nan_stay_in_their_row():
    hidden, weight, targets, *rest = problem()
    weight.abs_()
    hidden[2], hidden[3], hidden[4] = torch.nan, torch.inf, -torch.inf
    lse, _, total = kernel.forward(hidden, weight, targets, IGNORE, *rest, True, config())
    want, _, sums = ref.forward(hidden, weight, targets, IGNORE, *rest, True)
    for a, b in ((lse, want), (total, sums)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("tokens, here", [(0, 5), (5, 0), (0, 0)])
def test_empty(tokens, here):
    hidden, weight, targets, *rest = problem(tokens, 4, here, 3, 9)
    compare(hidden, weight, targets, *rest, True, config())


def test_plan():
    both_backends = ("triton", "reference")
    args = torch.bfloat16, "", both_backends, 132, (9, 0)
    nano = op.plan(8192, 2688, *args)
    assert nano.classes == 1536 and nano.tma and nano.logits.columns == 256
    assert op.plan(8192, 4096, *args).classes == 2048
    assert op.plan(64, 2688, *args).classes > 125_000
    assert op.plan(0, 1, *args).classes % nano.logits.rows == 0
    assert not op.plan(64, 64, torch.bfloat16, "", both_backends, 132, (8, 6)).tma
    assert "feature" in op.plan(4, 0, *args).reason
    with pytest.raises(RuntimeError, match="float64"):
        op.plan(4, 4, F32, "no float64", ("triton",), 132, (9, 0))
