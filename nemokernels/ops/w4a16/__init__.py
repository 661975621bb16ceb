"""Products with NVFP4 weights: W4A16 here, and nvfp4_linear, whose activations may be NVFP4 too."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemokernels._autocast import autocast
from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops import nvfp4_gemm
from nemokernels.ops.nvfp4 import (
    NVFP4,
    SwizzledNVFP4,
    check_kind,
    check_not_negative,
    check_parts,
    check_scale,
)
from nemokernels.ops.w4a16 import op, ref

__all__ = ["TiledNVFP4", "nvfp4_linear", "tile_nvfp4", "untile_nvfp4"]


class TiledNVFP4(NamedTuple):
    """A weight (..., N, K) in NVFP4, in the order in which the W4A16 kernels read it.

    Made once, by :func:`tile_nvfp4`, from the layout of a checkpoint; it takes the same 4.5 bits
    per weight, plus the padding of N to a multiple of 16 and of K to one of 64.

    Attributes:
        codes: (..., N/16, K/64, 16, 32) uint8: tiles of 16 rows and 64 columns, zero-padded. In a
            block of 16 elements byte i holds element i in its low and element i + 8 in its high
            nibble.
        scales: (..., N/16, K/64, 16, 4) uint8, the bits of the E4M3 block scales of the same tiles.
        global_scale: as in :class:`NVFP4`.
        rows, columns: N and K.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    rows: int
    columns: int


def tile_nvfp4(weight: NVFP4) -> TiledNVFP4:
    """Bring a weight (..., N, K) from the layout of a checkpoint into that of the W4A16 kernels.

    Its values are read once, to refuse block scales that no quantiser writes.

    Raises:
        TypeError, ValueError: a part has the wrong type, dtype, shape or device, or a block scale
            is negative.
    """
    where = "tile_nvfp4"
    check_kind(where, "weight", weight, NVFP4)
    check_parts(where, *weight)
    check(where, weight.codes.dim() >= 2, "`codes` has shape {}, expected (..., N, K/2)",
          tuple(weight.codes.shape))  # fmt: skip
    check_not_negative(where, weight.scales)
    return _tile(weight)


def _tile(weight: NVFP4) -> TiledNVFP4:
    codes, scales = ref.tile(weight.codes, weight.scales.view(torch.uint8))
    rows, half = weight.codes.shape[-2:]
    return TiledNVFP4(codes, scales, weight.global_scale, rows, half * 2)


def untile_nvfp4(weight: TiledNVFP4) -> NVFP4:
    """The inverse of :func:`tile_nvfp4`, byte for byte."""
    check_tiled("untile_nvfp4", "weight", weight)
    codes, scales = ref.untile(weight.codes, weight.scales, weight.rows, weight.columns)
    return NVFP4(codes, scales.contiguous().view(torch.float8_e4m3fn), weight.global_scale)


