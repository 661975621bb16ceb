import pytest
import torch

from nemokernels import causal_conv1d_fn, causal_conv1d_varlen_states, testing

F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def int32(values, device=CPU):
    return torch.tensor(values, dtype=torch.int32, device=device)


def by_token(x, weight, bias=None, activation=None, seq_idx=None, initial=None):
    """The definition, one output at a time; x (B, dim, T). Returns y and the final states."""
    batch, dim, tokens = x.shape
    width = weight.shape[1]
    back = width - 1
    initial = x.new_zeros(batch, dim, back) if initial is None else initial
    ids = [[0] * tokens] * batch if seq_idx is None else seq_idx.tolist()
    rows, states = [], []
    for b in range(batch):
        first = ids[b][0] if tokens else 0
        history = [(first, initial[b, :, i]) for i in range(back)]
        history += [(ids[b][t], x[b, :, t]) for t in range(tokens)]
        outs = []
        for t in range(tokens):
            v = torch.zeros(dim, dtype=x.dtype) if bias is None else bias.clone()
            for w in range(width):
                owner, value = history[t + w]
                if owner == ids[b][t]:
                    v = v + weight[:, w] * value
            v = torch.nn.functional.silu(v) if activation else v
            outs.append(v if ids[b][t] >= 0 else torch.zeros_like(v))
        rows.append(torch.stack(outs, 1) if outs else x.new_zeros(dim, 0))
        last = history[-1][0]
        state = [v if o == last and last >= 0 else torch.zeros_like(v) for o, v in history[-back:]]
        states.append(torch.stack(state, 1))
    return torch.stack(rows), torch.stack(states)


def problem(batch=2, dim=5, tokens=11, width=4, dtype=F64):
    return (
        torch.randn(batch, dim, tokens, dtype=dtype),
        torch.randn(dim, width, dtype=dtype),
        torch.randn(dim, dtype=dtype),
        torch.randn(batch, dim, width - 1, dtype=dtype),
    )


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 11])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("with_initial", [False, True])
def test_fp64_equals_definition(width, tokens, activation, with_initial):
    x, weight, bias, initial = problem(tokens=tokens, width=width)
    initial = initial if with_initial else None
    bias = bias if activation else None
    y, state = causal_conv1d_fn(x, weight, bias, None, initial, True, activation=activation)
    want, want_state = by_token(x, weight, bias, activation, None, initial)
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)
    assert torch.equal(state, want_state)
    without = causal_conv1d_fn(x, weight, bias, initial_states=initial, activation=activation)
    assert torch.equal(without, y)


IDS = [
    [[0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3, 3, 3, 9, 9, 9]],
    [[0, 0, -1, 0, 0, 1, 1, 1, -1, -1, 1], [-1, -1, -1, 4, 4, 4, 4, 5, 5, -1, -1]],
]


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("with_initial", [False, True])
def test_seq_idx_equals_definition(ids, width, with_initial):
    x, weight, bias, initial = problem(width=width)
    seq_idx, initial = int32(ids), initial if with_initial else None
    y, state = causal_conv1d_fn(x, weight, bias, seq_idx, initial, True, activation="silu")
    want, want_state = by_token(x, weight, bias, "silu", seq_idx, initial)
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)
    assert torch.equal(state, want_state)
    assert (y.transpose(1, 2)[seq_idx < 0] == 0).all()


