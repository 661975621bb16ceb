"""Registration of the causal_conv1d operators. Tensors are channel-last here: (B, T, D)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemokernels import _backends, _ext, _triton
from nemokernels._registry import family, filling, reference_on_cuda, register
from nemokernels.ops.causal_conv1d import ref

FAMILY = family("causal_conv1d", {"csrc": _ext.reason, "triton": _triton.reason})


class Config(NamedTuple):
    """Which backend runs and how; why no kernel if it is the reference.

    ``chunk`` tokens are walked by a warp of csrc, or summed up by a program of Triton's backward;
    a Triton program has ``block_t`` tokens of ``block_d`` channels at a time.
    """

    backend: str
    chunk: int = 0
    block_t: int = 0
    block_d: int = 0
    num_warps: int = 0
    reason: str = ""


def plan(
    batch: int,
    tokens: int,
    dim: int,
    dtypes: tuple[torch.dtype, ...],
    backends: tuple[str, ...],
    processors: int,
) -> Config:
    """The configuration for a problem. ``backends`` can run here; ``processors`` of the device.

    A warp of csrc walks ``chunk`` tokens and reads W-1 more in front of them (the backward W-1
    behind them too), so chunks are as long as leaves every multiprocessor eight blocks. Triton is
    for where csrc is not built.

    Raises:
        RuntimeError: none of ``backends`` takes these dtypes.
    """
    wide = [d for d in dtypes if d not in _triton.DTYPES]
    reason = f"the kernels take float32, bfloat16 and float16, got {wide[0]}" if wide else ""
    kernels = [b for b in backends if b != "reference" and not wide]
    if not kernels and "reference" not in backends:
        raise RuntimeError(f"causal_conv1d: {reason or 'no backend can run here'}")
    if not kernels:
        return Config("reference", reason=reason)
    groups = -(-dim // 256)  # csrc: 32 lanes of 8 channels
    chunks = (c for c in (256, 128, 64, 32)
              if groups * batch * -(-tokens // (4 * c)) >= 8 * processors)  # fmt: skip
    if kernels[0] == "csrc":
        return Config("csrc", next(chunks, 16))
    block_d = min(max(_triton.next_power_of_2(dim), 16), 128)
    return Config("triton", next(chunks, 16), 16, block_d, 8)  # not measured


def _plan(x: torch.Tensor, *others: torch.Tensor | None) -> Config:
    dtypes = tuple(t.dtype for t in (x, *others) if t is not None)
    batch, tokens, dim = x.shape if x.dim() == 3 else (1, *x.shape)
    usable = _backends.usable(FAMILY.name, x.device)
    return plan(batch, tokens, dim, dtypes, usable, _triton.processors(x.device))


def _cuda_leg(name: str, operator: str, reference, tensors: slice, **places: int):
    """Runs ``name`` of what the plan for these arguments picks; ``places`` as in filling."""

    def leg(*args, **targets):
        config = _plan(*args[tensors])
        if config.backend == "reference":
            return filling(reference_on_cuda(operator, reference), **places)(*args, **targets)
        if config.backend == "csrc":
            from nemokernels.ops.causal_conv1d import native as kernel
        else:
            from nemokernels.ops.causal_conv1d import kernel
        with torch.cuda.device_of(args[0]):
            return getattr(kernel, name)(*args, config=config, **targets)

    return leg


forward_cuda = _cuda_leg("forward", "causal_conv1d", ref.forward, slice(0, 3))
backward_cuda = _cuda_leg("backward", "causal_conv1d_backward", ref.backward, slice(2, 5), dx=0)
_varlen_cuda = _cuda_leg("varlen_states", "causal_conv1d_varlen_states", ref.varlen_states,
                         slice(0, 1))  # fmt: skip
_update_cuda = _cuda_leg("update", "causal_conv1d_update", ref.update, slice(0, 4))


def _example(device: torch.device, dtype: torch.dtype):
    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    bounds = torch.tensor([0, 5, 5, 7, 13], dtype=torch.int32, device=device)
    return (randn(1, 15, 24), randn(24, 4), randn(24), None, randn(4, 3, 24), bounds, True, True)


def _example_backward(device: torch.device, dtype: torch.dtype):
    x, weight, bias, _, initial, bounds, silu, _ = _example(device, dtype)
    seq_idx = torch.tensor([[0] * 6 + [2] * 5 + [-1] * 4], dtype=torch.int32, device=device)
    initial = initial[:1]
    dfinal = torch.randn_like(initial)
    return torch.randn_like(x), dfinal, x, weight, bias, seq_idx, initial, None, silu


def _example_update(device: torch.device, dtype: torch.dtype):
    x = torch.randn(3, 2, 24, device=device, dtype=dtype)
    state = torch.randn(5, 24, 5, device=device, dtype=dtype)
    weight = torch.randn(24, 4, device=device, dtype=dtype)
    slots = torch.tensor([4, -1, 1], dtype=torch.int32, device=device)
    accepted = torch.tensor([1, 1, 3], dtype=torch.int32, device=device)
    return x, state, weight, None, True, None, slots, accepted


def _example_varlen(device: torch.device, dtype: torch.dtype):
    bounds = torch.tensor([0, 5, 5, 6, 11], dtype=torch.int32, device=device)
    return torch.randn(11, 24, device=device, dtype=dtype), bounds, 3


def _sequences(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake(x, weight, bias, seq_idx, initial_states, cu_seqlens, silu, final):
    states = _sequences(x, cu_seqlens) if final else 0
    return x.new_empty(x.shape), x.new_empty(states, weight.shape[1] - 1, x.shape[2])


def _fake_backward(dy, dfinal, x, weight, bias, seq_idx, initial_states, cu_seqlens, silu):
    states = 0 if initial_states is None else _sequences(x, cu_seqlens)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        (weight if bias is None else bias).new_empty(x.shape[2]),
        x.new_empty(states, weight.shape[1] - 1, x.shape[2]),
    )


causal_conv1d_backward = register(
    FAMILY,
    "causal_conv1d_backward(Tensor dy, Tensor dfinal, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? seq_idx, Tensor? initial_states, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=ref.backward,
    fake=_fake_backward,
    example=_example_backward,
    cuda=backward_cuda,
)


def _setup(ctx, inputs, output):
    x, weight, bias, seq_idx, initial_states, cu_seqlens, ctx.silu, _ = inputs
    ctx.save_for_backward(x, weight, bias, seq_idx, initial_states, cu_seqlens)


def _backward(ctx, dy, dfinal):
    _, _, bias, _, initial_states, _ = saved = ctx.saved_tensors
    dx, dweight, dbias, dinitial = causal_conv1d_backward(dy, dfinal, *saved, ctx.silu)
    dbias = None if bias is None else dbias
    dinitial = None if initial_states is None else dinitial
    return dx, dweight, dbias, None, dinitial, None, None, None


causal_conv1d = register(
    FAMILY,
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
    "Tensor? initial_states, Tensor? cu_seqlens, bool silu, bool final) -> (Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    cuda=forward_cuda,
    setup_context=_setup,
    backward=_backward,
)

causal_conv1d_update = register(
    FAMILY,
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, "
    "bool silu, Tensor? cache_seqlens, Tensor? conv_state_indices, Tensor? num_accepted_tokens) "
    "-> Tensor",
    reference=ref.update,
    fake=lambda x, *_: x.new_empty(x.shape),
    example=_example_update,
    cuda=_update_cuda,
)

causal_conv1d_varlen_states = register(
    FAMILY,
    "causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, int state_len) -> Tensor",
    reference=ref.varlen_states,
    fake=lambda x, cu_seqlens, state_len: x.new_empty(
        cu_seqlens.shape[0] - 1, state_len, x.shape[1]
    ),
    example=_example_varlen,
    cuda=_varlen_cuda,
)
