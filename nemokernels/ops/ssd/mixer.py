"""Convolution, scan and gate of a Mamba-2 mixer as one differentiable step.

The convolution's output is as large as its input and cheap to compute again: the backward does so
instead of keeping it, and the mixer holds on to nothing but its input and the scan's output.

x, B and C stay side by side, as the convolution writes them, and so do their gradients: nothing is
copied on the way. A tile of the scan is a piece of every token's row in either layout, and longer
rows cost TMA nothing as long as their length and the offsets of B and C are multiples of 16 bytes.
The gradients of z, xBC and dt are written to where they lie in the input's gradient. As tensors of
their own they would have to be joined, one more pass over an input that is the widest tensor here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from nemokernels._registry import acc_dtype, filling, register
from nemokernels.ops.causal_conv1d import op as conv1d
from nemokernels.ops.causal_conv1d import ref as conv1d_ref
from nemokernels.ops.gated_rms_norm import op as gated_norm
from nemokernels.ops.gated_rms_norm import ref as gated_norm_ref
from nemokernels.ops.ssd import op, ref

__all__ = ["Sizes", "mix"]


@dataclass(frozen=True)
class Sizes:
    """H heads of P, G groups with states of N. A token is [z (H*P), x (H*P), B, C (G*N), dt (H)];
    without z nothing is gated."""

    heads: int
    headdim: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.headdim

    def split(self, zxbcdt: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """z (or 0 wide), xBC, dt."""
        channels = self.inner + 2 * self.groups * self.state
        gate = zxbcdt.shape[-1] - channels - self.heads
        return zxbcdt.split([gate, channels, self.heads], -1)

    def per_head(self, t: torch.Tensor) -> torch.Tensor:
        """(B, T, H*P) to (B, T, H, P)."""
        return t.unflatten(-1, (self.heads, self.headdim))

    def scanned(self, xBC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x (B, T, H, P), B and C (B, T, G, N)."""
        per_group = self.groups * self.state
        x, B, C = xBC.split([self.inner, per_group, per_group], -1)
        B, C = (t.unflatten(-1, (self.groups, self.state)) for t in (B, C))
        return self.per_head(x), B, C


class Legs(NamedTuple):
    """The parts of the backward; those that make a piece of the input's gradient also fill it."""

    normalise: Callable
    convolve: Callable
    scan: Callable
    convolution: Callable


REFERENCE = Legs(
    filling(gated_norm_ref.backward, dz=3),
    conv1d_ref.forward,
    filling(ref.backward_joined, ddt=1, dz=4),
    filling(conv1d_ref.backward, dx=0),
)
KERNELS = Legs(
    gated_norm.backward_cuda,
    conv1d.forward_cuda,
    partial(op.backward_cuda, joined=True),
    conv1d.backward_cuda,
)


def backward(
    legs: Legs, dout, dfinal, zxbcdt, conv_weight, conv_bias, A, D, dt_bias, norm_weight,
    initial_states, seq_idx, cu_seqlens, scanned, rstd, heads, headdim, groups, silu,
    norm_before_gate, *options,
):  # fmt: skip
    """Gradients of zxbcdt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, initial_states.

    ``scanned`` (B, T, H*P) is the scan's output before the gate, if there is one, ``rstd`` what the
    norm kept; without ``norm_weight`` the scan was gated by z itself.
    """
    state = (conv_weight.shape[0] - heads * headdim) // (2 * groups)
    sizes = Sizes(heads, headdim, groups, state)
    dzxbcdt = zxbcdt.new_empty(zxbcdt.shape)
    (z, xBC, dt), (dz, dxBC, ddt) = sizes.split(zxbcdt), sizes.split(dzxbcdt)
    dnorm = absent = zxbcdt.new_empty(0)
    gate, dgate, ungated = None, None, absent
    if norm_weight is None and z.shape[-1]:
        gate, dgate, ungated = map(sizes.per_head, (z, dz, scanned))
    elif norm_weight is not None:
        dout, dnorm, _, _ = legs.normalise(
            dout, scanned, norm_weight, None, z, rstd, sizes.inner // groups, norm_before_gate,
            dz=dz,
        )  # fmt: skip
    convolved, _ = legs.convolve(xBC, conv_weight, conv_bias, seq_idx, None, cu_seqlens, silu,
                                 False)  # fmt: skip
    x, B, C = sizes.scanned(convolved)
    dconvolved, _, dA, dD, _, ddt_bias, dinitial = legs.scan(
        sizes.per_head(dout), dfinal, x, dt, A, B, C, D, gate, dt_bias, initial_states, seq_idx,
        cu_seqlens, ungated, *options, ddt=ddt, dz=dgate,
    )  # fmt: skip
    no_final = dconvolved.new_empty(0, conv_weight.shape[1] - 1, dconvolved.shape[2])
    _, dweight, dbias, _ = legs.convolution(
        dconvolved, no_final, xBC, conv_weight, conv_bias, seq_idx, None, cu_seqlens, silu, dx=dxBC
    )
    dbias = absent if conv_bias is None else dbias
    return dzxbcdt, dweight, dbias, dA, dD, ddt_bias, dnorm, dinitial