@pytest.mark.parametrize("ids", [None, *IDS])
@pytest.mark.parametrize("cut", [1, 2, 7])
def test_states_continue_a_row(ids, cut):
    x, weight, bias, initial = problem()
    seq_idx = None if ids is None else int32(ids)
    part = lambda a, b: None if ids is None else seq_idx[:, a:b]  # noqa: E731
    whole, end = causal_conv1d_fn(x, weight, bias, seq_idx, initial, True)
    first, middle = causal_conv1d_fn(x[..., :cut], weight, bias, part(0, cut), initial, True)
    # A state belongs to the sequence of the next part's first token, if that goes on.
    if ids is not None:
        goes_on = (seq_idx[:, cut] == seq_idx[:, cut - 1]) & (seq_idx[:, cut] >= 0)
        middle = torch.where(goes_on[:, None, None], middle, 0)
    second, last = causal_conv1d_fn(x[..., cut:], weight, bias, part(cut, 11), middle, True)
    if ids is not IDS[1]:  # there a sequence resumes after padding, beyond a state's reach
        assert torch.equal(torch.cat((first, second), -1), whole)
        assert torch.equal(last, end)


BOUNDS = [[0, 5, 5, 6, 13, 15], [0, 15], [0, 0, 2, 11], [0], [0, 0]]


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", [F64, *DTYPES])
@pytest.mark.parametrize("dim", [5, 24])
def test_packed_equals_separate(bounds, dtype, dim):
    sequences = len(bounds) - 1
    x, weight, bias, _ = problem(1, dim, 15, 4, dtype)
    initial = torch.randn(sequences, dim, 3, dtype=dtype)
    dy, dfinal = torch.randn_like(x), torch.randn_like(initial)

    def packed(x, initial):
        return causal_conv1d_fn(
            x, weight, bias, None, initial, True, activation="silu", cu_seqlens=int32(bounds)
        )

    (y, state), (dx, dinitial) = testing.gradients(packed, [x, initial], [dy, dfinal])
    end = bounds[-1]
    assert (y[..., end:] == 0).all() and (dx[..., end:] == 0).all()
    for s, (a, b) in enumerate(zip(bounds, bounds[1:])):
        (y_s, state_s), (dx_s, dinitial_s) = testing.gradients(
            lambda x, i: causal_conv1d_fn(x, weight, bias, None, i, True, activation="silu"),
            [x[..., a:b], initial[s : s + 1]],
            [dy[..., a:b], dfinal[s : s + 1]],
        )
        for whole, alone in (
            (y[..., a:b], y_s),
            (state[s : s + 1], state_s),
            (dx[..., a:b], dx_s),
            (dinitial[s : s + 1], dinitial_s),
        ):
            assert torch.equal(whole, alone)


