"""The output projection of a Mamba-2 mixer, which keeps nothing as large as what it reads.

Its weight's gradient needs the normed output of the scan again. The norm's own backward keeps the
scan's output anyway, and to normalise that once more costs little beside a matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nemokernels.ops.gated_rms_norm import op as gated_norm

__all__ = ["project"]


def project(
    normed: torch.Tensor,
    beside: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: tuple,
) -> torch.Tensor:
    """``F.linear([beside, normed], weight, bias)``, bit for bit, and so are its gradients.

    ``normed`` (B, T, H*P) is what gated_rms_norm returns for the arguments ``norm``; it alone gets
    the gradient, which the norm then passes on. ``beside`` (B, T, M) or None.
    """
    return _Projection.apply(normed, beside, weight, bias, *norm)


def _joined(beside: torch.Tensor | None, normed: torch.Tensor) -> torch.Tensor:
    return normed if beside is None else torch.cat([beside, normed], -1)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(normed, beside, weight, bias, scanned, norm_weight, norm_bias, z, *options):
        return F.linear(_joined(beside, normed), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, beside, weight, _, *tensors = inputs[:8]
        ctx.options = inputs[8:]
        ctx.save_for_backward(beside, weight, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        beside, weight, scanned, *norm = ctx.saved_tensors
        wants = ctx.needs_input_grad
        rows, dtype = dout.flatten(0, -2), dout.dtype  # under autocast not that of the inputs
        dnormed = dbeside = dweight = dbias = None
        if wants[2]:
            normed, _ = gated_norm.gated_rms_norm(scanned, *norm, *ctx.options)
            dweight = rows.T @ _joined(beside, normed).to(dtype).flatten(0, -2)
        if wants[3]:
            dbias = rows.sum(0)
        if wants[0]:
            width = scanned.shape[-1]
            dbeside, dnormed = (dout @ weight.to(dtype)).split([weight.shape[1] - width, width], -1)
            dbeside = dbeside if wants[1] else None
        return dnormed, dbeside, dweight, dbias, *[None] * (4 + len(ctx.options))
