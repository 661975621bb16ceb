"""Random problems for the kernels of the Mamba-2 ops: few specialisations, many shapes.

A specialisation is what kernels are compiled for: dtypes, sizes that are constants there, options,
and the layout, because Triton compiles anew for a stride or an address that is divisible by 16.
A problem is drawn from its number alone. Every operator is called and compared through a ``Judge``,
with its reference in float64 and, for the budget, in the same precision.
"""

from __future__ import annotations

import torch
from fuzz_draw import BF16, F16, F32, INF, Fuzzed


def _steps(draw, H):
    """A and dt_bias as real layers have them."""
    steps = torch.exp(torch.rand(H, device=draw.device) * 4.6 - 6.9)
    return -1 - 15 * torch.rand(H, device=draw.device), steps.expm1().log()


def ssd(draw, judge, *, dtype, P=64, N=128, G=2, R=4, mode="rows", D=1, gate=False, start=True,
        padded=False, after=None):  # fmt: skip
    H = G * R
    rows, tokens, sequences, ids, bounds = draw.packing(mode)
    if padded:
        ids = draw.runs(rows, tokens)  # of which only the padding counts
    x, B, C = draw.slices(H * P, G * N, G * N, rows=(rows, tokens), dtype=dtype, after=after)
    A, bias = _steps(draw, H)
    inputs = (
        x.unflatten(-1, (H, P)),
        draw.randn(rows, tokens, H, dtype=dtype) / 2,
        A,
        B.unflatten(-1, (G, N)) / 2,
        C.unflatten(-1, (G, N)) / 2,
        {0: None, 1: draw.randn(H), 2: draw.randn(H, P)}[D],
        draw.randn(rows, tokens, H, P, dtype=dtype) if gate else None,
        bias,
        # Representable in dtype: how <G, S> rounds states from outside is not the reference's way.
        draw.randn(sequences, H, P, N, dtype=dtype).float() if start else None,
        ids,
        bounds,
    )
    options = (draw.choice((16, 64, 128)), True, 0.0, draw.choice((INF, 0.05)), None)
    out, final, ungated = judge("ssd_chunk_scan", *inputs, *options)
    dfinal = draw.randn(*final.shape, dtype=dtype).float()
    judge("ssd_chunk_scan_backward", draw.randn(*out.shape, dtype=dtype), dfinal, *inputs, ungated,
          *options)  # fmt: skip


def mixer(draw, judge, *, dtype, P=64, N=128, G=2, R=4, mode="rows", before=False, norm=True,
          bias=True):  # fmt: skip
    H, inner, channels = G * R, G * R * P, G * R * P + 2 * G * N
    rows, tokens, sequences, ids, bounds = draw.packing(mode)
    randn = lambda width: draw.randn(rows, tokens, width, dtype=dtype)  # noqa: E731
    A, dt_bias = _steps(draw, H)
    judge(
        "mamba_mixer_backward",
        randn(inner),
        draw.randn(sequences, H, P, N, dtype=dtype).float(),
        randn(inner + channels + H) / 2,
        draw.randn(channels, 4, dtype=dtype) / 2,
        draw.randn(channels, dtype=dtype) if bias else None,
        A,
        draw.randn(H),
        dt_bias,
        draw.randn(inner) if norm else None,
        draw.randn(sequences, H, P, N, dtype=dtype).float(),
        ids,
        bounds,
        randn(inner),
        torch.rand(rows, tokens, G, device=draw.device) + 0.5 if norm else draw.randn(0),
        H,
        P,
        G,
        True,
        before,
        *(draw.choice((16, 64)), True, 0.0, INF, None),
    )


