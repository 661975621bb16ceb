"""Registration of the NVFP4 operators with torch.library.

Block scales travel as uint8 between operators: torch has no comparison and no sum for float8, which
opcheck and autograd's own utilities need.
"""

from __future__ import annotations

import torch

from nemokernels._registry import family, register
from nemokernels.ops.nvfp4 import ref

FAMILY = family("nvfp4")


def _example_x(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(32, 48, device=device, dtype=dtype)


def _example_quantize(device: torch.device, dtype: torch.dtype):
    return _example_x(device, dtype), None, 1, torch.tensor(7, device=device), 0


def _example_quantize_pair(device: torch.device, dtype: torch.dtype):
    amax = torch.tensor([5.0], device=device)
    return _example_x(device, dtype), amax, None, 1, True, torch.tensor(7, device=device)


def _example_quantized(device: torch.device):
    return ref.quantize(_example_x(device, torch.float32), None, 1, None)


def _example_linear(device: torch.device, dtype: torch.dtype):
    x = torch.randn(2, 5, 48, device=device, dtype=dtype)
    return x, *_example_quantized(device)


def _example_linear_backward(device: torch.device, dtype: torch.dtype):
    dy = torch.randn(2, 5, 32, device=device, dtype=dtype)
    return dy, *_example_quantized(device)


def _fake_quantize(x, amax, *_):
    *rows, k = x.shape
    return (
        x.new_empty((*rows, k // 2), dtype=torch.uint8),
        x.new_empty((*rows, k // ref.BLOCK), dtype=torch.uint8),
        x.new_empty(() if amax is None else amax.shape, dtype=torch.float32),
    )


def _fake_quantize_pair(x, amax, amax_t, block_rows, hadamard, seed):
    if not hadamard and amax_t is None:
        amax_t = amax
    return *_fake_quantize(x, amax), *_fake_quantize(x.t(), amax_t)


quantize = register(
    FAMILY,
    "quantize_nvfp4(Tensor x, Tensor? amax, int block_rows, Tensor? seed, int stream) "
    "-> (Tensor, Tensor, Tensor)",
    reference=ref.quantize,
    fake=_fake_quantize,
    example=_example_quantize,
)

quantize_pair = register(
    FAMILY,
    "quantize_nvfp4_pair(Tensor x, Tensor? amax, Tensor? amax_t, int block_rows, bool hadamard, "
    "Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=ref.quantize_pair,
    fake=_fake_quantize_pair,
    example=_example_quantize_pair,
)

quantize_weight = register(
    FAMILY,
    "quantize_nvfp4_weight(Tensor x, Tensor? amax) -> (Tensor, Tensor, Tensor)",
    reference=ref.quantize_weight,
    fake=_fake_quantize,
    example=lambda device, dtype: (_example_x(device, dtype), None),
)

dequantize = register(
    FAMILY,
    "dequantize_nvfp4(Tensor codes, Tensor scales, Tensor global_scale, ScalarType dtype) "
    "-> Tensor",
    reference=ref.dequantize,
    fake=lambda codes, scales, global_scale, dtype: codes.new_empty(
        (*codes.shape[:-1], codes.shape[-1] * 2), dtype=dtype
    ),
    example=lambda device, dtype: (*_example_quantized(device), dtype),
)

swizzle = register(
    FAMILY,
    "swizzle_scales(Tensor scales) -> Tensor",
    reference=ref.swizzle,
    fake=lambda scales: scales.new_empty(
        (*scales.shape[:-2], -(-scales.shape[-2] // 128) * 128, -(-scales.shape[-1] // 4) * 4)
    ),
    example=lambda device, dtype: (
        torch.arange(200 * 5, device=device).reshape(200, 5).to(torch.uint8),
    ),
)

unswizzle = register(
    FAMILY,
    "unswizzle_scales(Tensor swizzled, SymInt rows, SymInt columns) -> Tensor",
    reference=ref.unswizzle,
    fake=lambda swizzled, rows, columns: swizzled.new_empty((*swizzled.shape[:-2], rows, columns)),
    example=lambda device, dtype: (
        torch.arange(256 * 8, device=device).reshape(256, 8).to(torch.uint8),
        200,
        5,
    ),
)

hadamard16_backward = register(
    FAMILY,
    "hadamard16_backward(Tensor dy) -> Tensor",
    reference=ref.hadamard16_backward,
    fake=lambda dy: dy.new_empty(dy.shape),
    example=lambda device, dtype: (_example_x(device, dtype),),
)

hadamard16 = register(
    FAMILY,
    "hadamard16(Tensor x) -> Tensor",
    reference=ref.hadamard16,
    fake=lambda x: x.new_empty(x.shape),
    example=lambda device, dtype: (_example_x(device, dtype),),
    setup_context=lambda ctx, inputs, output: None,
    backward=lambda ctx, dy: hadamard16_backward(dy),
)

linear_backward = register(
    FAMILY,
    "nvfp4_linear_backward(Tensor dy, Tensor codes, Tensor scales, Tensor global_scale) -> Tensor",
    reference=ref.linear_backward,
    fake=lambda dy, codes, scales, global_scale: dy.new_empty(
        (*dy.shape[:-1], codes.shape[-1] * 2)
    ),
    example=_example_linear_backward,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, dy):
    return linear_backward(dy, *ctx.saved_tensors), None, None, None


linear = register(
    FAMILY,
    "nvfp4_linear(Tensor x, Tensor codes, Tensor scales, Tensor global_scale) -> Tensor",
    reference=ref.linear,
    fake=lambda x, codes, scales, global_scale: x.new_empty((*x.shape[:-1], codes.shape[0])),
    example=_example_linear,
    setup_context=_setup,
    backward=_backward,
)
