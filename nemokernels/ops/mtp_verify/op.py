"""Registration of mtp_verify with torch.library."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemokernels import _backends, _triton
from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.mtp_verify import ref

FAMILY = family("mtp_verify", {"triton": _triton.reason})


@dataclass(frozen=True)
class Config:
    """Which backend runs and tokens per program or step of each kernel; why not Triton if not."""

    backend: str
    block: int = 0
    num_warps: int = 0
    block_cut: int = 0
    num_warps_cut: int = 0
    block_draw: int = 0
    num_warps_draw: int = 0
    reason: str = ""


def plan(vocab: int, unsupported: str, backends: tuple[str, ...]) -> Config:
    """The configuration for a vocabulary; ``unsupported`` says what bars Triton.

    It is the same for every batch, so that the batch changes no bit.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported)
    # Not measured. 32 logits per thread are in flight where they are read once.
    width = max(_triton.next_power_of_2(vocab), 16)
    block, block_cut, block_draw = min(width, 8192), min(width, 8192), min(width, 2048)
    warps = [max(size // 1024, 1) for size in (block, 2 * block_cut, 2 * block_draw)]
    return Config("triton", block, warps[0], block_cut, warps[1], block_draw, warps[2])


def _plan(logits, drafts, draft_lengths, draft_probs, *rest) -> Config:
    return plan(
        logits.shape[2], _triton.unsupported(logits, draft_probs),
        _backends.usable(FAMILY.name, logits.device),
    )  # fmt: skip


def _example(device: torch.device, dtype: torch.dtype):
    """Five requests: greedy, sampled, cut, without drafts, and a pad."""
    logits = 3 * torch.randn(5, 4, 11, device=device, dtype=dtype)
    make = lambda values, kind: torch.tensor(values, device=device, dtype=kind)  # noqa: E731
    return (
        logits,
        logits[:, :3].argmax(-1),
        make([3, 3, 2, 0, -1], torch.int32),
        torch.rand(5, 3, 11, device=device).softmax(-1),
        make([0.0, 1.0, 0.7, 1.5, 1.0], torch.float32),
        make([0, 0, 5, 3, 0], torch.int32),
        make([1.0, 1.0, 0.9, 1.0, 0.5], torch.float32),
        make([1234], torch.int64),
        torch.arange(5, device=device),
        torch.arange(5, device=device) + 100,
    )


def _fake(logits, drafts, *_):
    batch, rows, _ = logits.shape
    return (
        logits.new_empty((batch,), dtype=torch.int32),
        logits.new_empty((batch,), dtype=torch.int64),
        logits.new_empty((batch, rows), dtype=acc_dtype(logits)),
    )


mtp_verify = register(
    FAMILY,
    "mtp_verify(Tensor logits, Tensor drafts, Tensor? draft_lengths, Tensor? draft_probs, "
    "Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor seed, Tensor request_ids, "
    "Tensor positions) -> (Tensor, Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    plan=_plan,
    kernel="mtp_verify.kernel:verify",
)
