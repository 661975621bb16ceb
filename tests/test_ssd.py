import pytest
import torch
import torch.nn.functional as F

from nemokernels import mamba_chunk_scan_combined as scan
from nemokernels import testing

INF = float("inf")


def recurrence(x, step, log_decay, B, C, D=None, z=None, start=None, seq_idx=None):
    """The definition, one token at a time; ``d`` and ``d * A`` are separate arguments.

    A row's state is cleared where a new id begins (0 came before the row); padding is passed over.
    """
    (batch, length, heads, width), (groups, state) = x.shape, B.shape[2:]
    S = x.new_zeros(batch, heads, width, state) if start is None else start
    current = torch.zeros(batch, dtype=torch.int32)
    rows = []
    for t in range(length):
        b, c = (v[:, t].repeat_interleave(heads // groups, 1)[:, :, None] for v in (B, C))
        new = log_decay[:, t].exp()[..., None, None] * S
        real = torch.ones(batch, dtype=torch.bool)
        if seq_idx is not None:
            real = seq_idx[:, t] >= 0
            changed = (seq_idx[:, t] != current) & real
            current = torch.where(real, seq_idx[:, t], current)
            new = torch.where(changed[:, None, None, None], 0.0, new)
        new = new + (step[:, t, :, None] * x[:, t])[..., None] * b
        S = torch.where(real[:, None, None, None], new, S)
        y = (S * c).sum(-1)
        if D is not None:
            y = y + (D[:, None] if D.dim() == 1 else D) * x[:, t]
        if z is not None:
            y = y * F.silu(z[:, t])
        rows.append(torch.where(real[:, None, None], y, 0.0))
    return torch.stack(rows, 1) if rows else x.clone(), S


def plain(x, dt, A, B, C, D=None, z=None, dt_bias=None, start=None, seq_idx=None, softplus=True,
          limit=(0.0, INF)):  # fmt: skip
    step = dt if dt_bias is None else dt + dt_bias
    step = (F.softplus(step) if softplus else step).clamp(*limit)
    return recurrence(x, step, step * A, B, C, D, z, start, seq_idx)


def inputs(batch=2, length=13, heads=4, width=3, groups=2, state=5, rows=None, dtype=torch.float64):
    """x, dt, A, B, C, D, z, dt_bias, initial_states."""
    shapes = [(batch, length, heads, width), (batch, length, heads), (heads,)]
    shapes += [(batch, length, groups, state)] * 2 + [(heads,), shapes[0], (heads,)]
    shapes.append((batch if rows is None else rows, heads, width, state))
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    made[2] = -made[2].exp()
    return [m.to(dtype).requires_grad_() for m in made]


def ours(x, dt, A, B, C, D=None, z=None, dt_bias=None, start=None, chunk=4, **options):
    options = {"dt_softplus": True, "return_final_states": True, **options}
    return scan(x, dt, A, B, C, chunk, D=D, z=z, dt_bias=dt_bias, initial_states=start, **options)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize(
    "shape",
    [dict(length=1), dict(length=8), dict(length=33, groups=1), dict(batch=1, groups=4),
     dict(heads=2, width=64, state=128), dict(heads=2, width=80, state=256, length=5)],
)  # fmt: skip
def test_fp64_equals_recurrence(shape, chunk):
    args = inputs(**shape)
    for got, want in zip(ours(*args, chunk=chunk), plain(*args)):
        close(got, want)


@pytest.mark.parametrize(
    ("drop", "options"),
    [((5, 6, 7, 8), {}), ((6,), dict(dt_limit=(0.3, 1.2))), ((5, 7), dict(dt_softplus=False))],
)
def test_fp64_without_optional_inputs(drop, options):
    args = [None if i in drop else a for i, a in enumerate(inputs())]
    outs = ours(*args, **options), plain(*args, softplus=options.get("dt_softplus", True),
                                         limit=options.get("dt_limit", (0, INF)))  # fmt: skip
    leaves = [a for a in args if a is not None]
    grads = [torch.autograd.grad([(o * o).sum() for o in out], leaves) for out in outs]
    for a, b in zip((*outs[0], *grads[0]), (*outs[1], *grads[1])):
        close(a, b)


def test_softplus_is_the_identity_above_20():
    args = inputs(length=8)
    args[7] = None
    steps = torch.tensor([-60.0, -5, 0, 6, 15, 19.9, 20.1, 60], dtype=torch.float64)
    args[1] = steps[None, :, None].repeat(2, 1, 4).requires_grad_()
    outs = ours(*args), plain(*args)
    for a, b in zip(*outs):
        close(a, b)
    close(*(torch.autograd.grad(final.sum(), args[1])[0] for _, final in outs))


SEQ_IDX = torch.tensor([
    [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 5, 5],
    [2, 2, 3, 4, 4, 4, 4, 4, 4, 4, 6, 6, 6],
    [-1, 0, 0, 0, 0, 0, -1, -1, -1, 0, 1, -1, -1],
    [-1] * 13,
    [0, -1, -1, -1, -1, -1, -1, 7, 7, -1, 7, 8, 8],
], dtype=torch.int32)  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
def test_seq_idx_separates_and_pads(chunk):
    """Initial states reach id 0 only; padding gives zero, and states pass through it."""
    args = inputs(batch=len(SEQ_IDX))
    got = ours(*args, chunk=chunk, seq_idx=SEQ_IDX)
    want = plain(*args, seq_idx=SEQ_IDX)
    grads = [torch.randn_like(w) for w in want]
    for a, b in zip(got, want):
        close(a, b)
    for a, b in zip(*(torch.autograd.grad(outs, args, grads) for outs in (got, want))):
        close(a, b)
    assert torch.equal(got[1][3], args[8][3]) and (got[0][SEQ_IDX < 0] == 0).all()


@pytest.mark.parametrize(
    "options",
    [dict(), dict(dt_limit=(0.5, 1.0)), dict(dt_softplus=False), dict(per_channel=True),
     dict(cu_seqlens=[0, 4, 4, 5, 10]), dict(seq_idx=[[0, 0, 1, 1, 1, 1, -1, 2, 2, -1, -1]])],
)  # fmt: skip
def test_gradcheck(options):
    options = dict(options)
    args = inputs(batch=1, length=11, heads=2, width=2, groups=1, state=2,
                  rows=4 if "cu_seqlens" in options else 1)  # fmt: skip
    if options.pop("per_channel", False):
        args[5] = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    options = {k: torch.tensor(v).int() if k in ("cu_seqlens", "seq_idx") else v
               for k, v in options.items()}  # fmt: skip
    assert torch.autograd.gradcheck(lambda *a: ours(*a, **options), args)


LENGTHS = [5, 0, 8, 1, 13, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6, 5, 4), (1, 1, 16, 32), (1, 16, 1, 32)])
def test_packed_equals_separate_bit_for_bit(dtype, shape):
    heads, width, state, chunk = shape
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    total, slack = int(bounds[-1]), 3
    args = inputs(1, total + slack, heads, width, 1, state, rows=len(LENGTHS), dtype=dtype)
    dout, dfinal = torch.randn_like(args[0]), torch.randn(args[8].shape, dtype=dtype)
    with torch.no_grad():
        for i in (0, 1, 3, 4, 6):
            args[i][:, total:] = torch.nan
        dout[:, total:] = torch.nan
    out, final = ours(*args, chunk=chunk, cu_seqlens=bounds)
    dfinal = dfinal.to(final.dtype)
    grads = torch.autograd.grad([out, final], args, [dout, dfinal])
    assert (out[:, total:] == 0).all()
    per_token, shared = (0, 1, 3, 4, 6), (2, 5, 7)
    assert all((grads[i][:, total:] == 0).all() for i in per_token)
    sums = [torch.zeros_like(grads[i], dtype=torch.float64) for i in shared]
    for n, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:])):
        own = [a[:, lo:hi] if i in per_token else a for i, a in enumerate(args)]
        own = [a.detach().clone().requires_grad_() for a in [*own[:8], args[8][n : n + 1]]]
        alone = ours(*own, chunk=chunk)
        assert torch.equal(out[:, lo:hi], alone[0]) and torch.equal(final[n : n + 1], alone[1])
        one = torch.autograd.grad(alone, own, [dout[:, lo:hi], dfinal[n : n + 1]])
        assert all(torch.equal(grads[i][:, lo:hi], one[i]) for i in per_token)
        assert torch.equal(grads[8][n : n + 1], one[8])
        sums = [s + one[i].double() for s, i in zip(sums, shared)]
    if dtype == torch.float64:
        for i, s in zip(shared, sums):
            close(grads[i], s)


