"""The causal convolution of x, B and C: training shapes, and one token at a time."""

import torch
import torch.nn.functional as F

from nemokernels import causal_conv1d_fn, causal_conv1d_update
from nemokernels.bench.rows import Subject, mamba
from nemokernels.ops.causal_conv1d import cost

WIDTH = 4
PIECE = 1024  # channels at once in float64


def inputs(make, B, T, D):
    weight = make.randn(D, WIDTH) / 2
    return dict(x=make.randn(B, T, D), weight=weight, bias=make.randn(D))


def ours(x, weight, bias):
    y = causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")
    return y.transpose(1, 2)


def exact(x, weight, bias):
    parts = zip(x.split(PIECE, -1), weight.split(PIECE), bias.split(PIECE))
    return torch.cat([ours(*part) for part in parts], -1)


def eager(x, weight, bias):
    tokens, channels = x.shape[1:]
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=WIDTH - 1, groups=channels)
    return F.silu(y[..., :tokens]).transpose(1, 2)


def fla():
    from fla.modules.convolution import causal_conv1d

    def run(x, weight, bias):
        return causal_conv1d(x, weight=weight, bias=bias, activation="silu", backend="triton")[0]

    return run


def dao():
    from causal_conv1d import causal_conv1d_fn as peer

    def run(x, weight, bias):
        return peer(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    return run


def inputs_update(make, B, D):
    # Channels adjacent in the state: the layout that both its reading and its writing prefer.
    state = make.randn(B, WIDTH - 1, D).transpose(1, 2)
    return dict(x=make.randn(B, D), state=state, weight=make.randn(D, WIDTH) / 2,
                bias=make.randn(D))  # fmt: skip


def ours_update(x, state, weight, bias):
    return causal_conv1d_update(x, state, weight, bias, activation="silu"), state


def eager_update(x, state, weight, bias):
    window = torch.cat([state, x[..., None]], -1)
    state.copy_(window[..., 1:])
    return F.silu((window * weight).sum(-1) + bias), state


def dao_update():
    from causal_conv1d import causal_conv1d_update as peer

    return lambda x, state, weight, bias: (peer(x, state, weight, bias, "silu"), state)


CONV = Subject(
    "causal_conv1d", "causal_conv1d_fn", inputs=inputs, ours=ours, eager=eager,
    exact=exact, peers={"causal_conv1d": dao, "fla": fla}, wrt=("x", "weight", "bias"),
    tiny=dict(B=2, T=9, D=16),
)  # fmt: skip
UPDATE = Subject(
    "causal_conv1d", "causal_conv1d_update", inputs=inputs_update, ours=ours_update,
    eager=eager_update, peers={"causal_conv1d": dao_update}, mutates=("state",),
    tiny=dict(B=3, D=16),
)  # fmt: skip


def channels(short: str) -> int:
    sizes = mamba(short)
    return sizes["H"] * sizes["P"] + 2 * sizes["G"] * sizes["N"]


ROWS = []
for short, B, T in (("h8b", 8, 4096), ("nano3", 8, 4096), ("nano3", 1, 131072),
                    ("ultra", 8, 4096), ("nano4b", 8, 4096), ("nano3", 1, 2048)):  # fmt: skip
    shape = dict(B=B, T=T, D=channels(short))
    counted, quick = (*shape.values(), 2), (short, T) in (("h8b", 4096), ("nano3", 4096))
    label = f"{short} {B}x{T}"
    long = B * T >= 32768
    ROWS.append(CONV.row(label, cost=cost.forward(*counted), goal=0.93 if long else None,
                         quick=quick, **shape))  # fmt: skip
    if long:
        ROWS.append(CONV.row(label, "backward", cost=cost.backward(*counted), goal=0.85,
                             quick=quick, **shape))  # fmt: skip
for batch in (1, 64, 256, 512):
    shape = dict(B=batch, D=channels("nano3"))
    ROWS.append(UPDATE.row(f"nano3 {batch}", cost=cost.update(batch, 1, shape["D"], 3, 2), **shape))


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
