"""Registration of the NVFP4 operators with torch.library.

Block scales travel as uint8 between operators: torch has no comparison and no sum for float8, which
opcheck and autograd's own utilities need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemokernels import _backends, _triton
from nemokernels._registry import family, reference_on_cuda, register
from nemokernels.ops.nvfp4 import ref

FAMILY = family("nvfp4", {"triton": _triton.reason})


@dataclass(frozen=True)
class Config:
    """Which backend runs, the tile of x that a program quantises; why not Triton if not."""

    backend: str
    rows: int = 0
    columns: int = 0
    num_warps: int = 0
    reason: str = ""


def plan(transposed: bool, unsupported: str, backends: tuple[str, ...]) -> Config:
    """The configuration of a quantisation along the rows, or in both orientations.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported)
    # A square tile, so that both copies are written in pieces of 32 bytes. Not measured.
    return Config("triton", 64, 64, 4) if transposed else Config("triton", 16, 256, 4)


def _cuda(name: str, reference, launch, transposed: bool = False):
    """The CUDA leg: ``launch(kernel, config, *args)`` unless the plan says the reference."""

    def leg(*args):
        floats = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
        device = args[0].device
        unsupported = _triton.unsupported(*floats)
        if torch.float64 in args:
            unsupported = "the Triton kernels do not decode to float64"
        config = plan(transposed, unsupported, _backends.usable(FAMILY.name, device))
        if config.backend == "reference":
            return reference_on_cuda(name, reference)(*args)
        from nemokernels.ops.nvfp4 import kernel

        with torch.cuda.device_of(args[0]):
            return launch(kernel, config, *args)

    return leg


def _launch_quantize(kernel, config, x, amax, block_rows, seed, stream, swizzled):
    if x.numel() == 0:
        return ref.quantize(x, amax, block_rows, seed, stream, swizzled)
    return kernel.quantize(x, amax, block_rows, seed, stream, swizzled, config)


def _launch_quantize_pair(kernel, config, x, *args):
    if x.numel() == 0:
        return ref.quantize_pair(x, *args)
    return kernel.quantize_pair(x, *args, config)


def _launch_quantize_weight(kernel, config, x, amax):
    if x.numel() == 0:
        return ref.quantize_weight(x, amax)
    return kernel.quantize(x, amax, 1, None, 0, False, config, export=True)


def _example_x(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(32, 48, device=device, dtype=dtype)


def _example_quantize(device: torch.device, dtype: torch.dtype):
    return _example_x(device, dtype), None, 1, torch.tensor(7, device=device), 0, False


def _example_quantize_pair(device: torch.device, dtype: torch.dtype):
    amax = torch.tensor([5.0], device=device)
    seed = torch.tensor(7, device=device)
    return _example_x(device, dtype), amax, None, 1, True, seed, True


def _example_quantized(device: torch.device):
    return ref.quantize(_example_x(device, torch.float32), None, 1, None)


def _fake_quantize(x, amax, swizzled=False):
    *rows, k = x.shape
    blocks = (*rows, k // ref.BLOCK)
    return (
        x.new_empty((*rows, k // 2), dtype=torch.uint8),
        x.new_empty(ref.swizzled_shape(blocks) if swizzled else blocks, dtype=torch.uint8),
        x.new_empty(() if amax is None else amax.shape, dtype=torch.float32),
    )


def _fake_quantize_pair(x, amax, amax_t, block_rows, hadamard, seed, swizzled):
    if not hadamard and amax_t is None:
        amax_t = amax
    return *_fake_quantize(x, amax, swizzled), *_fake_quantize(x.t(), amax_t, swizzled)


quantize = register(
    FAMILY,
    "quantize_nvfp4(Tensor x, Tensor? amax, int block_rows, Tensor? seed, int stream, "
    "bool swizzled) -> (Tensor, Tensor, Tensor)",
    reference=ref.quantize,
    fake=lambda x, amax, block_rows, seed, stream, swizzled: _fake_quantize(x, amax, swizzled),
    example=_example_quantize,
    cuda=_cuda("quantize_nvfp4", ref.quantize, _launch_quantize),
)

quantize_pair = register(
    FAMILY,
    "quantize_nvfp4_pair(Tensor x, Tensor? amax, Tensor? amax_t, int block_rows, bool hadamard, "
    "Tensor? seed, bool swizzled) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=ref.quantize_pair,
    fake=_fake_quantize_pair,
    example=_example_quantize_pair,
    cuda=_cuda("quantize_nvfp4_pair", ref.quantize_pair, _launch_quantize_pair, transposed=True),
)

quantize_weight = register(
    FAMILY,
    "quantize_nvfp4_weight(Tensor x, Tensor? amax) -> (Tensor, Tensor, Tensor)",
    reference=ref.quantize_weight,
    fake=_fake_quantize,
    example=lambda device, dtype: (_example_x(device, dtype), None),
    cuda=_cuda("quantize_nvfp4_weight", ref.quantize_weight, _launch_quantize_weight),
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
    cuda=_cuda(
        "dequantize_nvfp4", ref.dequantize, lambda kernel, _, *args: kernel.dequantize(*args)
    ),
)

swizzle = register(
    FAMILY,
    "swizzle_scales(Tensor scales) -> Tensor",
    reference=ref.swizzle,
    fake=lambda scales: scales.new_empty(ref.swizzled_shape(scales.shape)),
    cuda=lambda scales: ref.swizzle(scales).contiguous(),
    example=lambda device, dtype: (
        torch.arange(200 * 5, device=device).reshape(200, 5).to(torch.uint8),
    ),
)

unswizzle = register(
    FAMILY,
    "unswizzle_scales(Tensor swizzled, SymInt rows, SymInt columns) -> Tensor",
    reference=ref.unswizzle,
    fake=lambda swizzled, rows, columns: swizzled.new_empty((*swizzled.shape[:-2], rows, columns)),
    cuda=lambda swizzled, rows, columns: ref.unswizzle(swizzled, rows, columns).clone(
        memory_format=torch.contiguous_format
    ),
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
    cuda=_cuda(
        "hadamard16_backward",
        ref.hadamard16_backward,
        lambda kernel, _, dy: kernel.hadamard16(dy, backward=True),
    ),
)

hadamard16 = register(
    FAMILY,
    "hadamard16(Tensor x) -> Tensor",
    reference=ref.hadamard16,
    fake=lambda x: x.new_empty(x.shape),
    example=lambda device, dtype: (_example_x(device, dtype),),
    cuda=_cuda("hadamard16", ref.hadamard16, lambda kernel, _, x: kernel.hadamard16(x)),
    setup_context=lambda ctx, inputs, output: None,
    backward=lambda ctx, dy: hadamard16_backward(dy),
)
