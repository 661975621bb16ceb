"""Per-tensor FP8 in plain torch: the specification and the CPU leg.

M tokens, N output features, K input features, L history length, S tensors under delayed scaling.
Scales and maxima are float32 by definition of the recipe, whatever the input's dtype, so a float64
input is quantised through float32; only the products of the linear layer follow ``acc_dtype``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemokernels._registry import acc_dtype
from nemokernels.ops.relu2 import ref as relu2

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


def activated(x: torch.Tensor, squared_relu: bool) -> torch.Tensor:
    """What is quantised: x, or relu2(x), rounded to x's dtype as the op of that name does."""
    return relu2.forward(x) if squared_relu else x


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    amax_slot: torch.Tensor,
    dtype: torch.dtype,
    squared_relu: bool,
    rows: bool,
    transpose: bool,
):
    """q = round-to-nearest-even(clamp(x * scale)), x (..., K) or relu2(x).

    The product is rounded to float32 first. Infinities saturate like large values, NaN stays NaN.
    Raises ``amax_slot`` to max |x| in place. Returns q, q flattened to (M, K) and transposed, each
    empty where not asked for, and 1 / scale: NaN unless the scale is positive and finite, so that a
    scale without meaning shows in what is computed from q.
    """
    x = activated(x, squared_relu)
    limit, factor = largest(dtype), scale.float().reshape(())
    q = (x.float() * factor).clamp(-limit, limit).to(dtype)
    amax_slot.copy_(torch.maximum(amax_slot, amax(x).to(amax_slot.dtype)))
    valid = (factor > 0) & factor.isfinite()
    return (
        q if rows else q.new_empty((0,)),
        as_rows(q).t() if transpose else q.new_empty((0, 0)),
        torch.where(valid, factor.reciprocal(), torch.nan),
    )


def dequantize(
    codes: torch.Tensor, scale_inv: torch.Tensor, format: torch.dtype, dtype: torch.dtype
) -> torch.Tensor:
    """value(code) * scale_inv in the accumulation dtype of ``dtype``, then one cast."""
    acc = acc_dtype(dtype)
    return (codes.view(format).to(acc) * scale_inv.to(acc).reshape(())).to(dtype)


def current_scale(x: torch.Tensor, dtype: torch.dtype, squared_relu: bool) -> torch.Tensor:
    """largest / amax of x or relu2(x); 1 where that is 0 or infinite; at most the largest float."""
    maximum = amax(activated(x, squared_relu))
    scale = (torch.full_like(maximum, largest(dtype)) / maximum).clamp(max=FLOAT_MAX)
    return torch.where((maximum > 0) & maximum.isfinite(), scale, 1.0)


def delayed_scaling_update(
    scales: Sequence[torch.Tensor],
    histories: Sequence[torch.Tensor],
    reduced: torch.Tensor | None,
    tops: Sequence[float],
    most_recent: bool,
) -> None:
    """Roll every history (L, S) and renew its scales (S), in place.

    ``reduced`` holds the maxima of all columns of all tensors, in order; ``tops`` for every tensor
    what the maximum is scaled to.
    """
    start = 0
    for scale, history, top in zip(scales, histories, tops):
        part = None if reduced is None else reduced[start : start + scale.numel()]
        _update(scale, history, part, top, most_recent)
        start += scale.numel()


def _update(
    scale: torch.Tensor,
    history: torch.Tensor,
    reduced: torch.Tensor | None,
    top: float,
    most_recent: bool,
) -> None:
    """A tensor that saw nothing (current maximum 0) keeps its history and its scale.

    The maximum over the history ignores NaN, as CUDA's fmaxf does; an infinite or NaN result keeps
    the scale.
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
    known = (maximum > 0) & maximum.isfinite()
    renewed = torch.where(known, torch.full_like(maximum, top) / maximum, scale)
    scale.copy_(torch.where(renewed.isinf(), FLOAT_MAX, renewed))

    rolled = torch.roll(history, -1, 0)
    rolled[-1] = current
    rolled[0] = 0
    history.copy_(torch.where(moved, rolled, history))


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x8: torch.Tensor,
    x8_t: torch.Tensor,
    x_inverse: torch.Tensor,
    w8: torch.Tensor,
    w8_t: torch.Tensor,
    w_inverse: torch.Tensor,
    *_,
):
    """y = (x8 w8^T) * x_inverse * w_inverse + bias, accumulated wide, one cast to x's dtype.

    x (..., K) and weight (N, K) only say whom the gradients belong to; the product reads their
    codes, as bytes. What follows passes through to the backward.
    """
    acc = acc_dtype(x)
    a, b = as_rows(x8.view(E4M3)).to(acc), w8.view(E4M3).to(acc)
    y = a @ b.t() * x_inverse.to(acc) * w_inverse.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype).reshape(*x.shape[:-1], w8.shape[0])


def product_backward(
    dy: torch.Tensor,
    dy8: torch.Tensor,
    dy8_t: torch.Tensor,
    dy_inverse: torch.Tensor,
    x8_t: torch.Tensor,
    x_inverse: torch.Tensor,
    w8_t: torch.Tensor,
    w_inverse: torch.Tensor,
    grad_dtype: torch.dtype,
    x_dtype: torch.dtype | None,
    w_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    *_,
):
    """dx = dy8 w8, dw = dy8^T x8, each over its two scales; db = sum of the unquantised dy.

    A gradient whose dtype is None is not computed and comes back empty.
    """
    acc = acc_dtype(dy)
    dx = dw = db = dy.new_empty((0,))
    if x_dtype is not None:
        wide = as_rows(dy8.view(grad_dtype)).to(acc) @ w8_t.view(E4M3).to(acc).t()
        dx = (wide * dy_inverse.to(acc) * w_inverse.to(acc)).to(x_dtype)
        dx = dx.reshape(*dy.shape[:-1], w8_t.shape[0])
    if w_dtype is not None:
        wide = dy8_t.view(grad_dtype).to(acc) @ x8_t.view(E4M3).to(acc).t()
        dw = (wide * dy_inverse.to(acc) * x_inverse.to(acc)).to(w_dtype)
    if bias_dtype is not None:
        db = as_rows(dy).to(acc).sum(0).to(bias_dtype)
    return dx, dw, db
