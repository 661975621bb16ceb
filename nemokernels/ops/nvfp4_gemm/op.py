"""Registration of products of two NVFP4 operands with torch.library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nemokernels import _backends, _ext, _triton
from nemokernels._registry import acc_dtype, family, reference_on_cuda, register
from nemokernels.ops.nvfp4.op import quantize
from nemokernels.ops.nvfp4.ref import quantize as quantize_ref
from nemokernels.ops.nvfp4.ref import quantize_weight, swizzle
from nemokernels.ops.nvfp4_gemm import native, ref

K_UNIT, N_UNIT, ALIGNMENT = 32, 8, 16  # those of csrc/nvfp4_gemm/nvfp4_gemm.h


def reason(device: torch.device) -> str | None:
    """Why ``device`` cannot multiply NVFP4 operands; None if it can."""
    why = _triton.reason(device)  # activations are quantised, and slots added up, by Triton
    if why is None:
        capability = torch.cuda.get_device_capability(device)
        why = no_matrix_units(capability) or _ext.reason(device)
    return why


def no_matrix_units(capability: tuple[int, int]) -> str | None:
    """Why a device of this compute capability has no block-scaled products; None if it has."""
    if capability[0] in (10, 12):
        return None
    have = "{}.{}".format(*capability)
    return f"NVFP4 products need compute capability 10.x or 12.x, this device has {have}"


FAMILY = family("nvfp4_gemm", {"csrc": reason})


@dataclass(frozen=True)
class Config:
    """Which backend runs; why not csrc, if the reference does."""

    backend: str
    reason: str = ""


def plan(
    sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    aligned: bool,
    backends: tuple[str, ...],
) -> Config:
    """The configuration for products of these (K, N) with results in ``dtype``.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    barred = ""
    for depth, columns in sizes:
        if depth % K_UNIT:
            barred = f"csrc takes K in multiples of {K_UNIT}, got {depth}"
        elif columns % N_UNIT:
            barred = f"csrc takes N in multiples of {N_UNIT}, got {columns}"
    if dtype != torch.bfloat16:
        barred = f"csrc returns bfloat16, not {dtype}"
    elif not aligned:
        barred = f"csrc takes operands aligned to {ALIGNMENT} bytes"
    if "csrc" in backends and not barred:
        return Config("csrc")
    if "reference" not in backends:
        raise RuntimeError(f"nvfp4_gemm: {barred or 'no backend can run here'}")
    return Config("reference", barred)


def _plan(sizes, dtype: torch.dtype, *operands: torch.Tensor) -> Config:
    aligned = all(t.data_ptr() % ALIGNMENT == 0 for t in operands)
    return plan(sizes, dtype, aligned, _backends.usable(FAMILY.name, operands[0].device))


def _contiguous(tensors):
    return [t.contiguous() if isinstance(t, torch.Tensor) else t for t in tensors]


def _product_cuda(*args):
    a, a_scales, b, b_scales, alpha = args = _contiguous(args)
    if 0 in (a.shape[0], a.shape[1], b.shape[0]):
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=ref.out_dtype(alpha))
    sizes = ((2 * a.shape[1], b.shape[0]),)
    config = _plan(sizes, ref.out_dtype(alpha), a, a_scales, b, b_scales)
    if config.backend == "reference":
        return reference_on_cuda("nvfp4_product", ref.product)(*args)
    return native.product(*args)


def _grouped_cuda(*args):
    a, a_scales, b, b_scales, alpha, offsets, squared_relu = args = _contiguous(args)
    if 0 in (a.shape[0], a.shape[1], *b.shape[:2]):
        return a.new_zeros((a.shape[0], b.shape[1]), dtype=ref.out_dtype(alpha))
    sizes = ((2 * a.shape[1], b.shape[1]),)
    config = _plan(sizes, ref.out_dtype(alpha), a, a_scales, b, b_scales)
    if config.backend == "reference":
        return reference_on_cuda("nvfp4_grouped_product", ref.grouped_product)(*args)
    return native.grouped_product(*args)


def add_up(rows, weights, row_of, out):
    """ref.add_up by the kernel that adds up the slots of moe_experts."""
    from nemokernels.ops.moe_experts.kernel import slot_sum

    slot_sum(rows, weights.float(), out, row_of=row_of)


