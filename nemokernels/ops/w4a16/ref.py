"""Products with NVFP4 weights and unquantised activations in plain torch: the specification.

A weight (N, K) is held in tiles of 16 rows and 64 columns, N and K padded with zeros: codes
(N/16, K/64, 16, 32) and block scales (N/16, K/64, 16, 4), bytes. In a block of 16 elements byte i
holds element i in its low nibble and element i + 8 in its high one.

Cast points: e2m1(code) * scale has at most 6 significant bits and is exact in bfloat16 and float16;
products accumulate in the accumulation dtype (float32; float64 stays float64); the global scale
multiplies the accumulator; then the epilogue; then one cast to x's dtype.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear as product
from torch.nn.functional import pad

from nemokernels._registry import acc_dtype
from nemokernels.ops.moe_experts import ref as moe
from nemokernels.ops.nvfp4.ref import VALUES, pack, unpack

ROWS, COLUMNS = 16, 64


def tile(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checkpoint layout, (..., N, K/2) and (..., N, K/16) bytes, to tiles."""
    values = unpack(codes).unflatten(-1, (scales.shape[-1], 2, 8))
    bytes_ = values[..., 0, :] | values[..., 1, :] << 4
    return _tiles(bytes_.flatten(-2), COLUMNS // 2), _tiles(scales, COLUMNS // 16)


def _tiles(x: torch.Tensor, width: int) -> torch.Tensor:
    rows, columns = x.shape[-2:]
    x = pad(x, (0, -columns % width, 0, -rows % ROWS))
    x = x.unflatten(-1, (x.shape[-1] // width, width))
    return x.unflatten(-3, (x.shape[-3] // ROWS, ROWS)).transpose(-3, -2).contiguous()


def untile(
    codes: torch.Tensor, scales: torch.Tensor, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of :func:`tile` for a weight (..., rows, columns)."""
    scales = _untiled(scales, rows, columns // 16)
    bytes_ = _untiled(codes, rows, columns // 2).unflatten(-1, (columns // 16, 8))
    return pack(torch.cat([bytes_ & 15, bytes_ >> 4], -1).flatten(-2)), scales


def _untiled(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    x = x.transpose(-3, -2)
    x = x.reshape(*x.shape[:-4], x.shape[-4] * ROWS, x.shape[-2] * x.shape[-1])
    return x[..., :rows, :columns]


def values(
    codes: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """e2m1(code) * scale of a tiled weight, (..., rows, columns), without the global scale."""
    codes, scales = untile(codes, scales, rows, columns)
    table = torch.tensor(VALUES, dtype=dtype, device=codes.device)
    step = scales.contiguous().view(torch.float8_e4m3fn).to(dtype)
    return table[unpack(codes).int()] * step.repeat_interleave(16, -1)


def linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor, rows: int
) -> torch.Tensor:
    """y = (x @ w^T) * scale_2, w (rows, K)."""
    acc = acc_dtype(x)
    weight = values(codes, scales, rows, x.shape[-1], acc)
    return (product(x.to(acc), weight) * scale_2.to(acc).reshape(())).to(x.dtype)


def linear_backward(
    dy: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    scale_2: torch.Tensor,
    columns: int,
) -> torch.Tensor:
    """dx = (dy @ w) * scale_2, w (N, columns)."""
    acc = acc_dtype(dy)
    weight = values(codes, scales, dy.shape[-1], columns, acc)
    return ((dy.to(acc) @ weight) * scale_2.to(acc).reshape(())).to(dy.dtype)


def experts(
    x: torch.Tensor,
    up_codes: torch.Tensor,
    up_scales: torch.Tensor,
    up_scale_2: torch.Tensor,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    down_scale_2: torch.Tensor,
    width: int,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
) -> torch.Tensor:
    """y of moe_experts' reference with expert matrices up (E, width, X) and down (E, X, width) in
    tiles and a global scale per expert each. Rounded to x's dtype are hidden and the rows that
    leave the down projection."""
    acc, slot = acc_dtype(x), moe.slots_of(offsets, order)
    rows = x[slot // weights.shape[1]].to(acc)
    out = x.new_empty(slot.numel(), x.shape[1])  # in slot order
    for e, r in moe.segments(offsets):
        up = values(up_codes[e], up_scales[e], width, x.shape[1], acc)
        down = values(down_codes[e], down_scales[e], x.shape[1], width, acc)
        hidden = (product(rows[r], up) * up_scale_2[e].to(acc)).relu().square().to(x.dtype)
        out[slot[r]] = (product(hidden.to(acc), down) * down_scale_2[e].to(acc)).to(x.dtype)
    return moe.slot_sum(out.view(*weights.shape, x.shape[1]), weights)
