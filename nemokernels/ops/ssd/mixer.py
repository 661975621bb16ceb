"""Convolution and scan of a Mamba-2 mixer as one differentiable step.

The convolution's output is as large as its input and cheap to compute again: the backward does so
instead of keeping it, and the mixer holds on to nothing but its input and the scan's output.

x, B and C stay side by side, as the convolution writes them, and so do their gradients: nothing is
copied on the way. A tile of the scan is a piece of every token's row in either layout, and longer
rows cost TMA nothing as long as their length and the offsets of B and C are multiples of 16 bytes.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from nemokernels.ops.causal_conv1d import op as conv1d
from nemokernels.ops.ssd import op

__all__ = ["conv_scan"]


class _ConvScan(torch.autograd.Function):
    @staticmethod
    def forward(xBC, dt, weight, bias, A, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
                sizes, silu, options):  # fmt: skip
        x, B, C = _convolve(xBC, weight, bias, seq_idx, cu_seqlens, sizes, silu)
        return op.ssd_chunk_scan(
            x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, *options
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.sizes, ctx.silu, ctx.options = inputs[11:]
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[:11], output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal, _dungated):
        *inputs, ungated = ctx.saved_tensors
        xBC, dt, weight, bias, A, D, z, dt_bias, initial_states, seq_idx, cu_seqlens = inputs
        x, B, C = _convolve(xBC, weight, bias, seq_idx, cu_seqlens, ctx.sizes, ctx.silu)
        scanned = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens)
        dconvolved, *rest = op.ssd_chunk_scan_backward_joined(
            dout, dfinal, *scanned, ungated, *ctx.options
        )
        ddt, dA, dD, dz, ddt_bias, dinitial = rest
        no_final = dconvolved.new_empty(0, weight.shape[1] - 1, xBC.shape[2])
        dxBC, dweight, dbias, _ = conv1d.causal_conv1d_backward(
            dconvolved, no_final, xBC, weight, bias, seq_idx, None, cu_seqlens, ctx.silu
        )
        grads = (dxBC, ddt, dweight, dbias, dA, dD, dz, ddt_bias, dinitial)
        grads = (None if t is None else grad for t, grad in zip(inputs, grads))
        return *grads, None, None, None, None, None


def conv_scan(
    xBC: torch.Tensor,
    dt: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    sizes: tuple[int, int, int, int],
    silu: bool,
    options: tuple,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan of the convolved xBC (B, T, H*P + 2*G*N), and its last states.

    ``sizes`` are H, P, G and N; ``options`` those of the scan's operator. Arguments are taken as
    checked.
    """
    y, final, _ = _ConvScan.apply(
        xBC, dt, weight, bias, A, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, sizes, silu,
        options,
    )  # fmt: skip
    return y, final


def _convolve(xBC, weight, bias, seq_idx, cu_seqlens, sizes, silu):
    H, P, G, N = sizes
    y, _ = conv1d.causal_conv1d(xBC, weight, bias, seq_idx, None, cu_seqlens, silu, False)
    x, B, C = y.split([H * P, G * N, G * N], -1)
    return x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
