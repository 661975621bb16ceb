from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from allocations import kept_beside
from torch.utils.checkpoint import checkpoint

from nemokernels import mamba_split_conv1d_scan_combined as mixer
from nemokernels import rmsnorm_fn
from nemokernels.ops.ssd import projection

HEADS, WIDTH, GROUPS, STATE, TAPS, INNER = 4, 3, 2, 5, 4, 12
CHANNELS = INNER + 2 * GROUPS * STATE
NAMES = ["zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D", "rmsnorm_weight",
         "outproj_weight", "outproj_bias"]  # fmt: skip


def inputs(batch=2, length=9, mlp=0, dtype=torch.float64):
    shapes = [(batch, length, 2 * mlp + INNER + CHANNELS + HEADS), (CHANNELS, TAPS), (CHANNELS,)]
    shapes += [(HEADS,)] * 3 + [(INNER,), (7, mlp + INNER), (7,)]
    made = {n: torch.randn(s, dtype=torch.float64).to(dtype) for n, s in zip(NAMES, shapes)}
    made["A"] = -made["A"].exp()
    return {n: t.requires_grad_() for n, t in made.items()}


def run(args, **options):
    options = {"headdim": WIDTH, "ngroups": GROUPS, "chunk_size": 4, **options}
    return mixer(**{"conv1d_bias": None, **args}, **options)


def dense(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight=None,
          outproj_weight=None, outproj_bias=None, before=True, activation="silu",
          start=None, limit=(0.0, float("inf"))):  # fmt: skip
    """The mixer with the scan as one masked, decayed attention matrix."""
    mlp = (zxbcdt.shape[-1] - INNER - CHANNELS - HEADS) // 2
    up, value, z, xbc, dt = zxbcdt.split([mlp, mlp, INNER, CHANNELS, HEADS], -1)
    xbc = F.conv1d(F.pad(xbc.transpose(1, 2), (TAPS - 1, 0)), conv1d_weight[:, None], conv1d_bias,
                   groups=CHANNELS).transpose(1, 2)  # fmt: skip
    xbc = F.silu(xbc) if activation else xbc
    x, B, C = xbc.split([INNER, GROUPS * STATE, GROUPS * STATE], -1)
    x = x.unflatten(-1, (HEADS, WIDTH))
    B, C = (v.unflatten(-1, (GROUPS, STATE)).repeat_interleave(HEADS // GROUPS, 2) for v in (B, C))
    step = F.softplus(dt + dt_bias).clamp(*limit)
    decay = (step * A).cumsum(1)
    carried = 0 if start is None else torch.einsum("blh,bhpn,blhn->blhp", decay.exp(), start, C)
    mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()[None, :, :, None]
    decay = (decay[:, :, None] - decay[:, None]).masked_fill(~mask, -torch.inf).exp()
    y = torch.einsum("blhn,bshn,blsh,bsh,bshp->blhp", C, B, decay, step, x)
    y = (y + carried + (D[:, None] if D.dim() == 1 else D) * x).flatten(2)
    if rmsnorm_weight is None:
        y = y * F.silu(z)
    else:
        y = y if before else y * F.silu(z)
        grouped = y.unflatten(-1, (GROUPS, -1))
        y = F.rms_norm(grouped, grouped.shape[-1:], eps=1e-6).flatten(2) * rmsnorm_weight
        y = y * F.silu(z) if before else y
    y = torch.cat([F.silu(up) * value, y], -1)
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mlp", [0, 2])
@pytest.mark.parametrize("drop", [(), NAMES[6:], NAMES[7:], ["conv1d_bias", "outproj_bias"]])
@pytest.mark.parametrize("before", [True, False])
def test_equals_dense_formula(mlp, drop, before):
    args = {n: t for n, t in inputs(mlp=mlp).items() if n not in drop}
    got = run(args, norm_before_gate=before)
    want = dense(**{"conv1d_bias": None, **args}, before=before)
    close(got, want)
    grad, leaves = torch.randn_like(got), list(args.values())
    for a, b in zip(*(torch.autograd.grad(o, leaves, grad) for o in (got, want))):
        close(a, b)


def test_head_dimension_from_skip_and_no_activation():
    args = inputs()
    args["D"] = torch.randn(HEADS, WIDTH, dtype=torch.float64)
    close(run(args, headdim=None), dense(**args))
    close(run(args, activation=None), dense(**args, activation=None))


def test_initial_states_and_limits_reach_the_scan():
    args, limit = inputs(), (0.3, 1.2)
    start = torch.randn(2, HEADS, WIDTH, STATE, dtype=torch.float64)
    want = dense(**args, start=start, limit=limit)
    close(run(args, initial_states=start, dt_limit=limit), want)


def test_packed_equals_separate_bit_for_bit():
    args = inputs(batch=1, length=13, dtype=torch.float32)
    bounds = torch.tensor([0, 6, 6, 7, 13]).int()
    start = torch.randn(4, HEADS, WIDTH, STATE)
    options = dict(return_final_states=True, norm_before_gate=False, dt_limit=(0.1, 2.0))
    projection = {n: args.pop(n) for n in NAMES[7:]}
    out, states = run(args, cu_seqlens=bounds, initial_states=start, **options)
    for n, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:])):
        part = {**args, "zxbcdt": args["zxbcdt"][:, lo:hi]}
        alone, state = run(part, initial_states=start[n : n + 1], **options)
        assert torch.equal(out[:, lo:hi], alone) and torch.equal(states[n : n + 1], state)
    projected = run({**args, **projection}, cu_seqlens=bounds, initial_states=start, **options)[0]
    assert torch.equal(projected, F.linear(out, *projection.values()))


