"""Registration of moe_route with torch.library."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemokernels import _backends, _ext, _triton
from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.moe_route import native, ref


def _native(device: torch.device) -> str | None:
    # Many tokens and the gradient are Triton's.
    return _ext.reason(device) or _triton.reason(device)


FAMILY = family("moe_route", {"csrc": _native, "triton": _triton.reason})

WIDEST = 2048  # lanes of a program: experts, with groups padded to powers of two


@dataclass(frozen=True)
class Config:
    """Which backend runs and how it is launched; why no kernel if it is the reference.

    A program of Triton's chooses for ``rows`` tokens. The slots are sorted in pieces of ``piece``,
    ``block`` at a time. If there are several, a piece is what a whole number of programs choose.
    """

    backend: str
    rows: int = 0
    num_warps: int = 0
    block: int = 0
    piece: int = 0
    reason: str = ""


def plan(
    tokens: int,
    lanes: int,
    top_k: int,
    unsupported: str,
    backends: tuple[str, ...],
    processors: int,
    barred: str | None = None,
) -> Config:
    """The configuration for so many tokens and ``lanes`` padded experts.

    ``barred`` says why csrc does not take a forward, "" if it does; None for a backward.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if "csrc" in backends:
        if not unsupported and barred == "":
            return Config("csrc")  # one launch, where Triton needs two to four; not measured
        if barred and "triton" not in backends:
            raise RuntimeError(f"moe_route: {barred}")
        backends = (*backends, "triton")
    if not unsupported and lanes > WIDEST:
        unsupported = f"the Triton kernels take up to {WIDEST} experts, got {lanes} with padding"
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported)
    # On an H100 one token per warp wins: four at 128 experts, one at 512. The rest: not measured.
    rows = min(max(512 // max(lanes, 1), 1), 4)
    block = 64
    blocks = max(_triton.cdiv(tokens * top_k, block), 1)
    pieces = 1 if blocks <= 16 else min(blocks, 2 * processors)
    piece = _triton.cdiv(blocks, pieces) * block
    if pieces > 1:
        piece = max(piece // (rows * top_k), 1) * rows * top_k
    return Config("triton", rows, rows, block, piece)


def _plan(logits, top_k, n_group, *others, barred: str | None = None) -> Config:
    tokens, experts = logits.shape
    lanes = _triton.next_power_of_2(n_group) * _triton.next_power_of_2(experts // n_group)
    return plan(
        tokens, lanes, top_k, _triton.unsupported(logits, *others),
        _backends.usable(FAMILY.name, logits.device), _triton.processors(logits.device), barred,
    )  # fmt: skip


def _plan_forward(logits, bias, top_k, n_group, *_) -> Config:
    barred = native.barred(*logits.shape, top_k, n_group)
    return _plan(logits, top_k, n_group, bias, barred=barred)


def _example(device: torch.device, dtype: torch.dtype):
    logits = torch.randn(7, 12, device=device, dtype=dtype)
    bias = 0.1 * torch.randn(12, device=device, dtype=acc_dtype(dtype))
    return logits, bias, 3, 3, 2, True, 2.5


def _probe(experts: int, top_k: int):
    """9 tokens of a model with so many experts."""

    def make(device: torch.device, dtype: torch.dtype):
        logits = torch.randn(9, experts, device=device, dtype=dtype)
        return logits, torch.rand(experts, device=device), top_k, 1, 1, True, 5.0

    return make


def _example_backward(device: torch.device, dtype: torch.dtype):
    args = _example(device, dtype)
    weights, experts, *_ = ref.forward(*args)
    return torch.randn_like(weights), args[0], experts, *args[5:]


def _fake(logits, correction_bias, top_k, n_group, topk_group, norm_topk_prob, scale):
    tokens, experts = logits.shape
    integers = lambda *shape: logits.new_empty(shape, dtype=torch.int32)  # noqa: E731
    return (
        logits.new_empty((tokens, top_k), dtype=acc_dtype(logits)),
        integers(tokens, top_k),
        integers(experts),
        integers(experts),
        integers(tokens * top_k),
    )


moe_route_backward = register(
    FAMILY,
    "moe_route_backward(Tensor dweights, Tensor logits, Tensor experts, bool norm_topk_prob, "
    "float scale) -> Tensor",
    reference=ref.backward,
    fake=lambda dweights, logits, experts, norm, scale: logits.new_empty(logits.shape),
    example=_example_backward,
    plan=lambda dweights, logits, experts, *rest: _plan(logits, experts.shape[1], 1, dweights),
    kernel="moe_route.kernel:backward",
)


def _setup(ctx, inputs, output):
    logits, _, _, _, _, ctx.norm_topk_prob, ctx.scale = inputs
    _, experts, counts, offsets, order = output
    ctx.mark_non_differentiable(experts, counts, offsets, order)
    ctx.save_for_backward(logits, experts)


def _backward(ctx, dweights, *_):
    dlogits = moe_route_backward(dweights, *ctx.saved_tensors, ctx.norm_topk_prob, ctx.scale)
    return dlogits, None, None, None, None, None, None


moe_route = register(
    FAMILY,
    "moe_route(Tensor logits, Tensor? correction_bias, int top_k, int n_group, int topk_group, "
    "bool norm_topk_prob, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    probes={"csrc": [_probe(128, 6), _probe(512, 22)]},
    plan=_plan_forward,
    kernel="moe_route.kernel:forward",
    setup_context=_setup,
    backward=_backward,
)
