"""Gated, grouped RMSNorm in plain torch: the specification and the CPU leg.

B.. leading axes, D channels in D / group_size groups. Everything between the load and the one
final cast is in the accumulation dtype (float32; float64 stays float64). Inputs are made contiguous
first, so that strides change no bit.
"""

from __future__ import annotations

import torch

from nemokernels._activations import sigmoid, silu
from nemokernels._registry import acc_dtype


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
):
    """norm(x * silu(z)), or norm(x) * silu(z) if norm_before_gate.

    Returns y (dtype of x) and rstd (B.., groups), 1 / sqrt(mean over the group + eps).
    """
    acc = acc_dtype(x)
    v = _wide(x, acc)
    gate = None if z is None else silu(_wide(z, acc))
    if gate is not None and not norm_before_gate:
        v = v * gate
    rstd = torch.rsqrt(_grouped(v, group_size).square().mean(-1) + eps)
    y = _normalise(v, rstd, group_size) * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype), rstd


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    rstd: torch.Tensor,
    group_size: int,
    norm_before_gate: bool,
):
    """Gradients of x, weight, bias and z; the last two are empty (size 0) where absent.

    With g the gradient of norm's output and v its input:
    dv = rstd * (w*g - xhat * mean_group(xhat * w*g)), dw = sum g * xhat, dbias = sum g,
    and silu'(z) = sig(z) * (1 + z * (1 - sig(z))).
    """
    acc = acc_dtype(x)
    u, g, w = _wide(x, acc), _wide(dy, acc), weight.to(acc)
    gate = dgate = None
    if z is not None:
        wide = _wide(z, acc)
        sig = sigmoid(wide)
        gate, slope = wide * sig, sig * (1 + wide * (1 - sig))
    v = u * gate if gate is not None and not norm_before_gate else u
    xhat = _normalise(v, rstd, group_size)
    if gate is not None and norm_before_gate:
        affine = xhat * w if bias is None else xhat * w + bias.to(acc)
        dgate, g = g * affine, g * gate
    dxhat = g * w
    projection = _grouped(xhat * dxhat, group_size).mean(-1, keepdim=True)
    dv = _normalise(dxhat - (_grouped(xhat, group_size) * projection).view(x.shape), rstd,
                    group_size)  # fmt: skip
    if gate is not None and not norm_before_gate:
        dgate, dv = dv * u, dv * gate
    rows = (-1, x.shape[-1]) if x.shape[-1] else (0, 0)
    dweight = (g * xhat).reshape(rows).sum(0).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else g.reshape(rows).sum(0).to(bias.dtype)
    dz = x.new_empty(0) if z is None else (dgate * slope).to(z.dtype)
    return dv.to(x.dtype), dweight, dbias, dz


def _wide(t: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    return t.contiguous().to(acc)


def _grouped(v: torch.Tensor, group_size: int) -> torch.Tensor:
    return v.reshape(*v.shape[:-1], v.shape[-1] // group_size, group_size)


def _normalise(v: torch.Tensor, rstd: torch.Tensor, group_size: int) -> torch.Tensor:
    return (_grouped(v, group_size) * rstd[..., None]).reshape(v.shape)