def test_seq_idx_reaches_convolution_and_scan():
    args = inputs(batch=1, length=13)
    seq_idx = torch.tensor([[0] * 6 + [1] * 5 + [-1] * 2]).int()
    out, state = run(args, seq_idx=seq_idx, return_final_states=True)
    for part in (slice(0, 6), slice(6, 11)):
        want = dense(**{**args, "zxbcdt": args["zxbcdt"][:, part]})
        close(out[:, part], want)
    alone = run({**args, "zxbcdt": args["zxbcdt"][:, 6:11]}, return_final_states=True)[1]
    close(state, alone)
    close(out[0, 11:], args["outproj_bias"].expand(2, -1))


@pytest.mark.parametrize("before", [True, False])
def test_a_norm_of_the_callers(before):
    """It sees the scan's output by heads and the gate; what it returns comes out."""
    args = {n: t for n, t in inputs().items() if not n.startswith("outproj")}
    weight = args.pop("rmsnorm_weight")

    def norm(y, z):
        assert y.shape == (2, 9, HEADS, WIDTH) and z.shape == (2, 9, INNER)
        y = y.flatten(2)
        return ("normed", rmsnorm_fn(y, weight, z=z, group_size=6, norm_before_gate=before))

    (word, got), state = run(args, norm=norm, return_final_states=True)
    want, want_state = run({**args, "rmsnorm_weight": weight}, norm_before_gate=before,
                           return_final_states=True)  # fmt: skip
    assert word == "normed" and torch.equal(got, want) and torch.equal(state, want_state)
    assert torch.equal(run(args, norm=norm)[1], want)


