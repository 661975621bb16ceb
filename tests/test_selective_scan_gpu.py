"""The selective scan's Triton kernels on a GPU, against its reference in float64 there."""

import pytest
import torch
from on_gpu import replay, same_bits
from selective_scans import low_gradients

from nemokernels import selective_scan_fn, testing, use_backend
from nemokernels.ops.selective_scan import ref

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = "out last du ddelta dA dB dC dD dz ddelta_bias dinitial".split()


@pytest.fixture(autouse=True)
def triton_kernels():
    with use_backend("selective_scan", "triton", "cuda"):
        yield


def inputs(batch, length, dim, groups, state, dtype, *, rows=None, gate=True):
    """The operator's tensors, with the steps and decays of real layers."""

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device="cuda").to(dtype)

    wide = torch.float32
    bias = torch.exp(torch.rand(dim, device="cuda") * 4.6 - 6.9).expm1().log()
    A = -torch.arange(1, state + 1, device="cuda", dtype=wide).expand(dim, state).contiguous()
    return [
        randn(batch, dim, length).transpose(1, 2), randn(batch, length, dim) / 2, A,
        randn(batch, length, groups, state), randn(batch, length, groups, state),
        randn(dim, dtype=wide), randn(batch, length, 2 * dim)[..., dim:] if gate else None, bias,
        randn(rows or batch, dim, state, dtype=wide),
    ]  # fmt: skip


def compare(args, bounds=None):
    operators, whole = torch.ops.nemokernels, (*args, bounds, True)
    got = operators.selective_scan(*whole)
    grads = (torch.randn_like(got[0]), torch.randn_like(got[1]))
    got += operators.selective_scan_backward(*grads, *whole)
    exact = ref.forward(*testing.to_double(whole))
    exact += ref.backward(*testing.to_double((*grads, *whole)))
    low = [*ref.forward(*whole), *low_gradients((*grads, *whole), exact[2:])]
    for name, *three in zip(NAMES, got, exact, low):
        testing.assert_matches(*three, name)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 300, 3200, 1, 16), (2, 129, 1024, 4, 16), (2, 77, 100, 2, 10), (1, 50, 64, 1, 128),
     (1, 1, 33, 1, 1)],
)  # fmt: skip
def test_matches_reference(shape, dtype):
    compare(inputs(*shape, dtype))
    compare(inputs(*shape, dtype, gate=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_equals_separate_bit_for_bit(dtype):
    bounds = [0, 64, 64, 200, 201, 290]
    args = inputs(1, 300, 320, 1, 16, dtype, rows=5)
    out, last = torch.ops.nemokernels.selective_scan(
        *args, torch.tensor(bounds, dtype=torch.int32, device="cuda"), True
    )
    assert (out[:, 290:] == 0).all()
    for n, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:])):
        own = [a[:, lo:hi] if i in (0, 1, 3, 4, 6) else a for i, a in enumerate(args)]
        own[8] = args[8][n : n + 1]
        alone = torch.ops.nemokernels.selective_scan(*own, None, True)
        assert same_bits((out[:, lo:hi], last[n : n + 1]), alone)
    compare(args, torch.tensor(bounds, dtype=torch.int32, device="cuda"))


def test_same_inputs_same_bits_and_graph_capture():
    args = inputs(2, 200, 640, 1, 16, torch.bfloat16)
    dout = torch.randn(2, 200, 640, device="cuda", dtype=torch.bfloat16)
    dlast = torch.randn(2, 640, 16, device="cuda")
    run = torch.ops.nemokernels.selective_scan_backward
    first = run(dout, dlast, *args, None, True)
    assert same_bits(first, run(dout, dlast, *args, None, True))
    assert same_bits(first, replay(lambda: run(dout, dlast, *args, None, True)))


def test_more_than_2_31_elements():
    """Offsets along tokens need 64 bits. The last tokens equal those of a short run's end."""
    length, dim = 270_000, 8192
    u = torch.randn(1, dim, 100, device="cuda", dtype=torch.bfloat16).repeat(1, 1, length // 100)
    B = torch.randn(1, 16, 100, device="cuda", dtype=torch.bfloat16).repeat(1, 1, length // 100)
    assert u.numel() > 2**31
    A = -torch.ones(dim, 16, device="cuda")
    out, last = selective_scan_fn(u, u.abs() + 1, A, B, B, return_last_state=True)
    u, B = u[..., -1000:].clone(), B[..., -1000:].clone()
    short, end = selective_scan_fn(u, u.abs() + 1, A, B, B, return_last_state=True)
    torch.testing.assert_close(out[..., -500:], short[..., -500:])
    torch.testing.assert_close(last, end)
