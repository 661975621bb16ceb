"""The chunk scan's Triton kernels on a GPU, against its reference in float64 there."""

import random

import on_gpu
import pytest
import torch

from nemokernels import (
    causal_conv1d_fn,
    mamba_split_conv1d_scan_combined,
    rmsnorm_fn,
    testing,
    use_backend,
)
from nemokernels import mamba_chunk_scan_combined as scan
from nemokernels.ops.ssd import ref

pytestmark = pytest.mark.gpu
INF = float("inf")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CHUNKS = (64, 32, 48, 96, 128)  # every one is as good a reference


@pytest.fixture(autouse=True)
def triton_kernels():
    with use_backend("ssd", "triton", "cuda"):
        yield


def inputs(batch, length, heads, width, groups, state, dtype, *, gate=False, rows=None):
    """x, dt, A, B, C, D, z, dt_bias, initial_states, with the steps and decays of real layers."""

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device="cuda").to(dtype)

    wide = torch.float32
    bias = torch.exp(torch.rand(heads, device="cuda") * 4.6 - 6.9).expm1().log()
    rows = batch if rows is None else rows
    return [
        randn(batch, length, heads, width),
        randn(batch, length, heads) / 2,
        -1 - 15 * torch.rand(heads, device="cuda"),
        randn(batch, length, groups, state) / 2,
        randn(batch, length, groups, state) / 2,
        randn(heads, dtype=wide),
        randn(batch, length, heads, width) if gate else None,
        bias,
        randn(rows, heads, width, state).to(wide),
    ]


def compare(args, seq_idx=None, cu_seqlens=None):
    """Outputs and gradients of the operator within the reference's budget; returns them all."""
    operator = torch.ops.nemokernels
    options = (True, 0.0, INF, None)
    whole = (*args, seq_idx, cu_seqlens)
    got = operator.ssd_chunk_scan(*whole, 64, *options)
    dout, dfinal = torch.randn_like(got[0]), torch.randn_like(got[1]).to(got[0].dtype).float()
    grads = operator.ssd_chunk_scan_backward(dout, dfinal, *whole, got[2], 64, *options)
    back = (dout, dfinal, *whole, got[2])
    with on_gpu.references():
        exact = ref.forward(*testing.to_double(whole), 64, *options)
        exact += ref.backward(*testing.to_double(back), 64, *options)
        low = [ref.forward(*whole, n, *options) + ref.backward(*back, n, *options) for n in CHUNKS]
    names = "out final ungated dx ddt dA dB dC dD dz ddt_bias dinitial".split()
    for name, *three in zip(names, (*got, *grads), exact, map(testing.worst, exact, zip(*low))):
        testing.assert_matches(*three, name)
    return (*got, *grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 2048, 64, 64, 8, 128), (2, 1000, 128, 64, 8, 128), (2, 515, 96, 80, 8, 128),
     (1, 300, 16, 64, 1, 256), (1, 129, 16, 128, 2, 128)],
)  # fmt: skip
def test_real_shapes(shape, dtype):
    compare(inputs(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_random_small_shapes(seed, dtype):
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 3])
    shape = (draw.randint(1, 3), draw.randint(1, 200), groups * draw.randint(3, 6),
             draw.randint(1, 130), groups, draw.randint(1, 256))  # fmt: skip
    compare(inputs(*shape, dtype, gate=draw.random() < 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_and_padding(dtype):
    ids = torch.arange(600, dtype=torch.int32, device="cuda")[None] // 77
    ids[:, 100:130] = -1
    compare(inputs(1, 600, 16, 64, 2, 128, dtype, gate=True), seq_idx=ids)


def test_split_sequences():
    """Few heads and many tokens, so that plan() splits."""
    compare(inputs(1, 20000, 8, 64, 8, 128, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_equals_separate_bit_for_bit(dtype):
    bounds = [0, 64, 64, 300, 301, 1000]
    args = inputs(1, 1010, 16, 64, 2, 128, dtype, rows=5)
    packed = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    options = (64, True, 0.0, INF, None)
    operator = torch.ops.nemokernels.ssd_chunk_scan
    out, final, _ = operator(*args, None, packed, *options)
    assert (out[:, 1000:] == 0).all()
    for n, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:])):
        own = [a[:, lo:hi] if i in (0, 1, 3, 4) else a for i, a in enumerate(args)]
        own[8] = args[8][n : n + 1]
        alone = operator(*own, None, None, *options)
        assert torch.equal(out[:, lo:hi], alone[0]) and torch.equal(final[n : n + 1], alone[1])
    compare(args, cu_seqlens=packed)


@pytest.mark.parametrize("norm", [True, False])
def test_a_mixer_fills_the_slices_of_one_gradient(norm):
    """As its parts do that have tensors of their own, which autograd joins; and in a CUDA graph."""
    H, P, G, N, wide = 16, 64, 2, 128, torch.float32
    inner, channels = H * P, H * P + 2 * G * N
    randn = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, device="cuda").to(dtype)  # noqa: E731
    leaves = [
        randn(2, 300, inner + channels + H),
        randn(channels, 4) / 2,
        randn(channels),
        randn(H, dtype=wide) - 4,
        -8 * torch.rand(H, device="cuda"),
        randn(H, dtype=wide),
    ]
    leaves += [randn(inner, dtype=wide)] if norm else []
    leaves, dout = [t.requires_grad_() for t in leaves], randn(2, 300, inner)

    def whole():
        weight = leaves[6] if norm else None
        out = mamba_split_conv1d_scan_combined(
            *leaves[:6], 128, rmsnorm_weight=weight, headdim=P, ngroups=G, norm_before_gate=False
        )
        return [out, *torch.autograd.grad(out, leaves, dout)]

    def parts():
        zxbcdt, weight, bias, dt_bias, A, D, *scale = leaves
        z, xBC, dt = zxbcdt.split([inner, channels, H], -1)
        xBC = causal_conv1d_fn(xBC.mT, weight, bias, activation="silu").mT
        x, B, C = xBC.split([inner, G * N, G * N], -1)
        x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, H), (B, G), (C, G)))
        gate = None if norm else z.unflatten(-1, (H, P))
        y = scan(x, dt, A, B, C, 128, D=D, z=gate, dt_bias=dt_bias, dt_softplus=True).flatten(2)
        if norm:
            y = rmsnorm_fn(y, *scale, z=z, eps=1e-6, group_size=inner // G, norm_before_gate=False)
        return [y, *torch.autograd.grad(y, leaves, dout)]

    assert on_gpu.same_bits(whole(), parts())
    assert on_gpu.same_bits(on_gpu.replay(whole), parts())


def test_same_inputs_same_bits():
    args = inputs(2, 1000, 64, 64, 8, 128, torch.bfloat16)
    torch.manual_seed(0)
    first = compare(args)
    for _ in range(3):
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(first, compare(args)))


