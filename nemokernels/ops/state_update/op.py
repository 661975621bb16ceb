"""Registration of selective_state_update with torch.library."""

from __future__ import annotations

import torch

from nemokernels._registry import family, register
from nemokernels.ops.state_update import ref

FAMILY = family("state_update")


def _example(device: torch.device, dtype: torch.dtype):
    """Five rows: three tokens, none, padding, one token, two tokens of which one is not stored."""
    H, P, N, G, T = 4, 16, 24, 2, 8
    randn = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)  # noqa: E731
    ints = lambda *rows: torch.tensor(rows, device=device, dtype=torch.int32)  # noqa: E731
    state = torch.randn(14, H, P, N, device=device)
    A = -torch.rand(H, 1, 1, device=device) - 0.5
    D, dt_bias = torch.randn(2, H, 1, device=device)
    slots = ints([3, 4, 5], [8, 6, 7], [-1, 1, 2], [0, 1, 2], [9, 11, -1])
    return (
        state, randn(T, H, P), randn(T, H, 1), A, randn(T, G, N), randn(T, G, N), D,
        randn(T, H, P), dt_bias, True, slots, None, ints(2, 1, 1, 0, 2), ints(0, 3, 3, 4, 5, 7),
        None, 5,
    )  # fmt: skip


selective_state_update = register(
    FAMILY,
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices, "
    "Tensor? dst_state_batch_indices, Tensor? num_accepted_tokens, Tensor? cu_seqlens, "
    "Tensor? seed, int philox_rounds) -> Tensor",
    reference=ref.forward,
    fake=lambda state, x, *rest: x.new_empty(x.shape),
    example=_example,
)
