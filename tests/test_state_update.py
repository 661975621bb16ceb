import math

import pytest
import torch

from nemokernels import selective_state_update, testing

H, P, N, G = 4, 6, 10, 2


def inputs(tokens, dtype=torch.float64, heads=H, groups=G, size=P, states=N):
    """x, dt, A, B, C and the optional D, z, dt_bias, each with its own value everywhere."""
    x, dt, z = torch.randn(3, tokens, heads, size).to(dtype)
    B, C = torch.randn(2, tokens, groups, states).to(dtype)
    D, dt_bias = torch.randn(2, heads, size).to(dtype)
    A = -torch.rand(heads, size, states).to(dtype) - 0.1
    return dict(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)


def by_definition(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """One token, one number at a time, in Python floats. Returns y and the new state."""
    state, y = state.double().clone(), torch.zeros_like(x, dtype=torch.float64)
    for b, h, p in torch.cartesian_prod(*(torch.arange(s) for s in x.shape)).tolist():
        g = h // (x.shape[1] // B.shape[1])
        d = dt[b, h, p].item() + (0.0 if dt_bias is None else dt_bias[h, p].item())
        d = math.log1p(math.exp(d)) if dt_softplus and d <= 20 else d
        total = 0.0
        for n in range(A.shape[2]):
            s = state[b, h, p, n].item() * math.exp(A[h, p, n].item() * d)
            s += d * x[b, h, p].item() * B[b, g, n].item()
            state[b, h, p, n] = s
            total += s * C[b, g, n].item()
        total += 0.0 if D is None else D[h, p].item() * x[b, h, p].item()
        if z is not None:
            total *= z[b, h, p].item() / (1 + math.exp(-z[b, h, p].item()))
        y[b, h, p] = total
    return y, state


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("softplus", [True, False])
def test_fp64_equals_definition(without, softplus):
    args = {k: v for k, v in inputs(3).items() if k not in without}
    args["dt_softplus"] = softplus
    state = torch.randn(3, H, P, N, dtype=torch.float64)
    want_y, want = by_definition(state, **args)
    y = selective_state_update(state, **args)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 6, 1, 3, 7), (5, 3, 3, 2, 17)])
def test_odd_sizes(shape):
    batch, heads, groups, size, states = shape
    args = inputs(batch, heads=heads, groups=groups, size=size, states=states)
    state = torch.randn(batch, heads, size, states, dtype=torch.float64)
    want_y, want = by_definition(state, **args)
    torch.testing.assert_close(
        selective_state_update(state, **args), want_y, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(state, want, rtol=1e-12, atol=1e-12)


def test_arguments_stand_where_the_drop_in_name_has_them():
    a, slots = inputs(2), torch.tensor([1, 0], dtype=torch.int32)
    named = torch.randn(2, H, P, N, dtype=torch.float64)
    placed = named.clone()
    order = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")
    want = selective_state_update(named, **a, state_batch_indices=slots)
    assert torch.equal(selective_state_update(placed, *(a[k] for k in order), slots), want)
    assert torch.equal(placed, named)


def test_without_a_head_axis():
    a = inputs(3, heads=1, groups=1)
    state = torch.randn(3, 1, P, N, dtype=torch.float64)
    flat, dense = state[:, 0].clone(), state.clone()
    want = selective_state_update(dense, **a)
    squeezed = {k: v if isinstance(v, bool) else v[0] if k in ("A", "D", "dt_bias") else v[:, 0]
                for k, v in a.items()}  # fmt: skip
    y = selective_state_update(flat, **squeezed)
    assert torch.equal(y, want[:, 0]) and torch.equal(flat, dense[:, 0])
    assert y.is_contiguous()


@pytest.mark.parametrize("dt_bias", [True, False])
def test_expanded_views_and_size_one_mean_the_same(dt_bias):
    a = inputs(3, dtype=torch.float32)
    dt, A, D, bias = a["dt"][..., :1], a["A"][:, :1, :1], a["D"][:, :1], a["dt_bias"][:, :1]
    tied = dict(a, dt=dt, A=A, D=D, dt_bias=bias if dt_bias else None)
    views = dict(a, dt=dt.expand(3, H, P), A=A.expand(H, P, N), D=D.expand(H, P),
                 dt_bias=bias.expand(H, P) if dt_bias else None)  # fmt: skip
    dense = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in views.items()}
    start = torch.randn(3, H, P, N)
    results = []
    for args in (tied, views, dense):
        state = start.clone()
        results.append((selective_state_update(state, **args), state))
    for y, state in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(state, results[0][1])


