"""The kernels of csrc/causal_conv1d against the reference.

Every test runs twice: the kernels as loops on the CPU, and, with a GPU, as they are.
"""

import conv1d
import pytest
import torch
from conv1d import ints, problem
from on_gpu import to

from nemokernels import causal_conv1d_fn, testing, use_backend
from nemokernels.ops.causal_conv1d import native as kernel
from nemokernels.ops.causal_conv1d import op, ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def device(native_device):
    return native_device


def compare(device, function, *args, chunk):
    return conv1d.compare(kernel, device, function, *args, config=csrc(chunk))


def csrc(chunk=16):
    return op.Config("csrc", chunk)


@pytest.mark.parametrize("mode", ["rows", "seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", [64, 13])
def test_forward_and_backward(device, mode, width, dtype, dim):
    batch = 1 if mode == "cu_seqlens" else 2
    for tokens, chunk, silu, initial in ((37, 16, True, True), (6, 16, False, False)):
        x, weight, bias, *packing, dy = problem(
            batch, tokens, dim, width, dtype, mode, initial=initial
        )
        args = (x, weight, bias if silu else None, *packing, silu)
        y, states = compare(device, "forward", *args, True, chunk=chunk)
        assert torch.equal(states.cpu(), ref.forward(*args, True)[1])
        dfinal = torch.randn(states.shape).to(dtype)
        compare(device, "backward", dy, dfinal, *args, chunk=chunk)
        empty = dfinal[:0]
        compare(device, "backward", dy, empty, *args, chunk=2 * chunk)


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (F16, BF16), (BF16, F16)])
def test_weights_of_another_dtype(device, dtypes):
    x, weight, bias, *packing, dy = problem(2, 21, 16, 4, dtypes[0], weight_dtype=dtypes[1])
    args = (x, weight, bias.to(F32), *packing, True)
    y, states = compare(device, "forward", *args, True, chunk=16)
    compare(device, "backward", dy, states.cpu(), *args, chunk=16)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("mode", ["rows", "seq_idx"])
def test_short_rows(device, tokens, mode):
    x, weight, bias, *packing, dy = problem(3, tokens, 16, 4, F32, mode)
    args = (x, weight, bias, *packing, True)
    _, states = compare(device, "forward", *args, True, chunk=16)
    compare(device, "backward", dy, torch.randn(states.shape), *args, chunk=16)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 5, 0), (2, 0, 16)])
def test_empty(device, shape):
    x, weight, bias, *packing, dy = problem(*shape, 4, F32)
    args = (x, weight, bias, *packing, True)
    _, states = compare(device, "forward", *args, True, chunk=16)
    compare(device, "backward", dy, states.cpu(), *args, chunk=16)


def views(t):
    """The values of t (B, T, D), laid out differently."""
    yield t.transpose(1, 2).contiguous().transpose(1, 2)
    yield torch.cat((t, t), -1)[..., : t.shape[-1]]
    yield torch.cat((t[..., :1], t), -1)[..., 1:]
    yield t.transpose(0, 1).contiguous().transpose(0, 1)
    odd_rows = t.new_empty(t.shape[0], t[0].numel() + 3)[:, :-3].unflatten(1, t.shape[1:])
    yield odd_rows.copy_(t)


