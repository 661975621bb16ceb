"""Stochastic rounding, the Hadamard transform, both orientations."""

import math

import pytest
import torch

from nemokernels import (
    dequantize_nvfp4,
    hadamard16,
    pack_e2m1,
    quantize_nvfp4,
    quantize_nvfp4_pair,
    quantize_nvfp4_weight,
    swizzle_scales,
    testing,
    unpack_e2m1,
    unswizzle_scales,
)
from nemokernels._philox import philox4x32
from nemokernels.ops.nvfp4 import ref

GRID = torch.tensor(ref.VALUES[:8])


def same(a, b):
    return all(torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))
               for x, y in zip(a, b))  # fmt: skip


def exact_block(values):
    """With amax 2688 and a 6 in the block S is 1, the block scale 448: codes round these values."""
    return torch.tensor(values) * 448


def test_noise_byte_by_byte():
    """Element e takes byte e % 4 of word e % 16 // 4 of draw e // 16, in a stream per copy."""
    x = torch.zeros(3, 32)
    for seed in (0, 5, (1 << 64) - 3):
        tensor_seed = torch.tensor(seed - (1 << 64) if seed >> 63 else seed)
        for stream in (0, 1):
            noise = ref.noise_like(x, tensor_seed, stream).reshape(-1)
            for e in range(0, 96, 7):
                word = philox4x32(seed, torch.tensor(e // 16), stream)[e % 16 // 4]
                assert noise[e] == int(word) >> 8 * (e % 4) & 255


def test_rounding_against_the_definition():
    """Up exactly when fraction + noise / 256 reaches the next value; exhaustive in the noise."""
    noise = torch.arange(256)
    for low, high in zip(GRID[:-1].tolist(), GRID[1:].tolist()):
        for fraction in (0.0, 1 / 256, 0.3, 0.5, 0.996):
            x = torch.full((256,), low + fraction * (high - low))
            up = torch.floor(fraction + noise / 256.0) == 1
            want = torch.where(up, high, low)
            for sign in (1.0, -1.0):
                codes = ref.round_e2m1(sign * x, noise)
                assert torch.equal(torch.tensor(ref.VALUES)[codes.int()], sign * want)


def test_rounding_saturates_and_keeps_zero():
    x = torch.tensor([6.0, 7.9, torch.inf, -torch.inf, 0.0, -0.0, torch.nan]).repeat(256, 1)
    codes = ref.round_e2m1(x, torch.arange(256)[:, None])
    assert (codes == torch.tensor([7, 7, 7, 15, 0, 8, 7], dtype=torch.uint8)).all()


@pytest.mark.parametrize("value", [0.1, 0.7, 1.3, 1.99, 2.2, 3.9, 4.7, 5.9])
def test_stochastic_mean(value):
    """The mean is low by at most step / 256 (the noise is one of 256 values, cut off below), and
    the sampled mean is within 6 standard deviations of that."""
    n = 1 << 16
    x = exact_block([6.0] + [value] * 15).repeat(n // 15, 1)
    q = quantize_nvfp4(x, amax=torch.tensor(2688.0), seed=11)
    got = dequantize_nvfp4(*q, dtype=torch.float64)[:, 1:] / 448
    low = GRID[GRID <= value].max().item()
    step = GRID[GRID > value].min().item() - low
    p = (value - low) / step
    assert set(got.unique().tolist()) == {low, low + step}
    noise = 6 * step * math.sqrt(p * (1 - p) / got.numel())
    bias = got.mean().item() - value
    assert -step / 256 - noise <= bias <= noise


def test_mean_is_low_by_half_a_bit_of_noise():
    """Over fractions spread evenly the 8 random bits cost 1/512 of the step on average."""
    fractions = (torch.arange(4096) + 0.5) / 4096
    noise = torch.arange(256)
    codes = ref.round_e2m1((4 + 2 * fractions)[:, None].expand(-1, 256), noise.expand(4096, 256))
    bias = (GRID[codes.int()].double().mean(1) - (4 + 2 * fractions.double())).mean()
    assert bias.item() == pytest.approx(-2 / 512, rel=1e-3)


def test_seed_decides_and_grid_does_not():
    x = torch.randn(64, 96)
    amax = x.abs().max()
    q = quantize_nvfp4(x, seed=3)
    assert same(q, quantize_nvfp4(x, seed=torch.tensor([3])))
    assert same(quantize_nvfp4(x, seed=(1 << 64) - 3), quantize_nvfp4(x, seed=torch.tensor(-3)))
    assert not same(q, quantize_nvfp4(x, seed=4)) and not same(q, quantize_nvfp4(x))
    assert same(q[1:], quantize_nvfp4(x)[1:])  # the noise reaches the codes alone
    head = quantize_nvfp4(x[:10], amax=amax, seed=3)
    assert torch.equal(head.codes, q.codes[:10])
    assert torch.equal(quantize_nvfp4(x.view(8, 8, 96), seed=3).codes.view(64, 48), q.codes)


def test_neighbours_get_independent_noise():
    """Columns of coin flips, over elements, rows and the two copies, agree half of the time."""
    x = torch.full((4096, 16), 0.25)
    x[::16], x[:, 0] = 6.0, 6.0
    q, q_t = quantize_nvfp4_pair(x * 448, seed=2)
    inner = torch.arange(4096) % 16 != 0
    here, there = unpack_e2m1(q.codes).t()[1:, inner], unpack_e2m1(q_t.codes)[1:, inner]
    flips = torch.cat([here, there, here[:1].roll(1, 1)]).double() * 2 - 1
    assert set(flips.unique().tolist()) == {-1.0, 1.0}
    correlation = flips @ flips.t() / flips.shape[1] - torch.eye(len(flips))
    assert correlation.abs().max() < 6 / math.sqrt(flips.shape[1])


def test_swizzled_scales():
    x = torch.randn(3, 144, 80)
    plain, got = quantize_nvfp4(x, seed=1), quantize_nvfp4(x, seed=1, swizzled=True)
    assert same(got, plain._replace(scales=swizzle_scales(plain.scales)))
    pairs = [quantize_nvfp4_pair(x[0], hadamard=True, swizzled=s) for s in (False, True)]
    for want, have in zip(*pairs):
        assert same(have, want._replace(scales=swizzle_scales(want.scales)))


@pytest.mark.parametrize("seed", [None, 9])
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("block_rows", [1, 16])
def test_pair_equals_two_quantisations(seed, hadamard, block_rows):
    x = torch.randn(48, 80).bfloat16()
    rowwise, transposed = quantize_nvfp4_pair(
        x, block_rows=block_rows, hadamard=hadamard, seed=seed
    )
    assert same(rowwise, quantize_nvfp4(x, block_rows=block_rows, seed=seed))
    x_t = hadamard16(x.t()) if hadamard else x.t()
    tensor_seed = None if seed is None else torch.tensor(seed)
    codes, scales, scale_2 = ref.quantize(x_t.contiguous(), None, block_rows, tensor_seed, 1)
    assert same(transposed, (codes, scales, scale_2))
    amax, amax_t = torch.tensor(9.0), torch.tensor(12.0)
    given = quantize_nvfp4_pair(x, amax=amax, amax_t=amax_t, hadamard=hadamard)
    assert same(given[0], quantize_nvfp4(x, amax=amax))
    assert same(given[1], quantize_nvfp4(x_t, amax=amax_t))
    if not hadamard:
        assert same(quantize_nvfp4_pair(x, amax=amax)[1], quantize_nvfp4(x.t(), amax=amax))


def test_square_blocks_hold_the_same_values_both_ways():
    weight = torch.randn(64, 48)
    q, q_t = quantize_nvfp4_pair(weight, block_rows=16)
    assert torch.equal(dequantize_nvfp4(*q), dequantize_nvfp4(*q_t).t())
    assert torch.equal(unpack_e2m1(q.codes), unpack_e2m1(q_t.codes).t())
    narrow, narrow_t = quantize_nvfp4_pair(weight)
    assert not torch.equal(dequantize_nvfp4(*narrow), dequantize_nvfp4(*narrow_t).t())


def sylvester_entry(i, j):
    return (-1) ** (bin(i & j).count("1"))


def test_hadamard_matrix():
    signs = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    want = [[signs[i] * sylvester_entry(i, j) / 4 for j in range(16)] for i in range(16)]
    matrix = hadamard16(torch.eye(16, dtype=torch.float64))
    assert matrix.tolist() == want
    assert torch.equal(matrix @ matrix.t(), torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16,), (3, 5, 48), (0, 32), (4, 0)])
def test_hadamard_against_the_dense_sum(dtype, shape):
    x = torch.randn(shape).to(dtype)
    matrix = torch.tensor([[ref.SIGNS[i] * sylvester_entry(i, j) / 4 for j in range(16)]
                           for i in range(16)])  # fmt: skip
    blocks = x.double().reshape(*shape[:-1], shape[-1] // 16, 16)
    exact = torch.einsum("...i,ij->...j", blocks, matrix.double()).reshape(shape)
    low = torch.einsum("...i,ij->...j", blocks.float(), matrix).reshape(shape).to(dtype)
    got = hadamard16(x)
    assert got.dtype == dtype
    testing.assert_matches(got, exact, exact if dtype == torch.float64 else low)


def test_hadamard_gradcheck_and_adjoint():
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard16, (x,))
    y = hadamard16(x)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(dx, x.detach(), rtol=1e-13, atol=1e-13)


def test_stochastic_weight_gradient_is_unbiased():
    """dY^T X from the transformed X and many draws of the quantised, transformed dY: the transform
    cancels and the rounding is unbiased.

    A draw is low by at most 1/256 of a step on average (its noise has 8 bits) and its standard
    deviation is at most half a step; the mean of the draws must lie within both.
    """
    x, dy = torch.randn(64, 16), torch.randn(64, 32)
    x_t = hadamard16(x.t().double())
    total, draws = torch.zeros(32, 16, dtype=torch.float64), 256
    for seed in range(draws):
        q = quantize_nvfp4_pair(dy, hadamard=True, seed=seed)[1]
        total += dequantize_nvfp4(*q, dtype=torch.float64) @ x_t.t()
    step = 2 * q.scales.double().repeat_interleave(16, 1) * q.global_scale  # the widest
    spread = 6 * ((step / 2) ** 2 @ x_t.t() ** 2 / draws).sqrt()
    bias = step / 256 @ x_t.t().abs()
    assert ((total / draws - dy.t().double() @ x.double()).abs() <= spread + bias).all()


def test_hadamard_cancels_in_the_weight_gradient():
    """dW = dY^T X contracts over tokens; transforming both along the tokens changes nothing."""
    x, dy = torch.randn(64, 24, dtype=torch.float64), torch.randn(64, 40, dtype=torch.float64)
    want = dy.t() @ x
    got = hadamard16(dy.t()) @ hadamard16(x.t()).t()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_quantisation_refuses_a_gradient_and_so_do_its_parts():
    x = torch.randn(16, 32, requires_grad=True)
    q = quantize_nvfp4(x)
    with pytest.raises(RuntimeError, match="not differentiable"):
        q.global_scale.backward()
    with pytest.raises(ValueError, match="`scales` requires a gradient"):
        dequantize_nvfp4(q.codes, torch.ones(16, 2, requires_grad=True).to(q[1].dtype), q[2])
    with pytest.raises(ValueError, match="`global_scale` requires a gradient"):
        dequantize_nvfp4(q.codes, q.scales.detach(), q.global_scale)


@pytest.mark.parametrize("fn", [hadamard16, quantize_nvfp4, quantize_nvfp4_weight])
def test_compiles(fn):
    torch.compiler.reset()
    x = torch.randn(16, 32)
    got = torch.compile(fn, fullgraph=True, backend="aot_eager")(x)
    want = fn(x)
    assert same(*(o if isinstance(o, tuple) else (o,) for o in (got, want)))


X = torch.randn(16, 32)
Q = quantize_nvfp4(X)
BYTES = torch.zeros(128, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_nvfp4([1.0]), TypeError, "`x` must be a torch.Tensor"),
        (lambda: quantize_nvfp4(X.int()), TypeError, "`x` is torch.int32"),
        (lambda: quantize_nvfp4(torch.tensor(1.0)), ValueError, "`x` needs at least one axis"),
        (lambda: quantize_nvfp4(X[:, :24]), ValueError, "must be a multiple of 16"),
        (lambda: quantize_nvfp4(X, block_rows=8), ValueError, "`block_rows` is 8"),
        (lambda: quantize_nvfp4(X[:8], block_rows=16), ValueError, "rows in multiples of 16"),
        (lambda: quantize_nvfp4(X[0], block_rows=16), ValueError, "rows in multiples of 16"),
        (lambda: quantize_nvfp4(X, amax=1.0), TypeError, "`amax` must be a torch.Tensor"),
        (lambda: quantize_nvfp4(X, amax=torch.ones(32)), ValueError, "`amax` has shape"),
        (lambda: quantize_nvfp4(X, amax=torch.ones(1).half()), TypeError, "`amax` is torch.fl"),
        (lambda: quantize_nvfp4(X, seed=1.5), TypeError, "`seed` must be an integer"),
        (lambda: quantize_nvfp4(X, seed=-1), ValueError, "`seed` is -1"),
        (lambda: quantize_nvfp4(X, seed=1 << 64), ValueError, "`seed` is"),
        (lambda: quantize_nvfp4(X, seed=torch.ones(1)), TypeError, "`seed` is torch.float32"),
        (lambda: quantize_nvfp4_pair(X[0]), ValueError, r"`x` has shape \(32,\)"),
        (lambda: quantize_nvfp4_pair(X[:8]), ValueError, "must be a multiple of 16"),
        (lambda: quantize_nvfp4_pair(X, amax_t=torch.ones(16)), ValueError, "`amax_t` has shape"),
        (lambda: quantize_nvfp4_pair(X, amax=torch.ones(16)), ValueError, "`amax_t` is needed"),
        (lambda: quantize_nvfp4_weight(X[:, :8]), ValueError, "`weight` has shape"),
        (lambda: dequantize_nvfp4(Q.codes.int(), *Q[1:]), TypeError, "`codes` is torch.int32"),
        (lambda: dequantize_nvfp4(Q.codes[:, :4], *Q[1:]), ValueError, "`codes` has shape"),
        (lambda: dequantize_nvfp4(Q.codes, Q.scales[:4], Q[2]), ValueError, "`scales` has shape"),
        (lambda: dequantize_nvfp4(Q.codes, Q[1].float(), Q[2]), TypeError, "`scales` is torch.fl"),
        (lambda: dequantize_nvfp4(*Q[:2], None), TypeError, "`global_scale` must be a torch.Ten"),
        (lambda: dequantize_nvfp4(*Q, dtype=torch.int8), TypeError, "`dtype` is torch.int8"),
        (lambda: quantize_nvfp4(X[0], swizzled=True), ValueError, "scales need a matrix"),
        (lambda: hadamard16(X[:, :8]), ValueError, "must be a multiple of 16"),
        (lambda: pack_e2m1(BYTES[:, :3]), ValueError, "last axis of even size"),
        (lambda: pack_e2m1(X), TypeError, "`codes` is torch.float32"),
        (lambda: unpack_e2m1(X), TypeError, "`packed` is torch.float32"),
        (lambda: swizzle_scales(BYTES[0]), ValueError, "`scales` has shape"),
        (lambda: swizzle_scales(X), TypeError, "`scales` is torch.float32"),
        (lambda: unswizzle_scales(BYTES, rows=129, columns=4), ValueError, "`rows` is 129"),
        (lambda: unswizzle_scales(BYTES, rows=128, columns=5), ValueError, "`columns` is 5"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
