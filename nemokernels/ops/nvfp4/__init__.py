"""NVFP4: quantisation, packing, scale layout, the 16-point Hadamard transform."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.nvfp4 import op, ref

__all__ = [
    "NVFP4",
    "SwizzledNVFP4",
    "dequantize_nvfp4",
    "hadamard16",
    "pack_e2m1",
    "quantize_nvfp4",
    "quantize_nvfp4_pair",
    "quantize_nvfp4_weight",
    "swizzle_nvfp4",
    "swizzle_scales",
    "unpack_e2m1",
    "unswizzle_scales",
]

BYTES = (torch.uint8, torch.float8_e4m3fn)


class NVFP4(NamedTuple):
    """A tensor (..., K) in NVFP4: ``value = e2m1(code) * scale of its block * global_scale``.

    Both conventions in use decode so: Transformer Engine's (global_scale = amax / 2688) and that of
    ModelOpt checkpoints (``weight``, ``weight_scale``, ``weight_scale_2``, 4-over-6 included).
    Checkpoints that store the reciprocal of the global scale must be inverted first.

    Attributes:
        codes: (..., K/2) uint8, the even element in the low nibble. 0 to 7 are 0, .5, 1, 1.5, 2, 3,
            4, 6; 8 to 15 the same negated.
        scales: (..., K/16) float8_e4m3fn, one per 16 elements of the last axis, rows in order (not
            swizzled).
        global_scale: float32, one element, or one per index of the leading axes (experts, rows).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor


