"""Registration of the Mamba-2 chunk scan with torch.library."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from nemokernels import _backends, _triton, _tuned
from nemokernels._registry import acc_dtype, family, filling, reference_on_cuda, register
from nemokernels.ops.ssd import ref

FAMILY = family("ssd", {"triton": _triton.reason})

OPTIONS = "int chunk_size, bool dt_softplus, float dt_min, float dt_max, ScalarType? state_dtype"
_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens"
)


@dataclass(frozen=True)
class Config:
    """Which backend runs, and how. Pairs are warps and pipeline stages of a kernel."""

    backend: str
    reason: str = ""  # why not triton, if it is the reference
    chunk: int = 64  # tokens per step of the walks that make out and dx
    span: int = 128  # tokens per state that the backward keeps, a multiple of chunk and square
    square: int = 64  # tokens along a tile of the scores' gradient, span or half of it
    block_p: int = 64  # head dimensions per program
    segment: int = 0  # tokens after which a sequence is split among programs; 0: never
    tma: bool = False
    tma_met: bool = False  # also to store states, where Triton can compile that
    scan: tuple[int, int] = (4, 2)
    states: tuple[int, int] = (4, 2)
    walk: tuple[int, int] = (4, 2)
    scores: tuple[int, int] = (4, 3)
    group: tuple[int, int] = (8, 3)


# By bytes per element and padded state size: what differs from Config's defaults. Not measured:
# chosen for few spills, and for two programs per multiprocessor where that can be had.
_WIDE = {"span": 64, "scan": (8, 2), "walk": (8, 1), "states": (8, 2), "scores": (4, 2),
         "group": (8, 1)}  # fmt: skip
_FLOAT32 = {"chunk": 16, "span": 64, "scan": (8, 1), "walk": (8, 1), "states": (8, 1),
            "scores": (8, 1), "group": (8, 1)}  # fmt: skip
LAUNCHES: dict[tuple[int, int], dict] = {
    (2, 256): _WIDE,
    (4, 16): _FLOAT32,
    (4, 32): _FLOAT32,
    (4, 64): _FLOAT32,
    (4, 128): _FLOAT32,
    (4, 256): {**_FLOAT32, "span": 32, "square": 32, "block_p": 32},
}
HOPPER = {(4, 256): _FLOAT32}  # has the shared memory for it, and compiles it
LARGEST_STATE = 256
SEGMENT = 8192


def plan(
    sequences: int,
    tokens: int,
    heads: int,
    width: int,
    state: int,
    dtypes: tuple[torch.dtype, ...],
    state_dtype: torch.dtype | None,
    backends: tuple[str, ...],
    capability: tuple[int, int],
    processors: int,
) -> Config:
    """The configuration for a problem. ``dtypes`` are those of all tensors, x first; ``backends``
    can run here; ``capability`` and ``processors`` are the device's.

    A program takes one head of one sequence. Where they are too few for the device, sequences of
    more than SEGMENT tokens are split, at the price of reading x and B once more. Segments have
    one length, so that a sequence that fits in one has the same bits, packed or alone.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    reason = _unsupported(state, dtypes, state_dtype)
    if "triton" in backends and not reason:
        size = max(16, _triton.next_power_of_2(state))
        hopper = capability[0] == 9
        launches = {**LAUNCHES, **HOPPER} if hopper else LAUNCHES
        settings = launches.get((dtypes[0].itemsize, size), {})
        blocks = _triton.cdiv(width, settings.get("block_p", 64))
        if blocks > 1:  # a stage of these kernels holds all blocks of a head
            stages = 2 if hopper and blocks == 2 and dtypes[0].itemsize == 2 else 1
            settings = {**settings, "scores": (4, stages), "group": (8, stages)}
        if capability[0] == 12 or capability in ((8, 6), (8, 9)):  # 99 KiB of shared memory
            pairs = {k: v for k, v in vars(Config("")).items() if isinstance(v, tuple)}
            settings = {**settings, **{k: (settings.get(k, v)[0], 1) for k, v in pairs.items()}}
        config = Config("triton", tma=capability >= (9, 0), tma_met=hopper, **settings)
        programs = sequences * heads * _triton.cdiv(width, config.block_p)
        split = tokens > SEGMENT and programs < 2 * processors
        return replace(config, segment=SEGMENT if split else 0)
    if "reference" not in backends:
        raise RuntimeError(f"ssd: {reason or 'no backend can run here'}")
    return Config("reference", reason)


def _unsupported(state: int, dtypes: tuple, state_dtype: torch.dtype | None) -> str:
    wide = [d for d in dtypes if d not in _triton.DTYPES]
    if wide:
        return f"the Triton kernels take float32, bfloat16 and float16, got {wide[0]}"
    if state > LARGEST_STATE:
        return f"the Triton kernels take states up to {LARGEST_STATE}, got {state}"
    if state_dtype not in (None, dtypes[0]):
        return f"the Triton kernels take state_dtype None or that of x, got {state_dtype}"
    return ""


