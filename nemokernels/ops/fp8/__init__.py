"""Per-tensor FP8: quantisation, current and delayed scaling, and the linear layer."""

from __future__ import annotations

import torch

from nemokernels._autocast import autocast
from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.fp8 import op

__all__ = [
    "current_scale",
    "delayed_scaling_update",
    "dequantize_fp8",
    "fp8_linear",
    "quantize_fp8",
]

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def quantize_fp8(
    x: torch.Tensor, scale: torch.Tensor, *, format: str = "e4m3", transpose: bool = False
) -> tuple[torch.Tensor, ...]:
    """``q = saturate(x * scale)``, rounded to nearest even, and ``amax = max |x|``.

    The product is rounded to float32 before it is rounded to 8 bits. Values beyond the format's
    largest (448 in E4M3, 57344 in E5M2), infinities included, become that largest value; the
    infinite amax tells. NaN stays NaN and is left out of amax, so that one NaN spoils neither the
    other elements nor the scale. Not differentiable. Autocast has no effect.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64 (which is first rounded to float32).
        scale: one float32 element, on x's device; what the consumer divides by.
        format: "e4m3" or "e5m2".
        transpose: also return q as (K, product of the leading sizes), which the matrix products of
            the backward read on hardware whose FP8 products take both operands K-contiguous.

    Returns:
        q in x's shape, amax () float32, and with ``transpose`` the transposed q.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; saturation, order of
    rounding and the treatment of NaN are those of NVIDIA Transformer Engine's cast kernels.
    """
    where = "quantize_fp8"
    check_tensor(where, "x", x, dtypes=FLOATS)
    _check_scalar(where, "scale", scale, x.device)
    dtype = _dtype(where, "format", format)
    if not transpose:
        return op.quantize(x, scale, dtype)
    check(where, x.dim() >= 1, "`x` needs at least one axis to be transposed, got a scalar")
    return op.quantize_transpose(x, scale, dtype)


