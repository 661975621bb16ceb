"""Registration of the Mamba-1 selective scan with torch.library."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemokernels import _backends, _triton
from nemokernels._registry import acc_dtype, family, reference_on_cuda, register
from nemokernels.ops.selective_scan import ref

FAMILY = family("selective_scan", {"triton": _triton.reason})

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_states, Tensor? cu_seqlens, bool delta_softplus"
)


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time: channels x tokens x the whole state."""

    channels: int
    tokens: int
    num_warps: int


@dataclass(frozen=True)
class Config:
    """Which backend runs, and how; why not Triton if it is the reference."""

    backend: str
    reason: str = ""
    forward: Tile | None = None
    backward: Tile | None = None


LARGEST_STATE = 256
TOKENS = 16  # of a tile


def plan(state: int, reason: str, backends: tuple[str, ...]) -> Config:
    """The configuration for a state size. ``reason`` says why Triton cannot take the problem,
    ``backends`` which can run here.

    Every thread holds 16 elements of each array: that leaves 16 warps on a multiprocessor to the
    forward, and 8 to the backward, which holds more arrays at once and takes more channels, as the
    gradients of B and C have one partial sum per block of channels. Not measured.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if state > LARGEST_STATE:
        reason = f"the Triton kernels take states up to {LARGEST_STATE}, got {state}"
    if _triton.needs_reference("selective_scan", reason, backends):
        return Config("reference", reason)
    width = max(16, _triton.next_power_of_2(state))
    channels = (max(1, most * 16 // width) for most in (8, 16))
    tiles = (Tile(count, TOKENS, count * TOKENS * width // 512) for count in channels)
    return Config("triton", "", *tiles)


def _plan(args: tuple) -> Config:
    u, A, *floats = args[0], args[2], *args[:9]
    reason = _triton.unsupported(*floats)
    return plan(A.shape[1], reason, _backends.usable(FAMILY.name, u.device))


def _forward_cuda(*args):
    config = _plan(args)
    if config.backend == "reference":
        return reference_on_cuda("selective_scan", ref.forward)(*args)
    from nemokernels.ops.selective_scan import kernel

    with torch.cuda.device_of(args[0]):
        return kernel.forward(*args, config.forward)


def _backward_cuda(*args):
    config = _plan(args[2:])
    if config.backend == "reference":
        return reference_on_cuda("selective_scan_backward", ref.backward)(*args)
    from nemokernels.ops.selective_scan import kernel

    with torch.cuda.device_of(args[0]):
        return kernel.backward(*args, config.backward)


def _example(device: torch.device, dtype: torch.dtype):
    """Four packed sequences, one of them empty, and two tokens of padding."""

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device=device, dtype=dtype)

    wide = acc_dtype(dtype)
    bounds = torch.tensor([0, 9, 9, 10, 21], dtype=torch.int32, device=device)
    return (
        randn(1, 23, 6), randn(1, 23, 6), -randn(6, 5, dtype=wide).exp(), randn(1, 23, 2, 5),
        randn(1, 23, 2, 5), randn(6, dtype=wide), randn(1, 23, 6), randn(6, dtype=wide),
        randn(4, 6, 5, dtype=wide), bounds, True,
    )  # fmt: skip


def _example_backward(device: torch.device, dtype: torch.dtype):
    args = _example(device, dtype)
    out, final = ref.forward(*args)
    return torch.randn_like(out), torch.randn_like(final), *args


def _fake(u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens, delta_softplus):
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return u.new_empty(u.shape), u.new_empty(rows, *A.shape, dtype=acc_dtype(u))


def _fake_backward(dout, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_states, *rest):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_states)
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


selective_scan_backward = register(
    FAMILY,
    f"selective_scan_backward(Tensor dout, Tensor dfinal, {_INPUTS}) "
    f"-> ({', '.join(['Tensor'] * 9)})",
    reference=ref.backward,
    cuda=_backward_cuda,
    fake=_fake_backward,
    example=_example_backward,
)


def _setup(ctx, inputs, output):
    ctx.softplus = inputs[10]
    ctx.save_for_backward(*inputs[:10])


def _backward(ctx, dout, dfinal):
    saved = ctx.saved_tensors
    grads = selective_scan_backward(dout, dfinal, *saved, ctx.softplus)
    return *(None if t is None else grad for t, grad in zip(saved, grads)), None, None


selective_scan = register(
    FAMILY,
    f"selective_scan({_INPUTS}) -> (Tensor, Tensor)",
    reference=ref.forward,
    cuda=_forward_cuda,
    fake=_fake,
    example=_example,
    setup_context=_setup,
    backward=_backward,
)