def _plan(tensors: tuple[torch.Tensor | None, ...], state_dtype: torch.dtype | None) -> Config:
    """``tensors`` are the floating inputs, as the operator takes them, and cu_seqlens."""
    *tensors, cu_seqlens = tensors
    x, B = tensors[0], tensors[3]
    batch, tokens, heads, width = x.shape
    config = plan(
        batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, tokens, heads, width, B.shape[3],
        tuple(t.dtype for t in tensors if t is not None), state_dtype,
        _backends.usable(FAMILY.name, x.device), torch.cuda.get_device_capability(x.device),
        _triton.processors(x.device),
    )  # fmt: skip
    # Neither by batch nor by length: packed and separate sequences have the same bits.
    return _tuned.tuned(FAMILY.name, x.device, (width, B.shape[3], x.dtype), config)


def candidates(config: Config, backward: bool) -> Iterator[Config]:
    """What may be faster than ``config`` on some card: other warps and stages of one kernel, and
    states twice as often in the backward."""
    if backward and config.span > config.square:
        yield replace(config, span=config.square)
    for kernel in ("states", "walk", "scores", "group") if backward else ("scan",):
        for launch in itertools.product((4, 8), (1, 2, 3, 4)):
            yield replace(config, **{kernel: launch})


def _forward_cuda(*args):
    inputs, (_, *options, state_dtype) = args[:11], args[11:]
    config = _plan((*inputs[:9], inputs[10]), state_dtype)
    if config.backend == "reference":
        return reference_on_cuda("ssd_chunk_scan", ref.forward)(*args)
    from nemokernels.ops.ssd import kernel

    return kernel.forward(*inputs, *options, config=config)


def backward_cuda(*args, joined=False, ddt=None, dz=None):
    """``joined``: dx, dB and dC side by side. ``ddt`` and ``dz``: parts of a tensor to fill."""
    inputs, (_, *options, state_dtype) = args[2:13], args[14:]
    config = _plan((*inputs[:9], inputs[10]), state_dtype)
    if config.backend == "reference":
        leg = ref.backward_joined if joined else ref.backward
        leg = reference_on_cuda("ssd_chunk_scan_backward", leg)
        places = {"ddt": 1, "dz": 4 if joined else 6}
        return filling(leg, **places)(*args, ddt=ddt, dz=dz)
    from nemokernels.ops.ssd import kernel

    return kernel.backward(*args[:14], *options, config=config, joined=joined, ddt=ddt, dz=dz)


def _example(device: torch.device, dtype: torch.dtype):
    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device=device, dtype=dtype)

    wide = acc_dtype(dtype)
    bounds = torch.tensor([0, 9, 9, 10, 21], dtype=torch.int32, device=device)
    return (
        randn(1, 23, 4, 8),
        randn(1, 23, 4),
        -randn(4, dtype=wide).exp(),
        randn(1, 23, 2, 16),
        randn(1, 23, 2, 16),
        randn(4, dtype=wide),
        randn(1, 23, 4, 8),
        randn(4, dtype=wide),
        randn(4, 4, 8, 16),
        None,
        bounds,
        8,
        True,
        0.0,
        float("inf"),
        None,
    )


def _example_backward(device: torch.device, dtype: torch.dtype):
    # On the CPU: on a GPU cumsum has no deterministic form, and raises where one is asked for.
    args = _example(torch.device("cpu"), dtype)
    out, final, ungated = ref.forward(*args)
    whole = torch.randn_like(out), torch.randn_like(final), *args[:11], ungated, *args[11:]
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in whole)


def _fake(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, *options):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty(rows, *x.shape[2:], B.shape[3], dtype=acc_dtype(x))
    return x.new_empty(x.shape), final, x.new_empty(0 if z is None else x.shape)


def _fake_backward(dout, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, *rest):
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


ssd_chunk_scan_backward = register(
    FAMILY,
    f"ssd_chunk_scan_backward(Tensor dout, Tensor dfinal, {_INPUTS}, Tensor ungated, {OPTIONS}) "
    f"-> ({', '.join(['Tensor'] * 9)})",
    reference=ref.backward,
    cuda=backward_cuda,
    fake=_fake_backward,
    example=_example_backward,
)


def _setup(ctx, inputs, output):
    _, _, ungated = output
    ctx.mark_non_differentiable(ungated)
    ctx.options = inputs[11:]
    ctx.save_for_backward(*inputs[:11], ungated)


def _backward(ctx, dout, dfinal, _dungated):
    saved = ctx.saved_tensors
    grads = ssd_chunk_scan_backward(dout, dfinal, *saved, *ctx.options)
    grads = tuple(None if t is None else grad for t, grad in zip(saved, grads))
    return *grads, None, None, *[None] * len(ctx.options)


ssd_chunk_scan = register(
    FAMILY,
    f"ssd_chunk_scan({_INPUTS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference=ref.forward,
    cuda=_forward_cuda,
    fake=_fake,
    example=_example,
    setup_context=_setup,
    backward=_backward,
)