def test_varlen_states_are_the_final_states_and_differentiable():
    bounds = torch.tensor([0, 5, 13]).int()
    args = inputs(batch=1, rows=2)
    out, final, varlen = ours(*args, cu_seqlens=bounds, return_varlen_states=True)
    only = ours(*args, cu_seqlens=bounds, return_final_states=False, return_varlen_states=True)
    assert torch.equal(final, varlen) and torch.equal(only[1], final) and len(only) == 2
    dstart = torch.autograd.grad(varlen.sum(), args[8])[0]
    assert (dstart > 0).all()
    assert isinstance(ours(*args, cu_seqlens=bounds, return_final_states=False), torch.Tensor)


def test_cu_seqlens_takes_padding_from_seq_idx():
    args = inputs(batch=1, rows=2)
    seq_idx = torch.tensor([[0] * 4 + [-1] + [1] * 6 + [-1] * 2]).int()
    got = ours(*args, cu_seqlens=torch.tensor([0, 5, 13]).int(), seq_idx=seq_idx)
    for n, part in enumerate((slice(0, 4), slice(5, 11))):
        own = [a[:, part] if a.dim() > 2 else a for a in args[:8]]
        want = plain(*own, start=args[8][n : n + 1])
        close(got[0][:, part], want[0])
        close(got[1][n : n + 1], want[1])
    assert (got[0][seq_idx < 0] == 0).all()