by_kernels = partial(ref.compose, native.grouped_product, quantize=quantize, combine=add_up)


def _experts_cuda(*args):
    args = _contiguous(args)
    x, _, up, up_scales, _, _, down, down_scales, *_, order = args
    if 0 in (order.numel(), *up.shape):
        return x.new_zeros(x.shape)
    sizes = (x.shape[1], up.shape[1]), (up.shape[1], x.shape[1])
    config = _plan(sizes, x.dtype, up, up_scales, down, down_scales)
    if config.backend == "reference":
        return reference_on_cuda("nvfp4_gemm_experts", ref.experts)(*args)
    with torch.no_grad(), torch.cuda.device_of(x):
        return by_kernels(*args)


def _example_operand(device: torch.device, rows: int, columns: int):
    codes, scales, scale_2 = quantize_ref(torch.randn(rows, columns, device=device), None, 1, None)
    return codes, swizzle(scales), scale_2


def _example_product(device: torch.device, dtype: torch.dtype):
    a, a_scales, a_global = _example_operand(device, 33, 96)
    b, b_scales, b_global = _example_operand(device, 136, 96)
    return a, a_scales, b, b_scales, a_global * b_global


def _example_experts_weights(device: torch.device, rows: int, columns: int):
    parts = [quantize_weight(torch.randn(rows, columns, device=device) / 7, None) for _ in range(4)]
    codes, scales, scale_2 = (torch.stack(part) for part in zip(*parts))
    return codes, swizzle(scales), scale_2


def _example_grouped(device: torch.device, dtype: torch.dtype):
    """200 rows: 131, none, 69 and none."""
    codes, scales, scale_2 = quantize_ref(torch.randn(200, 96, device=device), None, 1, None)
    offsets = torch.tensor([131, 131, 200, 200], device=device, dtype=torch.int32)
    b, b_scales, b_global = _example_experts_weights(device, 136, 96)
    return codes, ref.group_scales(scales, offsets), b, b_scales, b_global * scale_2, offsets, True


def _example_experts(device: torch.device, dtype: torch.dtype):
    """6 tokens, 2 slots; experts 1 and 3 of four have no rows."""
    up, down = (_example_experts_weights(device, *s) for s in ((96, 64), (64, 96)))
    weights = torch.rand(6, 2, device=device, dtype=acc_dtype(dtype))
    offsets = torch.tensor([5, 5, 12, 12], device=device, dtype=torch.int32)
    order = torch.tensor([0, 3, 5, 6, 10, 1, 2, 4, 7, 8, 9, 11], device=device, dtype=torch.int32)
    x = torch.randn(6, 64, device=device, dtype=dtype)
    scale = torch.full((1,), 3 / ref.LARGEST, device=device)
    return x, scale, *up, 2 * scale.expand(4).clone(), *down, weights, offsets, order


product = register(
    FAMILY,
    "nvfp4_product(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor alpha) -> Tensor",
    reference=ref.product,
    fake=lambda a, a_scales, b, b_scales, alpha: a.new_empty(
        (a.shape[0], b.shape[0]), dtype=ref.out_dtype(alpha)
    ),
    example=_example_product,
    cuda=_product_cuda,
)

grouped_product = register(
    FAMILY,
    "nvfp4_grouped_product(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor alpha, "
    "Tensor offsets, bool squared_relu) -> Tensor",
    reference=ref.grouped_product,
    fake=lambda a, a_scales, b, b_scales, alpha, offsets, squared_relu: a.new_empty(
        (a.shape[0], b.shape[1]), dtype=ref.out_dtype(alpha)
    ),
    example=_example_grouped,
    cuda=_grouped_cuda,
)

experts = register(
    FAMILY,
    "nvfp4_gemm_experts(Tensor x, Tensor x_scale, Tensor up, Tensor up_scales, "
    "Tensor up_global_scale, Tensor hidden_scale, Tensor down, Tensor down_scales, "
    "Tensor down_global_scale, Tensor weights, Tensor offsets, Tensor order) -> Tensor",
    reference=ref.experts,
    fake=lambda x, *_: x.new_empty(x.shape),
    example=_example_experts,
    cuda=_experts_cuda,
)
