import pytest
import torch

from nemokernels import rmsnorm_fn, testing
from nemokernels.ops.gated_rms_norm import ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x, weight, bias=None, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """A second formula, from the definition, one group at a time."""
    gate = 1 if z is None else z / (1 + torch.exp(-z))
    v = x if norm_before_gate else x * gate
    pieces = [
        part / (part.pow(2).sum(-1, keepdim=True) / part.shape[-1] + eps).sqrt()
        for part in v.split(group_size or x.shape[-1], dim=-1)
    ]
    y = torch.cat(pieces, -1) * weight
    y = y if bias is None else y + bias
    return y * gate if norm_before_gate else y


def inputs(*lead, width=12, dtype=torch.float64):
    x, z = torch.randn(2, *lead, width).to(dtype)
    weight, bias = torch.randn(2, width).to(dtype)
    return x, weight, bias, z


MODES = [(None, True), (None, False), (4, True), (4, False), (1, False)]


@pytest.mark.parametrize(("group_size", "before"), MODES)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (3, 0, 2), (7, 1, 3)])
def test_fp64_equals_definition(lead, group_size, before):
    x, weight, bias, z = inputs(*lead)
    for b in (bias, None):
        for gate in (z, None):
            args = (x, weight, b, gate, 1e-5, group_size, before)
            torch.testing.assert_close(rmsnorm_fn(*args), plain(*args), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("group_size", "before"), MODES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_z", [True, False])
def test_gradcheck(group_size, before, with_bias, with_z):
    x, weight, bias, z = inputs(2, 2)
    tensors = [x, weight] + [bias] * with_bias + [z] * with_z

    def fn(x, weight, *rest):
        return rmsnorm_fn(x, weight, rest[0] if with_bias else None, rest[-1] if with_z else None,
                          1e-5, group_size, before)  # fmt: skip

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision(dtype, before):
    """One rounding at the end, forward; float32 inside, backward."""
    x, weight, bias, z = inputs(33, width=96, dtype=dtype)
    dy = torch.randn(33, 96).to(dtype)

    def run(fn, *tensors):
        return lambda *t: fn(*t, 1e-5, 24, before)

    out, got = testing.gradients(run(rmsnorm_fn), [x, weight, bias, z], [dy])
    wide = [t.double() for t in (x, weight, bias, z)]
    exact, want = testing.gradients(run(plain), wide, [dy.double()])
    if dtype != torch.float32:
        error = (out[0].double() - exact[0]).abs()
        # The sum with the bias may cancel, so its float32 noise is measured at the addends' size.
        noise = 64 * torch.finfo(torch.float32).eps * (exact[0].abs() + 4)
        assert (error <= torch.finfo(dtype).eps / 2 * exact[0].abs() + noise).all()
    low = plain(*[t.float() for t in (x, weight, bias, z)], 1e-5, 24, before)
    testing.assert_matches(out[0], exact[0], low.to(dtype))
    for g, w, name in zip(got, want, ("dx", "dweight", "dbias", "dz")):
        assert g.dtype == dtype
        testing.assert_matches(g, w, w.to(dtype), name)


def test_each_tensor_keeps_its_own_dtype():
    x, weight, bias, z = inputs(4, dtype=torch.float32)
    tensors = [x.bfloat16(), weight, bias.half(), z.bfloat16()]
    out, grads = testing.gradients(lambda *t: rmsnorm_fn(*t, 1e-5, 4, False), tensors)
    assert out[0].dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]


@pytest.mark.parametrize("before", [True, False])
def test_any_strides(before):
    projection = torch.randn(5, 7, 300)
    z = projection[..., 3:131]
    weight = torch.randn(256)[::2]
    rows, columns = torch.randn(7, 5, 128).transpose(0, 1), torch.randn(128, 7, 5).permute(2, 1, 0)
    wide, repeated = torch.randn(5, 7, 384)[..., ::3], torch.randn(1, 7, 128).expand(5, 7, 128)
    for x in (rows, columns, wide, repeated):
        strided, dense = [x, weight, z], [t.contiguous() for t in (x, weight, z)]
        fn = lambda x, w, z: rmsnorm_fn(x, w, None, z, 1e-5, 64, before)  # noqa: E731
        assert fn(*strided).is_contiguous() and torch.equal(fn(*strided), fn(*dense))
        dy = torch.randn(7, 5, 128).transpose(0, 1)
        leaves = [t.detach().requires_grad_() for t in strided]
        got = torch.autograd.grad(fn(*leaves), leaves, dy)
        want = testing.gradients(fn, dense, [dy.contiguous()])[1]
        for g, w in zip(got, want):
            assert torch.equal(g, w)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("scale", "gate"), [(0.0, 0.0), (1e-20, 1.0), (1e15, 50.0), (1.0, -1e4)])
