"""Products of two NVFP4 operands: the linear layer, the experts, what the plan says."""

import ml_dtypes
import numpy as np
import pytest
import torch

from nemokernels import (
    NVFP4,
    NVFP4Experts,
    SwizzledNVFP4,
    backends,
    dequantize_nvfp4,
    moe_experts,
    moe_route,
    nvfp4_linear,
    quantize_nvfp4,
    quantize_nvfp4_pair,
    quantize_nvfp4_weight,
    swizzle_nvfp4,
    swizzle_scales,
    tile_nvfp4,
    use_backend,
)
from nemokernels.ops.nvfp4_gemm import op, ref

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def decoded(q: NVFP4) -> np.ndarray:
    """An NVFP4 matrix in float64, by ml_dtypes' decoding and one loop per block."""
    codes, scales = q.codes.numpy(), q.scales.view(torch.uint8).numpy()
    out = np.zeros((codes.shape[0], 2 * codes.shape[1]))
    for r, c in np.ndindex(*scales.shape):
        pairs = codes[r, 8 * c : 8 * c + 8]
        nibbles = np.stack([pairs & 15, pairs >> 4], 1).reshape(-1)
        block = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        out[r, 16 * c : 16 * c + 16] = block * float(scales[r, c].view(ml_dtypes.float8_e4m3fn))
    return out * q.global_scale.double().numpy()


