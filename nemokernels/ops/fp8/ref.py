"""Per-tensor FP8 in plain torch: the specification and the CPU leg.

M tokens, N output features, K input features, L history length, S tensors under delayed scaling.
Scales and maxima are float32 by definition of the recipe, whatever the input's dtype, so a float64
input is quantised through float32; only the products of the linear layer follow ``acc_dtype``.
"""

from __future__ import annotations

import torch

from nemokernels._registry import acc_dtype

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOAT_MAX = torch.finfo(torch.float32).max


def largest(dtype: torch.dtype) -> float:
    """Largest finite value: 448 for E4M3, 57344 for E5M2."""
    return torch.finfo(dtype).max


def amax(x: torch.Tensor) -> torch.Tensor:
    """max |x| over the elements that are not NaN; 0 if there are none. Shape (), float32."""
    magnitude = x.float().abs()
    magnitude = torch.where(magnitude.isnan(), 0.0, magnitude)
    return magnitude.amax() if x.numel() else magnitude.new_zeros(())


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., K) as (M, K); unlike reshape(-1, K) it knows M where K is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
    """q = round-to-nearest-even(clamp(x * scale)), and the amax of the unscaled x.

    The product is rounded to float32 first. Infinities saturate like large values, NaN stays NaN.
    """
    limit = largest(dtype)
    scaled = x.float() * scale.float().reshape(())
    return scaled.clamp(-limit, limit).to(dtype), amax(x)


def quantize_transpose(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
    """The same with a second copy of q (..., K), flattened to (M, K) and transposed: (K, M)."""
    q, maximum = quantize(x, scale, dtype)
    return q, maximum, as_rows(q).t()


def dequantize(
    codes: torch.Tensor, scale_inv: torch.Tensor, format: torch.dtype, dtype: torch.dtype
) -> torch.Tensor:
    """value(code) * scale_inv in the accumulation dtype of ``dtype``, then one cast."""
    acc = acc_dtype(dtype)
    return (codes.view(format).to(acc) * scale_inv.to(acc).reshape(())).to(dtype)


def current_scale(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """largest / amax(x); 1 where amax is 0 or infinite; capped at the largest float32."""
    maximum = amax(x)
    scale = (torch.full_like(maximum, largest(dtype)) / maximum).clamp(max=FLOAT_MAX)
    return torch.where((maximum > 0) & maximum.isfinite(), scale, 1.0)


def delayed_scaling_update(
    scale: torch.Tensor,
    history: torch.Tensor,
    reduced: torch.Tensor | None,
    dtype: torch.dtype,
    margin: float,
    most_recent: bool,
) -> None:
    """Roll the history (L, S) and renew the scales (S), both in place.

    A tensor that saw nothing (current maximum 0) keeps its history and its scale. The maximum over
    the history ignores NaN, as CUDA's fmaxf does; an infinite or NaN result keeps the scale.
    """
    current = history[0]
    if reduced is not None:
        current = torch.where(reduced != 0, reduced, current)
    moved = current != 0
    if most_recent:
        maximum = current
    else:
        seen = torch.cat([history[1:], current[None]])
        maximum = torch.where(moved & ~seen.isnan(), seen, 0.0).amax(0)
    top = torch.full_like(maximum, largest(dtype) * 2.0**-margin)
    known = (maximum > 0) & maximum.isfinite()
    renewed = torch.where(known, top / maximum, scale)
    scale.copy_(torch.where(renewed.isinf(), FLOAT_MAX, renewed))

    rolled = torch.roll(history, -1, 0)
    rolled[-1] = current
    rolled[0] = 0
    history.copy_(torch.where(moved, rolled, history))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    dy_scale: torch.Tensor | None,
    dy_amax: torch.Tensor | None,
    grad_dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
):
    """y = (q(x) q(w)^T) / x_scale / w_scale + bias, accumulated wide, one cast to x's dtype.

    Also returns the amaxes of x and w (2), their inverse scales (2), and, for the backward, the
    transposed codes of x (K, M) and w (K, N) as bytes; empty where not needed. ``dy_scale``,
    ``dy_amax`` and ``grad_dtype`` only pass through to the backward.
    """
    acc = acc_dtype(x)
    rows = as_rows(x)
    x_scale = current_scale(x, E4M3) if x_scale is None else x_scale.float().reshape(())
    w_scale = current_scale(weight, E4M3) if w_scale is None else w_scale.float().reshape(())
    x8, x_amax, x8_t = quantize_transpose(rows, x_scale, E4M3)
    w8, w_amax, w8_t = quantize_transpose(weight, w_scale, E4M3)
    inverse = torch.stack([x_scale, w_scale]).reciprocal()
    y = x8.to(acc) @ w8.to(acc).t() * inverse[0].to(acc) * inverse[1].to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    y = y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
    return (
        y,
        torch.stack([x_amax, w_amax]),
        inverse,
        (x8_t if need_dw else x8_t.new_empty((0, 0))).view(torch.uint8),
        (w8_t if need_dx else w8_t.new_empty((0, 0))).view(torch.uint8),
    )


def linear_backward(
    dy: torch.Tensor,
    inverse: torch.Tensor,
    x8_t: torch.Tensor,
    w8_t: torch.Tensor,
    dy_scale: torch.Tensor | None,
    grad_dtype: torch.dtype,
    x_dtype: torch.dtype | None,
    w_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
):
    """dx = q(dy) q(w), dw = q(dy)^T q(x), each over its two scales; db = sum of the unquantised dy.

    A gradient whose dtype is None is not computed and comes back empty. Also returns amax(dy).
    """
    acc = acc_dtype(dy)
    rows = as_rows(dy)
    scale = current_scale(dy, grad_dtype) if dy_scale is None else dy_scale.float().reshape(())
    dy8, dy_amax = quantize(rows, scale, grad_dtype)
    wide, dy_inverse = dy8.to(acc), scale.reciprocal().to(acc)
    dx = dw = db = dy.new_empty((0,))
    if x_dtype is not None:
        dx = (wide @ w8_t.view(E4M3).to(acc).t() * dy_inverse * inverse[1].to(acc)).to(x_dtype)
        dx = dx.reshape(*dy.shape[:-1], w8_t.shape[0])
    if w_dtype is not None:
        dw = (wide.t() @ x8_t.view(E4M3).to(acc).t() * dy_inverse * inverse[0].to(acc)).to(w_dtype)
    if bias_dtype is not None:
        db = rows.to(acc).sum(0).to(bias_dtype)
    return dx, dw, db, dy_amax