def reference(*args):
    """The backward in plain torch."""
    return backward(REFERENCE, *args)


def _cuda(*args):
    with torch.cuda.device_of(args[0]):
        return backward(KERNELS, *args)


def _fake(dout, dfinal, zxbcdt, conv_weight, conv_bias, A, D, dt_bias, norm_weight,
          initial_states, *rest):  # fmt: skip
    inputs = zxbcdt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, initial_states
    return tuple(zxbcdt.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _example(device: torch.device, dtype: torch.dtype):
    """Three sequences, one of them empty, and tokens that are nobody's; on the CPU, see op.py."""
    sizes, T = Sizes(4, 8, 2, 16), 23
    wide = acc_dtype(dtype)
    zxbcdt, dout = torch.randn(1, T, 132, dtype=dtype), torch.randn(1, T, 32, dtype=dtype)
    weight, bias = torch.randn(96, 4, dtype=dtype), torch.randn(96, dtype=dtype)
    A, D, dt_bias = -torch.rand(4, dtype=wide) - 0.5, *torch.randn(2, 4, dtype=wide)
    norm, start, dfinal = torch.randn(32, dtype=dtype), *torch.randn(2, 4, 4, 8, 16, dtype=wide)
    bounds = torch.tensor([0, 9, 9, 10, 21], dtype=torch.int32)
    z, xBC, dt = sizes.split(zxbcdt)
    options = 8, True, 0.0, float("inf"), None
    x, B, C = sizes.scanned(
        conv1d_ref.forward(xBC, weight, bias, None, None, bounds, True, False)[0]
    )
    y, _, _ = ref.forward(x, dt, A, B, C, D, None, dt_bias, start, None, bounds, *options)
    y = y.flatten(2)
    rstd = gated_norm_ref.forward(y, norm, None, z, 1e-5, 16, False)[1]
    whole = (dout, dfinal, zxbcdt, weight, bias, A, D, dt_bias, norm, start, None, bounds, y, rstd,
             4, 8, 2, True, False, *options)  # fmt: skip
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in whole)


mamba_mixer_backward = register(
    op.FAMILY,
    "mamba_mixer_backward(Tensor dout, Tensor dfinal, Tensor zxbcdt, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor A, Tensor D, Tensor dt_bias, Tensor? norm_weight, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, Tensor scanned, Tensor rstd, "
    "int heads, int headdim, int groups, bool silu, bool norm_before_gate, "
    f"{op.OPTIONS}) -> ({', '.join(['Tensor'] * 8)})",
    reference=reference,
    cuda=_cuda,
    fake=_fake,
    example=_example,
)


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(zxbcdt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, initial_states,
                seq_idx, cu_seqlens, sizes, silu, norm, options):  # fmt: skip
        z, xBC, dt = sizes.split(zxbcdt)
        convolved, _ = conv1d.causal_conv1d(
            xBC, conv_weight, conv_bias, seq_idx, None, cu_seqlens, silu, False
        )
        x, B, C = sizes.scanned(convolved)
        gate = sizes.per_head(z) if norm_weight is None and z.shape[-1] else None
        y, final, ungated = op.ssd_chunk_scan(
            x, dt, A, B, C, D, gate, dt_bias, initial_states, seq_idx, cu_seqlens, *options
        )
        if norm_weight is None:
            kept = ungated if gate is None else ungated.flatten(2)
            return y, final, kept, y.new_empty(0)  # not a view: nobody could change it in place
        y, (eps, before) = y.flatten(2), norm
        out, rstd = gated_norm.gated_rms_norm(
            y, norm_weight, None, z, eps, sizes.inner // sizes.groups, before
        )
        return out, final, y, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.sizes, ctx.silu, (_, ctx.before), ctx.options = inputs[10:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[:10], *output[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal, _dscanned, _drstd):
        saved, sizes = ctx.saved_tensors, ctx.sizes  # once: recomputation allows no second time
        grads = mamba_mixer_backward(
            dout.flatten(2), dfinal, *saved, sizes.heads, sizes.headdim, sizes.groups, ctx.silu,
            ctx.before, *ctx.options,
        )  # fmt: skip
        grads = (None if t is None else grad for t, grad in zip(saved, grads))
        return *grads, *[None] * 6


def mix(
    zxbcdt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    sizes: Sizes,
    silu: bool,
    norm: tuple[float, bool],
    options: tuple,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gated scan of the convolved part of zxbcdt (B, T, H*P), its last states, and what the
    backward keeps of the scan: its output before the gate, if there is one.

    ``norm`` are the norm's eps and norm_before_gate, ``options`` those of the scan's operator.
    Arguments are taken as checked.
    """
    out, final, scanned, _ = _Mixer.apply(
        zxbcdt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, initial_states, seq_idx,
        cu_seqlens, sizes, silu, norm, options,
    )  # fmt: skip
    return out.flatten(2), final, scanned
