"""The gated norm between scan and output projection, groups as the models have them."""

import torch.nn.functional as F

from nemokernels import rmsnorm_fn
from nemokernels.bench.rows import Subject, mamba
from nemokernels.ops.gated_rms_norm import cost

EPS = 1e-5


def inputs(make, rows, width, groups):
    return dict(x=make.randn(rows, width), z=make.randn(rows, width), weight=make.randn(width),
                groups=groups)  # fmt: skip


def ours(x, z, weight, groups):
    return rmsnorm_fn(x, weight, None, z=z, eps=EPS, group_size=x.shape[-1] // groups,
                      norm_before_gate=False)  # fmt: skip


def eager(x, z, weight, groups):
    gated = (x.float() * F.silu(z.float())).unflatten(-1, (groups, -1))
    normed = gated * (gated.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (normed.flatten(-2) * weight).to(x.dtype)


def mamba_ssm():
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn as peer

    return lambda x, z, weight, groups: peer(
        x, weight, None, z=z, eps=EPS, group_size=x.shape[-1] // groups, norm_before_gate=False
    )


GATED = Subject(
    "gated_rms_norm", "rmsnorm_fn", inputs=inputs, ours=ours, eager=eager,
    peers={"mamba_ssm": mamba_ssm}, wrt=("x", "z", "weight"),
    tiny=dict(rows=3, width=48, groups=4),
)  # fmt: skip

ROWS = []
for short in ("h8b", "nano3", "ultra", "nano4b"):
    sizes = mamba(short)
    for rows in (32768, 64):
        shape = dict(rows=rows, width=sizes["H"] * sizes["P"], groups=sizes["G"])
        counted = rows, shape["width"], 2
        long = rows > 64
        quick = long and short in ("h8b", "nano3")
        ROWS.append(GATED.row(f"{short} {rows}", cost=cost.forward(*counted),
                              goal=0.97 if long else None, quick=quick, **shape))  # fmt: skip
        if long:
            ROWS.append(GATED.row(f"{short} {rows}", "backward", cost=cost.backward(*counted),
                                  goal=0.88, quick=quick, **shape))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
