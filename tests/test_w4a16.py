"""NVFP4 weights with unquantised activations: the tiled layout, the linear layer, the experts."""

import math

import pytest
import torch

from nemokernels import (
    NVFP4,
    TiledNVFP4,
    dequantize_nvfp4,
    moe_experts,
    moe_route,
    nvfp4_linear,
    pack_e2m1,
    quantize_nvfp4_weight,
    testing,
    tile_nvfp4,
    unpack_e2m1,
    untile_nvfp4,
)


def quantized(n, k):
    return quantize_nvfp4_weight(torch.randn(n, k) / math.sqrt(max(k, 1)))


def random_weight(*shape, scale_2=None):
    """Every code and every block scale that is a number and not negative."""
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    scales = torch.randint(0, 127, (*shape[:-1], shape[-1] // 16), dtype=torch.uint8)
    scale_2 = torch.rand(shape[:-2]) / 100 if scale_2 is None else scale_2
    return NVFP4(codes, scales.view(torch.float8_e4m3fn), scale_2)


def same_bytes(a, b):
    return all(torch.equal(s.contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))
               for s, t in zip(a[:2], b[:2])) and torch.equal(a[2], b[2])  # fmt: skip


@pytest.mark.parametrize("shape", [(16, 64), (1, 16), (17, 80), (40, 208), (3, 32, 128), (0, 64),
                                   (16, 0), (2, 0, 5, 48)])  # fmt: skip
def test_tiling_is_undone_byte_for_byte(shape):
    weight = random_weight(*shape)
    tiled = tile_nvfp4(weight)
    rows, columns = shape[-2:]
    tiles = (*shape[:-2], -(-rows // 16), -(-columns // 64), 16)
    assert tiled.codes.shape == (*tiles, 32) and tiled.scales.shape == (*tiles, 4)
    assert same_bytes(untile_nvfp4(tiled), weight)
    assert tiled.codes.is_contiguous() and tiled.scales.is_contiguous()


def test_where_each_element_lies():
    """Byte i of a block holds elements i and i + 8; tiles are 16 x 64; the padding is zero."""
    weight = random_weight(35, 144)
    codes, tiled = unpack_e2m1(weight.codes), tile_nvfp4(weight)
    for n, k in ((0, 0), (5, 7), (5, 8), (16, 63), (34, 143), (20, 100)):
        byte = tiled.codes[n // 16, k // 64, n % 16, k % 64 // 16 * 8 + k % 8]
        assert (byte >> 4 * (k % 16 // 8)) & 15 == codes[n, k]
        scale = tiled.scales[n // 16, k // 64, n % 16, k % 64 // 16]
        assert scale == weight.scales.view(torch.uint8)[n, k // 16]
    assert not tiled.codes[2, :, 3:].any() and not tiled.codes[:, 2, :, 8:].any()
    assert not tiled.scales[2, :, 3:].any() and not tiled.scales[:, 2, :, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7, 48), (1, 1, 16), (33, 24, 160)])
def test_linear_equals_dequantise_then_product(dtype, shape):
    m, n, k = shape
    x, q, dy = torch.randn(m, k).to(dtype), quantized(n, k), torch.randn(m, n).to(dtype)
    unscaled = q._replace(global_scale=torch.ones(()))

    def dense(kind):
        weight = dequantize_nvfp4(*unscaled, dtype=kind)
        return lambda a: torch.nn.functional.linear(a, weight) * q.global_scale.to(kind)

    got, (dx,) = testing.gradients(lambda a: nvfp4_linear(a, q), [x], [dy])
    exact, (exact_dx,) = testing.gradients(dense(torch.float64), [x.double()], [dy.double()])
    low, (low_dx,) = testing.gradients(dense(torch.float32), [x.float()], [dy.float()])
    if dtype == torch.float64:
        torch.testing.assert_close(got[0], exact[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(dx, exact_dx, rtol=1e-13, atol=1e-13)
    else:
        assert got[0].dtype == dx.dtype == dtype
        testing.assert_matches(got[0], exact[0], low[0].to(dtype), "y")
        testing.assert_matches(dx, exact_dx, low_dx.to(dtype), "dx")
    tiled = tile_nvfp4(q)
    assert torch.equal(nvfp4_linear(x, tiled), got[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_rounds_nothing_of_the_weight(dtype):
    """Differences of two weights, exact without the global scale, show a rounding in between."""
    q = random_weight(32, 32, scale_2=torch.tensor(1 / 3))
    exact = dequantize_nvfp4(*q._replace(global_scale=torch.ones(())), dtype=torch.float32)
    assert torch.equal(exact.to(dtype).float(), exact)
    x = (torch.eye(32) - torch.eye(32).roll(1, 1)).to(dtype)
    y, (dx,) = testing.gradients(lambda a: nvfp4_linear(a, q), [x], [x])
    assert torch.equal(y[0], ((x.float() @ exact.t()) * q.global_scale).to(dtype))
    assert torch.equal(dx, ((x.float() @ exact) * q.global_scale).to(dtype))


def test_linear_gradcheck_strides_and_leading_axes():
    q = quantized(6, 32)
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: nvfp4_linear(a, q), (x,))
    wide = torch.randn(32, 3, 2).permute(2, 1, 0)
    assert torch.equal(nvfp4_linear(wide, q), nvfp4_linear(wide.contiguous(), q))
    torch.testing.assert_close(nvfp4_linear(wide[0, 0], q), nvfp4_linear(wide, q)[0, 0])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 4, 16), (3, 0, 16), (3, 4, 0)])
def test_linear_zero_sizes(m, n, k):
    x = torch.randn(m, k, requires_grad=True)
    y = nvfp4_linear(x, quantized(n, k))
    y.sum().backward()
    assert y.shape == (m, n) and x.grad.shape == (m, k) and not x.grad.isnan().any()
    assert k or not y.any()


def test_linear_nan_row_and_autocast():
    q, x = quantized(4, 32), torch.randn(5, 32)
    clean = nvfp4_linear(x, q)
    x[1, 2] = torch.nan
    y = nvfp4_linear(x, q)
    assert y[1].isnan().all() and torch.equal(y[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nvfp4_linear(x[2:], q), nvfp4_linear(x[2:].bfloat16(), q))


def experts_of(count, width, hidden, dtype=torch.float32):
    """up and down in NVFP4, and dequantised without their global scales in float64."""
    packed, wide = [], []
    for shape in ((count, hidden, width), (count, width, hidden)):
        weight = torch.randn(shape) / shape[-1] ** 0.5
        q = quantize_nvfp4_weight(weight, amax=weight.abs().amax((1, 2)))
        wide.append(dequantize_nvfp4(*q, dtype=torch.float64))
        packed.append(tile_nvfp4(q))
    return packed, wide


def route_of(tokens, experts, top_k):
    logits = torch.randn(tokens, experts)
    if top_k < experts:
        logits[:, 0] = -torch.inf
    return moe_route(logits, top_k=top_k, scale=2.5)


@pytest.mark.parametrize("tokens", [0, 1, 7, 65])
def test_experts_equal_dequantised_experts(tokens):
    route = route_of(tokens, 5, 2)
    packed, wide = experts_of(5, 48, 80)
    x = torch.randn(tokens, 48, dtype=torch.float64)
    weights = route._replace(weights=route.weights.double())
    got, want = moe_experts(x, *packed, weights), moe_experts(x, *wide, weights)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_in_low_precision(dtype):
    route = route_of(33, 5, 2)
    packed, wide = experts_of(5, 48, 80)
    x = torch.randn(33, 48).to(dtype)
    exact = moe_experts(x.double(), *wide, route._replace(weights=route.weights.double()))
    # Unquantised experts round their weights; these do not and may err no more.
    low = moe_experts(x, *(w.to(dtype) for w in wide), route)
    testing.assert_matches(moe_experts(x, *packed, route), exact, low)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_cast_points(dtype):
    """hidden and the rows that leave an expert are rounded, once each. Small codes, scales that are
    powers of two and few columns make every sum exact: not one bit may differ."""
    small = torch.tensor([0, 1, 2, 3, 4, 9, 10, 11, 12], dtype=torch.uint8)

    def matrix(rows, columns, scale_2):
        codes = pack_e2m1(small[torch.randint(9, (3, rows, columns))])
        scales = torch.ones(3, rows, columns // 16).to(torch.float8_e4m3fn)
        q = NVFP4(codes, scales, torch.tensor(scale_2))
        return tile_nvfp4(q), dequantize_nvfp4(*q, dtype=torch.float32)

    (up, wide_up), (down, wide_down) = (
        matrix(16, 32, [1.0, 0.5, 2.0]), matrix(32, 16, [0.25, 1.0, 2.0])
    )  # fmt: skip
    x, route = torch.randint(-2, 3, (9, 32)).to(dtype), route_of(9, 3, 2)
    route = route._replace(weights=torch.randint(4, 8, (9, 2)) / 8)
    want, rounded = torch.zeros(9, 32), 0
    for t in range(9):
        for j in range(2):
            e = route.experts[t, j]
            exact = (wide_up[e] @ x[t].float()).relu().square()
            h = exact.to(dtype).float()
            out = (wide_down[e] @ h).to(dtype).float()
            rounded += (h != exact).any() + (out != wide_down[e] @ h).any()
            want[t] += route.weights[t, j] * out
    assert rounded > 9 and torch.equal(moe_experts(x, up, down, route), want.to(dtype))


def test_experts_nan_stays_in_its_token_and_autocast():
    route, (packed, _) = route_of(6, 4, 2), experts_of(4, 32, 32)
    x = torch.randn(6, 32)
    clean = moe_experts(x, *packed, route)
    x[2, 5] = torch.nan
    got = moe_experts(x, *packed, route)
    assert got[2].isnan().all() and torch.equal(got[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])
    with torch.autocast("cpu", torch.bfloat16):
        got = moe_experts(x[3:], *packed, route_of(3, 4, 2))
    assert got.dtype == torch.bfloat16


def test_experts_refuse_a_gradient():
    route, (packed, _) = route_of(3, 2, 1), experts_of(2, 16, 16)
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="nvfp4_experts is not differentiable"):
        moe_experts(x, *packed, route).sum().backward()


X, W = torch.randn(4, 32), random_weight(8, 32, scale_2=torch.ones(()))
UP, DOWN = tile_nvfp4(random_weight(3, 16, 32)), tile_nvfp4(random_weight(3, 32, 16))
R = moe_route(torch.zeros(4, 3), top_k=2)
NEGATIVE = W._replace(scales=(-W.scales.float()).to(torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tile_nvfp4(W.codes), TypeError, "tile_nvfp4: `weight` must be a NVFP4, got Tens"),
        (lambda: tile_nvfp4(NEGATIVE), ValueError, "`scales` holds a negative scale"),
        (lambda: tile_nvfp4(W._replace(codes=W.codes.int())), TypeError, "`codes` is torch.int32"),
        (lambda: tile_nvfp4(W._replace(codes=W.codes[:, :12])), ValueError, "K a multiple of 16"),
        (lambda: tile_nvfp4(W._replace(scales=W.scales[:4])), ValueError, "`scales` has shape"),
        (lambda: tile_nvfp4(W._replace(scales=W.scales.float())), TypeError, "`scales` is torch.f"),
        (lambda: tile_nvfp4(NVFP4(W.codes[0], W.scales[0], W[2])), ValueError, r"\(..., N, K/2\)"),
        (lambda: untile_nvfp4(W), TypeError, "`weight` must be a TiledNVFP4, got NVFP4"),
        (lambda: untile_nvfp4(UP._replace(rows=17)), ValueError, "`weight.codes` has shape"),
        (lambda: untile_nvfp4(UP._replace(columns=31)), ValueError, "columns in multiples of 16"),
        (lambda: untile_nvfp4(UP._replace(scales=UP.codes)), ValueError, "`weight.scales` has"),
        (lambda: nvfp4_linear(X, W.codes), TypeError, "must be a NVFP4 or TiledNVFP4, got Tensor"),
        (lambda: nvfp4_linear(X[:, :16], W), ValueError, "`x` has 16 features, `weight` 32"),
        (lambda: nvfp4_linear(X, UP), ValueError, "`weight.codes` has shape"),
        (lambda: nvfp4_linear(X.to("meta"), W), ValueError, "`codes` is on cpu, expected meta"),
        (lambda: nvfp4_linear(X, W._replace(global_scale=torch.ones(8))), ValueError,
         "`weight.global_scale` has shape"),
        (lambda: nvfp4_linear(X, tile_nvfp4(W)._replace(global_scale=torch.ones((),
            requires_grad=True))), ValueError, "`weight.global_scale` requires a gradient"),
        (lambda: moe_experts(X, UP, DOWN[0], R), TypeError, "`down` must be a TiledNVFP4"),
        (lambda: moe_experts(X, UP, UP, R), ValueError, "`down` is 16 x 32, expected 32 x 16"),
        (lambda: moe_experts(X, DOWN, UP, R), ValueError, "`up` has 16 columns, expected the 32"),
        (lambda: moe_experts(X, UP._replace(global_scale=torch.ones(())), DOWN, R), ValueError,
         "`up.global_scale` has shape"),
        (lambda: moe_experts(X, tile_nvfp4(W), DOWN, R), ValueError, "expected experts in tiles"),
        (lambda: moe_experts(X, UP, DOWN, (1, 2)), TypeError, "`route` must be a Route"),
        (lambda: moe_experts(X, UP, DOWN, R._replace(offsets=R.offsets[:2])), ValueError,
         "`route.offsets` has shape"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_packing_takes_four_and_a_half_bits():
    tiled: TiledNVFP4 = tile_nvfp4(random_weight(2, 64, 128))
    assert tiled.codes.nbytes + tiled.scales.nbytes == 2 * 64 * 128 * 4.5 / 8
