"""The whole Mamba-2 mixer between its projections: convolution, scan and gated norm."""

from functools import partial

import torch

from nemokernels import mamba_split_conv1d_scan_combined
from nemokernels.bench import bench_causal_conv1d as conv
from nemokernels.bench import bench_gated_rms_norm as norm
from nemokernels.bench import bench_ssd as ssd
from nemokernels.bench.rows import Subject, mamba
from nemokernels.ops.ssd import cost


def inputs(make, B, T, H, P, G, N):
    A, dt_bias = ssd.decay(make, H)
    channels = H * P + 2 * G * N
    return dict(
        zxbcdt=make.randn(B, T, H * P + channels + H), conv_weight=make.randn(channels, 4) / 2,
        conv_bias=make.randn(channels), A=A, D=make.randn(H, dtype=torch.float32),
        dt_bias=dt_bias, weight=make.randn(H * P), P=P, G=G,
    )  # fmt: skip


def ours(zxbcdt, conv_weight, conv_bias, A, D, dt_bias, weight, P, G, chunk=ssd.CHUNK):
    return mamba_split_conv1d_scan_combined(
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, chunk, rmsnorm_weight=weight,
        rmsnorm_eps=norm.EPS, headdim=P, ngroups=G, norm_before_gate=False,
    )  # fmt: skip


def exact(zxbcdt, **rest):
    return torch.cat([ours(row, **rest) for row in zxbcdt.split(1)])


def of(convolve, scan, normalise):
    """A mixer made of these three functions."""

    def run(zxbcdt, conv_weight, conv_bias, A, D, dt_bias, weight, P, G):
        inner, heads = weight.numel(), A.numel()
        z, xbc, dt = zxbcdt.split([inner, conv_weight.shape[0], heads], -1)
        xbc = convolve(xbc, conv_weight, conv_bias)
        x, B, C = xbc.split([inner, *[(xbc.shape[-1] - inner) // 2] * 2], -1)
        B, C = (t.unflatten(-1, (G, -1)) for t in (B, C))
        y, _ = scan(x.unflatten(-1, (heads, P)), dt, A, B, C, D, dt_bias)
        return normalise(y.flatten(2), z, weight, G)

    return run


MIXER = Subject(
    "ssd", "mamba_split_conv1d_scan_combined", inputs=inputs, ours=ours, exact=exact,
    lows=tuple(partial(exact, chunk=n) for n in ssd.OTHERS),
    eager=of(conv.eager, ssd.eager, norm.eager),
    # mamba_ssm's scan and norm with fla's convolution: its own needs causal-conv1d.
    peers={"mamba_ssm": lambda: of(conv.fla(), ssd.mamba_ssm(), norm.mamba_ssm())},
    wrt=("zxbcdt", "conv_weight", "conv_bias", "A", "D", "dt_bias", "weight"),
    tiny=dict(B=2, T=140, H=4, P=8, G=2, N=16),
)  # fmt: skip

ROWS = []
for short, B, T in (("nano3", 8, 4096), ("h8b", 8, 4096), ("nano4b", 4, 4096)):
    shape = dict(B=B, T=T, **mamba(short))
    for way in ("forward", "both"):
        counted = getattr(cost, f"mixer_{way}")(**shape, itemsize=2, unit="bfloat16")
        ROWS.append(MIXER.row(f"{short} {B}x{T}", way, cost=counted, quick=short == "nano3",
                              **shape))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
