"""Registration of mtp_verify with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.mtp_verify import ref

FAMILY = family("mtp_verify")


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
)
