"""The Mamba-2 chunk scan, with step bias, softplus, skip and final states."""

from functools import partial

import torch
import torch.nn.functional as F

from nemokernels import mamba_chunk_scan_combined
from nemokernels.bench.rows import Subject, mamba, unit
from nemokernels.ops.ssd import cost

CHUNK = 128
OTHERS = (32, 64, 96, 160, 192)  # with which the reference rounds elsewhere, and errs as much


def decay(make, H):
    """A, and a bias for steps between 0.001 and 0.1, log-uniform: a fresh model's."""
    A = -1 - 15 * make.rand(H, dtype=torch.float32)
    return A, first_steps(make, H).expm1().log()


def first_steps(make, channels):
    return 0.001 * 100 ** make.rand(channels, dtype=torch.float32)


def inputs(make, B, T, H, P, G, N):
    A, dt_bias = decay(make, H)
    return dict(
        x=make.randn(B, T, H, P), dt=make.randn(B, T, H) / 2, A=A, B=make.randn(B, T, G, N),
        C=make.randn(B, T, G, N), D=make.randn(H, dtype=torch.float32), dt_bias=dt_bias,
    )  # fmt: skip


def ours(x, dt, A, B, C, D, dt_bias, chunk=CHUNK):
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D, dt_bias=dt_bias, dt_softplus=True,
                                     return_final_states=True)  # fmt: skip


def exact(x, dt, A, B, C, D, dt_bias, chunk=CHUNK):
    """A row and a group at a time, so that the reference's scores fit in memory."""
    groups, rows = B.shape[2], []
    per_head = [t.chunk(groups, -1) for t in (dt, A, D, dt_bias)]
    for b in range(x.shape[0]):
        parts = []
        for g, (steps, a, skip, bias) in enumerate(zip(*per_head)):
            heads = slice(g * len(a), (g + 1) * len(a))
            group = slice(g, g + 1)
            row = slice(b, b + 1)
            parts.append(ours(x[row, :, heads], steps[row], a, B[row, :, group], C[row, :, group],
                              skip, bias, chunk))  # fmt: skip
        rows.append((torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 1)))
    return tuple(torch.cat(results) for results in zip(*rows))


def eager(x, dt, A, B, C, D, dt_bias):
    """Chunks in their quadratic form; the states between them by doubling, log2(chunks) times."""
    T, G = x.shape[1], B.shape[2]
    step = F.softplus(dt.float() + dt_bias)

    def cut(t):  # (B, T, ...) -> (B, chunks, CHUNK, ...), padded with zeros
        return F.pad(t, (0, 0) * (t.dim() - 2) + (0, -T % CHUNK)).unflatten(1, (-1, CHUNK))

    a = cut(step * A).cumsum(2).unflatten(3, (G, -1))
    u = cut((x.float() * step[..., None]).to(x.dtype)).unflatten(3, (G, -1))
    b, c = cut(B), cut(C)
    scores = torch.einsum("bklgn,bksgn->bkgls", c, b)
    along = a.permute(0, 1, 3, 4, 2)
    hidden = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).triu(1)
    within = (along[..., None] - along[..., None, :]).masked_fill(hidden, float("-inf")).exp()
    weights = (scores[:, :, :, None] * within).to(x.dtype)
    y = torch.einsum("bkgrls,bksgrp->bklgrp", weights, u)

    left = (a[:, :, -1:] - a).exp()[..., None]
    states = torch.einsum("bksgn,bksgrp->bkgrpn", b, (u * left).to(x.dtype)).float()
    total, reach, chunks = a[:, :, -1, ..., None, None], 1, a.shape[1]
    while reach < chunks:
        earlier = F.pad(states[:, :-reach], (0, 0) * 4 + (reach, 0))
        states = states + total.exp() * earlier
        total = total + F.pad(total[:, :-reach], (0, 0) * 4 + (reach, 0))
        reach *= 2
    entering = F.pad(states[:, :-1], (0, 0) * 4 + (1, 0)).to(x.dtype)
    y = y + torch.einsum("bklgn,bkgrpn->bklgrp", c, entering) * a.exp()[..., None]
    y = y.flatten(1, 2)[:, :T].flatten(2, 3) + x * D[:, None]
    return y.to(x.dtype), states[:, -1].flatten(1, 2)


def mamba_ssm():
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as peer

    return lambda x, dt, A, B, C, D, dt_bias: peer(  # chunks of 256 are its fastest
        x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=True, return_final_states=True
    )