def test_any_strides_give_the_same_bits(device):
    x, weight, bias, seq_idx, initial, _, dy = to(device, problem(2, 19, 16, 4, BF16, "seq_idx"))

    def run(x, initial, dy, weight, bias, seq_idx):
        args = (x, weight, bias, seq_idx, initial, None, True)
        y, states = kernel.forward(*args, True, config=csrc(16))
        return y, states, *kernel.backward(dy, initial, *args, config=csrc(16))

    want = run(x, initial, dy, weight, bias, seq_idx)
    other = (weight.mT.contiguous().mT, torch.stack((bias, bias), 1)[:, 0])
    for x_view, initial_view, dy_view in zip(views(x), views(initial), views(dy)):
        got = run(x_view, initial_view, dy_view, *other, seq_idx.mT.contiguous().mT)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_packed_equals_separate(device, chunk, dtype):
    x, weight, bias, _, initial, cu, dy = problem(1, 70, 24, 4, dtype, "cu_seqlens")
    x, weight, bias, initial, cu, dy = to(device, (x, weight, bias, initial, cu, dy))
    args = (weight, bias, None)
    y, states = kernel.forward(x, *args, initial, cu, True, True, config=csrc(chunk))
    dx, _, _, dinitial = kernel.backward(
        dy, states, x, *args, initial, cu, True, config=csrc(chunk)
    )
    bounds = cu.tolist()
    assert (y[:, bounds[-1] :] == 0).all() and (dx[:, bounds[-1] :] == 0).all()
    for s, (a, b) in enumerate(zip(bounds, bounds[1:])):
        one, x_s, dy_s = initial[s : s + 1], x[:, a:b], dy[:, a:b]
        y_s, state = kernel.forward(x_s, *args, one, None, True, True, config=csrc(16))
        dx_s, _, _, dinitial_s = kernel.backward(
            dy_s, states[s : s + 1], x_s, *args, one, None, True, config=csrc()
        )
        for whole, alone in ((y[:, a:b], y_s), (states[s], state[0]), (dx[:, a:b], dx_s),
                             (dinitial[s], dinitial_s[0])):  # fmt: skip
            assert torch.equal(whole, alone)


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_gradient_within_wider_rows(device, dtype, shift):
    """The bits of one of its own, at offsets that 16-byte accesses can and cannot take."""
    x, weight, bias, *packing, dy = problem(2, 37, 64, 4, dtype, "rows")
    args = to(device, (dy, x.new_zeros(0, 3, 64), x, weight, bias, *packing, True))
    wide = torch.full((2, 37, 96), 7.0, dtype=dtype, device=device)
    part = wide[..., 8 + shift : 72 + shift]
    want = kernel.backward(*args, config=csrc())
    got = kernel.backward(*args, config=csrc(), dx=part)
    assert got[0] is part and all(map(torch.equal, got, want))
    part.fill_(7)
    assert (wide == 7).all()


def test_many_blocks(device):
    """More channels than a block has lanes for, more chunks than it has warps, ragged ends."""
    x, weight, bias, *packing, dy = problem(3, 150, 300, 4, BF16)
    args = (x, weight, bias, *packing, True)
    _, states = compare(device, "forward", *args, True, chunk=16)
    first = compare(device, "backward", dy, states.cpu(), *args, chunk=16)
    again = kernel.backward(*to(device, (dy, states, *args)), config=csrc(16))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("mode", ["seq_idx", "cu_seqlens"])
def test_nan_of_a_neighbour_does_not_spread(device, mode):
    x, weight, bias, *_, dy = problem(1, 24, 16, 4, F32)
    seq_idx = ints([[0] * 8 + [1] * 8 + [-1] * 8]) if mode == "seq_idx" else None
    cu = ints([0, 8, 16]) if mode == "cu_seqlens" else None
    x[:, :8] = dy[:, :8] = torch.nan
    x[:, 16:] = dy[:, 16:] = torch.nan
    args = (x, weight, bias, seq_idx, None, cu, True)
    y, states = kernel.forward(*to(device, args), True, config=csrc(16))
    assert y[:, :8].isnan().all() and y[:, 8:16].isfinite().all() and (y[:, 16:] == 0).all()
    dx, *_ = kernel.backward(*to(device, (dy, states[:0], *args)), config=csrc(16))
    assert dx[:, 8:16].isfinite().all() and (dx[:, 16:] == 0).all()
    x[:, :8] = dy[:, :8] = 0
    _, dweight, dbias, _ = kernel.backward(*to(device, (dy, states[:0], *args)), config=csrc(16))
    assert dweight.isfinite().all() and dbias.isfinite().all()


