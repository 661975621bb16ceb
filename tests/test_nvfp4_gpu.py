"""The Triton kernels of nvfp4 on a GPU: every bit is the reference's."""

import on_gpu
import pytest
import torch

from nemokernels import (
    dequantize_nvfp4,
    hadamard16,
    quantize_nvfp4,
    quantize_nvfp4_pair,
    quantize_nvfp4_weight,
    swizzle_scales,
    use_backend,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("nvfp4", "triton"):
        yield


def check(fn, *tensors, **kwargs):
    """``fn`` on the GPU and on the CPU give the same bits; returns the GPU's result."""
    got = fn(*on_gpu.to("cuda", tensors), **on_gpu.to("cuda", kwargs))
    want = fn(*tensors, **kwargs)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (got, want))):
        assert torch.equal(a.cpu().reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    return got


def corners(rows, columns, dtype):
    binades = torch.exp2(torch.randint(-24, 4, (rows, columns // 16, 1)))
    x = torch.randn(rows, columns) * binades.expand(-1, -1, 16).reshape(rows, columns)
    x[0, :16], x[1, :4], x[2, 3], x[3, :16] = 0, -0.0, 1e-42, 1e-40
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("shape", [(0, 16), (16, 16), (48, 80), (272, 2688), (16, 21504)])
def test_quantise(shape, dtype, seed):
    x = corners(*shape, dtype) if shape[0] else torch.empty(shape, dtype=dtype)
    check(quantize_nvfp4, x, seed=seed)
    check(quantize_nvfp4_weight, x)
    check(quantize_nvfp4, x, block_rows=16, seed=seed, swizzled=True)
    for hadamard in (False, True):
        check(quantize_nvfp4_pair, x, hadamard=hadamard, seed=seed)
    check(quantize_nvfp4_pair, x, block_rows=16, swizzled=True)
    check(hadamard16, x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity(value):
    x = torch.randn(64, 128)
    x[5, 20] = value
    check(quantize_nvfp4, x)
    check(quantize_nvfp4, x, amax=torch.tensor(4.0), seed=1)
    check(quantize_nvfp4_pair, x, hadamard=True, seed=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantise_and_swizzle(dtype):
    q = quantize_nvfp4(torch.randn(3, 300, 208), amax=torch.rand(3) + 3)
    check(dequantize_nvfp4, *q, dtype=dtype)
    check(swizzle_scales, q.scales)


def test_repeats_and_graph():
    x = torch.randn(4096, 2688, device="cuda").bfloat16()
    seed = torch.tensor(5, device="cuda")
    run = lambda: torch.ops.nemokernels.quantize_nvfp4_pair(  # noqa: E731
        x, None, None, 1, True, seed, False
    )
    first = run()
    assert on_gpu.same_bits(first, run()) and on_gpu.same_bits(first, on_gpu.replay(run))
