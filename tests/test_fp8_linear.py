import ml_dtypes
import numpy as np
import pytest
import torch

from nemokernels import (
    cast_fp8_weight,
    current_scale,
    delayed_scaling_update,
    fp8_linear,
    fp8_products,
    relu2,
    testing,
)

KINDS = {
    "e4m3": (ml_dtypes.float8_e4m3fn, np.float32(448)),
    "e5m2": (ml_dtypes.float8_e5m2, np.float32(57344)),
}


def fake_quantized(x, scale, format):
    """The value of x after 8 bits, float64: rounding by ml_dtypes, scale divided out exactly."""
    kind, limit = KINDS[format]
    values = x.detach().float().numpy()
    amax = np.abs(values).max(initial=0)
    if scale is None:
        scale = limit / amax if amax else np.float32(1)
    codes = np.clip(values * np.float32(scale), -limit, limit).astype(kind)
    inverse = np.float32(1) / np.float32(scale)
    return torch.from_numpy(codes.astype(np.float64)) * float(inverse)


def plain(x, weight, bias, dy, scales=(None, None, None), grad_format="e5m2"):
    """y, dx, dweight, dbias in float64: one dense product of quantised operands each."""
    k, n = weight.shape[1], weight.shape[0]
    xq = fake_quantized(x.reshape(-1, k), scales[0], "e4m3")
    wq = fake_quantized(weight, scales[1], "e4m3")
    dyq = fake_quantized(dy.reshape(-1, n), scales[2], grad_format)
    y = torch.einsum("mk,nk->mn", xq, wq) + (0 if bias is None else bias.detach().double())
    dx, dw = torch.einsum("mn,nk->mk", dyq, wq), torch.einsum("mn,mk->nk", dyq, xq)
    return y.reshape(dy.shape), dx.reshape(x.shape), dw, dy.reshape(-1, n).double().sum(0)


def low(x, weight, bias, dy, scales=(None, None, None), grad_format="e5m2"):
    """The same in the dtype of x: operands dequantised to float32, one cast at the end."""
    exact = plain(x, weight, bias, dy, scales, grad_format)
    k, n = weight.shape[1], weight.shape[0]
    xq = fake_quantized(x.reshape(-1, k), scales[0], "e4m3").float()
    wq = fake_quantized(weight, scales[1], "e4m3").float()
    dyq = fake_quantized(dy.reshape(-1, n), scales[2], grad_format).float()
    y = xq @ wq.t() + (0 if bias is None else bias.detach().float())
    outs = (y, dyq @ wq, dyq.t() @ xq, dy.reshape(-1, n).float().sum(0))
    kinds = (x.dtype, x.dtype, weight.dtype, weight.dtype)
    return [o.reshape(e.shape).to(kind) for o, e, kind in zip(outs, exact, kinds)]


def run(x, weight, bias, dy, **options):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = fp8_linear(*leaves, **options)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def sample(m, n, k, dtype):
    x, weight = torch.randn(m, k).to(dtype), (torch.randn(n, k) / 8).to(dtype)
    return x, weight, torch.randn(n).to(dtype), (torch.randn(m, n) * 1e-3).to(dtype)


def as_scales(values):
    names = ("x_scale", "w_scale", "dy_scale")
    return {n: torch.tensor([v]) for n, v in zip(names, values) if v is not None}


CASES = [(None, None, None), (50.0, 300.0, 1e6), (None, 7.0, None), (1e4, 1.0, 3.0)]


@pytest.mark.parametrize("scales", CASES)
@pytest.mark.parametrize("grad_format", KINDS)
@pytest.mark.parametrize("shape", [(16, 32, 64), (7, 5, 33), (1, 1, 1)])
def test_fp64_equals_dense_products_of_quantised_operands(shape, grad_format, scales):
    args = sample(*shape, torch.float64)
    got = run(*args, grad_format=grad_format, **as_scales(scales))
    want = plain(*args, scales, grad_format)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", CASES[:2])
def test_low_precision(dtype, scales):
    args = sample(40, 24, 96, dtype)
    got = run(*args, **as_scales(scales))
    names = ("y", "dx", "dweight", "dbias")
    for g, w, l, name in zip(got, plain(*args, scales), low(*args, scales), names):
        assert g.dtype == dtype
        testing.assert_matches(g, w, l, name)