def test_padding_changes_no_bit_and_hides_nan():
    args = inputs(length=9, dtype=torch.float32)
    seq_idx = torch.zeros(2, 12, dtype=torch.int32)
    seq_idx[:, 9:] = -1
    longer = [F.pad(a.detach(), (0, 0) * (a.dim() - 2) + (0, 3), value=torch.nan)
              if i in (0, 1, 3, 4, 6) else a.detach() for i, a in enumerate(args)]  # fmt: skip
    longer = [a.requires_grad_() for a in longer]
    (out, final), (more, same) = ours(*args), ours(*longer, seq_idx=seq_idx)
    assert torch.equal(out, more[:, :9]) and torch.equal(final, same)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, args, dout)
    padded = torch.autograd.grad(more, longer, F.pad(dout, (0,) * 5 + (3,), value=torch.nan))
    for i, (a, b) in enumerate(zip(grads, padded)):
        assert torch.equal(a, b[:, :9] if i in (0, 1, 3, 4, 6) else b)


def test_nan_stays_in_its_sequence():
    args = [a.detach() for a in inputs(batch=1, rows=3)]
    bounds = torch.tensor([0, 5, 9, 13]).int()
    clean = ours(*args, cu_seqlens=bounds)
    args[0][0, 6] = torch.nan
    out, final = ours(*args, cu_seqlens=bounds)
    assert torch.equal(out[:, :5], clean[0][:, :5]) and torch.equal(out[:, 9:], clean[0][:, 9:])
    assert torch.equal(final[[0, 2]], clean[1][[0, 2]]) and final[1].isnan().all()
    assert out[:, 6:9].isnan().all()


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 13])
def test_continues_from_its_own_final_state(cut):
    args = inputs()
    whole = plain(*args)
    first = [a[:, :cut] if a.shape[1:2] == (13,) else a for a in args]
    second = [a[:, cut:] if a.shape[1:2] == (13,) else a for a in args[:8]]
    a, middle = ours(*first)
    b, end = ours(*second, middle)
    close(torch.cat([a, b], 1), whole[0])
    close(end, whole[1])


