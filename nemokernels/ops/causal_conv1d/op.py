"""Registration of the causal_conv1d operators. Tensors are channel-last here: (B, T, D)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemokernels import _backends, _ext
from nemokernels._registry import family, reference_on_cuda, register
from nemokernels.ops.causal_conv1d import ref

FAMILY = family("causal_conv1d", {"csrc": _ext.reason})
NATIVE = (torch.float32, torch.bfloat16, torch.float16)


class Config(NamedTuple):
    """Which backend runs, tokens per warp if it is csrc, why not csrc if it is the reference."""

    backend: str
    chunk: int = 0
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

    A warp walks ``chunk`` tokens and reads W-1 more in front of them (the backward W-1 behind them
    too), so chunks are as long as leaves every multiprocessor eight blocks.

    Raises:
        RuntimeError: none of ``backends`` takes these dtypes.
    """
    wide = [d for d in dtypes if d not in NATIVE]
    if "csrc" in backends and not wide:
        groups = -(-dim // 256)  # 32 lanes of 8 channels
        for chunk in (256, 128, 64, 32):
            if groups * batch * -(-tokens // (4 * chunk)) >= 8 * processors:
                return Config("csrc", chunk)
        return Config("csrc", 16)
    reason = f"csrc takes float32, bfloat16 and float16, got {wide[0]}" if wide else ""
    if "reference" not in backends:
        raise RuntimeError(f"causal_conv1d: {reason or 'no backend can run here'}")
    return Config("reference", reason=reason)


def _plan(x: torch.Tensor, *others: torch.Tensor | None) -> Config:
    dtypes = tuple(t.dtype for t in (x, *others) if t is not None)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    batch, tokens, dim = x.shape if x.dim() == 3 else (1, *x.shape)
    return plan(batch, tokens, dim, dtypes, _backends.usable(FAMILY.name, x.device), processors)


def _forward_cuda(x, weight, bias, seq_idx, initial_states, cu_seqlens, silu, final):
    from nemokernels.ops.causal_conv1d import kernel

    args = (x, weight, bias, seq_idx, initial_states, cu_seqlens, silu, final)
    config = _plan(x, weight, bias)
    if config.backend == "reference":
        return reference_on_cuda("causal_conv1d", ref.forward)(*args)
    return kernel.forward(*args, chunk=config.chunk)


def _backward_cuda(dy, dfinal, x, weight, bias, seq_idx, initial_states, cu_seqlens, silu):
    from nemokernels.ops.causal_conv1d import kernel

    args = (dy, dfinal, x, weight, bias, seq_idx, initial_states, cu_seqlens, silu)
    config = _plan(x, weight, bias)
    if config.backend == "reference":
        return reference_on_cuda("causal_conv1d_backward", ref.backward)(*args)
    return kernel.backward(*args, chunk=config.chunk)


def _update_cuda(x, conv_state, weight, bias, *args):
    from nemokernels.ops.causal_conv1d import kernel

    if _plan(x, weight, bias).backend == "reference":
        run = reference_on_cuda("causal_conv1d_update", ref.update)
        return run(x, conv_state, weight, bias, *args)
    return kernel.update(x, conv_state, weight, bias, *args)


def _varlen_cuda(x, cu_seqlens, state_len):
    from nemokernels.ops.causal_conv1d import kernel

    if _plan(x).backend == "reference":
        run = reference_on_cuda("causal_conv1d_varlen_states", ref.varlen_states)
        return run(x, cu_seqlens, state_len)
    return kernel.varlen_states(x, cu_seqlens, state_len)


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
    cuda=_backward_cuda,
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
    cuda=_forward_cuda,
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