def nvfp4_linear(
    x: torch.Tensor | SwizzledNVFP4, weight: NVFP4 | TiledNVFP4 | SwizzledNVFP4
) -> torch.Tensor:
    """``y = x @ w.T`` with a frozen NVFP4 weight; activations unquantised (W4A16) or NVFP4 (W4A4).

    e2m1(code) times its block scale has at most 6 significant bits and is exact in every dtype of
    x. Such products with x accumulate in float32 (float64 for float64), the global scale multiplies
    the sum, and one cast follows: nothing of the weight is rounded. The gradient is that of x; the
    weight has none. Under autocast x is cast to the autocast dtype.

    W4A4: products of the values without global scales, which are exact, accumulate in float32; the
    product of the two global scales multiplies the sum; one cast to bfloat16. No gradient. On a
    GPU with block-scaled matrix units (compute capability 10.x, 12.x) they multiply; K must then be
    a multiple of 32 and N one of 8. Elsewhere the reference runs.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64, any strides; or (M, K) from
            ``quantize_nvfp4(x, amax=..., swizzled=True)``, with one global scale.
        weight: (N, K). Tiled once by :func:`tile_nvfp4`; an :class:`NVFP4` is tiled in every call.
            For x in NVFP4: from :func:`swizzle_nvfp4`. Its global scale has one element.

    Returns:
        (..., N) in x's dtype; bfloat16 for x in NVFP4.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.

    Source: the two executions of NVFP4 checkpoints, on GPUs without and with FP4 matrix units;
    CUTLASS, Blackwell block-scaled products.
    """
    where = "nvfp4_linear"
    if isinstance(x, SwizzledNVFP4):
        return nvfp4_gemm.linear(where, x, weight)
    check_tensor(where, "x", x, dtypes=FLOATS)
    check(where, x.dim() >= 1, "`x` needs at least one axis, got a scalar")
    check_kind(where, "weight", weight, NVFP4, TiledNVFP4)
    if isinstance(weight, NVFP4):
        check_parts(where, *weight, device=x.device)
        check(where, weight.codes.dim() == 2, "`codes` has shape {}, expected (N, K/2)",
              tuple(weight.codes.shape))  # fmt: skip
        weight = _tile(weight)
    check_tiled(where, "weight", weight, leading=(), device=x.device)
    check(where, weight.columns == x.shape[-1],
          "`x` has {} features, `weight` {}", x.shape[-1], weight.columns)  # fmt: skip
    check(where, weight.global_scale.numel() == 1,
          "`weight.global_scale` has shape {}, expected one element",
          tuple(weight.global_scale.shape))  # fmt: skip
    (x,) = autocast(x)
    return op.linear(x, weight.codes, weight.scales, weight.global_scale, weight.rows)


def experts(x: torch.Tensor, up: TiledNVFP4, down: TiledNVFP4, *route: torch.Tensor):
    """``moe_experts`` with weights in NVFP4, all checked; route is (weights, offsets, order)."""
    return op.experts(x, *up[:3], *down[:3], up.rows, *route)


def check_experts(where: str, x: torch.Tensor, up: TiledNVFP4, down: object) -> None:
    """Raise unless ``up`` and ``down`` are the matrices of experts that take rows of ``x``."""
    count = up.codes.shape[0]
    for name, weight in (("up", up), ("down", down)):
        check_tiled(where, name, weight, leading=(count,), device=x.device)
        check(where, weight.global_scale.shape == (count,),
              "`{}.global_scale` has shape {}, expected one per expert, ({},)",
              name, tuple(weight.global_scale.shape), count)  # fmt: skip
    check(where, up.columns == x.shape[1], "`up` has {} columns, expected the {} of `x`",
          up.columns, x.shape[1])  # fmt: skip
    check(where, (down.rows, down.columns) == (up.columns, up.rows),
          "`down` is {} x {}, expected {} x {}", down.rows, down.columns, up.columns,
          up.rows)  # fmt: skip


def check_tiled(where: str, name: str, weight: object, leading=None, device=None) -> None:
    """Raise unless ``weight`` is a TiledNVFP4 whose parts belong together."""
    check_kind(where, name, weight, TiledNVFP4)
    codes, scales, scale_2, rows, columns = weight
    check_tensor(where, f"{name}.codes", codes, dtypes=(torch.uint8,), device=device)
    check(where, rows >= 0 and columns >= 0 and columns % 16 == 0,
          "`{}` is {} x {}, expected columns in multiples of 16", name, rows, columns)  # fmt: skip
    tiles = (-(-rows // ref.ROWS), -(-columns // ref.COLUMNS), ref.ROWS)
    leading = tuple(codes.shape[:-4]) if leading is None else leading
    for part, value, last in (("codes", codes, 32), ("scales", scales, 4)):
        check_tensor(where, f"{name}.{part}", value, shape=(*leading, *tiles, last),
                     dtypes=(torch.uint8,), device=codes.device)  # fmt: skip
    whole = codes.new_empty((), dtype=torch.float32).expand(*leading, rows, columns)
    check_scale(where, f"{name}.global_scale", scale_2, whole)
    check(where, not scale_2.requires_grad, "`{}.global_scale` requires a gradient; it has none",
          name)  # fmt: skip