@pytest.mark.parametrize("mode", ["rows", "seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(mode, activation):
    x, weight, bias, initial = problem(1 if mode == "cu_seqlens" else 2, 3, 7, 4)
    seq_idx = int32([[0, 0, 1, 1, 1, 1, 1], [2, 2, 2, -1, -1, 3, 3]]) if mode == "seq_idx" else None
    bounds = int32([0, 1, 1, 6]) if mode == "cu_seqlens" else None
    if bounds is not None:
        initial = torch.randn(3, 3, 3, dtype=F64)

    def fn(x, weight, bias, initial):
        return causal_conv1d_fn(
            x, weight, bias, seq_idx, initial, True, activation=activation, cu_seqlens=bounds
        )

    inputs = [t.requires_grad_() for t in (x, weight, bias, initial)]
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradcheck(
        lambda x, w: causal_conv1d_fn(x, w, None, seq_idx, cu_seqlens=bounds), inputs[:2]
    )


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_gradcheck_of_rows_shorter_than_the_filter(tokens):
    inputs = [t.requires_grad_() for t in problem(2, 3, tokens, 4)]
    fn = lambda x, w, b, i: causal_conv1d_fn(x, w, b, None, i, True)  # noqa: E731
    assert torch.autograd.gradcheck(fn, inputs)


def test_gradient_of_padding_output_is_ignored():
    x, weight, bias, _ = problem(1, 4, 6)
    seq_idx = int32([[0, 0, 0, -1, -1, 1]])
    fn = lambda x, w, b: causal_conv1d_fn(x, w, b, seq_idx, activation="silu")  # noqa: E731
    dy = torch.randn(1, 4, 6, dtype=F64)
    _, clean = testing.gradients(fn, [x, weight, bias], [dy])
    dy[..., 3:5] = torch.nan
    _, dirty = testing.gradients(fn, [x, weight, bias], [dy])
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_rounds_once(dtype):
    x, weight, bias, _ = problem(2, 16, 33, 4, dtype)
    y = causal_conv1d_fn(x, weight, bias, activation="silu")
    wide = [t.double() for t in (x, weight, bias)]
    exact, _ = by_token(*wide, "silu")
    magnitude = causal_conv1d_fn(*(t.abs() for t in wide))
    # Half an ulp of the output, plus five float32 roundings of the sum.
    bound = torch.finfo(dtype).eps * exact.abs() + 5 * torch.finfo(torch.float32).eps * magnitude
    assert y.dtype == dtype and ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, F64),
    ],
)
def test_values_and_gradients_in_mixed_dtypes(x_dtype, weight_dtype):
    x, weight, bias, initial = problem(2, 16, 33)
    inputs = [x.to(x_dtype), weight.to(weight_dtype), bias.to(weight_dtype), initial.to(x_dtype)]
    fn = lambda x, w, b, i: causal_conv1d_fn(x, w, b, None, i, True, activation="silu")  # noqa: E731
    grads = [torch.randn_like(inputs[0]), torch.randn_like(inputs[3])]
    outs, got = testing.gradients(fn, inputs, grads)

    def definition(dtype):
        leaves, seeds = [t.to(dtype) for t in inputs], [g.to(dtype) for g in grads]
        outs, grad = testing.gradients(
            lambda x, w, b, i: by_token(x, w, b, "silu", None, i), leaves, seeds
        )
        return [*outs, *grad]

    exact, plain = definition(F64), definition(torch.float32)
    for g, w, p, leaf in zip([*outs, *got], exact, plain, [inputs[0], inputs[3], *inputs]):
        assert g.dtype == leaf.dtype
        testing.assert_matches(g, w, p.to(g.dtype))


def views(x):
    yield x.transpose(1, 2).contiguous().transpose(1, 2)
    yield torch.stack((x, x), -1)[..., 1]
    yield x.flip(2).flip(2)
    yield torch.cat((x, x), 1).permute(2, 0, 1).contiguous().permute(1, 2, 0)[:, : x.shape[1]]


