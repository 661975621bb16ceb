"""Counting: every formula against numbers worked out by hand, at ceilings that were once measured.

3.0 TB/s copied and 784 TFLOP/s of bfloat16 products are those of one H100; the floors in
milliseconds are what these ceilings make of the counts.
"""

import pytest

from nemokernels._cost import Cost
from nemokernels.bench.rows import rows
from nemokernels.ops.attention import cost as attention
from nemokernels.ops.causal_conv1d import cost as conv
from nemokernels.ops.cross_entropy import cost as cross_entropy
from nemokernels.ops.fp8 import cost as fp8
from nemokernels.ops.gated_rms_norm import cost as gated
from nemokernels.ops.mamba_step import cost as mamba_step
from nemokernels.ops.moe_experts import cost as experts
from nemokernels.ops.moe_route import cost as route
from nemokernels.ops.mtp_verify import cost as verify
from nemokernels.ops.nvfp4 import cost as nvfp4
from nemokernels.ops.nvfp4_gemm import cost as nvfp4_gemm
from nemokernels.ops.relu2 import cost as relu2
from nemokernels.ops.rms_norm import cost as rms_norm
from nemokernels.ops.selective_scan import cost as selective_scan
from nemokernels.ops.ssd import cost as ssd
from nemokernels.ops.state_update import cost as state_update
from nemokernels.ops.w4a16 import cost as w4a16

COPY, GEMM = 3.0e12, {"bfloat16": 784e12, "float8_e4m3fn": 1355e12}
BF16 = dict(itemsize=2, unit="bfloat16")
H8B = dict(H=128, P=64, G=8, N=128)
NANO3 = dict(H=64, P=64, G=8, N=128)


def ms(cost: Cost) -> float:
    return cost.floor(COPY, GEMM) * 1e3


def test_floor_is_the_slower_of_moving_and_multiplying():
    assert Cost(6e12, 784e12).floor(COPY, GEMM) == 2.0
    assert Cost(3e12, 2 * 784e12).floor(COPY, GEMM) == 2.0
    assert Cost(3e12).floor(COPY, {}) == 1.0
    with pytest.raises(ValueError, match="no matrix product of float16 was measured"):
        Cost(1, 1, "float16").floor(COPY, GEMM)


@pytest.mark.parametrize("cost, expected", [
    (ssd.forward(8, 4096, **H8B, **BF16), 0.417),
    (ssd.forward(4, 8192, **H8B, **BF16), 0.411),  # half as many final states
    (ssd.forward(8, 4096, **NANO3, **BF16), 0.231),
    (ssd.forward(1, 131072, **NANO3, **BF16), 0.901),
    (ssd.backward(8, 4096, **H8B, **BF16), 0.632),
    (ssd.backward(8, 4096, **NANO3, **BF16), 0.361),
    (ssd.backward(1, 131072, **NANO3, **BF16), 1.443),
    (conv.forward(8, 4096, 10240, 2), 0.447),
    (conv.backward(8, 4096, 10240, 2), 0.671),
    (conv.forward(8, 4096, 6144, 2), 0.268),
    (conv.backward(8, 4096, 6144, 2), 0.403),
    (gated.forward(32768, 8192, 2), 0.537),
    (gated.backward(32768, 8192, 2), 0.895),
    (experts.forward(16384, 2688, 1856, 6, 128, **BF16), 2.502),
    (experts.forward(16384, 1024, 2688, 22, 512, **BF16), 5.062),
    (experts.forward(64, 2688, 1856, 6, 128, **BF16), 0.852),
    (experts.forward(64, 1024, 2688, 22, 512, **BF16), 1.879),
    (state_update.forward(256, **NANO3, state_itemsize=4, itemsize=2), 0.360),
    (state_update.forward(256, **NANO3, state_itemsize=2, itemsize=2), 0.181),
    (state_update.forward(512, **H8B, state_itemsize=4, itemsize=2), 1.441),
    (fp8.quantize(32768 * 4096, 2, transpose=True), 0.179),
    (nvfp4.quantize(32768 * 4096, 2), 0.115),
    (nvfp4.quantize(32768 * 4096, 2, copies=2), 0.140),
    (verify.forward(256, 3, 131072, 4), 0.179),
    (verify.forward(64, 3, 131072, 2), 0.022),
    (fp8.linear(16384, 4096, 18560, 2), 1.838),
    (cross_entropy.both(8192, 2688, 131072, **BF16), 22.09),
], ids=str)  # fmt: skip
def test_floor_in_milliseconds(cost, expected):
    assert ms(cost) == pytest.approx(expected, abs=6e-4 if expected < 10 else 0.01)