def test_quantisation_is_the_identity_in_the_gradient():
    """On operands that 8 bits hold exactly, everything equals torch's own linear layer."""
    x = torch.randint(-8, 9, (6, 12)).double()
    weight = torch.randint(-8, 9, (5, 12)).double() / 8
    bias, dy = torch.randn(5).double(), 2.0 ** torch.randint(-6, 7, (6, 5)).double()
    got = run(x, weight, bias, dy, **as_scales((1.0, 8.0, 4.0)))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = torch.nn.functional.linear(*leaves)
    for g, w in zip(got, [y, *torch.autograd.grad(y, leaves, dy)]):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_gradients_use_the_format_asked_for():
    """3.25 survives E4M3 (3 mantissa bits) and not E5M2 (2 bits)."""
    x, weight, dy = torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), 3.25)
    for grad_format, want in (("e4m3", 3.25), ("e5m2", 3.0)):
        scales = as_scales((1.0, 1.0, 1.0))
        _, dx, dw = run(x, weight, None, dy, grad_format=grad_format, **scales)
        assert dx.item() == dw.item() == want


def test_scale_of_a_gradient_fits_its_format():
    """E5M2 reaches 2**-31 below its largest value; a scale made for E4M3 would lose the tail."""
    x, weight, one = torch.ones(1, 1), torch.ones(2, 1), torch.ones(1)
    dy = torch.tensor([[1.0, 2.0**-28]])
    _, _, dw = run(x, weight, None, dy, x_scale=one, w_scale=one)
    assert dw[1].item() == pytest.approx(2.0**-28, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_is_added_before_the_one_rounding(dtype):
    x, weight = torch.randint(-8, 9, (64, 12)).to(dtype), torch.randint(-8, 9, (32, 12)).to(dtype)
    bias, scales = torch.randn(32) * 7, as_scales((1.0, 1.0, 1.0))
    want = (x.float() @ weight.float().t() + bias).to(dtype)
    assert torch.equal(fp8_linear(x, weight, bias, **scales), want)
    assert not torch.equal(fp8_linear(x, weight, **scales) + bias.to(dtype), want)


def test_each_input_alone_can_need_a_gradient():
    x, weight, bias, dy = sample(6, 5, 8, torch.float32)
    _, dx, dw, db = run(x, weight, bias, dy)
    for which, want in enumerate((dx, dw, db)):
        leaves = [t.clone().requires_grad_(i == which) for i, t in enumerate((x, weight, bias))]
        (got,) = torch.autograd.grad(fp8_linear(*leaves), leaves[which], dy)
        assert torch.equal(got, want)
    with torch.no_grad():
        assert not fp8_linear(x.requires_grad_(), weight).requires_grad


def test_operator_refuses_a_gradient_it_kept_nothing_for():
    x, weight, _, dy = sample(6, 5, 8, torch.float32)
    codes, scale, nothing = torch.ones(5, 8).byte(), torch.ones(1), torch.ones(0, 0).byte()
    rest = (None, None, None, torch.float8_e5m2, False, "")
    operands = (torch.ones(6, 8).byte(), nothing, scale, codes, nothing, scale)
    for grads, name in (((True, False), "x"), ((False, True), "weight")):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((x, weight), grads)]
        with pytest.raises(RuntimeError, match=f"`{name}` needs a gradient, its operand was not"):
            torch.ops.nemokernels.fp8_product(*leaves, None, *operands, *rest)


def test_amaxes_reach_their_slots():
    x, weight, _, dy = sample(6, 5, 8, torch.float32)
    history = torch.zeros(2, 4, 3)
    slots = dict(zip(("x_amax", "w_amax", "dy_amax"), history[0, 0]))
    run(x, weight, None, dy, **slots)
    want = torch.stack([t.abs().max() for t in (x, weight, dy)])
    assert torch.equal(history[0, 0], want)
    run(x * 0.5, weight * 2, None, dy * 0.5, **slots)
    assert torch.equal(history[0, 0], want * torch.tensor([1.0, 2.0, 1.0]))
    assert not history[0, 1:].any() and not history[1].any()