def test_any_strides():
    x, weight, bias, initial = problem(2, 7, 9)
    seq_idx = int32([[0] * 4 + [1] * 5, [2] * 8 + [3]])
    want = causal_conv1d_fn(x, weight, bias, seq_idx, initial, True)
    for x_view, initial_view in zip(views(x), views(initial)):
        got = causal_conv1d_fn(
            x_view, weight.t().contiguous().t(), torch.stack((bias, bias), 1)[:, 0],
            seq_idx.t().contiguous().t(), initial_view, True,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert want[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(shape[1], 4, requires_grad=True), torch.randn(shape[1])
    y, state = causal_conv1d_fn(x, weight, bias, return_final_states=True, activation="silu")
    assert y.shape == shape and state.shape == (*shape[:2], 3)
    (y.sum() + state.sum()).backward()
    assert x.grad.shape == shape and (weight.grad == 0).all()


def test_final_states_out_receives_the_states():
    x, weight, _, _ = problem()
    out = torch.empty(2, 5, 3, dtype=F64)
    y, state = causal_conv1d_fn(x, weight, None, None, None, True, out)
    assert state is out and torch.equal(out, x[..., -3:])


def test_nan_stays_in_its_reach():
    x, weight, bias, _ = problem(2, 4, 12)
    clean = causal_conv1d_fn(x, weight, bias)
    x[0, 1, 5] = torch.nan
    out = causal_conv1d_fn(x, weight, bias)
    reach = torch.zeros_like(x, dtype=torch.bool)
    reach[0, 1, 5:9] = True
    assert torch.equal(out.isnan(), reach) and torch.equal(out[~reach], clean[~reach])
    seq_idx = int32([[0] * 6 + [1] * 6] * 2)
    assert causal_conv1d_fn(x, weight, bias, seq_idx).isnan().sum() == 1
    bounds = int32([0, 6, 12])
    assert causal_conv1d_fn(x[:1], weight, bias, cu_seqlens=bounds).isnan().sum() == 1


@pytest.mark.parametrize("value", [-1e4, -200.0, 200.0, 1e4])
def test_silu_of_extremes(value):
    x = torch.full((1, 2, 3), value, requires_grad=True)
    y = causal_conv1d_fn(x, torch.tensor([[0.0, 1.0]] * 2), activation="silu")
    y.sum().backward()
    assert torch.equal(y, torch.nn.functional.silu(x)) and x.grad.isfinite().all()


@pytest.mark.parametrize("state_len", [1, 3, 6])
def test_varlen_states(state_len):
    x, bounds = torch.randn(14, 3), [0, 4, 4, 5, 13]
    got = causal_conv1d_varlen_states(x, int32(bounds), state_len)
    for s, (a, b) in enumerate(zip(bounds, bounds[1:])):
        want = torch.cat((torch.zeros(state_len, 3), x[a:b]))[-state_len:].t()
        assert torch.equal(got[s], want)


TWO = torch.ones(2, 8, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "`x` must be a torch.Tensor"),
        (dict(x=torch.ones(2, 8)), ValueError, r"`x` has shape \(2, 8\), expected \(B, dim, T\)"),
        (dict(x=TWO.int()), TypeError, "`x` is torch.int32"),
        (dict(weight=torch.ones(7, 4)), ValueError, r"`weight` has shape \(7, 4\)"),
        (dict(weight=torch.ones(8, 5)), ValueError, "`weight` has 5 taps, expected 2, 3 or 4"),
        (dict(bias=torch.ones(7)), ValueError, "`bias` has shape"),
        (dict(bias=torch.ones(8, device="meta")), ValueError, "`bias` is on meta"),
        (dict(seq_idx=torch.zeros(2, 6)), TypeError, "`seq_idx` is torch.float32"),
        (dict(seq_idx=int32([[0] * 5] * 2)), ValueError, "`seq_idx` has shape"),
        (dict(cu_seqlens=int32([0, 6])), ValueError, "`x` must have one row with `cu_seqlens`"),
        (dict(x=TWO[:1], cu_seqlens=int32([1, 6])), ValueError, "`cu_seqlens` must start at 0"),
        (dict(x=TWO[:1], cu_seqlens=int32([0, 5, 4])), ValueError, "`cu_seqlens` must .* not decr"),
        (dict(x=TWO[:1], cu_seqlens=int32([0, 7])), ValueError, "`cu_seqlens` must .* end at"),
        (dict(x=TWO[:1], cu_seqlens=int32([])), ValueError, "`cu_seqlens` needs at least one"),
        (dict(cu_seqlens=int32([0]), seq_idx=int32([[0] * 6] * 2)), ValueError, "exclude each"),
        (dict(initial_states=torch.ones(2, 8, 4)), ValueError, "`initial_states` has shape"),
        (dict(initial_states=torch.ones(2, 8, 3).half()), TypeError, "`initial_states` is"),
        (dict(final_states_out=torch.ones(2, 8, 3)), ValueError, "`final_states_out` needs"),
        (dict(activation="relu"), ValueError, "`activation` is 'relu', expected"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d_fn(**{"x": TWO, "weight": torch.ones(8, 4), **change})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(4), int32([0, 4]), 3), "`x` has shape"),
        ((torch.ones(4, 2), int32([[0, 4]]), 3), "`cu_seqlens` has shape"),
        ((torch.ones(4, 2), int32([0, 4]), 0), "`state_len` must be at least 1, got 0"),
    ],
)
def test_bad_input_varlen(args, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d_varlen_states(*args)
