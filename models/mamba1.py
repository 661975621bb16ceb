"""The Mamba-1 mixer: a whole layer, or one branch of a layer beside attention.

Module names are the tensor names of the published checkpoints. Shapes: B rows, T tokens, D inner
channels, N state size, R rank of the step sizes.
"""

from __future__ import annotations

import torch
from torch import nn

from nemokernels import Fp8Normed
from nemokernels.models.linear import Linear, linear
from nemokernels.models.mixers import Conv1d, Wide
from nemokernels.models.norms import RMSNorm
from nemokernels.models.runs import Run

__all__ = ["Mamba1", "SelectiveScan"]


class SelectiveScan(Wide):
    """Map x and gate (B, T, D) to the gated output (B, T, D), without the outer projections.

    The convolution comes first; its output gives B, C and the step sizes for the scan. With
    ``norms`` each of the three passes through an RMSNorm. The bias of the steps is added inside the
    scan.
    """

    def __init__(self, config, index: int, *, norms: float | None = None, **kwargs):
        super().__init__()
        self.index = index
        inner, state, rank = config.d_inner, config.state_size, config.time_step_rank
        wide = {**kwargs, "dtype": torch.promote_types(kwargs["dtype"], torch.float32)}
        self.conv1d = Conv1d(inner, config.conv_kernel, config.use_conv_bias, **kwargs)
        self.x_proj = Linear(inner, rank + 2 * state, **kwargs)
        self.dt_proj = Linear(rank, inner, bias=True, **kwargs)
        self.A_log = nn.Parameter(torch.empty(inner, state, **wide))
        self.D = nn.Parameter(torch.empty(inner, **wide))
        self.sizes = (rank, state, state)
        self.dt_layernorm = self.B_layernorm = self.C_layernorm = None
        if norms is not None:
            self.dt_layernorm = RMSNorm(rank, norms, **kwargs)
            self.B_layernorm = RMSNorm(state, norms, **kwargs)
            self.C_layernorm = RMSNorm(state, norms, **kwargs)

    def forward(self, x: torch.Tensor, gate: torch.Tensor, run: Run) -> torch.Tensor:
        x = run.conv(self.index, x, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        dt, B, C = self.x_proj(x).split(self.sizes, -1)
        if self.dt_layernorm is not None:
            dt, B, C = self.dt_layernorm(dt), self.B_layernorm(B), self.C_layernorm(C)
        dt = linear(dt, self.dt_proj.weight)
        return run.selective_scan(
            self.index, x, dt, -self.A_log.exp(), B, C, D=self.D, dt_bias=self.dt_proj.bias, z=gate
        )


class Mamba1(SelectiveScan):
    """A layer's whole mixer: projection to x and gate, the scan, and the projection back."""

    def __init__(self, config, index: int, **kwargs):
        super().__init__(config, index, **kwargs)
        width, inner, bias = config.hidden_size, config.d_inner, config.use_bias
        self.in_proj = Linear(width, 2 * inner, bias=bias, **kwargs)
        self.out_proj = Linear(inner, width, bias=bias, **kwargs)

    @property
    def readers(self) -> tuple[Linear, ...]:
        return (self.in_proj,)

    def forward(self, x: torch.Tensor | Fp8Normed, run: Run) -> torch.Tensor:
        return self.out_proj(super().forward(*self.in_proj(x).chunk(2, -1), run))
