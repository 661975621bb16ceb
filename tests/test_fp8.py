import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemokernels import (
    current_scale,
    delayed_scaling_update,
    dequantize_fp8,
    quantize_fp8,
    relu2,
)

FLOAT_MAX = np.finfo(np.float32).max
FORMATS = {
    "e4m3": (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, 448.0),
    "e5m2": (torch.float8_e5m2, ml_dtypes.float8_e5m2, 57344.0),
}
one = torch.ones(1)


def bits(x):
    return x.view(torch.uint8).numpy()


def rounded(values, scale, format):
    """Codes from ml_dtypes: float32 product, clamp, its own rounding."""
    _, kind, limit = FORMATS[format]
    with np.errstate(all="ignore"):
        product = values.astype(np.float32) * np.float32(scale)
    return np.clip(product, -limit, limit).astype(kind)


def assert_same_codes(q, want):
    """Equal bit for bit; NaN codes may differ in their payload only."""
    got, want = bits(q), want.view(np.uint8)
    nan = np.isnan(q.float().numpy())
    kind = ml_dtypes.float8_e4m3fn if q.dtype == torch.float8_e4m3fn else ml_dtypes.float8_e5m2
    assert np.array_equal(nan, np.isnan(want.view(kind).astype(np.float32)))
    assert np.array_equal(got[~nan], want[~nan])


def every_bfloat16():
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_round_trips(format):
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[format][0])
    wide = dequantize_fp8(codes, one, dtype=torch.float32)
    want = codes.view(torch.uint8).numpy().view(FORMATS[format][1]).astype(np.float32)
    assert np.array_equal(wide.numpy(), want, equal_nan=True)
    finite = torch.isfinite(wide)
    q, amax = quantize_fp8(wide[finite], one, format=format)
    assert np.array_equal(bits(q), bits(codes[finite]))
    assert amax == FORMATS[format][2]


@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-20, 1e30, 1e-30])
@pytest.mark.parametrize("format", FORMATS)
def test_every_bfloat16_rounds_as_ml_dtypes(format, scale):
    x = every_bfloat16()
    q, _ = quantize_fp8(x, torch.tensor([scale]), format=format)
    assert_same_codes(q, rounded(x.float().numpy(), scale, format))


@pytest.mark.parametrize("format", FORMATS)
def test_ties_go_to_even_and_neighbours_do_not(format):
    """Every midpoint between two codes, and the float32 next to it on either side."""
    kind = FORMATS[format][1]
    grid = np.arange(128, dtype=np.uint8).view(kind).astype(np.float64)
    grid = grid[np.isfinite(grid)]
    middle = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    values = np.concatenate([middle, np.nextafter(middle, np.float32(0)),
                             np.nextafter(middle, np.float32(1e30))])  # fmt: skip
    values = np.concatenate([values, -values])
    q, _ = quantize_fp8(torch.from_numpy(values), one, format=format)
    assert_same_codes(q, rounded(values, 1.0, format))
    tied = bits(q)[: len(middle)]
    assert (tied % 2 == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_amax(dtype):
    x = (torch.randn(37, 65) * 20).to(dtype)
    q, amax = quantize_fp8(x, torch.tensor([3.3]))
    assert_same_codes(q, rounded(x.float().numpy(), 3.3, "e4m3"))
    assert amax.dtype == torch.float32 and amax == x.float().abs().max()


@pytest.mark.parametrize("format", FORMATS)
def test_infinity_saturates_and_nan_stays(format):
    x = torch.tensor([np.inf, -np.inf, np.nan, 3.0, -0.0])
    q, amax = quantize_fp8(x, one, format=format)
    limit = FORMATS[format][2]
    wide = dequantize_fp8(q, one, dtype=torch.float32)
    assert wide[:2].tolist() == [limit, -limit] and wide[2].isnan() and wide[3] == 3.0
    assert bits(q)[4] == 0x80 and amax == np.inf
    q, amax = quantize_fp8(x[2:], one, format=format)
    assert amax == 3.0
    assert quantize_fp8(torch.full((3,), np.nan), one)[1] == 0


def test_transposed_copy_holds_the_same_codes():
    x = torch.randn(5, 3, 7).permute(1, 0, 2)
    scale = torch.tensor([9.0])
    q, amax, q_t = quantize_fp8(x, scale, transpose=True)
    plain, amax2 = quantize_fp8(x.contiguous(), scale)
    assert np.array_equal(bits(q), bits(plain)) and amax == amax2
    assert q_t.shape == (7, 15) and q_t.is_contiguous()
    assert np.array_equal(bits(q_t), bits(q).reshape(15, 7).T)
    shape = [t.shape for t in quantize_fp8(x[:, :0], scale, transpose=True)]
    assert shape == [(3, 0, 7), (), (7, 0)]


def test_dequantize_casts_once():
    q = torch.randn(9, 33).to(torch.float8_e4m3fn)
    scale_inv = torch.tensor(0.0123)
    exact = q.double() * scale_inv.double()
    assert torch.equal(dequantize_fp8(q, scale_inv, dtype=torch.float64), exact)
    wide = q.float() * scale_inv
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(dequantize_fp8(q, scale_inv, dtype=dtype), wide.to(dtype))
    assert dequantize_fp8(q.t(), scale_inv).is_contiguous()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("x", "want"),
    [
        ([0.3, -2.5, 1.0], None),
        ([0.0, -0.0], 1.0),
        ([], 1.0),
        ([1.0, np.inf], 1.0),
        ([np.nan, np.nan], 1.0),
        ([np.nan, 2.5], None),
        ([1e-40], FLOAT_MAX),
        ([3e38], None),
    ],
)
def test_current_scale(format, x, want):
    scale = current_scale(torch.tensor(x), format=format)
    if want is None:
        want = np.float32(FORMATS[format][2]) / np.nanmax(np.abs(np.array(x, np.float32)))
    assert scale.shape == () and scale.item() == want


