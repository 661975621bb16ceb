"""Registration of attention and attention_with_cache with torch.library."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemokernels import _backends, _triton
from nemokernels._registry import acc_dtype, family, reference_on_cuda, register
from nemokernels.ops.attention import ref, vendor
from nemokernels.ops.fp8 import op as fp8

FAMILY = family(
    "attention",
    {
        "triton": _triton.reason,
        "torch": vendor.torch_reason,
        "flash_attn": vendor.flash_attn_reason,
    },
)
CACHE_FAMILY = family("attention_with_cache", {"triton": _triton.reason})

RULE = "Tensor? alibi_slopes, float scale, int? window, int global_tokens"  # scores and mask
WIDEST = 256  # head size; a program holds whole heads


@dataclass(frozen=True)
class Config:
    """Which backend attends to a cache: keys per part and tiles; why not Triton if it does not."""

    backend: str
    part: int = 0
    block_h: int = 0
    block_n: int = 0
    block_d: int = 0
    num_warps: int = 0
    num_stages: int = 0
    reason: str = ""


def plan(
    heads: int,
    groups: int,
    dim: int,
    room: int,
    dtype: torch.dtype,
    unsupported: str,
    backends: tuple[str, ...],
) -> Config:
    """The configuration for a cache of ``room`` tokens; ``unsupported`` says what bars Triton.

    It is the same for every batch and number of new tokens, so that neither changes a bit.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if not unsupported and dim > WIDEST:
        unsupported = f"the Triton kernels take heads up to {WIDEST}, got {dim}"
    if not unsupported and heads // groups > 64:
        unsupported = f"the Triton kernels take up to 64 heads per group, got {heads // groups}"
    if _triton.needs_reference(CACHE_FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported)
    # Not measured. At most 64 parts, whose partial results stay small beside what they read.
    part = max(_triton.next_power_of_2(_triton.cdiv(room, 64)), 512)
    block_h = max(_triton.next_power_of_2(heads // groups), 16)
    block_d = max(_triton.next_power_of_2(dim), 16)
    block_n = 64 if block_d * dtype.itemsize <= 256 else 32
    return Config("triton", part, block_h, block_n, block_d, 4, 3 if dtype.itemsize == 2 else 2)


@dataclass(frozen=True)
class SequenceConfig:
    """Which backend attends over sequences, the tiles of Triton, why no other if it is none.

    Tiles of ``block_m`` queries and ``block_n`` keys; in the gradient of keys the other way round.
    """

    backend: str
    block_m: int = 0
    block_n: int = 0
    block_d: int = 0
    num_warps: int = 0
    num_stages: int = 0
    reason: str = ""


def plan_sequences(
    dim: int,
    dtype: torch.dtype,
    slopes: bool,
    global_tokens: int,
    backward: bool,
    unsupported: str,
    backends: tuple[str, ...],
    capability: tuple[int, int],
) -> SequenceConfig:
    """The configuration for heads of ``dim``: the first of ``backends`` that takes the problem.

    ``unsupported`` says what bars Triton. The choice depends on no length, so that none changes a
    bit.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    reasons = []
    for name in backends:
        if name == "triton":
            wide = f"the Triton kernels take heads up to {WIDEST}, got {dim}"
            why = unsupported or (wide if dim > WIDEST else "")
            if not why:
                return _tiles(dim, dtype, backward, capability)
        elif name == "reference":
            return SequenceConfig("reference", reason="; ".join(reasons))
        else:
            why = vendor.unsupported(name, dtype, dim, slopes, global_tokens)
            if not why:
                return SequenceConfig(name)
        reasons.append(why)
    raise RuntimeError(f"attention: {'; '.join(reasons)}")


def _tiles(dim, dtype, backward, capability) -> SequenceConfig:
    # Not measured. The gradients of a tile of keys are two accumulators as tall as it; with these
    # tiles they fit the registers.
    block_d = max(_triton.next_power_of_2(dim), 16)
    if dtype == torch.float32:
        return SequenceConfig("triton", 32, 32, block_d, 4, 1)
    if capability not in _triton.ROOMY:
        return SequenceConfig("triton", 64, 32 if block_d <= 128 else 16, block_d, 4, 1)
    if block_d > 128:
        return SequenceConfig("triton", 64, 16 if backward else 32, block_d, 8, 2)
    return SequenceConfig("triton", 128, 32 if backward else 64, block_d, 8, 2 if backward else 3)


def _plan_sequences(q, slopes, global_tokens, backward=False) -> SequenceConfig:
    return plan_sequences(
        q.shape[3], q.dtype, slopes is not None, global_tokens, backward, _triton.unsupported(q),
        _backends.usable(FAMILY.name, q.device), torch.cuda.get_device_capability(q.device),
    )  # fmt: skip


def _forward_cuda(q, k, v, cu_seqlens, slopes, scale, window, global_tokens):
    config = _plan_sequences(q, slopes, global_tokens)
    args = (q, k, v, cu_seqlens, slopes, scale, window)
    if config.backend == "reference":
        return reference_on_cuda("attention", ref.forward)(*args, global_tokens)
    with torch.cuda.device_of(q):
        if config.backend == "triton":
            from nemokernels.ops.attention import kernel_sequence

            return kernel_sequence.forward(*args, global_tokens, config)
        return vendor.forward(config.backend, *args)


def _backward_cuda(dout, q, k, v, out, lse, cu_seqlens, slopes, scale, window, global_tokens):
    config = _plan_sequences(q, slopes, global_tokens, backward=True)
    args = (dout, q, k, v, out, lse, cu_seqlens, slopes, scale, window)
    if config.backend == "reference":
        return reference_on_cuda("attention_backward", ref.backward)(*args, global_tokens)
    with torch.cuda.device_of(q):
        if config.backend == "triton":
            from nemokernels.ops.attention import kernel_sequence

            return kernel_sequence.backward(*args, global_tokens, config)
        return vendor.backward(config.backend, *args)


def _plan_with_cache(q, k, v, k_cache, *rest) -> Config:
    eight = k_cache.dtype == torch.float8_e4m3fn
    barred = _triton.unsupported(q, None if eight else k_cache)
    if eight and not barred:
        barred = fp8.reason(q.device) or ""
    return plan(
        q.shape[2], k.shape[2], q.shape[3], k_cache.shape[1], q.dtype, barred,
        _backends.usable(CACHE_FAMILY.name, q.device),
    )  # fmt: skip


def _example(device: torch.device, dtype: torch.dtype):
    q = torch.randn(1, 11, 4, 8, device=device, dtype=dtype)
    k = torch.randn(1, 11, 2, 8, device=device, dtype=dtype)
    bounds = torch.tensor([0, 4, 4, 11], dtype=torch.int32, device=device)
    # A rule that every backend takes.
    return q, k, torch.randn_like(k), bounds, None, 8**-0.5, 3, 0


def _example_backward(device: torch.device, dtype: torch.dtype):
    q, k, v, *rest = _example(device, dtype)
    out, lse = ref.forward(q, k, v, *rest)
    return torch.randn_like(out), q, k, v, out, lse, *rest


def _example_cache(device: torch.device, dtype: torch.dtype):
    q = torch.randn(3, 2, 4, 8, device=device, dtype=dtype)
    k = torch.randn(3, 2, 2, 8, device=device, dtype=dtype)
    cache = torch.randn(4, 9, 2, 8, device=device, dtype=dtype)
    lengths = torch.tensor([5, 0, 7], dtype=torch.int32, device=device)
    slots = torch.tensor([3, -1, 0], dtype=torch.int32, device=device)
    v_cache = torch.randn_like(cache)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
    rule = slopes, 8**-0.5, 3, 1, 1.0, 1.0
    return q, k, torch.randn_like(k), cache, v_cache, lengths, slots, *rule


def _fake(q, k, v, *rest):
    rows, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((rows, heads, length), dtype=acc_dtype(q))


attention_backward = register(
    FAMILY,
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor? cu_seqlens, {RULE}) -> (Tensor, Tensor, Tensor)",
    reference=ref.backward,
    fake=lambda dout, q, k, v, *rest: tuple(t.new_empty(t.shape) for t in (q, k, v)),
    example=_example_backward,
    cuda=_backward_cuda,
)


def _setup(ctx, inputs, output):
    q, k, v, cu_seqlens, alibi_slopes, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, alibi_slopes)


def _backward(ctx, dout, _dlse):
    return *attention_backward(dout, *ctx.saved_tensors, *ctx.rest), *(None,) * 5


attention = register(
    FAMILY,
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, {RULE}) -> (Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    cuda=_forward_cuda,
    setup_context=_setup,
    backward=_backward,
)

attention_with_cache = register(
    CACHE_FAMILY,
    "attention_with_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    f"Tensor lengths, Tensor slots, {RULE}, float k_scale, float v_scale) -> Tensor",
    reference=ref.with_cache,
    fake=lambda q, *rest: q.new_empty(q.shape),
    example=_example_cache,
    plan=_plan_with_cache,
    kernel="attention.kernel:with_cache",
)
