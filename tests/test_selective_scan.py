import pytest
import torch

from nemokernels import selective_scan_fn, selective_state_update, testing
from nemokernels.ops.selective_scan import op

DIM, N, G = 6, 5, 2
F64 = torch.float64


def inputs(batch=2, length=9, dim=DIM, groups=G, state=N, dtype=F64):
    """Arguments of the function by name, all of them but the states and bounds."""
    randn = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    wide = F64 if dtype == F64 else torch.float32
    return dict(
        u=randn(batch, dim, length),
        delta=randn(batch, dim, length),
        A=-torch.rand(dim, state).to(wide) * 4 - 0.1,
        B=randn(batch, groups, state, length),
        C=randn(batch, groups, state, length),
        D=randn(dim).to(wide),
        z=randn(batch, dim, length),
        delta_bias=randn(dim).to(wide),
    )


def all_pairs(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial=None, softplus=True):
    """Every output as a sum over all tokens before it, in float64: no recurrence.

    Letters: b batch, c channel, t and s tokens, n state.
    """
    u, delta, A, B, C = (t.double() for t in (u, delta, A, B, C))
    d = delta if delta_bias is None else delta + delta_bias.double()[:, None]
    d = torch.nn.functional.softplus(d) if softplus else d
    share = u.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(share, 1) for t in (B, C))
    length = u.shape[2]
    passed = d.cumsum(-1)
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    gap = (passed[..., :, None] - passed[..., None, :]).masked_fill(~sees, 0)
    decay = torch.exp(gap[..., None] * A[:, None, None]) * sees[..., None]
    states = torch.einsum("bctsn,bcns->bctn", decay, B * (d * u)[:, :, None])
    if initial is not None:
        states = states + torch.exp(passed[..., None] * A[:, None]) * initial.double()[:, :, None]
    y = torch.einsum("bctn,bcnt->bct", states, C)
    if D is not None:
        y = y + D.double()[:, None] * u
    if z is not None:
        y = y * torch.nn.functional.silu(z.double())
    return y, states[:, :, -1]


def scan(*args, softplus=True, **kwargs):
    return selective_scan_fn(*args, delta_softplus=softplus, return_last_state=True, **kwargs)


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [True, False])
def test_fp64_equals_all_pairs(without, softplus):
    args = {k: v for k, v in inputs().items() if k not in without}
    if not softplus:
        args["delta"] = args["delta"].abs()
    initial = torch.randn(2, DIM, N, dtype=F64)
    got = scan(**args, softplus=softplus, initial_states=initial)
    for mine, want in zip(got, all_pairs(**args, initial=initial, softplus=softplus)):
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1), (2, 3, 3, 3, 7), (0, 4, 6, 2, 5), (2, 0, 6, 2, 5), (1, 2, 0, 1, 3)]
)
def test_sizes(sizes):
    args = inputs(*sizes)
    out, last = scan(**args)
    assert out.shape == args["u"].shape and last.shape == (sizes[0], sizes[2], sizes[4])
    if sizes[1] and out.numel():
        torch.testing.assert_close((out, last), all_pairs(**args), rtol=1e-12, atol=1e-12)
    else:
        assert (last == 0).all()


def test_shared_b_and_c_without_a_group_axis():
    args = inputs(groups=1)
    want = scan(**args)
    args["B"], args["C"] = args["B"][:, 0], args["C"][:, 0]
    assert all(map(torch.equal, scan(**args), want))


def test_arguments_stand_where_the_drop_in_name_has_them():
    args = inputs()
    want = scan(**args)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    assert all(map(torch.equal, selective_scan_fn(*map(args.get, order), True, True), want))
    assert torch.equal(selective_scan_fn(*map(args.get, order), True), want[0])


