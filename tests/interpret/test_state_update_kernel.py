"""The Triton kernel of selective_state_update, interpreted, against the reference."""

import pytest
import torch

from nemokernels import testing
from nemokernels.ops.state_update import kernel, op, ref

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus", "source", "target",
         "accepted", "cu_seqlens", "seed", "rounds")  # fmt: skip


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def problem(tokens, H=4, P=6, N=10, G=2, dtype=F32, **changed):
    """Every argument but the state, each with a value of its own everywhere."""
    x, dt, z = torch.randn(3, tokens, H, P).to(dtype)
    B, C = torch.randn(2, tokens, G, N).to(dtype)
    D, dt_bias = torch.randn(2, H, P)
    A = -torch.rand(H, P, N) - 0.1
    values = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)
    values.update(source=None, target=None, accepted=None, cu_seqlens=None, seed=None, rounds=5)
    return tuple({**values, **changed}[name] for name in NAMES)


def config_of(state, sequences, block_p=None):
    config = op.plan(sequences, *state.shape[1:], state.dtype, "", ("triton",), 2)
    return op.Config("triton", block_p, config.block_n, 1) if block_p else config


def compare(state, args, block_p=None):
    """y and every slot against the reference in float64; returns both as the kernel left them."""
    native, plain, exact = state.clone(), state.clone(), state.double()
    low = ref.forward(plain, *args)
    want = ref.forward(exact, *testing.to_double(args))
    cu_seqlens = args[NAMES.index("cu_seqlens")]
    sequences = args[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = kernel.update(native, *args, config_of(state, sequences, block_p))
    assert y.dtype == low.dtype and y.is_contiguous()
    testing.assert_matches(y, want, low, "y")
    testing.assert_matches(native, exact, plain, "state")
    return y, native


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("softplus, dtype", [(True, F32), (False, BF16), (True, F16)])
def test_options(without, softplus, dtype):
    args = problem(3, dtype=dtype, dt_softplus=softplus, **{name: None for name in without})
    compare(torch.randn(3, 4, 6, 10).to(dtype), args)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 6, 7, 3, 3), (1, 2, 64, 128, 1),
                                   (3, 3, 17, 33, 1), (1, 8, 5, 16, 4)])  # fmt: skip
@pytest.mark.parametrize("state_dtype, dtype", [(F32, BF16), (BF16, F32), (F16, F16)])
def test_sizes(shape, state_dtype, dtype):
    batch, H, P, N, G = shape
    compare(torch.randn(batch, H, P, N).to(state_dtype), problem(batch, H, P, N, G, dtype))


@pytest.mark.parametrize("block_p", [1, 2, 8, 16])
def test_blocks(block_p):
    compare(torch.randn(1, 4, 6, 10), problem(1), block_p)


@pytest.mark.parametrize("dt_wide", [True, False])
@pytest.mark.parametrize("A_axes", [0, 1, 2])
@pytest.mark.parametrize("per_head", [("D",), ("dt_bias",)])
def test_tied_parameters(dt_wide, A_axes, per_head):
    full = dict(zip(NAMES, problem(3)))
    full["dt"] = full["dt"] if dt_wide else full["dt"][..., :1]
    full["A"] = full["A"][:, : 6 if A_axes else 1, : 10 if A_axes == 2 else 1]
    full.update({name: full[name][:, :1] for name in per_head})
    state = torch.randn(3, 4, 6, 10)
    compare(state, problem(3, **full))
    full["dt"], full["A"] = full["dt"].expand(3, 4, 6), full["A"].expand(4, 6, 10)
    full.update({name: full[name].expand(4, 6) for name in per_head})
    compare(state, problem(3, **full))