@pytest.mark.parametrize("inside", [0, 1])
def test_any_strides(inside):
    """A state transposed, alone or inside a wider cache, and every input a view."""
    a = inputs(3, dtype=torch.float32, states=72)
    cache = torch.randn(5, H + inside, 72, P + inside)
    view = cache[:, inside:, :, inside:].transpose(2, 3)
    dense, before = view.clone(memory_format=torch.contiguous_format), cache.clone()
    wide = torch.randn(3, 2 * H * P + 8)
    wide[:, 3 : 3 + H * P] = a["z"].flatten(1)
    strided = dict(a, z=wide[:, 3 : 3 + H * P].unflatten(1, (H, P)))
    for name in ("x", "dt", "B", "C", "D", "A"):
        strided[name] = a[name].mT.contiguous().mT
    slots = torch.tensor([[9, 4], [9, 0], [9, 2]])[:, 1]
    y = selective_state_update(view, **strided, state_batch_indices=slots)
    want = selective_state_update(dense, **a, state_batch_indices=slots.int())
    assert torch.equal(y, want) and torch.equal(view, dense) and y.is_contiguous()
    view.copy_(before[:, inside:, :, inside:].transpose(2, 3))
    assert torch.equal(cache, before)


def test_zero_sizes():
    nothing = inputs(0, dtype=torch.float32)
    state = torch.randn(3, H, P, N)
    before = state.clone()
    empty = torch.zeros(0, dtype=torch.int32)
    assert selective_state_update(state[:0], **nothing).shape == (0, H, P)
    assert selective_state_update(state, **nothing, state_batch_indices=empty).shape == (0, H, P)
    for bounds, rows in (([0], 0), ([0, 0, 0], 2)):
        cu = torch.tensor(bounds, dtype=torch.int32)
        slots = torch.arange(rows)
        y = selective_state_update(state, **nothing, state_batch_indices=slots, cu_seqlens=cu)
        assert y.shape == (0, H, P)
    pads = torch.full((2,), -1)
    y = selective_state_update(state[:0], **inputs(2, torch.float32), state_batch_indices=pads)
    assert torch.equal(y, torch.zeros(2, H, P)) and torch.equal(state, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """float32 inside: only inputs and outputs are rounded."""
    args = inputs(5, dtype=dtype)
    args.update({k: args[k].float() for k in ("A", "D", "dt_bias")})
    state = torch.randn(5, H, P, N)
    want_y, want = by_definition(state, **args)
    y = selective_state_update(state, **args)
    assert y.dtype == dtype
    testing.assert_matches(state, want, want.float(), "state")
    if dtype == torch.float32:
        magnitude = by_definition(state, **{k: v.abs() if k in ("x", "B", "C", "z", "D") else v
                                            for k, v in args.items()})[0]  # fmt: skip
        assert ((y - want_y).abs() <= N * torch.finfo(dtype).eps * magnitude.abs().max()).all()
    else:
        testing.assert_matches(y, want_y, want_y.to(dtype), "y")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_state_is_rounded_only_when_stored(dtype):
    args = inputs(4, dtype=torch.float32)
    narrow = torch.randn(4, H, P, N).to(dtype)
    wide = narrow.float()
    want = selective_state_update(wide, **args)
    assert torch.equal(selective_state_update(narrow, **args), want)
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("start", [0.0, 2.0])
def test_softplus_and_decay_at_their_limits(start):
    steps = [-1e4, -200.0, -20.0, 0.0, 10.5, 20.0, 20.5, 200.0, 1e4]
    dt = torch.tensor(steps, dtype=torch.float64).view(-1, 1, 1)
    one = torch.ones_like(dt)
    state = torch.full((9, 1, 1, 1), start, dtype=torch.float64)
    y = selective_state_update(state, one, dt, -one[:1], one, one, dt_softplus=True)
    d = [s if s > 20 else math.log1p(math.exp(s)) for s in steps]
    want = torch.tensor([start * math.exp(-v) + v for v in d], dtype=torch.float64)
    assert torch.equal(y, state[..., 0])
    torch.testing.assert_close(y.flatten(), want, rtol=1e-13, atol=0)


def test_nan_stays_in_its_row():
    args, state = inputs(3, dtype=torch.float32), torch.randn(4, H, P, N)
    slots = torch.tensor([3, 1, 0])
    clean = state.clone()
    clean_y = selective_state_update(clean, **args, state_batch_indices=slots)
    state[1] = torch.nan
    y = selective_state_update(state, **args, state_batch_indices=slots)
    assert y[1].isnan().all() and state[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean_y[[0, 2]])
    assert torch.equal(state[[0, 2, 3]], clean[[0, 2, 3]])


def test_float64_x_on_a_float32_state_is_computed_in_float64():
    args, state = inputs(2), torch.randn(2, H, P, N)
    want_y, want = by_definition(state, **args)
    torch.testing.assert_close(
        selective_state_update(state, **args), want_y, rtol=1e-12, atol=1e-12
    )
    assert torch.equal(state, want.float())


def test_has_no_gradient():
    args, state = inputs(1, dtype=torch.float32), torch.zeros(1, H, P, N)
    args["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="selective_state_update writes into its state and has"):
        selective_state_update(state, **args)
    with torch.no_grad():
        selective_state_update(state, **args)


def test_compiles_with_the_state_mutated_in_place():
    args, slots = inputs(2, dtype=torch.float32), torch.tensor([2, 0])
    eager = torch.randn(3, H, P, N)
    compiled = eager.clone()
    step = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    want = selective_state_update(eager, **args, state_batch_indices=slots)
    assert torch.equal(step(compiled, **args, state_batch_indices=slots), want)
    assert torch.equal(compiled, eager)


HALF = torch.zeros(5, H, P, N, dtype=torch.float16)
GOOD = dict(state=torch.zeros(5, H, P, N), **inputs(3, torch.float32),
            state_batch_indices=torch.arange(3))  # fmt: skip
PACKED = dict(cu_seqlens=torch.tensor([0, 1, 3], dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(state=None), TypeError, "`state` must be a torch.Tensor"),
        (dict(state=torch.zeros(5, P)), ValueError, "`state` has shape .*, expected .slots"),
        (dict(state=torch.zeros(H, P, N).expand(5, H, P, N)), ValueError, "`state` share memory"),
        (dict(state=torch.zeros(5, H, P, N, dtype=torch.int8)), TypeError, "`state` is torch.int8"),
        (dict(x=torch.ones(3, P)), ValueError, r"`x` has shape \(3, 6\), expected \(T, H, P\)"),
        (dict(x=torch.ones(3, H, P, dtype=torch.int32)), TypeError, "`x` is torch.int32"),
        (dict(dt=torch.ones(3, H)), ValueError, "`dt` has shape"),
        (dict(dt=torch.ones(2, H, P)), ValueError, "`dt` has shape"),
        (dict(dt=torch.ones(3, 1, 1)), ValueError, "`dt` has shape"),
        (dict(A=torch.ones(H, 1, N)), ValueError, "`A` has shape"),
        (dict(A=torch.ones(H)), ValueError, "`A` has shape"),
        (dict(B=torch.ones(3, G, N + 1)), ValueError, "`B` has shape"),
        (dict(B=torch.ones(3, 3, N), C=torch.ones(3, 3, N)), ValueError, "`B` has 3 groups, .* 4"),
        (dict(B=torch.ones(3, 0, N), C=torch.ones(3, 0, N)), ValueError, "`B` has 0 groups"),
        (dict(C=torch.ones(3, 1, N)), ValueError, "`C` has shape"),
        (dict(D=torch.ones(H)), ValueError, "`D` has shape"),
        (dict(z=torch.ones(3, H, 1)), ValueError, "`z` has shape"),
        (dict(dt_bias=torch.ones(H, 2)), ValueError, "`dt_bias` has shape"),
        (dict(dt_bias=torch.ones(H, 1, device="meta")), ValueError, "`dt_bias` is on meta"),
        (dict(state_batch_indices=None), ValueError, "`state` has 5 slots, expected one for .* 3"),
        (dict(state_batch_indices=[0, 1, 2]), TypeError, "`state_batch_indices` must be"),
        (dict(state_batch_indices=torch.ones(3)), TypeError, "`state_batch_indices` is torch.fl"),
        (dict(state_batch_indices=torch.arange(2)), ValueError, "`state_batch_indices` has shape"),
        (dict(dst_state_batch_indices=torch.ones(3, 0).int()), ValueError, "`dst_state_batch_ind"),
        (dict(num_accepted_tokens=torch.ones(3).int()), ValueError, "needs a 2-D state_batch_ind"),
        (dict(num_accepted_tokens=torch.ones(2).int()), ValueError, "`num_accepted_tokens` has sh"),
        (dict(cu_seqlens=torch.tensor([0, 1, 3])), TypeError, "`cu_seqlens` is torch.int64"),
        (dict(cu_seqlens=torch.zeros(0).int()), ValueError, "`cu_seqlens` is empty"),
        (PACKED, ValueError, "`state_batch_indices` has shape"),
        (dict(seed=1), ValueError, "`seed` asks for .* or bfloat16 state, got torch.float32"),
        (dict(seed=1.0, state=HALF), TypeError, "`seed` must be an int"),
        (dict(seed=1 << 64, state=HALF), ValueError, "`seed` is 184467440737095516"),
        (dict(seed=torch.ones(2).long(), state=HALF), ValueError, "`seed` has shape"),
        (dict(seed=torch.ones(1).int(), state=HALF), TypeError, "`seed` is torch.i"),
        (dict(seed=1, philox_rounds=0, state=HALF), ValueError, "`philox_rounds`"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match="selective_state_update: .*" + message):
        selective_state_update(**{**GOOD, **change})