def fla():
    from fla.ops.simple_gla import chunk_simple_gla as peer

    def run(x, dt, A, B, C, D, dt_bias):  # steps, heads of B and C, and skip are not in the peer
        step, each = F.softplus(dt.float() + dt_bias), x.shape[2] // B.shape[2]
        v = (x * step[..., None]).to(x.dtype)
        q, k = (t.repeat_interleave(each, 2) for t in (C, B))
        y, state = peer(q, k, v, step * A, scale=1.0, output_final_state=True)
        return (y + x * D[:, None]).to(x.dtype), state.transpose(2, 3)

    return run


SSD = Subject(
    "ssd", "mamba_chunk_scan_combined", inputs=inputs, ours=ours, exact=exact, eager=eager,
    lows=tuple(partial(exact, chunk=n) for n in OTHERS),
    peers={"mamba_ssm": mamba_ssm, "fla": fla}, wrt=("x", "dt", "A", "B", "C", "D", "dt_bias"),
    tiny=dict(B=1, T=600, H=4, P=8, G=2, N=16),
)  # fmt: skip


def inputs_packed(make, T, S, H, P, G, N):
    """S sequences of unequal length in one row of T tokens."""
    share = torch.rand(S, generator=torch.Generator().manual_seed(0)) + 0.1
    ends = (share.cumsum(0) / share.sum() * T).round().int()
    bounds = [0, *ends[:-1].tolist(), T]
    seq_idx = torch.arange(S, dtype=torch.int32).repeat_interleave(torch.tensor(bounds).diff())
    return dict(
        inputs(make, 1, T, H, P, G, N), bounds=bounds, seq_idx=seq_idx[None].to(make.device),
        cu_seqlens=make.tensor(bounds, torch.int32),
    )  # fmt: skip


def ours_packed(x, dt, A, B, C, D, dt_bias, bounds, seq_idx, cu_seqlens):
    return mamba_chunk_scan_combined(
        x, dt, A, B, C, CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True, cu_seqlens=cu_seqlens,
        return_final_states=True,
    )  # fmt: skip


def one_by_one(scan):
    """Every sequence by itself."""

    def run(x, dt, A, B, C, D, dt_bias, bounds, seq_idx, cu_seqlens):
        cuts = [slice(a, b) for a, b in zip(bounds, bounds[1:])]
        parts = [scan(x[:, c], dt[:, c], A, B[:, c], C[:, c], D, dt_bias) for c in cuts]
        return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])

    return run


def mamba_ssm_packed():
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as peer

    return lambda x, dt, A, B, C, D, dt_bias, bounds, seq_idx, cu_seqlens: peer(  # no states
        x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=True, seq_idx=seq_idx
    )


PACKED = Subject(
    "ssd", "mamba_chunk_scan_combined, packed", inputs=inputs_packed, ours=ours_packed,
    exact=one_by_one(exact), lows=tuple(map(one_by_one, SSD.lows)), eager=one_by_one(eager),
    peers={"mamba_ssm": mamba_ssm_packed},
    wrt=SSD.wrt, tiny=dict(T=300, S=3, H=4, P=8, G=2, N=16),
)  # fmt: skip

ROWS = []


def add(short, B, T, way="forward", *, goal=None, dtype=torch.bfloat16):
    shape = dict(B=B, T=T, **mamba(short))
    counted = getattr(cost, way)(**shape, itemsize=dtype.itemsize, unit=unit(dtype))
    ROWS.append(SSD.row(f"{short} {B}x{T}", way, cost=counted, dtype=dtype, goal=goal,
                        quick=goal is not None, **shape))  # fmt: skip


add("h8b", 8, 4096, goal=0.61)
add("nano3", 8, 4096, goal=0.64)
add("nano3", 1, 131072, goal=0.50)
add("h8b", 8, 4096, "backward", goal=0.22)
add("nano3", 8, 4096, "backward", goal=0.22)
for way in ("forward", "backward"):
    for short in ("ultra", "nano4b", "h56b"):
        add(short, 4, 4096, way)
    add("h8b", 4, 8192, way)
    add("h8b", 8, 4096, way, dtype=torch.float16)
    add("h8b", 2, 4096, way, dtype=torch.float32)
add("nano3", 1, 131072, "backward")
add("nano3", 1, 2048)
add("nano3", 1, 8192)
for S in (16, 128):
    shape = mamba("nano3")
    for way in ("forward", "backward"):
        counted = getattr(cost, way)(1, 32768, **shape, itemsize=2, unit="bfloat16")
        ROWS.append(PACKED.row(f"nano3 32768 in {S}", way, cost=counted, T=32768, S=S, **shape))


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
