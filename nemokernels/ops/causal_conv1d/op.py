"""Registration of the causal_conv1d operators. Tensors are channel-last here: (B, T, D)."""

from __future__ import annotations

import torch

from nemokernels._registry import family, register
from nemokernels.ops.causal_conv1d import ref

FAMILY = family("causal_conv1d")


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
)


def _setup(ctx, inputs, output):
    x, weight, bias, seq_idx, initial_states, cu_seqlens, ctx.silu, _ = inputs
    ctx.save_for_backward(x, weight, bias, seq_idx, initial_states, cu_seqlens)


def _backward(ctx, dy, dfinal):
    bias, initial_states = ctx.saved_tensors[2], ctx.saved_tensors[4]
    dx, dweight, dbias, dinitial = causal_conv1d_backward(dy, dfinal, *ctx.saved_tensors, ctx.silu)
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
)

causal_conv1d_varlen_states = register(
    FAMILY,
    "causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, int state_len) -> Tensor",
    reference=ref.varlen_states,
    fake=lambda x, cu_seqlens, state_len: x.new_empty(
        cu_seqlens.shape[0] - 1, state_len, x.shape[1]
    ),
    example=_example_varlen,
)