def step_by_step(scale, history, reduced, limit, margin, algorithm):
    """One tensor at a time, one history row at a time, as the definition reads."""
    scale, history = scale.copy(), history.copy()
    length, tensors = history.shape
    with np.errstate(all="ignore"):
        for s in range(tensors):
            current = history[0, s]
            if reduced is not None and reduced[s] != 0:
                current = reduced[s]
            maximum = np.float32(0)
            if algorithm == "most_recent":
                maximum = current
            elif current != 0:
                for row in [*history[1:, s], current]:
                    if row > maximum:  # False for NaN
                        maximum = row
            if np.isfinite(maximum) and maximum > 0:
                scale[s] = np.float32(limit * 2.0**-margin) / maximum
            if np.isinf(scale[s]):
                scale[s] = FLOAT_MAX
            if current != 0:
                for row in range(1, length - 1):
                    history[row, s] = history[row + 1, s]
                history[length - 1, s] = current
                history[0, s] = 0
    return scale, history


AMAX = st.one_of(
    st.sampled_from([0.0, np.inf, np.nan, 1e-45, 1e-36, 448.0, 3.4e38]),
    st.floats(2.0**-20, 2.0**20, width=32),
)
THREE = st.lists(AMAX, min_size=3, max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, 5),
    steps=st.lists(st.tuples(THREE, st.none() | THREE), max_size=8),
    margin=st.sampled_from([0.0, 1.0, 3.0]),
    algorithm=st.sampled_from(["max", "most_recent"]),
    format=st.sampled_from(list(FORMATS)),
)
def test_delayed_scaling_against_step_by_step_model(length, steps, margin, algorithm, format):
    scale, history = torch.ones(3), torch.zeros(length, 3)
    want_scale, want_history = scale.numpy().copy(), history.numpy().copy()
    for local, reduced in steps:
        history[0] = torch.tensor(local)
        want_history[0] = local
        reduced = None if reduced is None else torch.tensor(reduced)
        want_scale, want_history = step_by_step(
            want_scale, want_history, None if reduced is None else reduced.numpy(),
            FORMATS[format][2], margin, algorithm,
        )  # fmt: skip
        delayed_scaling_update(
            scale, history, reduced, format=format, margin=margin, algorithm=algorithm
        )
        assert np.array_equal(scale.numpy(), want_scale, equal_nan=True)
        assert np.array_equal(history.numpy(), want_history, equal_nan=True)


def test_delayed_scaling_known_sequence():
    """Worked by hand: rolled histories, an unused tensor, a maximum that leaves the window."""
    scale, history = torch.ones(2), torch.zeros(3, 2)
    for amax, want in [(4.0, 112.0), (2.0, 112.0), (1.0, 112.0), (1.0, 224.0), (0.0, 224.0)]:
        history[0, 0] = amax
        delayed_scaling_update(scale, history)
        assert scale.tolist() == [want, 1.0]
    assert history[:, 0].tolist() == [0.0, 1.0, 1.0] and not history[:, 1].any()


def test_update_of_concatenated_state_equals_separate_updates():
    scale, history, amax = torch.rand(5), torch.rand(4, 5), torch.rand(5)
    parts = [(scale[i : i + 1].clone(), history[:, i : i + 1].clone()) for i in range(5)]
    delayed_scaling_update(scale, history, amax)
    for i, (s, h) in enumerate(parts):
        delayed_scaling_update(s, h, amax[i : i + 1])
        assert torch.equal(s, scale[i : i + 1]) and torch.equal(h, history[:, i : i + 1])
    delayed_scaling_update(torch.ones(0), torch.zeros(4, 0))
    delayed_scaling_update([], [])