def test_nothing_is_written_under_no_grad():
    x, weight, _, dy = sample(6, 5, 8, torch.float32)
    slots = dict(zip(("x_amax", "w_amax", "dy_amax"), torch.zeros(3)))
    with torch.no_grad():
        fp8_linear(x, weight, **slots)
    assert not any(slots.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_relu_equals_the_op_before_it(dtype):
    x, weight, bias, dy = sample(7, 5, 8, dtype)
    for scales in ({}, as_scales(CASES[1])):
        slots = [dict(x_amax=torch.zeros(1)) for _ in range(2)]
        got = run(x, weight, bias, dy, squared_relu=True, **scales, **slots[0])
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = fp8_linear(relu2(leaves[0]), *leaves[1:], **scales, **slots[1])
        for g, w in zip(got, [y, *torch.autograd.grad(y, leaves, dy)]):
            assert torch.equal(g, w)
        assert slots[0] == slots[1] and slots[0]["x_amax"] == relu2(x).amax()


def test_weight_cast_before():
    x, weight, bias, dy = sample(7, 5, 8, torch.bfloat16)
    for scale in (None, torch.tensor([30.0])):
        slot, unread = torch.zeros(1), torch.zeros(1)
        codes = cast_fp8_weight(weight, scale, slot)
        assert slot == weight.abs().amax()
        got = run(x, torch.full_like(weight, torch.nan), bias, dy, weight_codes=codes,
                  w_amax=unread)  # fmt: skip
        for g, w in zip(got, run(x, weight, bias, dy, w_scale=scale)):
            assert torch.equal(g, w)
        assert unread == 0
    codes = cast_fp8_weight(weight, transpose=False)
    assert torch.equal(fp8_linear(x, weight, weight_codes=codes), fp8_linear(x, weight))
    with pytest.raises(ValueError, match="`weight_codes` has shape .*which the gradient needs"):
        fp8_linear(x.requires_grad_(), weight, weight_codes=codes)


def test_main_gradient_accumulates_in_its_own_dtype():
    x, weight, _, dy = sample(7, 5, 8, torch.bfloat16)
    start = torch.randn(5, 8)
    main, weight = start.clone(), weight.requires_grad_()
    for _ in range(2):
        fp8_linear(x, weight, main_grad=main).backward(dy)
    assert weight.grad is None
    exact = plain(x.detach(), weight, None, dy)[2]
    _, _, wide = run(x.float(), weight.detach().float(), None, dy.float())
    testing.assert_matches(main, start.double() + 2 * exact, start + 2 * wide)


def test_ledger_tells_which_products_ran():
    x, weight, _, dy = sample(6, 5, 8, torch.float32)
    y = fp8_linear(x.requires_grad_(), weight, layer="ledger test")
    assert fp8_products("ledger test") == {"forward": "reference"}
    y.backward(dy)
    assert fp8_products("ledger test") == {"forward": "reference", "dgrad": "reference"}
    fp8_linear(x.detach(), weight.requires_grad_(), layer="ledger test").backward(dy)
    assert fp8_products("ledger test").keys() == {"forward", "dgrad", "wgrad"}
    assert fp8_products("another") == {} == fp8_products("")


def test_two_forwards_before_their_backwards_share_a_slot():
    x, weight, _, dy = sample(6, 5, 8, torch.float32)
    slot = torch.zeros(1)
    x.requires_grad_()
    a, b = (fp8_linear(x, weight, dy_amax=slot) for _ in range(2))
    b.backward(dy)
    a.backward(dy * 3)
    assert slot == (dy * 3).abs().max()


def test_delayed_scaling_settles_on_the_current_scale():
    x, weight, _, dy = sample(20, 12, 16, torch.float32)
    fwd, fwd_history = torch.ones(2), torch.zeros(3, 2)
    bwd, bwd_history = torch.ones(1), torch.zeros(3, 1)
    for _ in range(2):
        got = run(x, weight, None, dy, x_scale=fwd[:1], w_scale=fwd[1:], dy_scale=bwd,
                  x_amax=fwd_history[0, 0], w_amax=fwd_history[0, 1],
                  dy_amax=bwd_history[0])  # fmt: skip
        delayed_scaling_update(fwd, fwd_history)
        delayed_scaling_update(bwd, bwd_history, format="e5m2")
    assert torch.equal(fwd, torch.stack([current_scale(x), current_scale(weight)]))
    assert torch.equal(bwd[0], current_scale(dy, format="e5m2"))
    for g, w in zip(got, run(x, weight, None, dy)):
        assert torch.equal(g, w)


def test_backward_reads_the_scale_as_it_then_is():
    x, weight, dy = torch.ones(1, 1), torch.ones(1, 1, requires_grad=True), torch.full((1, 1), 1.0)
    dy_scale = torch.ones(1)
    y = fp8_linear(x, weight, x_scale=torch.ones(1), dy_scale=dy_scale)
    dy_scale.fill_(2.0**20)
    y.backward(dy)
    assert weight.grad.item() == 57344 / 2.0**20


def test_compiled_with_slots():
    def step(x, weight, forward, backward):
        return fp8_linear(x, weight, x_amax=forward[0], w_amax=forward[1], dy_amax=backward)

    x, weight, _, dy = sample(6, 5, 8, torch.float32)
    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves, slots = (
            [x.clone().requires_grad_(), weight.clone().requires_grad_()],
            torch.zeros(2),
        )
        dy_slot = torch.zeros(())
        for factor in (1.0, 3.0):
            y = fn(*leaves, slots, dy_slot)
            grads = torch.autograd.grad(y, leaves, dy * factor)
        results.append([y, *grads, slots, dy_slot])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert results[1][-1] == (dy * 3).abs().max()


def test_any_strides_and_leading_axes():
    x = torch.randn(4, 3, 16).permute(1, 0, 2)
    weight = torch.randn(16, 6).t()
    dy = torch.randn(6, 3, 4).permute(1, 2, 0)
    got = run(x, weight, None, dy)
    want = run(x.contiguous(), weight.contiguous(), None, dy.contiguous())
    for g, w in zip(got, want):
        assert g.is_contiguous() and torch.equal(g, w)
    assert got[0].shape == (3, 4, 6)
    assert torch.equal(fp8_linear(x[0, 0], weight), fp8_linear(x[:1, :1], weight)[0, 0])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 8), (4, 0, 8), (4, 5, 0), (0, 0, 0)])
