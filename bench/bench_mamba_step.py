"""One decode step of a whole Mamba-2 layer between its projections."""

import torch
import torch.nn.functional as F

from nemokernels import mamba_step
from nemokernels.bench.bench_ssd import decay
from nemokernels.bench.rows import Subject, mamba
from nemokernels.ops.mamba_step import cost

W = 4


def inputs(make, B, T, H, P, G, N):
    """Every sequence holds 7 tokens: past the first turn of the rings."""
    A, dt_bias = decay(make, H)
    channels = H * P + 2 * G * N
    conv = make.randn(B, W - 1 + T, channels).transpose(1, 2)
    return dict(
        xBC=make.randn(B, T, channels), dt=make.randn(B, T, H), conv_state=conv,
        ssm_state=make.randn(B, T, H, P, N, dtype=torch.float32), weight=make.randn(channels, W),
        bias=make.randn(channels), A=A, D=make.randn(H, dtype=torch.float32), dt_bias=dt_bias,
        lengths=make.tensor([7] * B, torch.int32), ngroups=G,
    )  # fmt: skip


def ours(xBC, dt, conv_state, ssm_state, weight, bias, A, D, dt_bias, lengths, ngroups):
    y = mamba_step(
        xBC, dt, conv_state, ssm_state, weight, bias, A, lengths, ngroups=ngroups, D=D,
        dt_bias=dt_bias,
    )  # fmt: skip
    return y, ssm_state, conv_state


def eager(xBC, dt, conv_state, ssm_state, weight, bias, A, D, dt_bias, lengths, ngroups):
    (_, T, H, P, N), out = ssm_state.shape, []
    rows = torch.arange(len(lengths), device=xBC.device)
    state = ssm_state[rows, (lengths - 1) % T].float()
    for t in range(T):
        position = lengths + t
        before = (position[:, None] + torch.arange(1 - W, 0, device=xBC.device)) % (W - 1 + T)
        taps = torch.cat([conv_state[rows[:, None], :, before], xBC[:, t, None]], 1)
        conv_state[rows, :, position % (W - 1 + T)] = xBC[:, t]
        convolved = F.silu((taps.transpose(1, 2) * weight).sum(-1) + bias)
        x, B, C = convolved.split([H * P, ngroups * N, ngroups * N], -1)
        x = x.unflatten(-1, (H, P)).float()
        B, C = (b.unflatten(-1, (ngroups, 1, N)).expand(-1, -1, H // ngroups, -1).flatten(1, 2)
                for b in (B, C))  # fmt: skip
        d = F.softplus(dt[:, t].float() + dt_bias)
        decay_now = (d * A).exp()[..., None, None]
        state = state * decay_now + (d[..., None] * x)[..., None] * B[:, :, None]
        ssm_state[rows, position % T] = state
        out.append((state * C[:, :, None]).sum(-1) + D[:, None] * x)
    return torch.stack(out, 1).to(xBC.dtype), ssm_state, conv_state


def mamba_ssm():
    """Its two launches; the convolution's ring is the same, of one state there is no ring."""
    from causal_conv1d import causal_conv1d_update
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def run(xBC, dt, conv_state, ssm_state, weight, bias, A, D, dt_bias, lengths, ngroups):
        H, P, N = ssm_state.shape[2:]
        convolved = causal_conv1d_update(xBC[:, 0], conv_state, weight, bias, "silu", lengths)
        x, B, C = convolved.split([H * P, ngroups * N, ngroups * N], -1)
        y = selective_state_update(
            ssm_state[:, 0], x.unflatten(-1, (H, P)), dt[:, 0, :, None].expand(-1, -1, P),
            A[:, None, None].expand(H, P, N), B.unflatten(-1, (ngroups, N)),
            C.unflatten(-1, (ngroups, N)), D[:, None].expand(H, P),
            dt_bias=dt_bias[:, None].expand(H, P), dt_softplus=True,
        )  # fmt: skip
        return y[:, None], ssm_state, conv_state

    return run


def subject(title, T, **peers):
    return Subject(
        "mamba_step", f"mamba_step, {title}", inputs=inputs, ours=ours, eager=eager, peers=peers,
        mutates=("conv_state", "ssm_state"), tiny=dict(B=3, T=T, H=4, P=8, G=2, N=16),
    )  # fmt: skip


ONE = subject("one token", 1, mamba_ssm=mamba_ssm)
FEW = subject("four tokens", 4)

ROWS = []
for short, batches in (("nano3", (1, 64, 256)), ("super3", (64,)), ("nano4b", (8,))):
    for decoded, T in ((ONE, 1), (FEW, 4)):
        for B in batches:
            shape = dict(B=B, T=T, **mamba(short))
            ROWS.append(decoded.row(
                f"{short} {B} x {T}", cost=cost.forward(**shape, W=W, state_itemsize=4, itemsize=2),
                quick=short == "nano3" and B == 256, **shape,
            ))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