@pytest.mark.parametrize("size", ["nothing", "no tokens", "no sequences", "N 0", "P 0"])
def test_empty(size):
    batch = {"nothing": 0, "no tokens": 0}.get(size, 2)
    P, N = {"P 0": 0}.get(size, 6), {"N 0": 0}.get(size, 10)
    bounds = {"no tokens": ints(0, 0, 0), "no sequences": ints(0)}.get(size)
    slots = 2 if size == "no tokens" else 0 if size == "no sequences" else batch
    args = problem(batch, P=P, N=N, cu_seqlens=bounds)
    y, _ = compare(torch.randn(slots, 4, P, N), args)
    assert y.shape == (batch, 4, P)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("target", [None, (1, 2, -1, 3), "per token"])
def test_slots(target, integer):
    source = ints(5, -1, 0, 3).to(integer)
    if target == "per token":
        target = torch.tensor([[1, 9], [2, 9], [-1, 9], [7, 9]], dtype=integer)
    elif target is not None:
        target = torch.tensor(target, dtype=integer)
    args = problem(4, source=source, target=target)
    args[0][1] = torch.nan  # the row of a negative slot
    before = torch.randn(10, 4, 6, 10)
    y, after = compare(before, args)
    assert (y[1] == 0).all()
    written = {s for s in (source if target is None else target.reshape(4, -1)[:, 0])
               .tolist() if s >= 0} - ({2} if target is not None else set())  # fmt: skip
    for slot in range(10):
        assert torch.equal(after[slot], before[slot]) == (slot not in written)


BOUNDS = ints(1, 4, 4, 5, 6, 8)  # three tokens, none, one (padding), one, two; one row on each side


@pytest.mark.parametrize("accepted", [None, (2, 1, 1, 0, 2), (3, 1, 8, -1, 1)])
@pytest.mark.parametrize("where, dtype", [("same", F32), ("own", F16), ("last", F32)])
def test_tokens_in_slots_of_their_own(accepted, where, dtype):
    source = ints([3, 4, 5], [8, 6, 7], [-1, -1, -1], [0, 1, 2], [9, 11, -1])
    target = {
        "same": None,
        "own": ints([12, 4, -1], [8, 6, 7], [13, 13, 13], [0, 1, 2], [9, 11, 10]),
        "last": ints(3, 7, 13, -1, 12),
    }[where]
    args = problem(
        10, dtype=dtype, source=source, target=target, cu_seqlens=BOUNDS,
        accepted=None if accepted is None else ints(*accepted),
    )  # fmt: skip
    args[0][[0, 4, 8, 9]] = torch.nan  # rows of padding and of nobody
    before = torch.randn(14, 4, 6, 10).to(dtype)
    y, after = compare(before, args)
    assert (y[[0, 4, 8, 9]] == 0).all()
    assert torch.equal(after[[6, 7, 8, 13]], before[[6, 7, 8, 13]])


def test_packed_with_one_slot_each():
    compare(torch.randn(6, 4, 6, 10), problem(10, cu_seqlens=BOUNDS, source=ints(3, 1, -1, 0, 5)))
    compare(torch.randn(5, 4, 6, 10), problem(10, cu_seqlens=BOUNDS))


def test_packed_equals_separate():
    args = dict(zip(NAMES, problem(8, cu_seqlens=ints(0, 3, 4, 8))))
    per_token = ("x", "dt", "B", "C", "z")
    state = torch.randn(3, 4, 6, 10)
    config = config_of(state, 3)
    packed, alone = state.clone(), state.clone()
    y = kernel.update(packed, *args.values(), config)
    for b, (i, j) in enumerate(((0, 3), (3, 4), (4, 8))):
        part = {**args, **{k: args[k][i:j] for k in per_token}, "cu_seqlens": ints(0, j - i)}
        y_b = kernel.update(alone[b : b + 1], *part.values(), config)
        assert torch.equal(y_b, y[i:j])
    assert torch.equal(packed, alone)