def test_state_dtype_reaches_the_scan():
    args = inputs(dtype=torch.float32)
    low = run(args, state_dtype=torch.bfloat16)
    assert torch.equal(run(args, state_dtype=torch.float32), run(args)) and (low != run(args)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_autocast(dtype):
    args = inputs(dtype=dtype)
    assert run(args).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert run(args).dtype == torch.bfloat16


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_rows(length):
    args = inputs(length=length)
    out, states = run(args, return_final_states=True)
    assert out.shape == (2, length, 7) and states.shape == (2, HEADS, WIDTH, STATE)
    if length:
        close(out, dense(**args))


@pytest.mark.parametrize("cast", [False, True])
def test_compiles_to_one_graph(cast):
    torch.compiler.reset()
    args = inputs(batch=1, dtype=torch.float32)
    bounds = torch.tensor([0, 4, 9]).int()

    def fn(a):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return run(a, cu_seqlens=bounds, norm_before_gate=False)

    want = torch.autograd.grad(fn(args).sum(), list(args.values()))
    out = torch.compile(fn, fullgraph=True, backend="aot_eager")(args)
    got = torch.autograd.grad(out.sum(), list(args.values()))
    assert torch.equal(out, fn(args)) and all(torch.equal(a, b) for a, b in zip(got, want))


def kept_by(args, **options):
    return kept_beside(args.values(), lambda: run(args, norm_before_gate=False, **options))


@pytest.mark.parametrize("gated_by", ["norm", "norm, then projection", "scan"])
def test_keeps_no_more_than_it_says(gated_by):
    """Beside views of zxbcdt and the parameters: the scan's output, once."""
    args = inputs(batch=2, length=40, dtype=torch.float32)
    if gated_by == "scan":
        del args["rmsnorm_weight"]
    if "projection" not in gated_by:
        args = {n: t for n, t in args.items() if not n.startswith("outproj")}
    scanned = 2 * 40 * INNER * 4
    statistics = 2 * 40 * GROUPS * 4 if "norm" in gated_by else 0
    assert scanned <= kept_by(args) <= scanned + statistics


def test_a_projection_keeps_of_an_mlp_what_the_mlp_keeps():
    args = inputs(batch=2, length=40, mlp=5, dtype=torch.float32)
    activated = 2 * 40 * 5 * 4  # silu(gate), and its product with the value
    scanned, statistics = 2 * 40 * INNER * 4, 2 * 40 * GROUPS * 4
    assert kept_by(args) <= scanned + statistics + 2 * activated


@pytest.mark.parametrize("mlp", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("without", [(), ("outproj_bias",)])
def test_projection_equals_linear_bit_for_bit(mlp, dtype, cast, without):
    """Its gradients too, though it reads what it has not kept."""
    args = {n: t for n, t in inputs(mlp=mlp, dtype=dtype).items() if n not in without}
    before = {n: t for n, t in args.items() if not n.startswith("outproj")}
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        got = run(args, norm_before_gate=False)
        y = run(before, norm_before_gate=False)
        want = F.linear(y, args["outproj_weight"], args.get("outproj_bias"))
    grad, leaves = torch.randn_like(got), list(args.values())
    assert torch.equal(got, want)
    pairs = zip(*(torch.autograd.grad(o, leaves, grad) for o in (got, want)))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("wanted", [*NAMES, ""])
def test_gradient_of_one_argument_alone(wanted):
    """The others are frozen."""
    args = {n: t.detach() for n, t in inputs(mlp=2).items()}
    out = run(args)
    assert not out.requires_grad
    if wanted:
        args[wanted].requires_grad_()
        got, want = run(args), dense(**args)
        grad = torch.randn_like(got)
        close(*(torch.autograd.grad(o, args[wanted], grad)[0] for o in (got, want)))


def test_a_frozen_projection_normalises_once():
    args = inputs()
    args["outproj_weight"].requires_grad_(False)
    out = run(args)
    with mock.patch.object(projection.gated_norm, "gated_rms_norm", side_effect=AssertionError):
        out.sum().backward()
    assert args["zxbcdt"].grad is not None and args["outproj_bias"].grad is not None


def test_runs_again_in_the_backward():
    """Under torch.utils.checkpoint, which hands out what was saved once."""
    args = inputs(mlp=2)
    leaves = list(args.values())
    out = checkpoint(lambda *a: run(dict(zip(args, a))), *leaves, use_reentrant=False)
    grad = torch.randn_like(out)
    pairs = zip(*(torch.autograd.grad(o, leaves, grad) for o in (out, run(args))))
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("without", [(), ("rmsnorm_weight",)])
def test_the_result_may_be_changed_in_place(without):
    args = {n: t for n, t in inputs().items() if n not in (*without, *NAMES[-2:])}
    leaves = list(args.values())
    grads = [torch.autograd.grad(out.mul_(3) if in_place else 3 * out, leaves, torch.ones_like(out))
             for in_place, out in ((True, run(args)), (False, run(args)))]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_double_backward_raises():
    args = inputs()
    grads = torch.autograd.grad(run(args).square().sum(), list(args.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in grads).backward()
