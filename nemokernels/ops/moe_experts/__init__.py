"""The routed experts of a mixture: two matrices each, squared ReLU between them."""

from __future__ import annotations

import torch

from nemokernels._autocast import autocast
from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops import nvfp4_gemm, w4a16
from nemokernels.ops.moe_experts import fp8, op
from nemokernels.ops.moe_experts.fp8 import FP8Experts
from nemokernels.ops.moe_route import RaggedRoute, Route
from nemokernels.ops.nvfp4_gemm import NVFP4Experts

__all__ = ["FP8Experts", "moe_experts"]


def moe_experts(
    x: torch.Tensor,
    up: torch.Tensor | w4a16.TiledNVFP4 | FP8Experts | NVFP4Experts,
    down: torch.Tensor | w4a16.TiledNVFP4 | FP8Experts | NVFP4Experts,
    route: Route | RaggedRoute,
) -> torch.Tensor:
    """Send every token through its experts and add up what they return.

    ``y_t = sum_j w_tj * down_e relu(up_e x_t)**2`` with e the j-th choice of token t. The products
    accumulate in float32; ``relu(.)**2`` and each expert's result are rounded to x's dtype; the
    weighted sum over j runs in the order of j in float32 with one cast at the end (float64 for
    float64 input), so equal inputs give equal bits. A token's NaN reaches that token's y alone.
    float16 overflows where ``up_e x`` exceeds 256. Under autocast x, up and down are cast to the
    autocast dtype; the weights stay float32.

    Gradients reach x, up, down and the route's weights; an expert without tokens gets zeros. Kept
    for them is the hidden layer (R, F) of R slots, beside the arguments. On a GPU no (R, X) copy is
    made of x, y or their gradients once it took more than 384 MiB: the rows that leave the experts
    are held a block of columns at a time (moe_experts/passes.py). Activations in NVFP4 are gathered
    for a piece of the rows at a time, within the same bound, and the hidden layer is kept in 4.5
    bits per element.

    Weights in NVFP4 (W4A16): code times block scale is exact, the global scale multiplies the
    float32 sum, and nothing of the weight is rounded. In FP8 (W8A8): x and each hidden layer are
    quantised by their static scales, saturating, the latter where it is computed; scales multiply
    the float32 sums. In NVFP4 with quantised activations (W4A4): the same with
    :func:`quantize_nvfp4`, whose amax is 2688 times the static scale, of x and of each hidden
    layer, the latter after it was rounded to x's dtype. All are for inference: no gradient.

    Args:
        x: (T, X), float32, bfloat16, float16 or float64, any strides; with weights in FP8 also
            float8_e4m3fn, quantised by whoever made it (y is bfloat16 then).
        up: (E, F, X), x's dtype; or in NVFP4 by :func:`tile_nvfp4` with a global scale per expert;
            or :class:`FP8Experts`, or :class:`NVFP4Experts`.
        down: (E, X, F), as ``up``.
        route: what ``moe_route`` returned for these tokens, k slots of each; or, for weights that
            are not quantised, a :class:`RaggedRoute`, whose tokens have any number of slots each.
            Offsets and starts must not decrease and the order must hold each slot once. On a GPU
            they are not read back to be checked; a route that is none gives wrong results there,
            within bounds.

    Returns:
        y (T, X) in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.

    Source: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
    Mixture-of-Experts Layer", 2017; weighting after the down projection as in transformers 5.23
    NemotronHExperts.
    """
    where = "moe_experts"
    eight = isinstance(up, FP8Experts)
    dtypes = (*FLOATS, torch.float8_e4m3fn) if eight else FLOATS
    check_tensor(where, "x", x, shape=(None, None), dims="(T, X)", dtypes=dtypes)
    tiled = isinstance(up, w4a16.TiledNVFP4)
    starts = getattr(route, "starts", None)
    quantised = tiled or eight or isinstance(up, NVFP4Experts)
    check(where, starts is None or not quantised,
          "`route` is ragged, which quantised experts do not take")  # fmt: skip
    if tiled:
        check(where, up.codes.dim() == 5, "`up.codes` has shape {}, expected experts in tiles",
              tuple(up.codes.shape))  # fmt: skip
        experts = up.codes.shape[0]
        w4a16.check_experts(where, x, up, down)
        (x,) = autocast(x)
    elif eight:
        fp8.check_experts(where, x, up, down)
        experts = up.values.shape[0]
        x = x if x.dtype not in FLOATS else autocast(x)[0]
    elif isinstance(up, NVFP4Experts):
        nvfp4_gemm.check_experts(where, x, up, down)
        experts = up.codes.shape[0]
        (x,) = autocast(x)
    else:
        check_tensor(where, "up", up, shape=(None, None, x.shape[1]), dims="(E, F, X)",
                     dtypes=FLOATS, device=x.device)  # fmt: skip
        experts = up.shape[0]
        check_tensor(where, "down", down, shape=(experts, x.shape[1], up.shape[1]),
                     dims="(E, X, F)", dtypes=FLOATS, device=x.device)  # fmt: skip
        x, up, down = autocast(x, up, down)
        for name, value in (("up", up), ("down", down)):
            check_tensor(where, name, value, dtypes=(x.dtype,))
    _check_route(where, route, x, experts)
    if tiled:
        return w4a16.experts(x, up, down, route.weights, route.offsets, route.order)
    if eight:
        return fp8.experts(x, up, down, route.weights, route.offsets, route.order)
    if isinstance(up, NVFP4Experts):
        return nvfp4_gemm.experts(x, up, down, route.weights, route.offsets, route.order)
    return op.moe_experts(x, up, down, route.weights, route.offsets, route.order, starts)[0]


def _check_route(where: str, route: object, x: torch.Tensor, experts: int) -> None:
    if not isinstance(route, (Route, RaggedRoute)):
        raise TypeError(f"{where}: `route` must be a Route, got {type(route).__name__}")
    tokens, integers = x.shape[0], dict(dtypes=(torch.int32,), device=x.device)
    real = dict(dtypes=(torch.float32, torch.float64), device=x.device)
    if isinstance(route, Route):
        check_tensor(where, "route.weights", route.weights, shape=(tokens, None), dims="(T, k)",
                     **real)  # fmt: skip
        slots = route.weights.shape[1]
        check(where, slots >= 1, "`route.weights` has no slots, expected at least one")
    else:
        check_tensor(where, "route.weights", route.weights, shape=(None,), dims="(R,)", **real)
        check_tensor(where, "route.starts", route.starts, shape=(tokens + 1,), dims="(T + 1,)",
                     **integers)  # fmt: skip
        slots = route.weights.shape[0]
        check(where, tokens > 0 or slots == 0, "`x` has no tokens, `route` {} slots", slots)
    check_tensor(where, "route.offsets", route.offsets, shape=(experts,), dims="(E,)",
                 **integers)  # fmt: skip
    check_tensor(where, "route.order", route.order, shape=(route.weights.numel(),), dims="(R,)",
                 **integers)  # fmt: skip