# B 2, T 3, H 4, P 5, G 2, N 6, two bytes: x 240, B and C 144 each, dt 48, final states 960.
SMALL = dict(B=2, T=3, H=4, P=5, G=2, N=6)


def test_scan_by_hand():
    forward = ssd.forward(**SMALL, **BF16)
    assert forward.bytes == 240 + 240 + 144 + 144 + 48 + 960
    # Per token: scores 2 groups x 64 x 6, twice; per head 64 x 5 inside and 6 x 5 in and out.
    assert forward.flops == 6 * (2 * 64 * 6 * 2 + 4 * 2 * (64 * 5 + 2 * 6 * 5))
    backward = ssd.backward(**SMALL, **BF16)
    assert backward.bytes == 3 * 240 + 4 * 144 + 2 * 48
    assert backward.flops == 6 * (3 * 2 * 64 * 6 * 2 + 4 * 2 * (2 * 64 * 5 + 5 * 6 * 5))


def test_mixer_by_hand():
    # zxbcdt: z and x of 20, B and C of 12, dt of 4 per token: 68; out 20.
    forward = ssd.mixer_forward(**SMALL, **BF16)
    assert forward.bytes == 6 * 2 * (68 + 20)
    both = ssd.mixer_both(**SMALL, **BF16)
    assert both.bytes == 6 * 2 * (68 + 20 + 68 + 68 + 20)
    assert both.flops == ssd.forward(**SMALL, **BF16).flops + ssd.backward(**SMALL, **BF16).flops


def test_small_ones_by_hand():
    # 3 rows of 2 tokens: 3 states of 120, 5 inputs of 44 channels, 2 x (44 + 4 + 20) beside them
    assert mamba_step.forward(3, 2, 4, 5, 2, 6, 4, 4, 2).bytes == 3 * (360 * 4 + (220 + 136) * 2)
    assert state_update.forward(2, 4, 5, 2, 6, 4, 2).bytes == 2 * 960 + 2 * 2 * (60 + 24 + 4)
    assert conv.update(2, 1, 10, 3, 2).bytes == 2 * 2 * 10 * 4 * 2
    assert rms_norm.forward(3, 10, 2).bytes == 2 * 60
    assert rms_norm.forward(3, 10, 2, residual=True).bytes == 4 * 60
    assert rms_norm.backward(3, 10, 2).bytes == 3 * 60
    assert rms_norm.backward(3, 10, 2, residual=True).bytes == 4 * 60
    assert relu2.forward(10, 2).bytes == 40 and relu2.backward(10, 2).bytes == 60
    # 3 tokens, 8 experts, 2 slots: 6 weights, 6 ids, 6 order entries, 8 counts and 8 offsets.
    assert route.forward(3, 8, 2, 4).bytes == 96 + 24 + 24 + 24 + 32 + 32
    assert route.backward(3, 8, 2, 4).bytes == 96 + 96 + 24 + 24
    assert fp8.quantize(10, 2).bytes == 30
    assert fp8.rms_norm(5, 2, 2).bytes == 50 and fp8.gated_rms_norm(5, 2, 2).bytes == 70
    assert fp8.rms_norm(5, 2, 2, residual=True, transpose=True).bytes == 100
    assert fp8.gated_rms_norm(5, 2, 2, transpose=True).bytes == 80
    assert fp8.update(3, 7).bytes == 168
    assert fp8.linear(2, 3, 4, 2).bytes == 2 * (6 + 12 + 8)
    assert fp8.linear_backward(2, 3, 4, 2).bytes == 2 * (8 + 6 + 12) + 6 + 12
    assert fp8.linear_backward(2, 3, 4, 2).flops == 2 * 2 * 24
    assert fp8.linear_both(2, 3, 4, 2).bytes == 2 * 2 * (6 + 12 + 8)
    assert fp8.linear_both(2, 3, 4, 2).flops == 3 * 2 * 24
    assert w4a16.linear(2, 16, 4, **BF16).bytes == 64 + 16 + 32 + 4
    assert w4a16.linear(2, 16, 4, **BF16).flops == 2 * 2 * 16 * 4
    assert nvfp4_gemm.linear(2, 16, 4).bytes == (32 + 64) * 9 / 16 + 8 * 2
    assert nvfp4_gemm.linear(2, 16, 4).flops == 2 * 2 * 16 * 4
    # 2 rows of 3 tokens, 8 channels, 2 groups of states of 5: 16 bytes per token and vector.
    assert selective_scan.forward(2, 3, 8, 2, 5, 2).bytes == 6 * (4 * 16 + 2 * 20) + 4 * 2 * 40
    assert selective_scan.backward(2, 3, 8, 2, 5, 2).bytes == 6 * (7 * 16 + 4 * 20)
    assert verify.forward(2, 3, 10, 4, probs_itemsize=4).bytes == 320 + 80
    assert verify.forward(2, 0, 10, 4, probs_itemsize=4).bytes == 80