def dequantize_fp8(
    q: torch.Tensor, scale_inv: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """``q * scale_inv`` in float32 (float64 for a float64 result), then one cast.

    ``scale_inv`` is 1 / the scale given to :func:`quantize_fp8`. The ``weight_scale`` of a ModelOpt
    FP8 checkpoint is such an inverse: ``dequantize_fp8(weight, weight_scale)``. Not differentiable.
    Autocast has no effect.

    Args:
        q: any shape, float8_e4m3fn or float8_e5m2.
        scale_inv: one float32 element, on q's device.
        dtype: of the result; float32, bfloat16, float16 or float64.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    where = "dequantize_fp8"
    check_tensor(where, "q", q, dtypes=tuple(FORMATS.values()))
    check(where, not q.requires_grad, "`q` requires a gradient; quantisation has none")
    _check_scalar(where, "scale_inv", scale_inv, q.device)
    _check_float(where, dtype)
    return op.dequantize(q.view(torch.uint8), scale_inv, q.dtype, dtype)


def current_scale(x: torch.Tensor, *, format: str = "e4m3") -> torch.Tensor:
    """The scale under which the largest magnitude of ``x`` becomes the format's largest value.

    ``largest / max |x|`` over the elements that are not NaN; 1 where that maximum is 0 or infinite;
    the largest float32 where the quotient overflows. Of a tensor that is sharded over ranks, reduce
    the maxima first and call this on the reduced maximum. Not differentiable. Autocast has no
    effect.

    Args:
        x: any shape, float32, bfloat16, float16 or float64.
        format: "e4m3" or "e5m2".

    Returns:
        () float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or value.

    Source: per-tensor current scaling of NVIDIA Transformer Engine.
    """
    check_tensor("current_scale", "x", x, dtypes=FLOATS)
    return op.current_scale(x, _dtype("current_scale", "format", format))


def delayed_scaling_update(
    scale: torch.Tensor,
    amax_history: torch.Tensor,
    amax: torch.Tensor | None = None,
    *,
    format: str = "e4m3",
    margin: float = 0.0,
    algorithm: str = "max",
) -> None:
    """End of a step under delayed scaling: roll the histories and renew the scales, in place.

    Column s of the history belongs to scale s; concatenate the state of all tensors of one format
    and update them in one call. Row 0 collects the current step's maximum; rows 1 to L - 1 hold
    earlier steps, the latest last. Per column:

    1. ``current = amax`` if that is given and not 0, else ``amax_history[0]``.
    2. If ``current`` is 0 (the tensor was not used), history and scale stay as they are. Otherwise
       ``maximum`` is the maximum of rows 1 to L - 1 and ``current`` ("max", NaN ignored), or
       ``current`` ("most_recent").
    3. ``scale = largest * 2**-margin / maximum``, capped at the largest float32. A maximum that is
       0, infinite or NaN keeps the scale.
    4. Rows 1 to L - 1 move up by one, ``current`` becomes the last row, row 0 becomes 0. With a
       history of length 1 nothing is remembered: its row becomes 0.

    Args:
        scale: (S) float32, ones at the start.
        amax_history: (L, S) float32, zeros at the start, L at least 1.
        amax: (S) float32, the current maxima after a max-reduction over ranks, or None to take
            row 0 of the history. All ranks must then hold the same values.
        format: format of these tensors, "e4m3" or "e5m2".
        margin: powers of two left unused above the maximum.
        algorithm: "max" or "most_recent".

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        RuntimeError: a state tensor requires a gradient.

    Source: delayed scaling recipe of NVIDIA Transformer Engine, as its fused update kernel does it.
    """
    where = "delayed_scaling_update"
    single = (torch.float32,)
    check_tensor(where, "scale", scale, shape=(None,), dims="(S,)", dtypes=single)
    check_tensor(where, "amax_history", amax_history, shape=(None, scale.shape[0]), dims="(L, S)",
                 dtypes=single, device=scale.device)  # fmt: skip
    check(where, amax_history.shape[0] >= 1, "`amax_history` needs at least one row, got none")
    if amax is not None:
        check_tensor(where, "amax", amax, shape=scale.shape, dims="(S,)", dtypes=single,
                     device=scale.device)  # fmt: skip
    check(where, algorithm in ("max", "most_recent"),
          "`algorithm` is {!r}, expected 'max' or 'most_recent'", algorithm)  # fmt: skip
    op.delayed_scaling_update(scale, amax_history, amax, _dtype(where, "format", format),
                              float(margin), algorithm == "most_recent")  # fmt: skip


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    dy_scale: torch.Tensor | None = None,
    x_amax: torch.Tensor | None = None,
    w_amax: torch.Tensor | None = None,
    dy_amax: torch.Tensor | None = None,
    grad_format: str = "e5m2",
) -> torch.Tensor:
    """``y = x @ weight.T + bias`` with both operands of each of its three products in FP8.

    Forward: x and weight in E4M3. Backward: dy in ``grad_format``; ``dx = dy @ weight`` and
    ``dweight = dy.T @ x`` take the 8-bit operands, ``dbias`` sums the unquantised dy. Products
    accumulate in float32 (float64 for float64 x); the scales are divided out of the accumulator,
    the bias is added to it, and there is one cast at the end. Saved for backward: the 8-bit
    codes. Quantisation counts as the identity in the gradient.

    A scale that is None is taken from the tensor itself (current scaling). Delayed scaling passes
    stored scales and, as slots, elements of row 0 of the histories that
    :func:`delayed_scaling_update` reads: each ``*_amax`` is raised in place to the amax of its
    tensor. ``dy_scale`` is read and ``dy_amax`` is written when the backward runs.

    A graph made by torch.compile refuses a backward if the storage of ``dy_amax`` was written
    between its forward and it. Where several compiled graphs are in flight, give every slot its own
    storage and hand their concatenation to :func:`delayed_scaling_update` as ``amax``.

    Under autocast x is cast to the autocast dtype; the weight is quantised from its own dtype.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64, any strides.
        weight: (N, K), any of these dtypes.
        bias: (N), any of these dtypes.
        x_scale, w_scale, dy_scale: one float32 element each, multiplied in before the rounding.
        x_amax, w_amax, dy_amax: one float32 element each, written.
        grad_format: format of dy, "e5m2" (Transformer Engine's HYBRID) or "e4m3".

    Returns:
        (..., N) in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: Micikevicius et al., 2022; NVIDIA Transformer Engine's Linear.
    """
    where = "fp8_linear"
    check_tensor(where, "x", x, dtypes=FLOATS)
    check(where, x.dim() >= 1, "`x` needs at least one axis, got a scalar")
    check_tensor(where, "weight", weight, shape=(None, x.shape[-1]), dims="(N, K)", dtypes=FLOATS,
                 device=x.device)  # fmt: skip
    if bias is not None:
        check_tensor(where, "bias", bias, shape=(weight.shape[0],), dims="(N,)", dtypes=FLOATS,
                     device=x.device)  # fmt: skip
    scalars = dict(x_scale=x_scale, w_scale=w_scale, dy_scale=dy_scale, x_amax=x_amax,
                   w_amax=w_amax, dy_amax=dy_amax)  # fmt: skip
    for name, value in scalars.items():
        if value is not None:
            _check_scalar(where, name, value, x.device)
    grad_dtype = _dtype(where, "grad_format", grad_format)

    (x,) = autocast(x)
    train = torch.is_grad_enabled()
    need_dx, need_dw = train and x.requires_grad, train and weight.requires_grad
    y, amaxes, *_ = op.linear(x, weight, bias, x_scale, w_scale, dy_scale, dy_amax, grad_dtype,
                              need_dx, need_dw)  # fmt: skip
    op.record_amax(x_amax, amaxes[0])
    op.record_amax(w_amax, amaxes[1])
    return y


def _dtype(where: str, name: str, value: str) -> torch.dtype:
    check(where, value in FORMATS, "`{}` is {!r}, expected 'e4m3' or 'e5m2'", name, value)
    return FORMATS[value]


def _check_float(where: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{where}: `dtype` is {dtype}, expected one of {names}")


def _check_scalar(where: str, name: str, value: object, device: torch.device) -> None:
    check_tensor(where, name, value, dtypes=(torch.float32,), device=device)
    check(where, value.numel() == 1, "`{}` has shape {}, expected one element", name,
          tuple(value.shape))  # fmt: skip
    check(where, not value.requires_grad, "`{}` requires a gradient; it has none", name)
