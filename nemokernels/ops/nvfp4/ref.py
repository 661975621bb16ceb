"""NVFP4 in plain torch: the specification and the CPU leg.

E2M1 codes (0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, 8 = -0), two per byte, the even element
in the low nibble; one E4M3 scale per block of 16 elements of the last axis; one float32 scale.
Quantisation is float32 arithmetic by definition, in this order, whatever the input's dtype.
R rows, K contraction axis. Block scales travel as bytes (uint8) between operators.
"""

from __future__ import annotations

import torch

from nemokernels._philox import philox4x32
from nemokernels._registry import acc_dtype

BLOCK = 16
E2M1_MAX, E4M3_MAX = 6.0, 448.0
FLOAT_MAX = torch.finfo(torch.float32).max
SMALLEST_E4M3 = 2.0**-9
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """(..., K) codes 0..15 to (..., K/2) bytes."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """(..., K/2) bytes to (..., K) codes 0..15."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def round_e2m1(x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Codes of float32 x, saturating at 6; NaN becomes +6 as in the hardware conversion.

    Spacing is .5 below 2, 1 below 4, else 2. Without noise ties go to the even code. With noise, 8
    random bits per element, x is raised by noise / 256 of the spacing at x and cut down to the grid
    of that spacing, which rounds up with probability equal to the fraction, truncated to 1/256.
    """
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    if noise is None:
        size = (size / step).round() * step
    else:
        size = ((size + noise.to(size.dtype) * 2.0**-8 * step) / step).floor() * step
    size = torch.where(size.isnan(), E2M1_MAX, size.clamp(max=E2M1_MAX))
    code = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
    sign = torch.where(x.signbit() & ~x.isnan(), 8, 0)
    return (code.to(torch.int32) + sign).to(torch.uint8)


def noise_like(x: torch.Tensor, seed: torch.Tensor, stream: int) -> torch.Tensor:
    """8 random bits per element: element e (row-major) takes byte e % 4, lowest first, of word
    (e % 16) // 4 of Philox4x32-10 at counter (e // 16, 0, stream, 0): one draw per block."""
    draws = torch.arange(x.numel() // BLOCK, device=x.device)
    words = torch.stack(philox4x32(seed.reshape(()), draws, stream), -1)
    shifts = torch.tensor([0, 8, 16, 24], device=x.device)
    return (words[..., None] >> shifts & 255).reshape(x.shape)


def over(scale: torch.Tensor, axes: int) -> torch.Tensor:
    """A scale per tensor (one element), or per leading axes, with axes appended to broadcast."""
    scale = scale.float() if scale.dtype != torch.float64 else scale
    if scale.numel() == 1:
        scale = scale.reshape(())
    return scale.reshape(scale.shape + (1,) * (axes - scale.dim()))


def tensor_amax(x: torch.Tensor) -> torch.Tensor:
    """max |x| over what is not NaN, shape (), float32; 0 if there is nothing."""
    size = x.float().abs()
    size = torch.where(size.isnan(), 0.0, size)
    return size.amax() if x.numel() else size.new_zeros(())


def block_amax(x: torch.Tensor, block_rows: int) -> torch.Tensor:
    """max |x| per block (..., R, K/16), repeated over the rows of a 16 x 16 block; NaN spreads."""
    blocks = x.abs().unflatten(-1, (x.shape[-1] // BLOCK, BLOCK))
    if block_rows == 1:
        return blocks.amax(-1)
    tiles = blocks.unflatten(-3, (x.shape[-2] // BLOCK, BLOCK)).amax((-1, -3))
    return tiles.repeat_interleave(BLOCK, -2)


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """amax / (6 * 448) in float32."""
    return amax.float() / torch.full_like(amax, E2M1_MAX * E4M3_MAX, dtype=torch.float32)


def quantize(
    x: torch.Tensor,
    amax: torch.Tensor | None,
    block_rows: int,
    seed: torch.Tensor | None,
    stream: int = 0,
    swizzled: bool = False,
):
    """Packed codes (..., K/2), block scales (..., K/16) as bytes, global scale (amax's shape).

    S = min(2688 / amax, FLT_MAX), or 1 where amax is 0 or infinite; block scale
    s = e4m3(min(block amax * (S * (1/6)), FLT_MAX)), saturating; and with the rounded s
    q = e2m1(x * min(1 / (s * (1/S)), FLT_MAX)), saturating. Swizzled scales are those of swizzle().
    """
    wide = x.float()
    amax = tensor_amax(x) if amax is None else amax.float()
    top = torch.full_like(amax, E2M1_MAX * E4M3_MAX)
    encode = (top / amax).clamp(max=FLOAT_MAX)
    encode = over(torch.where((amax == 0) | (encode == 0), 1.0, encode), x.dim())
    scale = (block_amax(wide, block_rows) * (encode * (1 / E2M1_MAX))).clamp(max=E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn)
    inverse = (1 / (scale.float() * (1 / encode))).clamp(max=FLOAT_MAX)
    scaled = wide * inverse.repeat_interleave(BLOCK, -1)
    noise = None if seed is None else noise_like(x, seed, stream)
    scale = scale.view(torch.uint8)
    scale = swizzle(scale) if swizzled else scale
    return pack(round_e2m1(scaled, noise)), scale, global_scale(amax)


def quantize_pair(
    x: torch.Tensor,
    amax: torch.Tensor | None,
    amax_t: torch.Tensor | None,
    block_rows: int,
    hadamard: bool,
    seed: torch.Tensor | None,
    swizzled: bool = False,
):
    """quantize of x (R, K) and of its transpose (K, R), the latter after hadamard16 if asked.

    Without the transform both share one amax. The noise of the transpose is the stream 1.
    """
    x_t = x.t().contiguous()
    if hadamard:
        x_t = hadamard16(x_t)
    elif amax_t is None:
        amax_t = tensor_amax(x) if amax is None else amax
    rowwise = quantize(x, amax, block_rows, seed, 0, swizzled)
    return *rowwise, *quantize(x_t, amax_t, block_rows, seed, 1, swizzled)


def quantize_weight(x: torch.Tensor, amax: torch.Tensor | None):
    """The arithmetic of ModelOpt's checkpoint export. Same outputs as :func:`quantize`.

    g = amax / 2688; s = e4m3(clamp(block amax / (6 g), 2**-9, 448)), with 1 where the quotient is
    0; q = e2m1(x / (s * g)). Negative zero becomes positive.
    """
    wide = x.float()
    amax = tensor_amax(x) if amax is None else amax
    scale_2 = global_scale(amax)
    g = over(scale_2, x.dim())
    scale = block_amax(wide, 1) / (E2M1_MAX * g)
    # 0 / 0: a tensor of zeros. Its blocks are zero blocks like any other.
    zero = (scale == 0) | ((g == 0) & scale.isnan())
    scale = torch.where(zero, 1.0, scale.clamp(SMALLEST_E4M3, E4M3_MAX))
    # inf / inf is a NaN whose sign depends on the processor.
    scale = torch.where(scale.isnan(), torch.nan, scale).to(torch.float8_e4m3fn)
    step = (scale.float() * g).repeat_interleave(BLOCK, -1)
    codes = round_e2m1(torch.where(wide == 0, 0.0, wide / step))
    return pack(codes), scale.view(torch.uint8), scale_2


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """e2m1 * (s * global scale), in float32 (float64 for a float64 result), one cast."""
    acc = acc_dtype(dtype)
    values = torch.tensor(VALUES, dtype=acc, device=codes.device)[unpack(codes).int()]
    step = scales.view(torch.float8_e4m3fn).to(acc) * over(scale_2, codes.dim()).to(acc)
    return (values * step.repeat_interleave(BLOCK, -1)).to(dtype)


def hadamard16(x: torch.Tensor) -> torch.Tensor:
    """Every 16 elements of the last axis times diag(SIGNS) H / 4, H the 16 x 16 Sylvester matrix.

    Accumulated wide in the order of :func:`_butterflies`, one cast.
    """
    acc = acc_dtype(x)
    return _butterflies(_sixteens(x, acc) * _signs(x, acc)).reshape(x.shape).to(x.dtype)


def hadamard16_backward(dy: torch.Tensor) -> torch.Tensor:
    """dx: every 16 elements times the transposed matrix H diag(SIGNS) / 4, which is its inverse."""
    acc = acc_dtype(dy)
    return (_butterflies(_sixteens(dy, acc)) * _signs(dy, acc)).reshape(dy.shape).to(dy.dtype)


def _sixteens(x: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    return x.to(acc).unflatten(-1, (x.shape[-1] // BLOCK, BLOCK))


def _signs(x: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    return torch.tensor(SIGNS, dtype=acc, device=x.device)


def _butterflies(x: torch.Tensor) -> torch.Tensor:
    """The last axis (16) times H / 4: sums and differences of the elements whose index differs in
    bit 0, then in bit 1, 2 and 3. A kernel that keeps this order has the same bits."""
    x = x.unflatten(-1, (2, 2, 2, 2))
    for bit in (-1, -2, -3, -4):
        a, b = x.unbind(bit)
        x = torch.stack((a + b, a - b), bit)
    return x.flatten(-4) * 0.25


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """(..., R, C) bytes, zero-padded to multiples of (128, 4), in 128 x 4 tiles of 512 bytes.

    A tile holds its rows as 32 groups of 16 bytes: row r, column c at byte
    (r % 32) * 16 + (r // 32) * 4 + c. Tiles follow each other along the columns first.
    """
    rows, columns = scales.shape[-2:]
    padded = torch.nn.functional.pad(scales, (0, -columns % 4, 0, -rows % 128))
    shape = padded.shape
    tiles = padded.reshape(*shape[:-2], shape[-2] // 128, 4, 32, shape[-1] // 4, 4)
    return tiles.transpose(-4, -2).reshape(shape)


def swizzled_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(..., R', C') of swizzled block scales (..., R, C)."""
    return *shape[:-2], -(-shape[-2] // 128) * 128, -(-shape[-1] // 4) * 4


def put_rows(swizzled: torch.Tensor, row: torch.Tensor, scales: torch.Tensor) -> None:
    """Write block scales (R, C) into the rows ``row`` (R,) of contiguous swizzled ones, a matrix.

    Four columns of a tile are written as one number; those of the padding become zero.
    """
    fours = torch.nn.functional.pad(scales, (0, -scales.shape[1] % 4)).view(torch.int32)
    rows, columns = swizzled.shape
    tiles = swizzled.view(rows // 128, columns // 4, 32, 16).view(torch.int32)
    tiles.permute(0, 3, 2, 1)[row // 128, row % 128 // 32, row % 32] = fours


def unswizzle(swizzled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`swizzle` without the padding."""
    shape = swizzled.shape
    tiles = swizzled.reshape(*shape[:-2], shape[-2] // 128, shape[-1] // 4, 32, 4, 4)
    return tiles.transpose(-4, -2).reshape(shape)[..., :rows, :columns]