def test_any_strides_give_the_same_bits():
    args = dict(zip(NAMES, problem(3)))
    state = torch.randn(3, 4, 6, 10)
    config, want_state = config_of(state, 3), state.clone()
    want = kernel.update(want_state, *args.values(), config)
    for axes in ((0, 1, 3, 2), (3, 2, 1, 0), (1, 0, 2, 3)):
        # dim() axes of every tensor, innermost axes moved outwards
        def turned(t, axes=axes):
            if not isinstance(t, torch.Tensor):
                return t
            order = [a for a in axes if a < t.dim()]
            back = sorted(range(t.dim()), key=order.__getitem__)
            wide = t.permute(order).contiguous()
            return torch.cat((wide, wide), -1)[..., : wide.shape[-1]].permute(back)

        got_state = turned(state)
        got = kernel.update(got_state, *(turned(args[name]) for name in NAMES), config)
        assert torch.equal(got, want) and torch.equal(got_state, want_state)


def exact_products(tokens, N=10, **changed):
    """Arguments whose stepped state is rounded once in float32, whatever the order of its sums."""
    one = torch.ones(tokens, 4, 1)
    B = torch.randn(tokens, 2, N).half()
    x = torch.randn(tokens, 4, 6).half() * torch.logspace(-4, 4, 6, base=2).half()
    return problem(tokens, N=N, x=x, B=B, dt=one, A=torch.zeros(4, 1, 1), dt_bias=None,
                   dt_softplus=False, **changed)  # fmt: skip


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("N, rounds, seed", [(10, 5, 7), (16, 10, -1), (3, 1, 1 << 40)])
def test_stochastic_rounding_has_the_references_bits(N, rounds, seed, dtype):
    args = exact_products(3, N, seed=torch.tensor([seed]), rounds=rounds, source=ints(4, 0, 2))
    native = torch.randn(5, 4, 6, N).to(dtype)
    native[4, 0, 0] = torch.inf
    native[4, 0, 1, :2] = torch.tensor([torch.nan, torch.finfo(dtype).max])
    native[4, 1] *= 2.0**-14
    plain = native.clone()
    kernel.update(native, *args, config_of(native, 3))
    ref.forward(plain, *args)
    assert torch.equal(native.isnan(), plain.isnan())
    assert torch.equal(native.nan_to_num(0.0).view(torch.int16),
                       plain.nan_to_num(0.0).view(torch.int16))  # fmt: skip


def test_random_numbers_of_a_far_slot():
    """Counters past 32 bits; the slots share one piece of memory."""
    far = (1 << 26) + 3
    args = exact_products(1, seed=torch.tensor([11]), source=torch.tensor([far]))
    memory = torch.randn(1, 4, 6, 10).half()
    wide = memory.float() + (args[0].float()[..., None] * args[3].float().repeat_interleave(2, 1)
                             [:, :, None])  # fmt: skip
    bits = ref.rounding_bits(memory.shape[1:], torch.tensor([far]), torch.tensor([11]), 5)
    want = ref.round_stochastically(wide, bits, F16)
    kernel.update(memory.expand(far + 1, 4, 6, 10), *args, config_of(memory, 1))
    assert torch.equal(memory, want)


def test_extremes():
    args = dict(zip(NAMES, problem(3, dt_bias=None)))
    args["dt"] = torch.tensor([-90.0, 19.9, 200.0])[:, None, None].expand(3, 4, 1)
    args["z"] = torch.tensor([-200.0, 0.0, 200.0])[:, None, None].expand(3, 4, 6)
    y, state = compare(torch.randn(3, 4, 6, 10), problem(3, **args))
    assert y.isfinite().all() and state.isfinite().all()


def test_plan():
    everywhere = ("triton", "reference")
    big = op.plan(256, 64, 64, 128, F32, "", everywhere, 132)
    assert big == op.Config("triton", 16, 128, 4)
    assert op.plan(256, 64, 64, 128, F16, "", everywhere, 132).block_p == 32
    assert op.plan(1, 64, 64, 128, F32, "", everywhere, 132) == op.Config("triton", 8, 128, 2)
    assert op.plan(0, 64, 64, 128, F32, "", everywhere, 132).backend == "triton"
    assert op.plan(4, 1, 64, 9000, F32, "", everywhere, 132).reason.endswith("got 9000")
    with pytest.raises(RuntimeError, match="got float64"):
        op.plan(4, 1, 64, 128, F32, "got float64", ("triton",), 132)