def conv1d(draw, judge, *, dtype, channels, width=4, mode="rows", silu=True, bias=True, start=True,
           ring=False, new=(1,), after=None):  # fmt: skip
    """``channels``: those that Triton takes for the same. ``new``: tokens of an update."""
    rows, tokens, sequences, ids, bounds = draw.packing(mode)
    channels = draw.choice(channels)
    x, dy = draw.slices(channels, channels, rows=(rows, tokens), dtype=dtype, after=after)
    weight = draw.randn(channels, width, dtype=dtype)
    bias = draw.randn(channels, dtype=dtype) if bias else None
    initial = draw.randn(sequences, width - 1, channels, dtype=dtype) if start else None
    inputs = (x, weight, bias, ids, initial, bounds, silu)
    _, states = judge("causal_conv1d", *inputs, True)
    judge("causal_conv1d_backward", dy, draw.randn(*states.shape, dtype=dtype), *inputs)
    batch, new = draw.randint(1, 5), draw.choice(new)
    state = draw.randn(batch + 2, channels, width - 1 + new, dtype=dtype)
    slots = draw.sample(range(-1, batch + 2), batch)
    ring = draw.ints([draw.randint(0, 9) for _ in slots]) if ring else None
    judge("causal_conv1d_update", draw.randn(batch, new, channels, dtype=dtype), state, weight,
          bias, silu, ring, draw.ints(slots), None)  # fmt: skip


def rms_norm(draw, judge, *, width, dtype, wide=None, add=False, after=None):
    rows = (draw.randint(0, 3), draw.tokens())
    x, dy, residual, dtotal = draw.slices(*[width] * 4, rows=rows, dtype=dtype, after=after)
    weight, eps = draw.randn(width, dtype=wide or dtype), draw.choice((1e-5, 1e-2))
    if not add:
        _, rstd = judge("rms_norm", x, weight, eps)
        judge("rms_norm_backward", dy, x, weight, rstd)
        return
    residual, dtotal = (t.to(wide or dtype) for t in (residual, dtotal))
    _, total, rstd = judge("add_rms_norm", x, residual, weight, eps)
    x_dtype = dtype if wide not in (None, dtype) else None
    judge("add_rms_norm_backward", dy, dtotal, total, weight, rstd, x_dtype)


def gated_rms_norm(draw, judge, *, groups, size, dtype, first=False, gate=True, bias=False,
                   after=None):  # fmt: skip
    width, rows = groups * size, (draw.randint(0, 3), draw.tokens())
    x, z, dy = draw.slices(*[width] * 3, rows=rows, dtype=dtype, after=after)
    weight, bias = draw.randn(width), draw.randn(width) if bias else None
    z = z if gate else None
    _, rstd = judge("gated_rms_norm", x, weight, bias, z, 1e-5, size, first)
    judge("gated_rms_norm_backward", dy, x, weight, bias, z, rstd, size, first)


def _heads(draw, H):
    """A, D and dt_bias per head."""
    rates = -torch.rand(H, device=draw.device) * 4 - 0.1
    return rates, draw.randn(H), draw.randn(H)


def state_update(draw, judge, *, H, P, N, G, dtype, state_dtype=F32, mode="rows", gate=True,
                 batch=(5, 8), after=None):  # fmt: skip
    batch = draw.sequences(*batch)
    lengths = [draw.choice((0, 1, 2, 4)) if mode == "packed" else 1 for _ in range(batch)]
    tokens = sum(lengths)
    x, B, C = draw.slices(H * P, G * N, G * N, rows=(tokens,), dtype=dtype, after=after)
    A, D, bias = _heads(draw, H)
    places = draw.sample(range(4 * batch + 2), 4 * batch)
    slots = [[-1 if draw.random() < 0.1 else p for p in places[4 * b : 4 * b + 4]]
             for b in range(batch)]  # fmt: skip
    packed = mode == "packed"
    accepted = draw.ints([draw.randint(0, 4) for _ in range(batch)])
    judge(
        "selective_state_update",
        draw.randn(4 * batch + 2, H, P, N, dtype=state_dtype),
        x.unflatten(-1, (H, P)),
        draw.randn(tokens, H, 1, dtype=dtype).expand(-1, -1, P),
        A[:, None, None].expand(H, P, N),
        B.unflatten(-1, (G, N)),
        C.unflatten(-1, (G, N)),
        D[:, None].expand(H, P),
        draw.randn(tokens, H, P, dtype=dtype) if gate else None,
        bias[:, None].expand(H, P),
        True,
        draw.ints(slots).view(batch, 4) if packed else draw.ints([s[0] for s in slots]),
        None,
        accepted if packed else None,
        draw.ints([sum(lengths[:b]) for b in range(batch + 1)]) if packed else None,
        None,
        5,
    )


