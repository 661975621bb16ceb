"""One decode step of the recurrence, states in 32 and in 16 bits."""

from functools import partial

import torch
import torch.nn.functional as F

from nemokernels import selective_state_update
from nemokernels.bench.bench_ssd import decay
from nemokernels.bench.rows import Subject, mamba
from nemokernels.ops.state_update import cost


def inputs(make, B, H, P, G, N, *, state_dtype, seed=None):
    A, dt_bias = decay(make, H)
    return dict(
        state=make.randn(B, H, P, N, dtype=state_dtype), x=make.randn(B, H, P),
        dt=make.randn(B, H, 1), A=A.view(H, 1, 1), B=make.randn(B, G, N), C=make.randn(B, G, N),
        D=make.randn(H, 1, dtype=torch.float32), z=make.randn(B, H, P),
        dt_bias=dt_bias.view(H, 1), seed=seed,
    )  # fmt: skip


def ours(state, x, dt, A, B, C, D, z, dt_bias, seed):
    y = selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True,
        seed=seed if state.dtype is torch.float16 else None,  # the float64 reference rounds nothing
    )  # fmt: skip
    return y, state


def eager(state, x, dt, A, B, C, D, z, dt_bias, seed):
    step = F.softplus(dt.float() + dt_bias)
    B, C = (t.float().repeat_interleave(x.shape[1] // t.shape[1], 1)[:, :, None] for t in (B, C))
    new = state.float() * (step[..., None] * A).exp() + (step * x)[..., None] * B
    y = ((new * C).sum(-1) + D * x) * F.silu(z.float())
    state.copy_(new)
    return y.to(x.dtype), state


def expanded(peer):
    """Peers take the axes that are tied as views of stride 0."""

    def run(state, x, dt, A, B, C, D, z, dt_bias, seed):
        y = peer(
            state, x, dt.expand_as(x), A.expand(state.shape[1:]), B, C, D.expand(x.shape[1:]),
            z=z, dt_bias=dt_bias.expand(x.shape[1:]), dt_softplus=True,
        )  # fmt: skip
        return y, state

    return run


def mamba_ssm():
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update as peer

    return expanded(peer)


def flashinfer():
    from flashinfer.mamba import selective_state_update as peer

    return expanded(peer)


def subject(title, **options):
    return Subject(
        "state_update", f"selective_state_update, {title}", inputs=partial(inputs, **options),
        ours=ours, eager=eager, peers={"mamba_ssm": mamba_ssm, "flashinfer": flashinfer},
        mutates=("state",), tiny=dict(B=3, H=4, P=8, G=2, N=16),
    )  # fmt: skip


SUBJECTS = {
    "float32": subject("float32 state", state_dtype=torch.float32),
    "bfloat16": subject("bfloat16 state", state_dtype=torch.bfloat16),
    "stochastic": subject("stochastic float16 state", state_dtype=torch.float16, seed=7),
}

ROWS = []
for short, batches in (("nano3", (1, 16, 64, 256, 512)), ("h8b", (64, 256)), ("nano4b", (64,)),
                       ("h56b", (64,))):  # fmt: skip
    for name, decoded in SUBJECTS.items():
        size = 4 if name == "float32" else 2
        for B in batches:
            shape = dict(B=B, **mamba(short))
            goal = 0.93 if B == 256 else None
            ROWS.append(decoded.row(
                f"{short} {B}", cost=cost.forward(**shape, state_itemsize=size, itemsize=2),
                goal=goal, quick=goal is not None and short == "nano3", **shape,
            ))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