def test_fp32_matches():
    args = [a.detach() for a in inputs(length=70, heads=4, width=16, state=16)]
    low = [a.float() for a in args]
    args = [a.double() for a in low]
    grads = [torch.randn(2, 70, 4, 16), torch.randn(2, 4, 16, 16)]
    got, dgot = testing.gradients(lambda *a: ours(*a, chunk=32), low, grads)
    plain_low, dlow = testing.gradients(plain, low, grads)
    want, dwant = testing.gradients(plain, args, [g.double() for g in grads])
    names = ["out", "final", "dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dinitial"]
    for name, *three in zip(names, [*got, *dgot], [*want, *dwant], [*plain_low, *dlow]):
        testing.assert_matches(*three, name)


def test_decay_gradient_does_not_cancel():
    """The last input reaches the final state undecayed: however large, dA keeps its bits."""
    args = inputs(length=6, dtype=torch.float32)
    grads = []
    for size in (1.0, 1e8):
        with torch.no_grad():
            args[0][:, -1] = size
        final = ours(*args, chunk=8)[1]
        grads.append(torch.autograd.grad(final.sum(), args[2])[0])
    assert torch.equal(*grads) and (grads[0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_by_its_roundings(dtype):
    """No path from input to result has more than three roundings to the low dtype.

    The error is at most that many half units of the sum of absolute values of all terms; one more
    covers second-order terms, float32 sums and float16 subnormals. That sum is the recurrence
    itself on absolute values, and its gradients.
    """
    args = [a.detach() for a in inputs(length=37, heads=4, width=8, state=16)]
    for i in (0, 1, 3, 4, 8):
        args[i] = args[i].to(dtype)
    low = [a if a.dtype == dtype else a.float() for a in args]
    low[6] = None
    dout, dfinal = torch.randn(low[0].shape).to(dtype), torch.randn(low[8].shape)
    leaves = [a if a is None else a.clone().requires_grad_() for a in low]
    got = ours(*leaves, chunk=8)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(got, wanted, [dout, dfinal])
    assert [g.dtype for g in grads] == [w.dtype for w in wanted]

    wide = [a if a is None else a.double().requires_grad_() for a in low]
    want = plain(*wide)
    exact = torch.autograd.grad(want, [w for w in wide if w is not None],
                                [dout.double(), dfinal.double()])  # fmt: skip
    x, dt, A, B, C, D, _, bias, start = (None if a is None else a.detach() for a in wide)
    raw = dt + bias
    step = F.softplus(raw).requires_grad_()
    log_decay = (step * A).detach().requires_grad_()
    size = [v.abs().requires_grad_() for v in (x, B, C, D, start)]
    sx, sB, sC, sD, sstart = size
    sizes = recurrence(sx, step, log_decay, sB, sC, sD, None, sstart)
    by = torch.autograd.grad(sizes, [*size, step, log_decay],
                             [dout.double().abs(), dfinal.double().abs()])  # fmt: skip
    ddt = (by[5] + A.abs() * by[6]) * raw.sigmoid()
    bound = [by[0], ddt, (by[6] * step).sum((0, 1)), by[1], by[2], by[3], ddt.sum((0, 1)), by[4]]
    unit = 4 * torch.finfo(dtype).eps / 2
    for a, b, scale in zip([*got, *grads], [*want, *exact], [*sizes, *bound]):
        assert ((a.double() - b).abs() <= unit * scale).all()


def test_state_dtype_rounds_the_entering_state_only():
    args = inputs(length=12)
    args[6] = None
    first = [a[:, :4] if i in (0, 1, 3, 4) else a for i, a in enumerate(args)]
    rest = [a[:, 4:8] if i in (0, 1, 3, 4) else a for i, a in enumerate(args[:8])]
    args[8] = first[8] = args[8].bfloat16().double()
    middle = plain(*first)[1]
    out, final = ours(*args, chunk=4, state_dtype=torch.bfloat16)
    rounded = middle.bfloat16().double()
    close(out[:, 4:8], plain(*rest, start=rounded)[0])
    assert not torch.allclose(out[:, 4:8], plain(*rest, start=middle)[0], rtol=1e-6)
    close(final, plain(*args)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seq_idx", [None, [[0] * 5 + [1] * 9 + [-1] * 6]])
def test_extreme_steps_and_decays_stay_finite(dtype, seq_idx):
    heads = 6
    args = inputs(1, 20, heads, groups=1, dtype=dtype)
    args[2] = -torch.tensor([1e-6, 1e-3, 1.0, 1e2, 1e4, 1e30]).requires_grad_()
    steps = torch.tensor([0.0, 1e-8, 1e4, 1.0, 1e4, -1e4, 1e-3])
    args[1] = steps[torch.arange(20) % 7][None, :, None].repeat(1, 1, heads).to(dtype)
    args[1].requires_grad_()
    seq_idx = seq_idx and torch.tensor(seq_idx).int()
    for softplus in (True, False):
        outs = ours(*args, chunk=8, seq_idx=seq_idx, dt_softplus=softplus)
        grads = torch.autograd.grad(outs, args, [torch.randn_like(o) for o in outs])
        assert all(t.isfinite().all() for t in (*outs, *grads))


def test_decay_beyond_the_range_of_floats():
    """dt * A overflows: nothing is remembered, and nothing turns into NaN."""
    args = [a.float() for a in inputs()]
    args[1], args[2], args[7] = torch.full((2, 13, 4), 1e4), torch.full((4,), -1e37), None
    leaves = [a if a is None else a.detach().requires_grad_() for a in args]
    out, final = ours(*leaves, dt_softplus=False)
    grads = torch.autograd.grad(out.sum() + final.sum(), [a for a in leaves if a is not None])
    assert all(t.isfinite().all() for t in (out, final, *grads))
    assert (grads[-1] == 0).all()


@pytest.mark.parametrize("A", [-1e-6, -1.0, -1e4])
@pytest.mark.parametrize("dt", [1e-6, 1.0, 1e4])
def test_extreme_steps_and_decays_are_right(A, dt):
    x, _, _, B, C = (a.detach() for a in inputs(length=20)[:5])
    args = x, torch.full((2, 20, 4), dt).double(), torch.full((4,), A).double(), B, C
    low = [a.float() for a in args]
    want = plain(*args, softplus=False)
    for a, b, c in zip(ours(*low, dt_softplus=False), want, plain(*low, softplus=False)):
        testing.assert_matches(a, b, c)


def test_any_strides():
    args = [a.detach() for a in inputs()]
    views = [a.transpose(0, -1).contiguous().transpose(0, -1) for a in args]
    views[0] = torch.stack([args[0], args[0]], -1)[..., 0]
    views[3] = args[3][:, :, :1].expand(2, 13, 2, 5)
    views[6] = torch.cat([args[6], args[6]], -1)[..., :3]
    same = [v.contiguous() for v in views]
    for a, b in zip(ours(*views), ours(*same)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("batch", "length", "bounds"),
    [(0, 5, None), (2, 0, None), (1, 0, [0]), (1, 0, [0, 0, 0]), (1, 4, [0]), (1, 4, [0, 0])],
)
def test_nothing_to_scan(batch, length, bounds):
    rows = batch if bounds is None else len(bounds) - 1
    args = inputs(batch, length, rows=rows)
    out, final = ours(*args, cu_seqlens=None if bounds is None else torch.tensor(bounds).int())
    assert (out == 0).all() and out.shape == args[0].shape and torch.equal(final, args[8])
    (out.sum() + final.sum()).backward()
    assert (args[8].grad == 1).all() and all((a.grad == 0).all() for a in args[:8])


def test_what_backward_reads_is_not_differentiable():
    x, dt, A, B, C, _, z, *_ = inputs()
    out, final, ungated = torch.ops.nemokernels.ssd_chunk_scan(
        x, dt, A, B, C, None, z, None, None, None, None, 4, True, 0.0, INF, None
    )
    assert out.requires_grad and final.requires_grad and not ungated.requires_grad


def test_autocast_casts_nothing():
    args = inputs(dtype=torch.float32)
    want = torch.autograd.grad(ours(*args)[0].sum(), args)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(*args)[0]
        got = torch.autograd.grad(out.sum(), args)
    assert torch.equal(out, ours(*args)[0])
    assert all(torch.equal(a, b) for a, b in zip(got, want))