def mamba_step(draw, judge, *, H, P, N, G, dtype, tokens=1, width=4, state_dtype=F32, gate=True,
               batch=(5, 8), spare=0, after=None):  # fmt: skip
    batch, channels = draw.sequences(*batch), H * P + 2 * G * N
    xBC, z = draw.slices(channels, H * P, rows=(batch, tokens), dtype=dtype, after=after)
    A, D, bias = _heads(draw, H)
    slots = [-1 if draw.random() < 0.1 else s for s in draw.sample(range(batch + 2), batch)]
    judge(
        "mamba_step",
        xBC,
        draw.randn(batch, tokens, H, dtype=dtype),
        z if gate else None,
        draw.randn(batch + 2, channels, width - 1 + tokens + spare, dtype=dtype),
        draw.randn(batch + 2, tokens + spare, H, P, N, dtype=state_dtype),
        draw.randn(channels, width, dtype=dtype),
        draw.randn(channels, dtype=dtype),
        A,
        D,
        bias,
        draw.ints([draw.randint(0, 20) for _ in range(batch)]),
        draw.ints(slots),
        G,
        0.0,
        draw.choice((INF, 0.5)),
        None,
        5,
    )


# ``after``: 16 keeps every address and stride aligned, 8 the addresses, 3 nothing.
FUZZED = (
    Fuzzed("ssd", ssd, (
        dict(dtype=BF16, G=8, R=2),
        dict(dtype=BF16, G=1, R=8, gate=True, start=False, after=8),
        dict(dtype=BF16, mode="seq_idx", after=16),
        dict(dtype=BF16, mode="packed", D=2, gate=True, after=8),
        dict(dtype=BF16, P=80, D=2, after=3),
        dict(dtype=BF16, P=80, G=1, R=8, mode="packed", padded=True),
        dict(dtype=BF16, N=256, G=1, R=8, start=False, after=16),
        dict(dtype=BF16, N=256, mode="seq_idx"),
        dict(dtype=F16, gate=True, after=8),
        dict(dtype=F16, P=33, N=20, G=3, R=3, mode="seq_idx", D=0),
        dict(dtype=F32, G=1, R=8, after=3),
        dict(dtype=F32, P=80, mode="packed"),
    )),
    Fuzzed("ssd", mixer, (
        dict(dtype=BF16, G=8, R=2),
        dict(dtype=BF16, before=True, mode="seq_idx"),
        dict(dtype=BF16, norm=False, bias=False, mode="packed"),
        dict(dtype=BF16, P=80, mode="packed"),
        dict(dtype=F16, P=33, N=20, G=3, R=3, norm=False, mode="seq_idx"),
        dict(dtype=F32, G=1, R=8, bias=False),
    )),
    Fuzzed("causal_conv1d", conv1d, (
        dict(dtype=BF16, channels=range(80, 641, 16), new=(0, 2, 3, 4)),
        dict(dtype=BF16, channels=range(72, 641, 16), mode="seq_idx", after=8, ring=True),
        dict(dtype=BF16, channels=range(65, 400, 8), mode="packed", after=3, new=(2, 4)),
        dict(dtype=BF16, channels=(1,), mode="rows", ring=True, after=3),
        dict(dtype=BF16, channels=range(80, 641, 16), mode="packed", width=2, bias=False,
             start=False, after=16),
        dict(dtype=F16, channels=range(17, 32, 2), width=3, mode="seq_idx", silu=False, bias=False,
             ring=True, new=(3, 4), after=16),
        dict(dtype=F16, channels=range(80, 641, 16), mode="packed"),
        dict(dtype=F16, channels=range(40, 64, 16), after=8, new=(3,)),
        dict(dtype=F32, channels=range(80, 641, 16), ring=True),
        dict(dtype=F32, channels=range(3, 16, 2), width=3, mode="packed", silu=False, new=(2, 4)),
    )),
    Fuzzed("rms_norm", rms_norm, (
        dict(width=1, dtype=BF16, add=True),
        dict(width=33, dtype=BF16, after=3),
        dict(width=128, dtype=BF16, add=True, after=3),
        dict(width=2688, dtype=BF16, after=16),
        dict(width=4096, dtype=BF16, add=True),
        dict(width=257, dtype=BF16, wide=F32, add=True, after=8),
        dict(width=2688, dtype=BF16, wide=F32),
        dict(width=80, dtype=F16, after=8),
        dict(width=4480, dtype=F16, add=True, after=8),
        dict(width=7, dtype=F32, add=True, after=3),
        dict(width=18432, dtype=F32, after=8),
        dict(width=18432, dtype=BF16, add=True),
    )),
    Fuzzed("gated_rms_norm", gated_rms_norm, (
        dict(groups=8, size=512, dtype=BF16, after=16),
        dict(groups=8, size=1024, dtype=BF16),
        dict(groups=1, size=4096, dtype=BF16, first=True, after=8),
        dict(groups=1, size=5120, dtype=BF16, bias=True),
        dict(groups=3, size=16, dtype=BF16, after=3),
        dict(groups=2, size=80, dtype=BF16, gate=False, after=8),
        dict(groups=8, size=512, dtype=F16, first=True, bias=True),
        dict(groups=5, size=7, dtype=F16, after=8),
        dict(groups=8, size=512, dtype=F32, after=3),
        dict(groups=1, size=1, dtype=F32, first=True),
    )),
    Fuzzed("state_update", state_update, (
        dict(H=16, P=64, N=128, G=8, dtype=BF16),
        dict(H=16, P=64, N=128, G=8, dtype=BF16, batch=(0, 1), after=8),
        *(dict(H=16, P=64, N=128, G=8, dtype=BF16, state_dtype=s, after=16) for s in (BF16, F16)),
        dict(H=16, P=64, N=128, G=8, dtype=BF16, mode="packed", after=3),
        dict(H=16, P=64, N=128, G=8, dtype=BF16, state_dtype=BF16, mode="packed"),
        dict(H=8, P=80, N=128, G=2, dtype=BF16, mode="packed", batch=(4, 6), after=8),
        dict(H=8, P=64, N=256, G=1, dtype=BF16, gate=False),
        dict(H=6, P=17, N=33, G=3, dtype=F16, state_dtype=F16, mode="packed", after=8),
        dict(H=4, P=5, N=10, G=2, dtype=F32, mode="packed", batch=(0, 6)),
    )),
    Fuzzed("mamba_step", mamba_step, (
        dict(H=16, P=64, N=128, G=8, dtype=BF16),
        dict(H=16, P=64, N=128, G=8, dtype=BF16, batch=(0, 1), spare=1, after=8),
        *(dict(H=16, P=64, N=128, G=8, dtype=BF16, state_dtype=s, after=16) for s in (BF16, F16)),
        dict(H=16, P=64, N=128, G=8, dtype=BF16, tokens=2, after=3),
        dict(H=16, P=64, N=128, G=8, dtype=BF16, tokens=4, spare=2),
        dict(H=8, P=80, N=128, G=2, dtype=BF16, tokens=3, batch=(4, 6), after=8),
        dict(H=8, P=64, N=256, G=1, dtype=BF16, gate=False, spare=2),
        dict(H=6, P=17, N=33, G=3, dtype=F16, width=3, spare=1, after=3),
        dict(H=4, P=5, N=10, G=2, dtype=F32, width=2, tokens=5, batch=(0, 6)),
    )),
)  # fmt: skip