@pytest.mark.parametrize("reduced", [False, True])
def test_update_of_many_tensors_equals_separate_updates(reduced):
    """Of two formats and several widths, one of them a view."""
    sizes, formats = (2, 1, 0, 3), ("e4m3", "e5m2", "e4m3", "e5m2")
    state = [(torch.rand(n), torch.rand(4, 2 * n)[:, ::2]) for n in sizes]
    want = [(s.clone(), h.clone()) for s, h in state]
    amax = torch.rand(6)
    delayed_scaling_update([s for s, _ in state], [h for _, h in state],
                           amax if reduced else None, format=formats, margin=1)  # fmt: skip
    for (s, h), (got_s, got_h), format, part in zip(want, state, formats, amax.split(sizes)):
        delayed_scaling_update(s, h, part if reduced else None, format=format, margin=1)
        assert torch.equal(got_s, s) and torch.equal(got_h, h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", FORMATS)
def test_squared_relu_on_the_way(format, dtype):
    """The same bits as storing relu2(x) first: infinities, NaN and float16's overflow included."""
    x = (torch.randn(9, 33) * 8).to(dtype)
    x[0, :5] = torch.tensor([np.nan, np.inf, -np.inf, 300.0, -0.0])
    scale = torch.tensor([0.7])
    got = quantize_fp8(x, scale, format=format, transpose=True, squared_relu=True)
    for a, b in zip(got, quantize_fp8(relu2(x), scale, format=format, transpose=True)):
        assert a.shape == b.shape and np.array_equal(bits(a.reshape(-1)), bits(b.reshape(-1)))


def test_update_writes_through_views():
    state = torch.rand(4, 10)
    scale, history = state[0, ::2], state[1:, ::2]
    want_scale, want_history = scale.clone(), history.clone()
    delayed_scaling_update(want_scale, want_history)
    before = state[:, 1::2].clone()
    delayed_scaling_update(scale, history)
    assert torch.equal(state[0, ::2], want_scale) and torch.equal(state[1:, ::2], want_history)
    assert torch.equal(state[:, 1::2], before)


X, EIGHT = torch.ones(2, 8), torch.ones(2, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_fp8([1.0], one), TypeError, "`x` must be a torch.Tensor"),
        (lambda: quantize_fp8(EIGHT, one), TypeError, "`x` is torch.float8_e4m3fn"),
        (lambda: quantize_fp8(X, 1.0), TypeError, "`scale` must be a torch.Tensor, got float"),
        (lambda: quantize_fp8(X, one.double()), TypeError, "`scale` is torch.float64"),
        (lambda: quantize_fp8(X, torch.ones(2)), ValueError, r"`scale` has shape \(2,\), expected"),
        (lambda: quantize_fp8(X, one.to("meta")), ValueError, "`scale` is on meta"),
        (lambda: quantize_fp8(X, one, format="e3m4"), ValueError, "`format` is 'e3m4'"),
        (lambda: quantize_fp8(X, one * 0), ValueError, "`scale` is 0.0, expected a positive"),
        (lambda: quantize_fp8(X, -one), ValueError, "`scale` is -1.0, expected a positive"),
        (lambda: quantize_fp8(X, one * np.inf), ValueError, "`scale` is inf, expected a pos"),
        (lambda: quantize_fp8(X, one * np.nan), ValueError, "`scale` is nan, expected a pos"),
        (lambda: quantize_fp8(torch.tensor(1.0), one, transpose=True), ValueError, "got a scalar"),
        (lambda: dequantize_fp8(X, one), TypeError, "`q` is torch.float32"),
        (lambda: dequantize_fp8(EIGHT, X), ValueError, "`scale_inv` has shape"),
        (lambda: dequantize_fp8(EIGHT, one, dtype=torch.int8), TypeError, "`dtype` is torch.int8"),
        (lambda: current_scale(EIGHT), TypeError, "`x` is torch.float8_e4m3fn"),
        (lambda: current_scale(X, format="hybrid"), ValueError, "`format` is 'hybrid'"),
        (lambda: delayed_scaling_update(X, X), ValueError, "`scale` has shape"),
        (lambda: delayed_scaling_update(X[0], X[:, :3]), ValueError, "`amax_history` has shape"),
        (lambda: delayed_scaling_update(X[0], X[:0]), ValueError, "at least one row"),
        (lambda: delayed_scaling_update(X[0], X.half()), TypeError, "`amax_history` is torch.fl"),
        (lambda: delayed_scaling_update(X[0], X, X), ValueError, "`amax` has shape"),
        (lambda: delayed_scaling_update([X[0]], []), ValueError, "got 1 of `scale`, 0 of `amax_"),
        (lambda: delayed_scaling_update([X[0]] * 2, [X, X[:1]]), ValueError, "all the same numb"),
        (lambda: delayed_scaling_update([X[0]] * 2, [X, X.to("meta")]), ValueError, "on meta"),
        (lambda: delayed_scaling_update(X[0], X, algorithm="mean"), ValueError, "`algorithm` is"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_gradient_is_refused_not_dropped():
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        current_scale(x).backward()
    with pytest.raises(ValueError, match="`x` requires a gradient"):
        quantize_fp8(x, one)
    with pytest.raises(ValueError, match="`q` requires a gradient"):
        dequantize_fp8(EIGHT.clone().requires_grad_(), one)
    with pytest.raises(RuntimeError, match="writes into its state"):
        delayed_scaling_update(torch.ones(8, requires_grad=True), X)
    with torch.no_grad():
        assert quantize_fp8(x, one)[1] == 1