class SwizzledNVFP4(NamedTuple):
    """An operand (..., R, K) of a product in NVFP4 on block-scaled matrix units.

    Attributes:
        codes, global_scale: as in :class:`NVFP4`.
        scales: (..., R', K'/16) float8_e4m3fn in the order of :func:`swizzle_scales`; R' and K'/16
            are R and K/16 rounded up to multiples of 128 and 4, the padding is zero.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor


def quantize_nvfp4(
    x: torch.Tensor,
    *,
    amax: torch.Tensor | None = None,
    block_rows: int = 1,
    seed: int | torch.Tensor | None = None,
    swizzled: bool = False,
) -> NVFP4 | SwizzledNVFP4:
    """Quantise along the last axis with the arithmetic of NVFP4 training.

    All in float32, in this order: ``S = min(2688 / amax, FLT_MAX)`` (1 where amax is 0 or
    infinite); ``s = e4m3(block_amax * (S * (1/6)))``, saturating at 448;
    ``q = e2m1(x * min(1 / (s * (1/S)), FLT_MAX))``, saturating; ``global_scale = amax / 2688``.
    Rounding is to nearest even, or stochastic with a seed: 8 random bits per element, which leaves
    the mean low by 1/512 of the spacing. The bits depend on the seed and the element's index alone.

    A block that holds a NaN gets the scale NaN (and code 7 throughout), so it decodes to NaN; other
    blocks do not notice. An infinite amax makes the decoded tensor infinite or NaN. Not
    differentiable. Autocast has no effect.

    Args:
        x: (..., K), K a multiple of 16, float32, bfloat16, float16 or float64 (which is first
            rounded to float32).
        amax: float32, one element, or one per index of x's leading axes; e.g. reduced over ranks.
            None: max |x| over everything that is not NaN.
        block_rows: 1 for blocks of 1 x 16; 16 for blocks of 16 x 16 of the last two axes, whose
            scale is repeated in each of the 16 rows.
        seed: an integer or a one-element int64 tensor (on x's device); rounds stochastically. Use
            another seed in every step and layer.
        swizzled: return a :class:`SwizzledNVFP4`, which products read and
            :func:`dequantize_nvfp4` does not. Takes at least two axes.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025; order of operations of
    NVIDIA Transformer Engine.
    """
    where = "quantize_nvfp4"
    _check_x(where, x, block_rows)
    _check_amax(where, "amax", amax, x)
    check(where, not swizzled or x.dim() >= 2,
          "`swizzled` scales need a matrix, got `x` of shape {}", tuple(x.shape))  # fmt: skip
    parts = op.quantize(x, amax, block_rows, _seed(where, seed, x), 0, swizzled)
    return _wrap(*parts, swizzled=swizzled)


def quantize_nvfp4_pair(
    x: torch.Tensor,
    *,
    amax: torch.Tensor | None = None,
    amax_t: torch.Tensor | None = None,
    block_rows: int = 1,
    hadamard: bool = False,
    seed: int | torch.Tensor | None = None,
    swizzled: bool = False,
) -> tuple[NVFP4, NVFP4] | tuple[SwizzledNVFP4, SwizzledNVFP4]:
    """Quantise ``x`` and its transpose, for the two matrix products a training step needs it in.

    Equal to ``quantize_nvfp4(x)`` and ``quantize_nvfp4(x.T)``, the latter of
    ``hadamard16(x.T)`` with ``hadamard``. Activations: blocks of 1 x 16, ``hadamard=True``.
    Gradients: the same with a seed. Weights: ``block_rows=16``, where both copies hold the same
    values. The two copies draw independent noise from one seed. Not differentiable. Autocast has no
    effect.

    Args:
        x: (R, K), both multiples of 16.
        amax, amax_t: of x and of the (transformed) transpose; None computes them. Without the
            transform ``amax_t`` defaults to ``amax``.
        block_rows, seed, swizzled: as in :func:`quantize_nvfp4`.
        hadamard: transform the transpose along its last axis, and round it to x's dtype, first.

    Returns:
        (R, K) and (K, R) in NVFP4.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: as :func:`quantize_nvfp4`.
    """
    where = "quantize_nvfp4_pair"
    check_tensor(where, "x", x, shape=(None, None), dims="(R, K)", dtypes=FLOATS)
    _check_x(where, x, block_rows)
    _check_x(where, x.t(), block_rows)
    _check_amax(where, "amax", amax, x)
    _check_amax(where, "amax_t", amax_t, x.t())
    if amax_t is None and amax is not None and not hadamard:
        check(where, amax.numel() == 1,
              "`amax_t` is needed beside an `amax` per row, got None")  # fmt: skip
    out = op.quantize_pair(x, amax, amax_t, block_rows, hadamard, _seed(where, seed, x), swizzled)
    return _wrap(*out[:3], swizzled=swizzled), _wrap(*out[3:], swizzled=swizzled)


def quantize_nvfp4_weight(weight: torch.Tensor, *, amax: torch.Tensor | None = None) -> NVFP4:
    """Quantise a weight for a checkpoint, with the arithmetic of ModelOpt's export.

    ``global_scale = amax / 2688``; ``s = e4m3(clamp(block_amax / (6 global_scale), 2**-9, 448))``,
    1 for a block of zeros; ``q = e2m1(x / (s * global_scale))``, to nearest even. It differs from
    :func:`quantize_nvfp4` in the corners: small blocks keep a scale, zeros are positive. NaN and
    infinity as there. Not differentiable. Autocast has no effect.

    Args:
        weight: (..., K), K a multiple of 16, float32, bfloat16, float16 or float64.
        amax: as in :func:`quantize_nvfp4`. For stacked experts (E, N, K) pass
            ``weight.abs().amax((1, 2)).float()``: checkpoints hold one global scale per expert.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: NVIDIA Model-Optimizer, NVFP4QTensor.
    """
    where = "quantize_nvfp4_weight"
    _check_x(where, weight, 1, "weight")
    _check_amax(where, "amax", amax, weight)
    return _wrap(*op.quantize_weight(weight, amax))


def dequantize_nvfp4(
    codes: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``e2m1(code) * (scale * global_scale)`` in float32 (float64 for a float64 result), one cast.

    Takes the parts of an :class:`NVFP4`: ``dequantize_nvfp4(*q)``. Not differentiable. Autocast has
    no effect.

    Args:
        codes, scales, global_scale: see :class:`NVFP4`.
        dtype: of the result; float32, bfloat16, float16 or float64.

    Returns:
        (..., K).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    where = "dequantize_nvfp4"
    check_parts(where, codes, scales, global_scale)
    if dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{where}: `dtype` is {dtype}, expected one of {names}")
    return op.dequantize(codes, scales.view(torch.uint8), global_scale, dtype)


def hadamard16(x: torch.Tensor) -> torch.Tensor:
    """Every 16 consecutive elements of the last axis times the orthogonal matrix diag(s) H / 4.

    H is the 16 x 16 Sylvester-Hadamard matrix, s a fixed vector of signs. Two operands transformed
    along their common axis have the same product as before. Sums are in float32 (float64 for
    float64), one cast; the matrix is exact in every dtype. Autocast has no effect.

    Args:
        x: (..., K), K a multiple of 16, float32, bfloat16, float16 or float64.

    Raises:
        TypeError, ValueError: x has the wrong type, dtype or shape.

    Source: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025; signs of NVIDIA
    Transformer Engine.
    """
    _check_x("hadamard16", x, 1)
    return op.hadamard16(x)


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """(..., K) codes 0 to 15 to (..., K/2) bytes, the even element in the low nibble."""
    check_tensor("pack_e2m1", "codes", codes, dtypes=(torch.uint8,))
    even = codes.dim() >= 1 and codes.shape[-1] % 2 == 0
    check("pack_e2m1", even, "`codes` has shape {}, expected a last axis of even size",
          tuple(codes.shape))  # fmt: skip
    return ref.pack(codes)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """(..., K/2) bytes to (..., K) codes 0 to 15; the inverse of :func:`pack_e2m1`."""
    check_tensor("unpack_e2m1", "packed", packed, dtypes=(torch.uint8,))
    check("unpack_e2m1", packed.dim() >= 1, "`packed` needs at least one axis, got a scalar")
    return ref.unpack(packed)


def swizzle_scales(scales: torch.Tensor) -> torch.Tensor:
    """Block scales in the order that block-scaled matrix products of CUTLASS and cuBLAS read.

    Padded with zeros to R' and C', multiples of 128 and 4. Scale (r, c) goes to byte
    ``((r // 128) * (C'/4) + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4``.

    Args:
        scales: (..., R, C), float8_e4m3fn or uint8. Leading axes (experts) are swizzled each alone.

    Returns:
        (..., R', C') in the same dtype.

    Raises:
        TypeError, ValueError: scales has the wrong type, dtype or shape.

    Source: CUTLASS, Blackwell block-scaled scale factor layout.
    """
    _check_matrix("swizzle_scales", "scales", scales)
    return op.swizzle(scales.view(torch.uint8)).view(scales.dtype)


def unswizzle_scales(swizzled: torch.Tensor, *, rows: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`swizzle_scales`: (..., R', C') to (..., rows, columns)."""
    where = "unswizzle_scales"
    _check_matrix(where, "swizzled", swizzled)
    for name, size, have, tile in zip(
        ("rows", "columns"), (rows, columns), swizzled.shape[-2:], (128, 4)
    ):
        check(where, size >= 0 and -(-size // tile) * tile == have,
              "`{}` is {}, but `swizzled` has {}, expected its next multiple of {}",
              name, size, have, tile)  # fmt: skip
    return op.unswizzle(swizzled.view(torch.uint8), rows, columns).view(swizzled.dtype)


def swizzle_nvfp4(weight: NVFP4) -> SwizzledNVFP4:
    """Bring (..., R, K) from the layout of a checkpoint into that of products on Blackwell.

    The codes are kept, the scales copied. Their values are read once, to refuse negative ones:
    no quantiser writes them, and the matrix units would take them for positive.

    Raises:
        TypeError, ValueError: a part has the wrong type, dtype, shape or device, or a block scale
            is negative.
    """
    where = "swizzle_nvfp4"
    check_kind(where, "weight", weight, NVFP4)
    check_parts(where, *weight)
    check(where, weight.codes.dim() >= 2, "`codes` has shape {}, expected (..., R, K/2)",
          tuple(weight.codes.shape))  # fmt: skip
    check_not_negative(where, weight.scales)
    return SwizzledNVFP4(weight.codes, swizzle_scales(weight.scales), weight.global_scale)


def _wrap(codes: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor, swizzled=False):
    kind = SwizzledNVFP4 if swizzled else NVFP4
    return kind(codes, scales.view(torch.float8_e4m3fn), scale_2)


def _seed(where: str, seed: int | torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    if isinstance(seed, torch.Tensor):
        check_tensor(where, "seed", seed, dtypes=(torch.int64,), device=x.device)
        check(where, seed.numel() == 1, "`seed` has shape {}, expected one element",
              tuple(seed.shape))  # fmt: skip
        return seed
    if seed is None:
        return None
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{where}: `seed` must be an integer or a tensor, got {seed!r}")
    check(where, 0 <= seed < 1 << 64, "`seed` is {}, expected 64 bits, not negative", seed)
    return torch.tensor(seed - (1 << 64) if seed >> 63 else seed, device=x.device)


def _check_x(where: str, x: object, block_rows: int, name: str = "x") -> None:
    check_tensor(where, name, x, dtypes=FLOATS)
    check(where, x.dim() >= 1, "`{}` needs at least one axis, got a scalar", name)
    check(where, x.shape[-1] % ref.BLOCK == 0,
          "`{}` has shape {}; a quantised axis must be a multiple of 16 (pad it with zeros)",
          name, tuple(x.shape))  # fmt: skip
    check(where, block_rows in (1, 16), "`block_rows` is {}, expected 1 or 16", block_rows)
    if block_rows == 16:
        check(where, x.dim() >= 2 and x.shape[-2] % ref.BLOCK == 0,
              "`{}` has shape {}; blocks of 16 x 16 need rows in multiples of 16",
              name, tuple(x.shape))  # fmt: skip


def _check_amax(where: str, name: str, amax: object, x: torch.Tensor) -> None:
    if amax is not None:
        check_scale(where, name, amax, x)


def check_scale(where: str, name: str, scale: object, x: torch.Tensor) -> None:
    check_tensor(where, name, scale, dtypes=(torch.float32,), device=x.device)
    leading = scale.dim() < x.dim() and scale.shape == x.shape[: scale.dim()]
    check(where, leading or scale.numel() == 1,
          "`{}` has shape {}, expected one element or one per leading index of shape {}",
          name, tuple(scale.shape), tuple(x.shape))  # fmt: skip


def check_parts(
    where: str, codes: object, scales: object, global_scale: object, device=None
) -> None:
    """Raise unless these are the parts of an :class:`NVFP4`."""
    check_tensor(where, "codes", codes, dtypes=(torch.uint8,), device=device)
    check(where, codes.dim() >= 1 and codes.shape[-1] % 8 == 0,
          "`codes` has shape {}, expected a last axis of K/2, K a multiple of 16",
          tuple(codes.shape))  # fmt: skip
    blocks = (*codes.shape[:-1], codes.shape[-1] // 8)
    check_tensor(where, "scales", scales, shape=blocks, dims="(..., K/16)",
                 dtypes=(torch.float8_e4m3fn,), device=codes.device)  # fmt: skip
    check_scale(where, "global_scale", global_scale, codes)
    for name, part in (("scales", scales), ("global_scale", global_scale)):
        check(where, not part.requires_grad, "`{}` requires a gradient; it has none", name)


def check_not_negative(where: str, scales: torch.Tensor) -> None:
    if not scales.is_meta:
        check(where, not (scales.view(torch.uint8) > 127).any().item(),
              "`scales` holds a negative scale, expected none below zero")  # fmt: skip


def check_kind(where: str, name: str, value: object, *kinds: type) -> None:
    """Raise unless ``value`` is one of these containers."""
    if not isinstance(value, kinds):
        want = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{where}: `{name}` must be a {want}, got {type(value).__name__}")


def _check_matrix(where: str, name: str, value: object) -> None:
    check_tensor(where, name, value, dtypes=BYTES)
    check(where, value.dim() >= 2, "`{}` has shape {}, expected (..., R, C)", name,
          tuple(value.shape))  # fmt: skip