def rounded(exact: np.ndarray) -> np.ndarray:
    return exact.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def random_operand(*shape, scale_2=None):
    """Every code and every block scale that is a number and not negative."""
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    scales = torch.randint(0, 127, (*shape[:-1], shape[-1] // 16), dtype=torch.uint8)
    scale_2 = torch.rand(shape[:-2]) / 100 if scale_2 is None else scale_2
    return NVFP4(codes, scales.view(torch.float8_e4m3fn), scale_2)


@pytest.mark.parametrize("m, n, k", [(5, 7, 48), (1, 16, 16), (130, 136, 96), (33, 129, 272)])
def test_linear_by_another_formula(m, n, k):
    a, b = random_operand(m, k), random_operand(n, k)
    y = nvfp4_linear(swizzle_nvfp4(a), swizzle_nvfp4(b))
    exact = decoded(a) @ decoded(b).T
    assert y.dtype == BF16 and y.shape == (m, n)
    # float32 sums of exact products, one float32 factor, one rounding: K + 2 roundings of the sum
    # of magnitudes, and half an ulp of bfloat16.
    budget = (k + 2) * 2.0**-24 * (np.abs(decoded(a)) @ np.abs(decoded(b)).T) + np.abs(exact) / 256
    assert (np.abs(y.double().numpy() - exact) <= budget).all()
    alpha = a.global_scale.double() * b.global_scale.double()
    wide = ref.product(a.codes, swizzle_scales(a.scales).view(torch.uint8), b.codes,
                       swizzle_scales(b.scales).view(torch.uint8), alpha)  # fmt: skip
    np.testing.assert_allclose(wide.numpy(), exact, rtol=1e-12, atol=1e-12 * np.abs(exact).max())


def test_linear_of_small_numbers_is_exact():
    """Sums that fit float32 and bfloat16: not one bit may differ."""
    x, w = torch.randint(-3, 4, (9, 64)).float(), torch.randint(-1, 2, (24, 64)).float()
    one = torch.tensor(2688.0)  # a global scale of 1
    q = quantize_nvfp4(x, amax=one, swizzled=True)
    plain = quantize_nvfp4(x, amax=one)
    weight = quantize_nvfp4_weight(w, amax=one)
    exact = decoded(plain) @ decoded(weight).T
    y = nvfp4_linear(q, swizzle_nvfp4(weight))
    assert np.array_equal(y.double().numpy(), rounded(exact))


def test_quantisers_return_what_products_read():
    x = torch.randn(32, 48)
    swizzled, plain = quantize_nvfp4(x, swizzled=True), quantize_nvfp4(x)
    assert type(swizzled) is SwizzledNVFP4 and type(plain) is NVFP4
    again = swizzle_nvfp4(plain)
    assert all(torch.equal(s.view(torch.uint8), t.view(torch.uint8))
               for s, t in zip(swizzled[:2], again[:2]))  # fmt: skip
    assert swizzled.global_scale == plain.global_scale
    pair = quantize_nvfp4_pair(x, swizzled=True)
    assert [type(q) for q in pair] == [SwizzledNVFP4] * 2
    assert torch.equal(pair[0].scales.view(torch.uint8), swizzled.scales.view(torch.uint8))


@pytest.mark.parametrize("m, n, k", [(0, 8, 32), (3, 0, 32), (3, 8, 0)])
def test_linear_zero_sizes(m, n, k):
    y = nvfp4_linear(swizzle_nvfp4(random_operand(m, k)), swizzle_nvfp4(random_operand(n, k)))
    assert y.shape == (m, n) and not y.any()


def test_a_nan_block_stays_in_its_row():
    x = torch.randn(6, 64)
    weight = swizzle_nvfp4(quantize_nvfp4_weight(torch.randn(8, 64)))
    amax = x.abs().max()
    clean = nvfp4_linear(quantize_nvfp4(x, amax=amax, swizzled=True), weight)
    x[2, 5] = torch.nan
    y = nvfp4_linear(quantize_nvfp4(x, amax=amax, swizzled=True), weight)
    rest = [0, 1, 3, 4, 5]
    assert y[2].isnan().all() and torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize(
    "ends", [(5, 5, 12), (0, 128, 128), (129, 130, 130), (0, 0, 0), (1, 2, 258)]
)
def test_scales_of_groups_begin_at_tiles(ends):
    offsets = torch.tensor(ends, dtype=torch.int32)
    scales = torch.randint(1, 127, (ends[-1], 5), dtype=torch.uint8)
    grouped = ref.group_scales(scales, offsets)
    assert grouped.shape == (ref.padded_rows(ends[-1], 3), 8)
    first = start = 0
    for end in ends:
        tiles = -(-(end - start) // 128) * 128
        own = swizzle_scales(scales[start:end])
        assert torch.equal(grouped[first : first + tiles], own)
        first, start = first + tiles, end
    assert first <= grouped.shape[0] and not grouped[first:].any()


def test_scales_of_groups_that_are_none_stay_in_bounds():
    offsets = torch.tensor([1, 0] * 20 + [3], dtype=torch.int32)
    grouped = ref.group_scales(torch.ones(3, 4, dtype=torch.uint8), offsets)
    assert grouped.shape == (ref.padded_rows(3, 41), 4)


def test_padded_rows_are_enough_for_any_split():
    for rows in range(0, 300, 7):
        for experts in (1, 2, 5):
            most = min(experts, rows)  # all but one with a single row
            split = [1] * (most - 1) + [rows - (most - 1)] if rows else []
            assert sum(-(-c // 128) * 128 for c in split) <= ref.padded_rows(rows, experts)


def experts_of(count, width, hidden):
    """up and down, their parts before swizzling, and static scales for what they multiply."""
    made = []
    for shape, top in (((count, hidden, width), (3.0,)),
                       ((count, width, hidden), tuple(range(5, 5 + count)))):  # fmt: skip
        w = torch.randn(shape) / shape[-1] ** 0.5
        q = quantize_nvfp4_weight(w, amax=w.abs().amax((1, 2)))
        made.append((q, NVFP4Experts(*swizzle_nvfp4(q), torch.tensor(top) / 2688)))
    return made


@pytest.mark.parametrize("tokens", [0, 1, 7, 150])
def test_experts_by_another_formula(tokens):
    """One expert, one token and one slot at a time, with the public quantiser, in float64."""
    logits = torch.randn(tokens, 4)
    logits[:, 1] = -torch.inf
    route = moe_route(logits, top_k=2)
    (up, up_q), (down, down_q) = experts_of(4, 32, 48)
    x = torch.randn(tokens, 32, dtype=F64)
    y = moe_experts(x, up_q, down_q, route._replace(weights=route.weights.double()))
    want = np.zeros((tokens, 32))
    x4 = decoded(quantize_nvfp4(x, amax=torch.tensor(3.0) / 2688 * 2688)) if tokens else None
    matrices = [[decoded(NVFP4(*(p[e] for p in q))) for e in range(4)] for q in (up, down)]
    for t in range(tokens):
        for j in range(2):
            e = int(route.experts[t, j])
            h = np.maximum(matrices[0][e] @ x4[t], 0) ** 2
            amax = down_q.input_scale[e] * 2688
            h4 = decoded(quantize_nvfp4(torch.from_numpy(h)[None], amax=amax))[0]
            want[t] += float(route.weights[t, j]) * (matrices[1][e] @ h4)
    # The global scales are float32 products; everything else is exact or float64.
    np.testing.assert_allclose(
        y.numpy(), want, rtol=1e-6, atol=1e-6 * max(np.abs(want).max(initial=0), 1)
    )


def test_a_square_is_rounded_once():
    """Sums that fit float32, squares that do not fit bfloat16: rounded after the square alone."""
    rows, matrices = torch.randint(256, (9, 32)).byte(), torch.randint(256, (2, 24, 32)).byte()
    one, offsets = torch.tensor(1.0), torch.tensor([7, 9], dtype=torch.int32)
    scales, more = (one.expand(*n, 4).to(torch.float8_e4m3fn) for n in ((9,), (2, 24)))
    a, b = (dequantize_nvfp4(*q, one, dtype=F32) for q in ((rows, scales), (matrices, more)))
    args = (rows, ref.group_scales(scales.view(torch.uint8), offsets), matrices,
            swizzle_scales(more).view(torch.uint8), torch.ones(2), offsets)  # fmt: skip
    wide = torch.cat([a[:7] @ b[0].T, a[7:] @ b[1].T])
    square = wide.relu().square()
    assert torch.equal(ref.grouped_product(*args, False), wide.to(BF16))
    assert torch.equal(ref.grouped_product(*args, True), square.to(BF16))
    assert not torch.equal(square.to(BF16), wide.to(BF16).relu().square())


@pytest.mark.parametrize("counts", [(128, 0, 130, 142), (0, 399, 0, 1), (1, 127, 255, 17)])
def test_pieces_of_the_rows_have_the_same_bits(counts):
    """In float64 no product and no sum is rounded, whatever they are multiplied beside."""
    (_, up), (_, down) = experts_of(4, 160, 48)
    offsets, order = torch.tensor(counts).cumsum(0).int(), torch.randperm(400).int()
    x, weights = torch.randn(200, 160, dtype=F64), torch.rand(200, 2, dtype=F64)
    args = x, up.input_scale, *up[:3], down.input_scale, *down[:3], weights, offsets, order
    each, sizes, results = 160 + 48 * 9, [], []

    def multiply(*args):
        sizes[-1].append(args[-1].shape)
        assert args[5][-1] == len(args[0]) and (args[5].diff() >= 0).all()
        return ref.grouped_product(*args)

    for most in (2**40, 1, 272 * each):
        sizes.append([])
        results.append(ref.compose(multiply, *args, slot_bytes=most))
    few = [(128, 48)] * 3 + [(16, 48)]
    assert sizes == [[(400, 48), (400, 160)], few + [(400, 128), (400, 32)],
                     [(256, 48), (144, 48), (400, 128), (400, 32)]]  # fmt: skip
    assert all(torch.equal(results[0], y) for y in results[1:]) and results[0].any(1).all()


def test_experts_round_to_the_dtype_of_x():
    (_, up), (_, down) = experts_of(4, 32, 48)
    x, route = torch.randn(9, 32), moe_route(torch.randn(9, 4), top_k=2)
    exact = moe_experts(x.double(), up, down, route._replace(weights=route.weights.double()))
    for dtype in (F32, BF16, torch.float16):
        y = moe_experts(x.to(dtype), up, down, route)
        assert y.dtype == dtype and (y - exact).norm() < exact.norm() / 4
    with torch.autocast("cpu", BF16):
        assert torch.equal(
            moe_experts(x, up, down, route), moe_experts(x.bfloat16(), up, down, route)
        )


def test_experts_nan_stays_in_its_token():
    (_, up), (_, down) = experts_of(4, 32, 48)
    x, route = torch.randn(6, 32), moe_route(torch.randn(6, 4), top_k=2)
    clean = moe_experts(x, up, down, route)
    x[2, 5] = torch.nan
    y, rest = moe_experts(x, up, down, route), [0, 1, 3, 4, 5]
    assert y[2].isnan().all() and torch.equal(y[rest], clean[rest])


def test_plan():
    both = ("csrc", "reference")
    assert op.plan([(96, 136)], BF16, True, both) == op.Config("csrc")
    assert "K in multiples of 32, got 48" in op.plan([(48, 136)], BF16, True, both).reason
    assert "N in multiples of 8, got 12" in op.plan([(96, 12)], BF16, True, both).reason
    assert "aligned to 16 bytes" in op.plan([(96, 136)], BF16, False, both).reason
    assert "returns bfloat16, not torch.float32" in op.plan([(96, 136)], F32, True, both).reason
    two = op.plan([(96, 136), (136, 96)], BF16, True, both)
    assert two.backend == "reference" and "got 136" in two.reason
    assert op.plan([(96, 136)], BF16, True, ("reference",)).backend == "reference"
    with pytest.raises(RuntimeError, match="nvfp4_gemm: csrc takes K in multiples of 32, got 48"):
        op.plan([(48, 136)], BF16, True, ("csrc",))


def test_which_devices_have_the_matrix_units(monkeypatch):
    assert op.no_matrix_units((10, 0)) is op.no_matrix_units((12, 0)) is None
    for capability in ((8, 0), (9, 0), (11, 0)):
        assert "10.x or 12.x, this device has {}.{}".format(*capability) in op.no_matrix_units(
            capability
        )
    monkeypatch.setattr(op._triton, "reason", lambda device: None)
    monkeypatch.setattr(op._ext, "reason", lambda device: "the CUDA library is not built")
    for capability, why in (((9, 0), "10.x or 12.x, this device has 9.0"), ((12, 0), "not built")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert why in op.reason(torch.device("cuda"))
    monkeypatch.undo()
    row = backends("cpu")["nvfp4_gemm"]
    assert row["chosen"] == "reference" and "this is cpu" in row["rejected"]["csrc"]
    with pytest.raises(RuntimeError, match="backend 'csrc' of op 'nvfp4_gemm' cannot run on cpu"):
        with use_backend("nvfp4_gemm", "csrc", "cpu"):
            pass


X, W = (swizzle_nvfp4(random_operand(n, 64, scale_2=torch.ones(()))) for n in (4, 8))
PLAIN = random_operand(8, 64, scale_2=torch.ones(()))
NEGATIVE = PLAIN._replace(scales=(-PLAIN.scales.float()).to(torch.float8_e4m3fn))
(_, UP), (_, DOWN) = experts_of(3, 32, 48)
SEVENTEEN, (_, (_, SIXTEEN)) = UP._replace(codes=UP.codes[:, :17]), experts_of(3, 32, 16)
R = moe_route(torch.zeros(4, 3), top_k=2)


def run(up=UP, down=DOWN, **changes):
    x = changes.pop("x", torch.zeros(4, 32))
    return moe_experts(x, up._replace(**changes), down, R)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: swizzle_nvfp4(W), TypeError, "`weight` must be a NVFP4, got SwizzledNVFP4"),
        (lambda: swizzle_nvfp4(NEGATIVE), ValueError, "`scales` holds a negative scale"),
        (lambda: swizzle_nvfp4(PLAIN._replace(codes=PLAIN.codes[:, :28])), ValueError, "`codes`"),
        (lambda: swizzle_nvfp4(NVFP4(PLAIN[0][0], PLAIN[1][0], PLAIN[2])), ValueError, r"K/2\)"),
        (lambda: nvfp4_linear(X, PLAIN), TypeError, "`weight` must be a SwizzledNVFP4, got NVFP4"),
        (lambda: nvfp4_linear(X, tile_nvfp4(PLAIN)), TypeError, "be a SwizzledNVFP4, got Tiled"),
        (lambda: nvfp4_linear(torch.zeros(4, 64), W), TypeError, "must be a NVFP4 or TiledNVFP4"),
        (lambda: nvfp4_linear(X, W._replace(scales=PLAIN.scales)), ValueError,
         r"`weight.scales` has shape \(8, 4\), expected \(..., R', K'/16\), swizzled, = \(128"),
        (lambda: nvfp4_linear(X._replace(scales=X.scales.float()), W), TypeError, "`x.scales` is"),
        (lambda: nvfp4_linear(X._replace(codes=X.codes.int()), W), TypeError, "`x.codes` is"),
        (lambda: nvfp4_linear(X._replace(codes=X.codes[:, :28]), W), ValueError, "K a multiple"),
        (lambda: nvfp4_linear(X._replace(codes=X.codes[None]), W), ValueError, "`x.codes` has"),
        (lambda: nvfp4_linear(X, swizzle_nvfp4(random_operand(8, 32))), ValueError,
         "`x` has 64 features, `weight` 32"),
        (lambda: nvfp4_linear(X._replace(global_scale=torch.ones(4)), W), ValueError,
         r"`x.global_scale` has shape \(4,\), expected one element"),
        (lambda: nvfp4_linear(X._replace(global_scale=torch.ones((), dtype=F64)), W), TypeError,
         "`x.global_scale` is torch.float64"),
        (lambda: nvfp4_linear(X, W._replace(codes=W.codes.to("meta"))), ValueError, "is on meta"),
        (lambda: run(down=DOWN[0]), TypeError, "`down` must be a NVFP4Experts, got Tensor"),
        (lambda: run(x=torch.zeros(4, 48)), ValueError, "`up` has 32 columns, expected the 48"),
        (lambda: run(down=UP), ValueError, "`down.codes` has shape"),
        (lambda: run(up=SEVENTEEN, down=SIXTEEN), ValueError, "`up` has 17 rows, expected a mult"),
        (lambda: run(input_scale=torch.ones((), requires_grad=True)), ValueError,
         "`up.input_scale` requires a gradient; it has none"),
        (lambda: run(global_scale=torch.ones(3, requires_grad=True)), ValueError,
         "`up.global_scale` requires a gradient; it has none"),
        (lambda: run(global_scale=torch.ones(())), ValueError, r"`up.global_scale` has shape \("),
        (lambda: run(input_scale=torch.ones(3)), ValueError, "`up.input_scale` has shape"),
        (lambda: run(down=DOWN._replace(input_scale=torch.ones(1))), ValueError, "one per expert"),
        (lambda: run(scales=UP.scales[:, :64]), ValueError, "`up.scales` has shape"),
        (lambda: run(x=torch.zeros(4, 32).requires_grad_()), ValueError, "`x` requires a gradient"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
