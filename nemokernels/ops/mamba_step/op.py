"""Registration of mamba_step with torch.library."""

from __future__ import annotations

import functools

import torch

from nemokernels import _backends, _triton
from nemokernels._registry import family, register
from nemokernels.ops.mamba_step import ref
from nemokernels.ops.state_update import op as state_update

FAMILY = family("mamba_step", {"triton": _triton.reason})


# As for selective_state_update: the same states are cut into the same programs.
plan = functools.partial(state_update.plan, op=FAMILY.name)


def _plan(xBC, dt, z, conv_state, ssm_state, *rest):
    return plan(
        xBC.shape[0], *ssm_state.shape[2:], ssm_state.dtype,
        _triton.unsupported(xBC, dt, z, ssm_state, *rest[:5]),
        _backends.usable(FAMILY.name, xBC.device), _triton.processors(xBC.device),
    )  # fmt: skip


def _example(device: torch.device, dtype: torch.dtype):
    """Four rows of two tokens: a new sequence, a padding row, one past a turn of both rings."""
    H, P, N, G, W, B, T = 4, 16, 24, 2, 4, 4, 2
    C = H * P + 2 * G * N
    randn = lambda *shape, kind=dtype: torch.randn(*shape, device=device, dtype=kind)  # noqa: E731
    ints = lambda *values: torch.tensor(values, device=device, dtype=torch.int32)  # noqa: E731
    D, dt_bias = torch.randn(2, H, device=device)
    return (
        randn(B, T, C), randn(B, T, H), randn(B, T, H * P), randn(6, C, W - 1 + T),
        torch.randn(6, 3, H, P, N, device=device), randn(C, W), randn(C),
        -torch.rand(H, device=device) - 0.5, D, dt_bias, ints(0, 3, 1, 10), ints(4, -1, 0, 5), G,
        0.01, 0.5, None, 5,
    )  # fmt: skip


mamba_step = register(
    FAMILY,
    "mamba_step(Tensor xBC, Tensor dt, Tensor? z, Tensor(a!) conv_state, Tensor(b!) ssm_state, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor A, Tensor? D, Tensor? dt_bias, Tensor lengths, "
    "Tensor? slots, int groups, float dt_min, float dt_max, Tensor? seed, int philox_rounds) "
    "-> Tensor",
    reference=ref.forward,
    fake=lambda xBC, dt, z, conv_state, ssm_state, *rest: xBC.new_empty(
        *xBC.shape[:2], *ssm_state.shape[2:4]
    ),
    example=_example,
    plan=_plan,
    kernel="mamba_step.kernel:step",
)