def test_extreme_values_stay_finite(scale, gate, before):
    x = torch.full((3, 8), scale, requires_grad=True)
    z = torch.full((3, 8), gate, requires_grad=True)
    y = rmsnorm_fn(x, torch.ones(8), None, z, 1e-5, 4, before)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and z.grad.isfinite().all()


def test_nan_stays_in_its_group():
    x, weight, bias, z = inputs(4, dtype=torch.float32)
    clean = rmsnorm_fn(x, weight, bias, z, 1e-5, 4, False)
    x[2, 5] = torch.nan
    out = rmsnorm_fn(x, weight, bias, z, 1e-5, 4, False)
    hit = torch.zeros(4, 12, dtype=torch.bool)
    hit[2, 4:8] = True
    assert out[hit].isnan().all() and torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("before", [True, False])
def test_a_row_does_not_depend_on_its_batch(before):
    x, weight, bias, z = inputs(31, width=15, dtype=torch.float32)
    dy = torch.randn_like(x)

    def run(rows):
        fn = lambda x, z: rmsnorm_fn(x, weight, bias, z, 1e-5, 5, before)  # noqa: E731
        out, grads = testing.gradients(fn, [x[rows], z[rows]], [dy[rows]])
        return out + grads

    whole = run(slice(None))
    for row in range(31):
        for alone, batched in zip(run([row]), whole):
            assert torch.equal(alone[0], batched[row])


def test_defaults_are_those_of_the_drop_in_name():
    x, weight, bias, z = inputs(3)
    want = plain(x, weight, bias, z, 1e-6, None, True)
    torch.testing.assert_close(rmsnorm_fn(x, weight, bias, z), want, rtol=1e-13, atol=1e-13)


def test_rstd_is_kept_per_group():
    x, weight, bias, z = inputs(3, dtype=torch.bfloat16)
    y, rstd = ref.forward(x, weight, bias, z, 1e-5, 4, False)
    assert rstd.shape == (3, 3) and rstd.dtype == torch.float32 and y.dtype == x.dtype


def test_no_channels():
    assert rmsnorm_fn(torch.ones(3, 0), torch.ones(0), None, torch.ones(3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=None), TypeError, "`x` must be a torch.Tensor"),
        (dict(x=torch.ones(2, 8, dtype=torch.int8)), TypeError, "`x` is torch.int8"),
        (dict(x=torch.tensor(1.0)), ValueError, "`x` needs at least one axis"),
        (dict(weight=None), TypeError, "`weight` must be a torch.Tensor"),
        (dict(weight=torch.ones(7)), ValueError, r"`weight` has shape \(7,\), expected \(D,\)"),
        (dict(bias=torch.ones(8, 1)), ValueError, "`bias` has shape"),
        (dict(bias=torch.ones(8, device="meta")), ValueError, "`bias` is on meta"),
        (dict(z=torch.ones(8)), ValueError, "`z` has shape"),
        (dict(z=torch.ones(2, 8, dtype=torch.bool)), TypeError, "`z` is torch.bool"),
        (dict(eps=-1.0), ValueError, "`eps` must not be negative"),
        (dict(group_size=3), ValueError, r"`group_size` is 3, expected a divisor .* \(8\)"),
        (dict(group_size=0), ValueError, "`group_size` is 0"),
        (dict(group_size=-8), ValueError, "`group_size` is -8"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match="rmsnorm_fn: " + message):
        rmsnorm_fn(**{"x": torch.ones(2, 8), "weight": torch.ones(8), **change})