@pytest.mark.parametrize("mode", ["plain", "ring", "speculative"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("entries_first", [False, True])
def test_update(device, mode, width, dtype, entries_first):
    for tokens, extra in ((1, 0), (1, 1), (3, 2), (0, 2), (9, 8), (5, 1)):
        if mode == "speculative" and tokens > extra + 1:
            continue
        x, state = torch.randn(4, tokens, 21).to(dtype), torch.randn(6, 21, width - 1 + extra)
        state = state.to(dtype)
        state = state.mT.contiguous().mT if entries_first else state
        weight, bias = torch.randn(21, width).to(dtype), torch.randn(21)
        position, slots = ints([0, 7, 2, 1]), ints([5, -1, 0, 3])
        ring = position if mode == "ring" else None
        accepted = position if mode == "speculative" else None
        args = (weight, bias, True, ring, slots, accepted)
        copies = [state.clone() for _ in range(2)] + [state.double()]
        low = ref.update(x, copies[0], *args)
        exact = ref.update(x.double(), copies[2], *testing.to_double(args))
        native = copies[1].to(device)
        got = kernel.update(x.to(device), native, *to(device, args), config=csrc())
        testing.assert_matches(got, exact, low)
        assert torch.equal(native.cpu(), copies[0]) and (got[1] == 0).all()


def test_update_of_a_slot_that_does_not_exist_shows(device):
    state = torch.zeros(2, 8, 3, device=device)
    x, weight = torch.ones(2, 1, 8, device=device), torch.ones(8, 4, device=device)
    slots = ints([2, 1]).to(device)
    y = kernel.update(x, state, weight, None, False, None, slots, None, config=csrc())
    assert y[0].isnan().all() and (y[1] == 1).all() and (state[0] == 0).all()


@pytest.mark.parametrize("state_len", [1, 3, 6])
def test_varlen_states(device, state_len):
    args = torch.randn(14, 9).mT.contiguous().mT, ints([0, 4, 4, 5, 13]), state_len
    got = kernel.varlen_states(*to(device, args), config=csrc())
    assert torch.equal(got.cpu(), ref.varlen_states(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_public_function_on_cuda(dtype):
    x, weight, bias, _, initial, cu, dy = problem(1, 700, 96, 4, dtype, "cu_seqlens")

    def fn(device):
        def call(x, weight, bias, initial):
            out = causal_conv1d_fn(x.mT, weight, bias, None, initial.mT, True,
                                   activation="silu", cu_seqlens=cu.to(device))  # fmt: skip
            return [o.mT for o in out]

        return call

    inputs, grads = [x, weight, bias, initial], [dy, torch.randn(initial.shape).to(dtype)]
    low = testing.gradients(fn("cpu"), inputs, grads)
    exact = testing.gradients(fn("cpu"), [t.double() for t in inputs], [g.double() for g in grads])
    with use_backend("causal_conv1d", "csrc"):
        got = testing.gradients(fn("cuda"), to("cuda", inputs), to("cuda", grads))
    for part, want, plain in zip(sum(got, []), sum(exact, []), sum(low, [])):
        testing.assert_matches(part, want, plain)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    with use_backend("causal_conv1d", "csrc", "cuda"):
        conv1d.compare_past_two_to_the_31()


def test_the_comparison_past_two_to_the_31_in_small():
    conv1d.compare_past_two_to_the_31(8, 640, "cpu")


def test_plan():
    everywhere = ("csrc", "reference")
    assert op.plan(8, 4096, 10240, (BF16,), everywhere, 132) == op.Config("csrc", 256)
    assert op.plan(1, 4096, 6144, (BF16, F32), everywhere, 132) == op.Config("csrc", 16)
    assert op.plan(1, 1 << 20, 6144, (BF16,), everywhere, 132).chunk == 256
    assert op.plan(0, 0, 0, (BF16,), everywhere, 132).backend == "csrc"
    wide = op.plan(1, 8, 8, (F32, torch.float64), everywhere, 132)
    assert wide.backend == "reference" and "got torch.float64" in wide.reason
    assert op.plan(1, 8, 8, (F32,), ("reference",), 132).backend == "reference"
    with pytest.raises(RuntimeError, match="got torch.float64"):
        op.plan(1, 8, 8, (torch.float64,), ("csrc",), 132)
    without = op.plan(8, 4096, 10240, (BF16,), ("triton", "reference"), 132)
    assert without == op.Config("triton", 256, 16, 128, 8)
    assert op.plan(1, 8, 9, (F32,), ("triton",), 132)[1:4] == (16, 16, 16)
