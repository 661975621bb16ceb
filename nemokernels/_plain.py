"""References called by themselves, without their operator: plain torch on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable


def plain(
    forward: Callable, backward: Callable, wrt: Sequence[int], *args: object
) -> tuple[torch.Tensor, ...]:
    """``forward(*args)``, whose gradients are those of ``backward(*gradients of outputs, *args)``.

    Autograd through a reference's forward would give NaN where the exp in a gate overflows; its own
    backward does not. ``wrt`` says of which arguments it returns the gradients.
    """
    return _Plain.apply(forward, backward, wrt, *args)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, wrt, *args):
        ctx.how = backward, wrt
        ctx.save_for_backward(*(a if isinstance(a, torch.Tensor) else None for a in args))
        ctx.others = [None if isinstance(a, torch.Tensor) else a for a in args]
        return forward(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts):
        backward, wrt = ctx.how
        args = [b if a is None else a for a, b in zip(ctx.saved_tensors, ctx.others)]
        grads = dict(zip(wrt, backward(*douts, *args)))
        found = (None if a is None else grads.get(place) for place, a in enumerate(args))
        return None, None, None, *found
