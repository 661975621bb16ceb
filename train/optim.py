"""AdamW's parameter groups, and gradient clipping over sharded and replicated parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_NO_DECAY = ("A_log", "D", "dt_bias")


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices and convolution taps, but not to A_log, D and
    dt_bias (whatever their shape), norms or biases."""
    return parameter.dim() >= 2 and name.rsplit(".", 1)[-1] not in _NO_DECAY


def adamw(
    named: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95, 1e-8), the betas of the Nemotron runs, with decay as in :func:`decays`."""
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for name, parameter in named:
        # Parameters on different meshes, or on none, cannot share one multi-tensor update.
        axes = parameter.device_mesh.ndim if isinstance(parameter, DTensor) else 0
        key = (decays(name, parameter), axes)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": weight_decay if decay else 0.0}
            for (decay, _), params in sorted(groups.items(), reverse=True)
        ],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
    )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that their global L2 norm is at most ``max_norm``; return the norm.

    Raises:
        FloatingPointError: the norm is not finite on some rank; no gradient has been changed.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    squares = [torch.linalg.vector_norm(g.float()).square() for g in grads]
    squares = [s.full_tensor() if isinstance(s, DTensor) else s for s in squares]
    norm = torch.stack(squares).sum().sqrt().item()
    if not norm < float("inf"):
        raise FloatingPointError(f"gradient norm is {norm}; the optimizer step was not taken")
    if norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm
