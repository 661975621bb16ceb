"""Launches of the chunk scan's Triton kernels: layouts, workspaces, order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from nemokernels._tl import clear_outside
from nemokernels._triton import Specialisation, cdiv, contiguous, next_power_of_2, row_divisor
from nemokernels.ops.ssd import kernel_backward as backward_kernels
from nemokernels.ops.ssd import kernel_forward as forward_kernels
from nemokernels.ops.ssd.chunks import fill_forward, packed_places

HEADS_PER_PROGRAM = 16  # of the kernels over steps
SEGMENT_BLOCK = 1024


@dataclass(frozen=True)
class Layout:
    """Sizes, and where sequences and chunks of ``length`` tokens lie. See ref.py for letters.

    Packed: K is an upper bound, taken without waiting for the device; ``owner`` of a chunk that
    does not exist is S.
    """

    B: int
    T: int
    H: int
    P: int
    G: int
    N: int
    S: int
    length: int
    NC: int  # chunks per row, unless packed
    K: int
    bounds: torch.Tensor | None
    first: torch.Tensor | None
    owner: torch.Tensor | None
    seq_idx: torch.Tensor | None
    ids: torch.Tensor | None
    BLOCK_P: int
    BLOCK_N: int
    TMA: bool
    ROWS: int  # divides the strides of rows and of tokens: 16 or 1

    @property
    def blocks(self) -> int:
        return cdiv(self.P, self.BLOCK_P)

    @property
    def flags(self) -> dict:
        return {"HAS_PAD": self.seq_idx is not None, "PACKED": self.bounds is not None}

    @property
    def tiles(self) -> dict:
        sizes = {"P": self.P, "N": self.N, "L": self.length}
        blocks = {"BLOCK_P": self.BLOCK_P, "BLOCK_N": self.BLOCK_N, "TMA": self.TMA}
        ids = {"HAS_IDS": self.ids is not None}
        return {**sizes, **blocks, **self.flags, **ids, "ROWS": self.ROWS}

    def sums(self, x: torch.Tensor, *shape: int) -> torch.Tensor:
        """Float32 for every chunk; zeros where some may not exist."""
        make = x.new_empty if self.bounds is None else x.new_zeros
        return make(shape, dtype=torch.float32)

    def clear(self, *tensors: torch.Tensor) -> None:
        """Zero the tokens (1, T, ...) of packed rows that no sequence has."""
        for tensor in tensors if self.bounds is not None else ():
            if tensor.numel():
                clear_outside(tensor, self.bounds)


def layout(x, B, seq_idx, cu_seqlens, *others, chunk: int, block_p: int, tma: bool) -> Layout:
    """``tma``: use it if neither packing nor padding asks for masks. Alignment is not looked at.

    ``others`` are the further tensors (B, T, ...) that are read, or None.
    """
    batch, tokens, heads, width = x.shape
    groups, state = B.shape[2:]
    nc = cdiv(tokens, chunk)
    bounds = first = owner = ids = None
    sequences, total = batch, batch * nc
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        bounds, first, count, total = packed_places(cu_seqlens, tokens, chunk)
        ends = count.cumsum(0)
        owner = torch.searchsorted(ends, torch.arange(total, device=x.device), right=True).int()
    elif seq_idx is not None:
        ids = fill_forward(seq_idx).contiguous()
    return Layout(
        batch, tokens, heads, width, groups, state, sequences, chunk, nc, total,
        bounds, first, owner, contiguous(seq_idx), ids,
        min(block_p, max(16, next_power_of_2(width))), max(16, next_power_of_2(state)),
        tma and cu_seqlens is None and seq_idx is None,
        row_divisor(x, B, *others),
    )  # fmt: skip


def unit_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its last axis has gaps."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _describable(tensor: torch.Tensor) -> bool:
    # cuTensorMapEncode wants 16-byte aligned addresses and strides; those of lone rows are unused.
    strides = [s for s, n in zip(tensor.stride()[:-1], tensor.shape) if n > 1]
    aligned = all(s > 0 and s * tensor.element_size() % 16 == 0 for s in strides)
    return aligned and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0


def _describe(tensor: torch.Tensor, length: int, block: int) -> TensorDescriptor:
    spare = 16 // tensor.element_size()
    strides = [s if n > 1 else spare for s, n in zip(tensor.stride()[:-1], tensor.shape)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, length, 1, block])


def _sources(sizes: Layout, wide: list[torch.Tensor], narrow: list[torch.Tensor]) -> list:
    """What kernels take for tensors with P (wide) and N (narrow) as last axis."""
    if not sizes.TMA:
        return [*wide, *narrow]
    return [_describe(t, sizes.length, sizes.BLOCK_P) for t in wide] + [
        _describe(t, sizes.length, sizes.BLOCK_N) for t in narrow
    ]


def _settle(sizes: Layout, *tensors: torch.Tensor) -> Layout:
    """The layout, without TMA if a tensor is not aligned for it."""
    if sizes.TMA and not all(map(_describable, tensors)):
        return replace(sizes, TMA=False)
    return sizes


def _launch(pair: tuple[int, int]) -> dict:
    return {"num_warps": pair[0], "STAGES": pair[1]}


def _small(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _steps(sizes: Layout, x, dt, A, dt_bias, softplus, dt_min, dt_max, store_step: bool):
    """a, b and, if asked for, d: (H, K, L) float32."""
    a = A.new_empty(sizes.H, sizes.K, sizes.length, dtype=torch.float32)
    b, d = torch.empty_like(a), torch.empty_like(a) if store_step else None
    grid = (sizes.K, cdiv(sizes.H, HEADS_PER_PROGRAM))
    if a.numel():
        forward_kernels.ssd_steps_kernel[grid](
            dt, dt_bias, A, sizes.seq_idx, sizes.bounds, sizes.first, sizes.owner, a, b, d,
            sizes.T, sizes.NC, sizes.K, sizes.S, sizes.H, *dt.stride(), dt_min, dt_max,
            L=sizes.length, BLOCK_H=HEADS_PER_PROGRAM, SOFTPLUS=softplus,
            HAS_BIAS=dt_bias is not None, **sizes.flags, STORE_STEP=store_step,
            EXACT=x.dtype == torch.float32, num_warps=4,
        )  # fmt: skip
    return a, b, d


def _states(sizes: Layout, z, M, initial, a, b, *, segments, segment, reverse, launch,
            met=None, tma_met=False):  # fmt: skip
    """Walk the states; see the kernel. Returns the ends and total decays unless ``met`` is given"""
    ends = totals = None
    if met is None:
        ends = z.new_empty(sizes.S, segments, sizes.H, sizes.P, sizes.N, dtype=torch.float32)
        totals = z.new_empty(sizes.S, segments, sizes.H, dtype=torch.float32)
    zs, ms = _sources(sizes, [z], [M])
    forward_kernels.ssd_states_kernel[(sizes.S * sizes.H * sizes.blocks, segments)](
        zs, ms, initial, met, ends, totals, a, b, sizes.seq_idx, sizes.ids, sizes.bounds,
        sizes.first, sizes.T, sizes.NC, sizes.K, sizes.H, sizes.H // sizes.G, segment,
        *z.stride()[:3], *M.stride()[:3], **sizes.tiles, HAS_INITIAL=initial is not None,
        REVERSE=reverse, STORE_MET=met is not None, TMA_MET=tma_met, **_launch(launch),
    )  # fmt: skip
    return ends, totals


def _enter_segments(sizes: Layout, z, M, initial, a, b, *, split, reverse, launch):
    """State at the start of every segment (its end in reverse), segments, chunks of each.

    ``split`` is the tokens of a segment, 0 for one segment of any length.
    """
    longest = max(sizes.NC, 1)
    segment = split // sizes.length if split else longest
    segments = cdiv(longest, segment)
    if segments == 1 or sizes.S * sizes.H * sizes.P * sizes.N == 0:
        return initial, 1, longest
    ends, totals = _states(sizes, z, M, None, a, b, segments=segments, segment=segment,
                           reverse=reverse, launch=launch)  # fmt: skip
    size = sizes.P * sizes.N
    forward_kernels.ssd_segments_kernel[(sizes.S * sizes.H, cdiv(size, SEGMENT_BLOCK))](
        initial, ends, totals, segments, sizes.H, size, HAS_INITIAL=initial is not None,
        REVERSE=reverse, BLOCK=SEGMENT_BLOCK, num_warps=4,
    )  # fmt: skip
    return ends, segments, segment


def forward(
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
    dt_softplus, dt_min, dt_max, *, config,
):  # fmt: skip
    """As ref.forward; ``config`` is an op.Config."""
    x, B, C = unit_last(x), unit_last(B), unit_last(C)
    sizes = layout(x, B, seq_idx, cu_seqlens, C, z, chunk=config.chunk, block_p=config.block_p,
                   tma=config.tma)  # fmt: skip
    out = x.new_empty(x.shape)
    ungated = x.new_empty(x.shape if z is not None else 0)
    sizes.clear(out, ungated)
    final = x.new_empty(sizes.S, sizes.H, sizes.P, sizes.N, dtype=torch.float32)
    programs = sizes.S * sizes.H * sizes.blocks
    if programs * sizes.T == 0:
        final.copy_(0 if initial_states is None else initial_states)
        return out, final, ungated
    sizes = _settle(sizes, x, B, C, out)
    A, D, dt_bias = _small(A), _small(D), _small(dt_bias)
    initial = contiguous(initial_states)
    a, b, _ = _steps(sizes, x, dt, A, dt_bias, dt_softplus, dt_min, dt_max, False)
    initial, segments, segment = _enter_segments(
        sizes, x, B, initial, a, b, split=config.segment, reverse=False, launch=config.states
    )
    xs, outs, bs, cs = _sources(sizes, [x, out], [B, C])
    forward_kernels.ssd_scan_kernel[(programs, segments)](
        xs, bs, cs, outs, ungated, z, D, initial, final, a, b, sizes.seq_idx, sizes.ids,
        sizes.bounds, sizes.first, sizes.T, sizes.NC, sizes.K, sizes.H, sizes.H // sizes.G,
        segment, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
        *((0,) * 4 if z is None else z.stride()), **sizes.tiles, D_AXES=0 if D is None else D.dim(),
        HAS_Z=z is not None, HAS_INITIAL=initial is not None, **_launch(config.scan),
    )  # fmt: skip
    return out, final, ungated


def backward(
    dout, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, ungated,
    dt_softplus, dt_min, dt_max, *, config, joined=False, ddt=None, dz=None,
):  # fmt: skip
    """As ref.backward, or ref.backward_joined; ``config`` is an op.Config.

    ``ddt`` and ``dz``, if given, are written to: tensors whose tokens may lie apart, at one
    distance in all rows.
    """
    x, B, C, dy = unit_last(x), unit_last(B), unit_last(C), unit_last(dout)
    sizes = layout(x, B, seq_idx, cu_seqlens, C, z, dy, chunk=config.span, block_p=config.block_p,
                   tma=config.tma)  # fmt: skip
    squares = config.span // config.square  # along one side of a chunk's scores
    S, K, H, P, N, blocks = sizes.S, sizes.K, sizes.H, sizes.P, sizes.N, sizes.blocks
    absent = x.new_empty(0)
    widths = [H * P, sizes.G * N, sizes.G * N]
    if joined:
        whole = x.new_empty(*x.shape[:2], sum(widths))
        flat = whole.split(widths, -1)
    else:
        flat = [x.new_empty(*x.shape[:2], width) for width in widths]
    dx, dB, dC = (t.unflatten(2, like.shape[2:]) for t, like in zip(flat, (x, B, B)))
    ddt = dt.new_empty(dt.shape) if ddt is None else ddt
    dA, dbias = sizes.sums(x, K, H), sizes.sums(x, K, H)
    D_axes = 0 if D is None else D.dim()
    parts = {0: 1, 1: blocks, 2: P}[D_axes]
    dD = sizes.sums(x, K * squares, H, parts) if D_axes else None
    if dz is None:
        dz = absent if z is None else z.new_empty(z.shape)
    sizes.clear(*((whole,) if joined else (dx, dB, dC)), ddt, dz)
    dinitial = absent if initial_states is None else initial_states.new_empty(S, H, P, N)

    def results():
        like_D = absent if D is None else (dD.sum(0) if D_axes == 2 else dD.sum((0, 2))).to(D.dtype)
        bias = absent if dt_bias is None else dbias.sum(0).to(dt_bias.dtype)
        rest = like_D, dz, bias, dinitial
        if joined:
            return whole, ddt, dA.sum(0).to(A.dtype), *rest
        return dx, ddt, dA.sum(0).to(A.dtype), dB, dC, *rest

    if S * H * blocks * sizes.T == 0:
        dA.zero_(), dbias.zero_(), dB.zero_(), dC.zero_(), ddt.zero_()
        if dD is not None:
            dD.zero_()
        if initial_states is not None:
            dinitial.copy_(dfinal)
        return results()
    rate, skip, bias = _small(A), _small(D), _small(dt_bias)
    chunk_map = (sizes.seq_idx, sizes.bounds, sizes.first, sizes.owner)
    D_here = D_axes  # where dD is made: with a gate, from the gradient before it is rounded
    if z is not None:
        dy, go, D_here = x.new_empty(x.shape), dy, 0
        backward_kernels.ssd_gate_backward_kernel[(K * squares, H, blocks)](
            go, z, ungated, x, dz, dy, dD, *chunk_map, sizes.T, sizes.NC, S, H, *go.stride()[:3],
            *x.stride()[:3], *z.stride(), dz.stride(1), P=P, L=config.square, SPAN=config.span,
            BLOCK_P=sizes.BLOCK_P, D_AXES=D_axes, **sizes.flags, ROWS=sizes.ROWS, num_warps=4,
        )  # fmt: skip
    sizes = _settle(sizes, x, dy, B, C, dx, dB, dC)
    a, b, d = _steps(sizes, x, dt, rate, bias, dt_softplus, dt_min, dt_max, True)

    # Through the states: S entering every chunk, then from the last chunk to the first dx and G.
    met, leaving = (x.new_empty(K * H * blocks * sizes.BLOCK_P, sizes.BLOCK_N) for _ in "SG")
    kept = met, leaving  # as the walks store them, and as the kernels per chunk load them
    if sizes.TMA:
        block = [sizes.BLOCK_P, sizes.BLOCK_N]
        met, leaving = (TensorDescriptor.from_tensor(t, block) for t in kept)
    tma_met = sizes.TMA and config.tma_met
    kept = (met, leaving) if tma_met else kept
    initial = contiguous(initial_states)
    walk = {"split": config.segment, "launch": config.states}
    start, segments, segment = _enter_segments(sizes, x, B, initial, a, b, reverse=False, **walk)
    _states(sizes, x, B, start, a, b, segments=segments, segment=segment, reverse=False,
            met=kept[0], tma_met=tma_met, launch=config.states)  # fmt: skip
    start, _, _ = _enter_segments(sizes, dy, C, dfinal.contiguous(), a, b, reverse=True, **walk)
    walked = replace(sizes, length=config.chunk)
    dys, dxs, bs, cs = _sources(walked, [dy, dx], [B, C])
    strides = dict(x=x.stride()[:3], y=dy.stride()[:3], b=B.stride()[:3], c=C.stride()[:3])
    backward_kernels.ssd_walk_backward_kernel[(S * H * blocks, segments)](
        dys, bs, cs, dxs, skip, start, kept[1], dinitial, a, b, sizes.seq_idx, sizes.ids,
        sizes.bounds, sizes.first, sizes.T, sizes.NC, K, H, H // sizes.G, segment,
        dx.stride(1), *strides["y"], *strides["b"], *strides["c"], **walked.tiles,
        SPAN=config.span, D_AXES=D_axes, HAS_INITIAL=initial is not None, TMA_MET=tma_met,
        **_launch(config.walk),
    )  # fmt: skip

    # Within each chunk, one program per group: the scores, then B and C.
    chunk_map = (sizes.seq_idx, sizes.ids, sizes.bounds, sizes.first, sizes.owner)
    dscores = x.new_empty(K, sizes.G, sizes.length, sizes.length)
    sums = a.new_empty(squares + 1, *a.shape)
    r, p = torch.empty_like(a), torch.empty_like(a)
    through = a.new_empty(H, K)
    ints = (sizes.T, sizes.NC, K, S, H, sizes.G, H // sizes.G)
    squared = replace(sizes, length=config.square)
    backward_kernels.ssd_scores_backward_kernel[(K * sizes.G * (2 * squares - 1),)](
        *_sources(squared, [x, dy], [B, C]), dscores, dD, sums, a, d, *chunk_map, *ints,
        *strides["x"], *strides["y"], *strides["b"], *strides["c"], **squared.tiles,
        SPAN=config.span, D_AXES=D_here, **_launch(config.scores),
    )  # fmt: skip
    xs, dys, bs, cs, dBs, dCs = _sources(sizes, [x, dy], [B, C, dB, dC])
    for source, states, grad, w, of in ((xs, leaving, dBs, r, "x"), (dys, met, dCs, p, "y")):
        backward_kernels.ssd_group_backward_kernel[(K * sizes.G,)](
            source, bs, cs, states, leaving, dscores, grad, w, through, a, d, *chunk_map, *ints,
            dB.stride(1), *strides[of], *strides["b"], *strides["c"], **sizes.tiles,
            SQUARE=config.square, OF_C=of == "y", **_launch(config.group),
        )  # fmt: skip
    backward_kernels.ssd_steps_backward_kernel[(K, cdiv(H, HEADS_PER_PROGRAM))](
        dt, bias, rate, sums, r, p, d, through, ddt, dA, dbias, sizes.seq_idx, sizes.bounds,
        sizes.first, sizes.owner, sizes.T, sizes.NC, K, S, H, *dt.stride(),
        ddt.stride(1), dt_min, dt_max, L=sizes.length, BLOCK_H=HEADS_PER_PROGRAM,
        SOFTPLUS=dt_softplus, HAS_BIAS=dt_bias is not None, **sizes.flags,
        EXACT=x.dtype == torch.float32, HAS_CROSS=squares > 1, num_warps=4,
    )  # fmt: skip
    return results()


def launch_on_meta(grad, batch=8, tokens=4096, heads=128, width=64, state=128, dtype=torch.bfloat16,
                   rows=None):  # fmt: skip
    """A function that launches all kernels of a call; ``rows`` packs so many sequences."""
    from nemokernels.ops.ssd.op import plan

    def new(*shape, dtype=dtype):
        return torch.empty(shape, device="meta", dtype=dtype)

    def run():
        capability = divmod(driver.active.get_current_target().arch, 10)
        config = plan(rows or batch, tokens, heads, width, state, (dtype,), None, ("triton",),
                      capability, 132)  # fmt: skip
        x, B = new(batch, tokens, heads, width), new(batch, tokens, 8, state)
        A, dt = new(heads, dtype=torch.float32), x[..., 0].contiguous()
        bounds = new(rows + 1, dtype=torch.int32) if rows else None
        args = (x, dt, A, B, B, A, None, A, None, None, bounds)
        options = (True, 0.0, float("inf"))
        if not grad:
            return forward(*args, *options, config=config)
        final = new(rows or batch, heads, width, state, dtype=torch.float32)
        return backward(x, final, *args, new(0), *options, config=config)

    return run


def specialisations():
    """Nemotron-H 8B and Nano 3 in bfloat16, packed and long; 80 wide; float32; largest states."""
    launch = launch_on_meta
    long = {"heads": 64, "batch": 1, "tokens": 131072}
    yield Specialisation("H-8B forward", launch(False))
    yield Specialisation("H-8B backward", launch(True))
    yield Specialisation("H-8B packed forward", launch(False, batch=1, rows=8))
    yield Specialisation("H-8B packed backward", launch(True, batch=1, rows=8))
    yield Specialisation("Nano 3 131072 forward", launch(False, **long))
    yield Specialisation("float32 forward", launch(False, dtype=torch.float32))
    yield Specialisation("float32 backward", launch(True, dtype=torch.float32))
    yield Specialisation("P 80 backward", launch(True, width=80, heads=96))
    yield Specialisation("N 256 forward", launch(False, state=256))
    yield Specialisation("N 256 backward", launch(True, state=256))
    yield Specialisation("float32 N 256 forward", launch(False, state=256, dtype=torch.float32))
    yield Specialisation("float32 N 256 backward", launch(True, state=256, dtype=torch.float32))
