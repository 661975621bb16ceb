"""mamba_inner_fn against one token after the other."""

import pytest
import torch
import torch.nn.functional as F

from nemokernels import mamba_inner_fn, testing

F64 = torch.float64
DIM, N, RANK, WIDTH = 4, 3, 2, 5


def inputs(batch=2, length=6, taps=4, dtype=F64):
    shapes = dict(
        xz=(batch, 2 * DIM, length), conv1d_weight=(DIM, 1, taps), conv1d_bias=(DIM,),
        x_proj_weight=(RANK + 2 * N, DIM), delta_proj_weight=(DIM, RANK),
        out_proj_weight=(WIDTH, DIM), out_proj_bias=(WIDTH,), A=(DIM, N), D=(DIM,),
        delta_bias=(DIM,), B_proj_bias=(N,), C_proj_bias=(N,), b_rms_weight=(N,),
        c_rms_weight=(N,), dt_rms_weight=(DIM,),
    )  # fmt: skip
    made = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return {**made, "A": -made["A"].exp()}


def normed(s, weight, eps):
    return s / (s.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def by_token(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight,
             out_proj_weight, out_proj_bias, A, B=None, C=None, D=None, delta_bias=None,
             B_proj_bias=0, C_proj_bias=0, delta_softplus=True, b_rms_weight=None,
             c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6):  # fmt: skip
    """One token after the other; torch's own convolution."""
    x, z = xz[:, :DIM], xz[:, DIM:]
    taps, state, outs = conv1d_weight.shape[-1], 0, []
    x = F.silu(F.conv1d(F.pad(x, (taps - 1, 0)), conv1d_weight, conv1d_bias, groups=DIM))
    for t in range(x.shape[2]):
        row = x[:, :, t] @ x_proj_weight.T
        steps, row = row[:, :RANK] @ delta_proj_weight.T, row[:, RANK:]
        b = row[:, :N] + B_proj_bias if B is None else B[:, :, t]
        c = row[:, row.shape[1] - N :] + C_proj_bias if C is None else C[:, :, t]
        eps = b_c_dt_rms_eps
        b, c, steps = (
            v if w is None else normed(v, w, eps)
            for v, w in ((b, b_rms_weight), (c, c_rms_weight), (steps, dt_rms_weight))
        )
        steps = steps if delta_bias is None else steps + delta_bias
        steps = F.softplus(steps) if delta_softplus else steps
        state = torch.exp(steps[:, :, None] * A) * state + (
            (steps * x[:, :, t])[:, :, None] * b[:, None]
        )
        y = (state * c[:, None]).sum(-1)
        y = y if D is None else y + D * x[:, :, t]
        outs.append((y * F.silu(z[:, :, t])) @ out_proj_weight.T)
    out = torch.stack(outs, 1)
    return out if out_proj_bias is None else out + out_proj_bias


NORMS = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")
OPTIONAL = ("conv1d_bias", "out_proj_bias", "D", "delta_bias", "B_proj_bias", "C_proj_bias")


@pytest.mark.parametrize("without", [(), NORMS, (*NORMS, *OPTIONAL)])
@pytest.mark.parametrize("options", [{}, dict(delta_softplus=False), dict(b_c_dt_rms_eps=0.5)])
def test_equals_the_recurrence(without, options):
    args = {k: v for k, v in inputs().items() if k not in without}
    absent = {k: None for k in ("conv1d_bias", "out_proj_bias") if k in without}
    names, grads = list(args), [torch.randn(2, 6, WIDTH, dtype=F64)]

    def run(fn):
        def call(*leaves):
            return fn(**dict(zip(names, leaves)), **absent, **options)

        outs, found = testing.gradients(call, list(args.values()), grads)
        return [*outs, *found]

    for got, want in zip(run(mamba_inner_fn), run(by_token), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("given", ["B", "C", "BC"])
def test_b_and_c_of_the_callers(given):
    """Their rows of the projection are not there; norms apply to them too."""
    args = inputs()
    args["x_proj_weight"] = args["x_proj_weight"][: RANK + (2 - len(given)) * N]
    for name in given:
        args[name] = torch.randn(2, N, 6, dtype=F64)
        del args[f"{name}_proj_bias"]
    torch.testing.assert_close(mamba_inner_fn(**args), by_token(**args), rtol=1e-10, atol=1e-10)
    by_group = {name: args[name][:, None] for name in given}
    assert torch.equal(mamba_inner_fn(**{**args, **by_group}), mamba_inner_fn(**args))


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("sizes", [(0, 3), (2, 0), (1, 1)])
def test_sizes(sizes, level):
    args = inputs(*sizes, taps=2)
    out = mamba_inner_fn(**args, checkpoint_lvl=level)
    assert out.shape == (*sizes, WIDTH)
    if out.numel():
        torch.testing.assert_close(out, by_token(**args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    args = inputs(length=16, dtype=dtype)
    wide = {k: v.double() for k, v in args.items()}
    low = by_token(**args)
    testing.assert_matches(mamba_inner_fn(**args), by_token(**wide), low.to(dtype))


def test_projected_biases_are_rounded_like_what_they_are_added_to():
    args = inputs(dtype=torch.bfloat16)
    biases = {k: torch.randn(N) for k in ("B_proj_bias", "C_proj_bias")}
    rounded = {k: v.bfloat16() for k, v in biases.items()}
    assert torch.equal(mamba_inner_fn(**{**args, **biases}), mamba_inner_fn(**{**args, **rounded}))


def test_autocast_takes_float32_projections():
    args = inputs(dtype=torch.float32)
    projections = {k for k in args if k.startswith(("x_proj", "delta_proj", "out_proj"))}
    low = {k: v.bfloat16() if k in projections else v for k, v in args.items()}
    low["xz"] = args["xz"] = args["xz"].bfloat16()
    want = mamba_inner_fn(**low)
    with torch.autocast("cpu", torch.bfloat16):
        got = mamba_inner_fn(**args)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_compiles_to_one_graph():
    torch.compiler.reset()
    names, grads = list(inputs()), []
    args = inputs(dtype=torch.float32)

    def loss(*leaves):
        return mamba_inner_fn(**dict(zip(names, leaves))).square().sum()

    for fn in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [v.clone().requires_grad_() for v in args.values()]
        fn(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *grads))


BAD = [
    (dict(xz=torch.ones(2, 7, 6)), ValueError, "`xz` has 7 channels, expected an even number"),
    (dict(xz=torch.ones(2, 8)), ValueError, "`xz` has shape"),
    (dict(A=-torch.ones(4, 3).cfloat()), TypeError, "`A` is torch.complex64"),
    (dict(A=-torch.ones(3, 3)), ValueError, "`A` has shape"),
    (dict(conv1d_weight=torch.ones(4, 4)), ValueError, "`conv1d_weight` has shape"),
    (dict(x_proj_weight=torch.ones(9, 4)), ValueError, r"`x_proj_weight` has shape \(9, 4\)"),
    (dict(x_proj_weight=torch.ones(8, 4).half()), TypeError,
     "`x_proj_weight` is torch.float16, expected torch.float32 like `xz`"),
    (dict(delta_proj_weight=torch.ones(5, 2)), ValueError, "`delta_proj_weight` has shape"),
    (dict(delta_proj_weight=torch.ones(4, 3)), ValueError, "`x_proj_weight` has shape"),
    (dict(out_proj_weight=torch.ones(5, 3)), ValueError, "`out_proj_weight` has shape"),
    (dict(out_proj_weight=torch.ones(5, 4, device="meta")), ValueError, "`out_proj_weight` is on"),
    (dict(out_proj_bias=torch.ones(4)), ValueError, "`out_proj_bias` has shape"),
    (dict(conv1d_bias=torch.ones(3)), ValueError, "`conv1d_bias` has shape"),
    (dict(D=torch.ones(3)), ValueError, "`D` has shape"),
    (dict(delta_bias=torch.ones(4, 1)), ValueError, "`delta_bias` has shape"),
    (dict(b_rms_weight=torch.ones(4)), ValueError, "`b_rms_weight` has shape"),
    (dict(c_rms_weight=[1.0]), TypeError, "`c_rms_weight` must be a torch.Tensor"),
    (dict(dt_rms_weight=torch.ones(2)), ValueError, "`dt_rms_weight` has shape"),
    (dict(B_proj_bias=torch.ones(2)), ValueError, "`B_proj_bias` has shape"),
    (dict(C_proj_bias=torch.ones(3, device="meta")), ValueError, "`C_proj_bias` is on meta"),
    (dict(C=torch.ones(2, 3, 6), x_proj_weight=torch.ones(5, 4), C_proj_bias=torch.ones(3)),
     ValueError, "`C_proj_bias` is of no use where `C` is given"),
    (dict(checkpoint_lvl=2), ValueError, "`checkpoint_lvl` must be 0 or 1, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    optional = {*NORMS, *OPTIONAL} - {"conv1d_bias", "out_proj_bias"}
    good = {k: v for k, v in inputs(dtype=torch.float32).items() if k not in optional}
    with pytest.raises(error, match=f"mamba_inner_fn: {message}"):
        mamba_inner_fn(**{**good, **change})
