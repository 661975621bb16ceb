"""RMSNorm and residual-add RMSNorm in plain torch: the specification and the CPU leg.

B.. leading axes, D normalised axis. Everything between the load and the one final cast is in the
accumulation dtype (float32; float64 stays float64).
"""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float):
    """y = x * rstd * weight, rstd = 1 / sqrt(mean(x**2) + eps). Returns y (dtype of x) and rstd."""
    acc = acc_dtype(x)
    wide = x.to(acc)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * rstd[..., None] * weight.to(acc)).to(x.dtype), rstd


def backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor):
    """dx = rstd * (w*dy - xhat * mean(xhat * w*dy)); dw = sum over rows of dy * xhat."""
    acc = acc_dtype(x)
    xhat = x.to(acc) * rstd[..., None]
    dxhat = dy.to(acc) * weight.to(acc)
    dx = rstd[..., None] * (dxhat - xhat * (xhat * dxhat).mean(-1, keepdim=True))
    dweight = (dy.to(acc) * xhat).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def add_forward(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    """s = x + residual rounded to the residual's dtype, then RMSNorm of the rounded s."""
    acc = acc_dtype(residual)
    total = (x.to(acc) + residual.to(acc)).to(residual.dtype)
    y, rstd = forward(total, weight, eps)
    return y.to(x.dtype), total, rstd


def add_backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    x_dtype: torch.dtype | None,
):
    """ds = RMSNorm backward of dy at s, plus the gradient that reaches s directly.

    Returns the gradients of x, of the residual and of the weight. ``x_dtype`` None says that x
    has the residual's dtype: the first is empty (size 0) then, as it would repeat the second.
    """
    acc = acc_dtype(total)
    dnorm, dweight = backward(dy.to(acc), total.to(acc), weight, rstd)
    ds = dnorm + dtotal.to(acc)
    dx = total.new_empty(0) if x_dtype is None else ds.to(x_dtype)
    return dx, ds.to(total.dtype), dweight
