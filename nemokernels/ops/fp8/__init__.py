"""Per-tensor FP8: quantisation, current and delayed scaling, and the linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemokernels._autocast import autocast
from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.fp8 import op
from nemokernels.ops.fp8.checks import (
    FORMATS,
    Fp8Codes,
    check_codes,
    check_float,
    check_no_grad,
    check_scalar,
    check_scale,
    format_dtype,
)
from nemokernels.ops.fp8.ledger import fp8_products
from nemokernels.ops.fp8.norms import Fp8Normed, gated_rms_norm_fp8, rms_norm_fp8

__all__ = [
    "Fp8Codes",
    "Fp8Normed",
    "cast_fp8_weight",
    "current_scale",
    "delayed_scaling_update",
    "dequantize_fp8",
    "fp8_linear",
    "fp8_products",
    "gated_rms_norm_fp8",
    "quantize_fp8",
    "rms_norm_fp8",
]


def quantize_fp8(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    format: str = "e4m3",
    transpose: bool = False,
    squared_relu: bool = False,
) -> tuple[torch.Tensor, ...]:
    """``q = saturate(x * scale)``, rounded to nearest even, and ``amax = max |x|``.

    The product is rounded to float32 before it is rounded to 8 bits. Values beyond the format's
    largest (448 in E4M3, 57344 in E5M2), infinities included, become that largest value; the
    infinite amax tells. NaN stays NaN and is left out of amax, so that one NaN spoils neither the
    other elements nor the scale. Not differentiable. Autocast has no effect.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64 (which is first rounded to float32).
        scale: one float32 element, on x's device; what the consumer divides by. Positive and
            finite: checked where it is on the CPU.
        format: "e4m3" or "e5m2".
        transpose: also return q as (K, product of the leading sizes), which the matrix products of
            the backward read on hardware whose FP8 products take both operands K-contiguous.
        squared_relu: quantise ``relu2(x)``, as it would be stored in x's dtype, instead of x.

    Returns:
        q in x's shape, amax () float32, and with ``transpose`` the transposed q. x is read once for
        all of them.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; saturation, order of
    rounding and the treatment of NaN are those of NVIDIA Transformer Engine's cast kernels.
    """
    where = "quantize_fp8"
    check_tensor(where, "x", x, dtypes=FLOATS)
    check_no_grad(where, "x", x)
    check_scale(where, "scale", scale, x.device)
    dtype = format_dtype(where, "format", format)
    check(where, x.dim() >= 1 or not transpose,
          "`x` needs at least one axis to be transposed, got a scalar")  # fmt: skip
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    with torch.no_grad():
        q, q_t, _ = op.quantize(x, scale, amax, dtype, squared_relu, True, transpose)
    return (q, amax, q_t) if transpose else (q, amax)


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
    check_no_grad(where, "q", q)
    check_scalar(where, "scale_inv", scale_inv, q.device)
    check_float(where, dtype)
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
    return op.current_scale(x, format_dtype("current_scale", "format", format), False)


def delayed_scaling_update(
    scale: torch.Tensor | Sequence[torch.Tensor],
    amax_history: torch.Tensor | Sequence[torch.Tensor],
    amax: torch.Tensor | None = None,
    *,
    format: str | Sequence[str] = "e4m3",
    margin: float = 0.0,
    algorithm: str = "max",
) -> None:
    """End of a step under delayed scaling: roll the histories and renew the scales, in place.

    Column s of the history belongs to scale s. The state of a whole model, as sequences of such
    pairs, is updated in one call, which is one launch on a GPU. Row 0 collects the current step's
    maximum; rows 1 to L - 1 hold earlier steps, the latest last. Per column:

    1. ``current = amax`` if that is given and not 0, else ``amax_history[0]``.
    2. If ``current`` is 0 (the tensor was not used), history and scale stay as they are. Otherwise
       ``maximum`` is the maximum of rows 1 to L - 1 and ``current`` ("max", NaN ignored), or
       ``current`` ("most_recent").
    3. ``scale = largest * 2**-margin / maximum``, capped at the largest float32. A maximum that is
       0, infinite or NaN keeps the scale.
    4. Rows 1 to L - 1 move up by one, ``current`` becomes the last row, row 0 becomes 0. With a
       history of length 1 nothing is remembered: its row becomes 0.

    It can be captured in a CUDA graph, after one call with the same tensors outside of it.

    Args:
        scale: (S) float32, ones at the start; or several of these.
        amax_history: (L, S) float32, zeros at the start, L at least 1; or one for each scale, all
            of the same L.
        amax: the current maxima after a max-reduction over ranks, (S) float32, of several tensors
            their concatenation; or None to take row 0 of the history. All ranks must then hold the
            same values.
        format: format of these tensors, "e4m3" or "e5m2"; or one for each scale.
        margin: powers of two left unused above the maximum.
        algorithm: "max" or "most_recent".

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        RuntimeError: a state tensor requires a gradient.

    Source: delayed scaling recipe of NVIDIA Transformer Engine, as its fused update kernel does it.
    """
    where, single = "delayed_scaling_update", (torch.float32,)
    scales = [scale] if isinstance(scale, torch.Tensor) else list(scale)
    histories = [amax_history] if isinstance(amax_history, torch.Tensor) else list(amax_history)
    formats = [format] * len(scales) if isinstance(format, str) else list(format)
    check(where, len(scales) == len(histories) == len(formats),
          "got {} of `scale`, {} of `amax_history`, {} of `format`, expected the same number",
          len(scales), len(histories), len(formats))  # fmt: skip
    for s, history in zip(scales, histories):
        check_tensor(where, "scale", s, shape=(None,), dims="(S,)", dtypes=single,
                     device=getattr(scales[0], "device", None))  # fmt: skip
        check_tensor(where, "amax_history", history, shape=(None, s.shape[0]), dims="(L, S)",
                     dtypes=single, device=s.device)  # fmt: skip
        check(where, history.shape[0] == histories[0].shape[0] >= 1,
              "`amax_history` needs at least one row, and all the same number, got {} and {}",
              histories[0].shape[0], history.shape[0])  # fmt: skip
    if amax is not None and scales:
        columns = sum(s.shape[0] for s in scales)
        check_tensor(where, "amax", amax, shape=(columns,), dims="(S,)", dtypes=single,
                     device=scales[0].device)  # fmt: skip
    check(where, algorithm in ("max", "most_recent"),
          "`algorithm` is {!r}, expected 'max' or 'most_recent'", algorithm)  # fmt: skip
    largest = [torch.finfo(format_dtype(where, "format", f)).max for f in formats]
    tops = [value * 2.0**-margin for value in largest]
    if scales:
        op.delayed_scaling_update(scales, histories, amax, tops, algorithm == "most_recent")


def cast_fp8_weight(
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    *,
    transpose: bool = True,
) -> Fp8Codes:
    """A weight in E4M3, to be used by several calls of :func:`fp8_linear`. Has no gradient.

    Args:
        weight: (N, K), float32, bfloat16, float16 or float64.
        scale: one float32 element; None is current scaling.
        amax: one float32 element, raised in place to max |weight|; None: nowhere.
        transpose: make the codes that the gradient of x needs.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    where = "cast_fp8_weight"
    check_tensor(where, "weight", weight, shape=(None, None), dims="(N, K)", dtypes=FLOATS)
    if scale is not None:
        check_scale(where, "scale", scale, weight.device)
    if amax is not None:
        check_scalar(where, "amax", amax, weight.device)
    q, q_t, scale_inv = op.cast(weight, scale, amax, FORMATS["e4m3"], transpose=transpose)
    return Fp8Codes(q, q_t, scale_inv)


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
    squared_relu: bool = False,
    x_codes: Fp8Codes | None = None,
    weight_codes: Fp8Codes | None = None,
    main_grad: torch.Tensor | None = None,
    layer: str = "",
) -> torch.Tensor:
    """``y = x @ weight.T + bias`` with both operands of each of its three products in FP8.

    Forward: x and weight in E4M3. Backward: dy in ``grad_format``; ``dx = dy @ weight`` and
    ``dweight = dy.T @ x`` take the 8-bit operands, ``dbias`` sums the unquantised dy. Products
    accumulate in float32 (float64 for float64 x); the scales are divided out of the accumulator,
    the bias is added to it, and there is one cast at the end. Saved for backward: the 8-bit
    codes, and x under ``squared_relu``. Quantisation counts as the identity in the gradient.

    On a GPU the products are torch's scaled_mm: the forward accumulates fast, in the tensor core's
    own precision, the gradients in split accumulation. It takes N and K that are multiples of 16,
    any number of tokens, and float32, bfloat16 or float16; anything else is multiplied by the
    reference, which warns.

    A scale that is None is taken from the tensor itself (current scaling). Delayed scaling passes
    stored scales and, as slots, elements of row 0 of the histories that
    :func:`delayed_scaling_update` reads: each ``*_amax`` is raised in place to the amax of its
    tensor. ``dy_scale`` is read and ``dy_amax`` is written when the backward runs. Under no_grad
    nothing is written. A scale that is not positive and finite is refused on the CPU; on a GPU,
    where it is not known before the launch, the result is NaN.

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
        squared_relu: multiply ``relu2(x)``, which is quantised as it is computed and never stored.
            Same bits as ``fp8_linear(relu2(x), ...)``.
        x_codes: x in E4M3, as its producer has emitted it (:func:`rms_norm_fp8`); x itself, its
            scale and its slot are then not read.
        weight_codes: the weight as :func:`cast_fp8_weight` has cast it before; the weight itself is
            then not read, ``w_scale`` and ``w_amax`` neither.
        main_grad: (N, K), floating; dweight is added to it in its dtype, and the weight gets none.
        layer: name under which :func:`fp8_products` tells where the products ran.

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
    for name, value in dict(x_scale=x_scale, w_scale=w_scale, dy_scale=dy_scale).items():
        if value is not None:
            check_scale(where, name, value, x.device)
    for name, value in dict(x_amax=x_amax, w_amax=w_amax, dy_amax=dy_amax).items():
        if value is not None:
            check_scalar(where, name, value, x.device)
    if main_grad is not None:
        check_tensor(where, "main_grad", main_grad, shape=weight.shape, dims="(N, K)",
                     dtypes=FLOATS, device=x.device)  # fmt: skip
    grad_dtype = format_dtype(where, "grad_format", grad_format)

    (x,) = autocast(x)
    train = torch.is_grad_enabled()
    need_dx, need_dw = train and x.requires_grad, train and weight.requires_grad
    e4m3 = FORMATS["e4m3"]
    if weight_codes is None:
        slot = w_amax if train else None
        weight_codes = op.cast(weight, w_scale, slot, e4m3, transpose=need_dx)
    else:
        check_codes(where, "weight_codes", weight_codes, weight, need_dx)
    if x_codes is None:
        slot = x_amax if train else None
        x_codes = op.cast(x, x_scale, slot, e4m3, squared_relu=squared_relu, transpose=need_dw)
    else:
        check(where, not squared_relu, "`x_codes` are of x, which excludes `squared_relu`")
        check_codes(where, "x_codes", x_codes, x, need_dw)
    return op.product(x, weight, bias, *x_codes, *weight_codes, dy_scale, dy_amax, main_grad,
                      grad_dtype, squared_relu, layer)  # fmt: skip
