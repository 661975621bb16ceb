"""Mamba-1's scan, in bfloat16 and at the sizes of Hymba-1.5B's Mamba branch."""

import torch
import torch.nn.functional as F

from nemokernels import selective_scan_fn
from nemokernels.bench.bench_ssd import first_steps
from nemokernels.bench.rows import Subject
from nemokernels.ops.selective_scan import cost

HYMBA = dict(D=3200, G=1, N=16)


def inputs(make, B, T, D, G, N):
    def last(*shape):  # channels adjacent, as a projection leaves them
        return make.randn(*shape).movedim(1, -1)

    return dict(
        u=last(B, T, D), delta=last(B, T, D) / 2, A=-1 - 15 * make.rand(D, N, dtype=torch.float32),
        B=last(B, T, G, N), C=last(B, T, G, N), D=make.randn(D, dtype=torch.float32),
        z=last(B, T, D), bias=first_steps(make, D).expm1().log(),
    )  # fmt: skip


def ours(u, delta, A, B, C, D, z, bias):
    return selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True,
                             return_last_state=True)  # fmt: skip


def eager(u, delta, A, B, C, D, z, bias):
    """All tokens at once, their states by doubling, log2(T) times."""
    step = F.softplus(delta.float() + bias[:, None])[:, :, None]  # (B, D, 1, T)
    each = u.shape[1] // B.shape[1]
    B, C = (t.float().repeat_interleave(each, 1) for t in (B, C))
    total, state, reach = step * A[..., None], step * u[:, :, None] * B, 1
    while reach < u.shape[2]:
        state = state + total.exp() * F.pad(state[..., :-reach], (reach, 0))
        total = total + F.pad(total[..., :-reach], (reach, 0))
        reach *= 2
    y = ((state * C).sum(2) + D[:, None] * u) * F.silu(z.float())
    return y.to(u.dtype), state[..., -1]


def mamba_ssm():
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as peer

    return lambda u, delta, A, B, C, D, z, bias: peer(
        u, delta, A, B, C, D, z, bias, delta_softplus=True, return_last_state=True
    )


SCAN = Subject(
    "selective_scan", "selective_scan_fn", inputs=inputs, ours=ours, eager=eager,
    peers={"mamba_ssm": mamba_ssm}, wrt=("u", "delta", "A", "B", "C", "D", "z", "bias"),
    tiny=dict(B=2, T=21, D=6, G=2, N=5),
)  # fmt: skip

ROWS = []
for B, T in ((8, 4096), (4, 2048), (1, 2048)):
    shape = dict(B=B, T=T, **HYMBA)
    label = f"hymba {B}x{T}"
    ROWS.append(SCAN.row(label, cost=cost.forward(**shape, itemsize=2), **shape))
    if B == 4:  # plain torch keeps a dozen states per token for its backward
        ROWS.append(SCAN.row(label, "backward", cost=cost.backward(**shape, itemsize=2), **shape))


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