def test_experts_by_hand():
    # 3 tokens of width 4, 2 slots, experts of width 5, 3 of them touched.
    forward = experts.forward(3, 4, 5, 2, 3, **BF16)
    assert forward.bytes == 24 + 24 + 3 * 2 * 20 * 2 + 3 * 6 * 4
    assert forward.flops == 6 * 2 * 2 * 20
    narrow = w4a16.experts(3, 4, 5, 2, 3, **BF16)
    assert forward.bytes - narrow.bytes == 3 * 2 * 20 * (2 - 0.5625)
    assert nvfp4_gemm.experts(3, 4, 5, 2, 3).bytes == narrow.bytes
    assert nvfp4_gemm.experts(3, 4, 5, 2, 3).unit == "float4_e2m1fn_x2"
    backward = experts.backward(3, 4, 5, 2, 3, **BF16)
    assert backward.bytes == 3 * 24 + 6 * 5 * 2 + 4 * 3 * 20 * 2 + 4 * 6 * 4
    assert backward.flops == 2 * forward.flops
    both = experts.both(3, 4, 5, 2, 3, **BF16)
    assert both.bytes == forward.bytes + backward.bytes + 6 * 5 * 2
    assert both.flops == 3 * forward.flops


def test_cross_entropy_by_hand():
    forward = cross_entropy.forward(3, 4, 5, **BF16)
    assert forward.bytes == 24 + 40 + 3 * 16 and forward.flops == 2 * 60
    assert cross_entropy.backward(3, 4, 5, **BF16).flops == 3 * 2 * 60
    assert cross_entropy.backward(3, 4, 5, **BF16).bytes == 2 * (24 + 40) + 3 * 16


def test_attention_by_hand():
    assert [attention.pairs(t, s) for t, s in ((3, 3), (1, 5), (2, 5))] == [6, 5, 9]
    forward = attention.forward(2, 3, 4, 2, 5, **BF16)
    assert forward.bytes == 2 * (2 * 2 * 3 * 4 * 5 + 2 * 2 * 3 * 2 * 5)
    assert forward.flops == 2 * 4 * 6 * (2 * 5 + 2 * 5)
    backward = attention.backward(2, 3, 4, 2, 5, **BF16)
    assert backward.bytes == 2 * forward.bytes and backward.flops == 2.5 * forward.flops
    # 2 new tokens after 3: caches of 3 read; q and out 2 x 4, k and v 2 x 2 read and written.
    cached = attention.with_cache(2, 2, 3, 4, 2, 5, cache_itemsize=2, **BF16)
    assert cached.bytes == 2 * 2 * 5 * (2 * 3 * 2 + 2 * 2 * 4 + 2 * 2 * 2 * 2)
    assert cached.flops == 2 * 4 * 9 * 4 * 5
    # Of an E4M3 cache the 2 x 5 rows of 2 heads, read or written, have half the bytes.
    narrow = attention.with_cache(2, 2, 3, 4, 2, 5, cache_itemsize=1, **BF16)
    assert narrow.bytes == cached.bytes - 2 * 2 * 5 * 2 * 5


def test_goals_of_the_scan_are_those_of_its_milliseconds():
    """0.68, 0.36 and 1.8 ms forward."""
    chosen = {row.label: row for row in rows(("ssd",), quick=True) if row.way == "forward"}
    for label, goal in (("h8b 8x4096", 0.68), ("nano3 8x4096", 0.36), ("nano3 1x131072", 1.8)):
        assert ms(chosen[label].cost) / goal == pytest.approx(chosen[label].goal, abs=6e-3)