@pytest.mark.parametrize("packed", [False, True])
def test_graph_capture(packed):
    args = inputs(1, 500, 16, 64, 2, 128, torch.bfloat16, rows=2 if packed else 1)
    bounds = torch.tensor([0, 200, 500], dtype=torch.int32, device="cuda") if packed else None
    leaves = [None if a is None else a.requires_grad_() for a in args]
    wanted = [leaf for leaf in leaves if leaf is not None]

    def step():
        x, dt, A, B, C, D, z, bias, start = leaves
        outs = scan(x, dt, A, B, C, 64, D=D, z=z, dt_bias=bias, initial_states=start,
                    cu_seqlens=bounds, dt_softplus=True, return_final_states=True)  # fmt: skip
        return [*outs, *torch.autograd.grad([o.float().sum() for o in outs], wanted)]

    eager = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(eager, captured):
        assert torch.equal(a, b)


def test_more_than_2_31_elements():
    """Offsets along tokens need 64 bits. The last tokens equal those of a short run's end."""
    length, heads = 270_000, 128
    args = inputs(1, 64, heads, 64, 1, 16, torch.bfloat16)[:5]
    repeat = -(-length // 64)
    x, dt, B, C = (args[i].repeat(1, repeat, *[1] * (args[i].dim() - 2)) for i in (0, 1, 3, 4))
    assert x.numel() > 2**31
    short = slice(-6400, None)
    run = {"dt_softplus": True, "return_final_states": True}
    out, final = scan(x, dt + 5, args[2], B, C, 64, **run)
    tail, end = scan(*(t[:, short] if t.dim() > 2 else t for t in (x, dt + 5, args[2], B, C)), 64,
                     **run)  # fmt: skip
    torch.testing.assert_close(out[:, -640:], tail[:, -640:])
    torch.testing.assert_close(final, end)
    # Backward: where the gradient of the output is zero but at the end, that of a short run's end.
    args = (x, dt + 5, args[2], B, C, *[None] * 6)
    last = [t[:, short] if n in (0, 1, 3, 4) else t for n, t in enumerate(args[:5])]
    dout, dfinal = torch.zeros_like(out), torch.randn_like(final)
    dout[:, -640:] = out[:, -640:]
    options = (64, True, 0.0, INF, None)
    backward = torch.ops.nemokernels.ssd_chunk_scan_backward
    grads = backward(dout, dfinal, *args, out[:0], *options)
    want = backward(dout[:, short], dfinal, *last, *[None] * 6, out[:0], *options)
    for n in (0, 1, 3, 4):
        torch.testing.assert_close(grads[n][:, -640:], want[n][:, -640:])