@pytest.mark.parametrize("softplus", [True, False])
def test_gradcheck(softplus):
    args = inputs(1, 4, 4, 2, 2)
    args["delta"] = args["delta"].abs()
    leaves = [*args.values(), torch.randn(1, 4, 2, dtype=F64)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def call(*leaves):
        return scan(*leaves[:8], softplus=softplus, initial_states=leaves[8])

    assert torch.autograd.gradcheck(call, leaves)


def test_gradients_equal_those_of_all_pairs():
    """Also above softplus's threshold."""
    args = inputs(2, 6)
    args["delta"][:, 0] = 20.5 - args["delta_bias"][0]
    args["A"] = args["A"] / 20
    names, initial = list(args), torch.randn(2, DIM, N, dtype=F64)

    def run(fn):
        def call(*leaves):
            return fn(**dict(zip(names, leaves)), **{fn_initial[fn]: leaves[-1]})

        outs, grads = testing.gradients(call, [*args.values(), initial], douts)
        return [*outs, *grads]

    fn_initial = {scan: "initial_states", all_pairs: "initial"}
    douts = [torch.randn(2, DIM, 6, dtype=F64), torch.randn(2, DIM, N, dtype=F64)]
    for mine, want in zip(run(scan), run(all_pairs), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Everything inside is float32: the error is that of the last cast."""
    args = inputs(dtype=dtype)
    (out, last), (want, state) = scan(**args), all_pairs(**args)
    assert out.dtype == dtype and last.dtype == torch.float32
    testing.assert_matches(out, want, want.to(dtype))
    torch.testing.assert_close(last.double(), state, rtol=1e-5, atol=1e-5)


def test_strides():
    args = inputs()
    want = scan(**args)
    turned = {
        k: v.transpose(1, -1).clone().transpose(1, -1) for k, v in args.items() if v.dim() > 2
    }
    assert all(map(torch.equal, scan(**{**args, **turned}), want))
    assert want[0].transpose(1, 2).is_contiguous()


BOUNDS = [0, 4, 4, 5, 11]


def packed():
    args = inputs(1, 13)
    initial = torch.randn(4, DIM, N, dtype=F64)
    return args, initial, torch.tensor(BOUNDS, dtype=torch.int32)


def piece(args, lo, hi):
    return {k: v[..., lo:hi] if v.dim() > 2 else v for k, v in args.items()}


def test_packed_equals_separate_bit_for_bit():
    args, initial, bounds = packed()
    out, last = scan(**args, initial_states=initial, cu_seqlens=bounds)
    assert (out[..., 11:] == 0).all()
    for n, (lo, hi) in enumerate(zip(BOUNDS[:-1], BOUNDS[1:])):
        alone = scan(**piece(args, lo, hi), initial_states=initial[n : n + 1])
        assert torch.equal(out[..., lo:hi], alone[0]) and torch.equal(last[n : n + 1], alone[1])


def test_packed_gradients_equal_separate():
    args, initial, bounds = packed()
    names, douts = list(args), [torch.randn(1, DIM, 13, dtype=F64), torch.randn_like(initial)]

    def call(*leaves):
        named = dict(zip(names, leaves))
        return scan(**named, initial_states=leaves[-1], cu_seqlens=bounds)

    def separately(*leaves):
        named, outs, lasts = dict(zip(names, leaves)), [], []
        for n, (lo, hi) in enumerate(zip(BOUNDS[:-1], BOUNDS[1:])):
            start = leaves[-1][n : n + 1]
            parts = scan(**piece(named, lo, hi), initial_states=start) if hi > lo else (None, start)
            outs += [] if parts[0] is None else [parts[0]]
            lasts.append(parts[1])
        outs.append(named["u"][..., 11:] * 0)
        return torch.cat(outs, -1), torch.cat(lasts)

    tensors = [*args.values(), initial]
    for mine, want in zip(testing.gradients(call, tensors, douts)[1],
                          testing.gradients(separately, tensors, douts)[1]):  # fmt: skip
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)


def test_a_nan_stays_in_its_row_and_channel():
    args = inputs()
    args["u"][1, 3, 5] = float("nan")
    out, last = scan(**args)
    wrong = out.isnan()
    assert wrong[1, 3, 5:].all() and wrong.sum() == 4
    assert last[1, 3].isnan().all() and last.isnan().sum() == N


def test_pieces_continue_from_the_last_state():
    args = inputs()
    out, last = scan(**args)
    first = scan(**piece(args, 0, 4))
    second = scan(**piece(args, 4, 9), initial_states=first[1])
    assert torch.equal(torch.cat([first[0], second[0]], -1), out) and torch.equal(second[1], last)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_decoding_continues_the_scan_bit_for_bit(dtype):
    """selective_state_update without a head axis is one token of this scan."""
    args = inputs(groups=1, dtype=dtype)
    want, last = scan(**args)
    _, state = scan(**piece(args, 0, 6))
    args["B"], args["C"] = args["B"][:, 0], args["C"][:, 0]
    for t in range(6, 9):
        x, dt, z, B, C = (args[k][..., t] for k in ("u", "delta", "z", "B", "C"))
        y = selective_state_update(state, x, dt, args["A"], B, C, args["D"], z,
                                   args["delta_bias"], dt_softplus=True)  # fmt: skip
        assert torch.equal(y, want[..., t])
    assert torch.equal(state, last)


def test_autocast_casts_nothing():
    args = inputs(dtype=torch.float32)
    want = scan(**args)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, scan(**args), want))


BAD = [
    (dict(u=[1.0]), TypeError, "`u` must be a torch.Tensor"),
    (dict(u=torch.ones(2, 4)), ValueError, "`u` has shape"),
    (dict(u=torch.ones(2, 4, 6).int()), TypeError, "`u` is torch.int32"),
    (dict(delta=torch.ones(2, 4, 5)), ValueError, "`delta` has shape"),
    (dict(delta=None), TypeError, "`delta` must be a torch.Tensor"),
    (dict(A=-torch.ones(3, 5)), ValueError, "`A` has shape"),
    (dict(A=-torch.ones(4, 5).cfloat()), TypeError, "`A` is torch.complex64"),
    (dict(B=torch.ones(4, 5)), ValueError, r"`B` has shape \(4, 5\), expected \(B, N, L\), or"),
    (dict(B=torch.ones(2, 3, 5, 6)), ValueError, "`B` has 3 groups, expected a divisor of the 4"),
    (dict(B=torch.ones(2, 2, 5, 6)), ValueError, "`C` has 1 groups, expected 2"),
    (dict(C=torch.ones(2, 5, 7)), ValueError, "`C` has shape"),
    (dict(C=torch.ones(2, 1, 4, 6)), ValueError, "`C` has shape"),
    (dict(D=torch.ones(4, 1)), ValueError, "`D` has shape"),
    (dict(z=torch.ones(2, 6, 4)), ValueError, "`z` has shape"),
    (dict(delta_bias=torch.ones(4, device="meta")), ValueError, "`delta_bias` is on meta"),
    (dict(initial_states=torch.ones(1, 4, 5)), ValueError, "`initial_states` has shape"),
    (dict(cu_seqlens=torch.tensor([0, 6])), TypeError, "`cu_seqlens` is torch.int64"),
    (dict(cu_seqlens=torch.tensor([0, 6]).int()), ValueError, "`u` must have one row"),
    (dict(cu_seqlens=torch.zeros(0).int()), ValueError, "`cu_seqlens` needs at least one"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    good = dict(u=torch.ones(2, 4, 6), delta=torch.ones(2, 4, 6), A=-torch.ones(4, 5),
                B=torch.ones(2, 5, 6), C=torch.ones(2, 5, 6))  # fmt: skip
    with pytest.raises(error, match=f"selective_scan_fn: {message}"):
        selective_scan_fn(**{**good, **change})


@pytest.mark.parametrize("bounds", [[1, 6], [0, 4, 3], [0, 7]])
def test_bad_bounds(bounds):
    args = piece(inputs(1), 0, 6)
    with pytest.raises(ValueError, match="selective_scan_fn: `cu_seqlens` is"):
        selective_scan_fn(**args, cu_seqlens=torch.tensor(bounds).int())


def test_plan():
    both = ("triton", "reference")
    for state in (1, 16, 17, 64, 256):
        config = op.plan(state, "", both)
        width = max(16, 1 << (state - 1).bit_length())
        for tile in (config.forward, config.backward):
            assert config.backend == "triton"
            assert tile.channels * tile.tokens * width == 16 * 32 * tile.num_warps
    assert op.plan(257, "", both).backend == "reference"
    assert "257" in op.plan(257, "", both).reason
    assert op.plan(16, "float64", both) == op.Config("reference", "float64")
    with pytest.raises(RuntimeError, match="selective_scan: float64"):
        op.plan(16, "float64", ("triton",))