def test_zero_sizes(m, n, k):
    y, dx, dw, db = run(*sample(m, n, k, torch.float32))
    assert (y.shape, dx.shape, dw.shape, db.shape) == ((m, n), (m, k), (n, k), (n,))
    assert not dx.any() and not dw.any()


def test_mixed_dtypes_and_autocast():
    x, weight, bias, dy = sample(6, 5, 8, torch.float32)
    y, dx, dw, db = run(x.bfloat16(), weight, bias.half(), dy.bfloat16())
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (
        torch.bfloat16, torch.bfloat16, torch.float32, torch.float16)  # fmt: skip
    plain = fp8_linear(x.bfloat16(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp8_linear(x, weight), plain)


def test_tiny_gradients_survive():
    """Gradients far below the range of any 16-bit format come through the scale."""
    x, weight, bias, dy = sample(6, 5, 8, torch.float32)
    _, dx, dw, _ = run(x, weight, bias, dy * 2.0**-80)
    _, want_dx, want_dw, _ = run(x, weight, bias, dy)
    assert torch.equal(dx * 2.0**80, want_dx) and torch.equal(dw * 2.0**80, want_dw)


def test_nan_row_does_not_spread():
    x, weight, bias, dy = sample(6, 5, 8, torch.float32)
    clean = run(x, weight, bias, dy)
    x[2, 3] = torch.nan
    y, dx, dw, _ = run(x, weight, bias, dy)
    rows = [0, 1, 3, 4, 5]
    scale_moved = current_scale(x) != current_scale(torch.nan_to_num(x))
    assert not scale_moved and y[2].isnan().all() and torch.equal(dx, clean[1])
    assert y[rows].isfinite().all() and dw[:, 3].isnan().all() and dw[:, :3].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "`x` must be a torch.Tensor"),
        (dict(x=torch.ones(2, 8, dtype=torch.int64)), TypeError, "`x` is torch.int64"),
        (dict(x=torch.tensor(1.0)), ValueError, "`x` needs at least one axis"),
        (dict(weight=torch.ones(4, 7)), ValueError, r"`weight` has shape \(4, 7\), exp"),
        (dict(weight=torch.ones(4, 8, device="meta")), ValueError, "`weight` is on meta"),
        (dict(bias=torch.ones(5)), ValueError, "`bias` has shape"),
        (dict(x_scale=2.0), TypeError, "`x_scale` must be a torch.Tensor"),
        (dict(w_scale=torch.ones(4)), ValueError, "`w_scale` has shape"),
        (dict(dy_scale=torch.ones(1).half()), TypeError, "`dy_scale` is torch.float16"),
        (dict(dy_amax=torch.ones(1, requires_grad=True)), ValueError, "`dy_amax` requires a grad"),
        (dict(x_amax=torch.ones(2)), ValueError, "`x_amax` has shape"),
        (dict(dy_scale=torch.tensor(0.0)), ValueError, "`dy_scale` is 0.0, expected a positive"),
        (dict(x_scale=torch.tensor(torch.nan)), ValueError, "`x_scale` is nan"),
        (dict(w_scale=torch.tensor(torch.inf)), ValueError, "`w_scale` is inf"),
        (dict(main_grad=torch.ones(8, 4)), ValueError, "`main_grad` has shape"),
        (dict(grad_format="hybrid"), ValueError, "`grad_format` is 'hybrid'"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        fp8_linear(**{"x": torch.ones(2, 8), "weight": torch.ones(4, 8), **change})
