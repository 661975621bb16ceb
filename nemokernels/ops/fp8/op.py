"""Registration of the FP8 operators with torch.library.

Where an operator takes 8-bit codes, or saves them for its backward, they travel as uint8: torch has
no comparison and no sum for float8, which opcheck and autograd's own utilities need.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from nemokernels import _backends, _triton
from nemokernels._registry import family, reference_on_cuda, register
from nemokernels.ops.fp8 import ledger, ref
from nemokernels.ops.relu2.op import relu2_backward

OLDEST = (8, 9)  # older devices convert to no E4M3
MULTIPLE = 16  # sizes of an FP8 product on the device


def reason(device: torch.device) -> str | None:
    """Why FP8 kernels cannot run on ``device``; None if they can."""
    why = _triton.reason(device)
    if why is None and torch.cuda.get_device_capability(device) < OLDEST:
        have = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        why = f"FP8 needs sm_89 or newer, this device is {have}"
    return why


FAMILY = family("fp8", {"triton": reason})


@dataclass(frozen=True)
class Config:
    """Which backend runs, rows and columns of a program's tile, warps; why not the kernels."""

    backend: str
    rows: int = 0
    columns: int = 0
    num_warps: int = 0
    reason: str = ""


def plan(transpose: bool, unsupported: str, backends: tuple[str, ...]) -> Config:
    """The configuration of an elementwise pass; ``unsupported`` says what bars Triton.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported)
    # Not measured. A transposed tile writes whole 64-byte pieces of its columns.
    return Config("triton", 64, 128, 8) if transpose else Config("triton", 16, 256, 4)


def plan_product(n: int, k: int, unsupported: str, backends: tuple[str, ...]) -> Config:
    """Where x (M, K) times weight (N, K) and its two gradients are multiplied.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if not unsupported and (n % MULTIPLE or k % MULTIPLE):
        unsupported = f"FP8 products need sizes that are multiples of {MULTIPLE}, got {n} x {k}"
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported)
    return Config("scaled_mm")


def usable(x: torch.Tensor) -> tuple[str, ...]:
    """The backends of the FP8 operators that can run on x's device."""
    return _backends.usable(FAMILY.name, x.device)


def _run(name: str, reference, launcher: str, like: torch.Tensor, args, config: Config):
    if config.backend == "reference":
        return reference_on_cuda(name, reference)(*args)
    from nemokernels.ops.fp8 import kernel

    with torch.cuda.device_of(like):
        return getattr(kernel, launcher)(*args, config)


def _quantize_cuda(*args):
    x, transpose = args[0], args[-1]
    config = plan(transpose, _triton.unsupported(x), usable(x))
    return _run("quantize_fp8", ref.quantize, "quantize", x, args, config)


def _dequantize_cuda(*args):
    codes, scale_inv, _, dtype = args
    unsupported = _triton.unsupported(scale_inv, codes.new_empty(0, dtype=dtype))
    config = plan(False, unsupported, usable(codes))
    return _run("dequantize_fp8", ref.dequantize, "dequantize", codes, args, config)


def _current_scale_cuda(*args):
    x = args[0]
    config = plan(False, _triton.unsupported(x), usable(x))
    return _run("fp8_current_scale", ref.current_scale, "current_scale", x, args, config)


def _update_cuda(*args):
    scales, histories, amax, _, _ = args
    config = plan(False, _triton.unsupported(*scales, *histories, amax), usable(scales[0]))
    _run("delayed_scaling_update", ref.delayed_scaling_update, "update", scales[0], args,
         config)  # fmt: skip


def _product_cuda(*args):
    x, w8, bias = args[0], args[6], args[2]
    config = plan_product(*w8.shape, _triton.unsupported(x, bias), usable(x))
    ledger.note(args[-1], ("forward",), config.backend)
    return _run("fp8_product", ref.product, "product", x, args, config)


def _product_backward_cuda(*args):
    dy, x8_t, w8_t, dtypes = args[0], args[4], args[6], args[9:12]
    grads = [dy.new_empty(0, dtype=dtype) for dtype in dtypes if dtype is not None]
    k = w8_t.shape[0] if dtypes[0] is not None else x8_t.shape[0]
    config = plan_product(dy.shape[-1], k, _triton.unsupported(dy, *grads), usable(dy))
    _note_backward(args, config.backend)
    return _run("fp8_product_backward", ref.product_backward, "product_backward", dy, args,
                config)  # fmt: skip


def _note_backward(args, backend: str) -> None:
    products = zip(("dgrad", "wgrad"), args[9:11])
    ledger.note(args[-1], tuple(name for name, dtype in products if dtype is not None), backend)


@functools.wraps(ref.product)
def _product_cpu(*args):
    ledger.note(args[-1], ("forward",), _backends.REFERENCE)
    return ref.product(*args)


@functools.wraps(ref.product_backward)
def _product_backward_cpu(*args):
    _note_backward(args, _backends.REFERENCE)
    return ref.product_backward(*args)


def _example_quantize(device: torch.device, dtype: torch.dtype):
    x = torch.randn(3, 5, 48, device=device, dtype=dtype)
    slot = torch.zeros(1, device=device)
    return x, torch.tensor([40.0], device=device), slot, ref.E4M3, True, True, True


def _example_dequantize(device: torch.device, dtype: torch.dtype):
    q = torch.randn(5, 48, device=device).to(ref.E5M2)
    return q.view(torch.uint8), torch.tensor([0.025], device=device), ref.E5M2, dtype


def _example_update(device: torch.device, dtype: torch.dtype):
    history = torch.rand(4, 6, device=device)
    history[:, 1] = 0
    reduced = torch.rand(8, device=device)
    reduced[:2] = 0
    scales = [torch.rand(6, device=device), torch.rand(2, device=device)]
    return scales, [history, torch.rand(4, 2, device=device)], reduced, [224.0, 57344.0], False


def _codes(x: torch.Tensor, format: torch.dtype):
    codes = (x.float() * 100).clamp(-448, 448).to(format)
    return codes.view(torch.uint8), codes.t().contiguous().view(torch.uint8), x.new_full(
        (), 0.01, dtype=torch.float32)  # fmt: skip


def _example_product(device: torch.device, dtype: torch.dtype):
    x = torch.randn(10, 48, device=device, dtype=dtype)
    weight = torch.randn(32, 48, device=device, dtype=dtype)
    bias, scale = torch.randn(32, device=device, dtype=dtype), torch.ones(1, device=device)
    operands = (*_codes(x, ref.E4M3), *_codes(weight, ref.E4M3))
    return x, weight, bias, *operands, scale, None, None, ref.E5M2, False, ""


def _example_product_backward(device: torch.device, dtype: torch.dtype):
    x, weight, _, _, x8_t, x_inverse, _, w8_t, w_inverse, *_ = _example_product(device, dtype)
    dy = torch.randn(10, 32, device=device, dtype=dtype)
    operands = (*_codes(dy, ref.E5M2), x8_t, x_inverse, w8_t, w_inverse)
    return dy, *operands, ref.E5M2, dtype, dtype, dtype, ""


def _scalar_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((), dtype=torch.float32)


def _fake_quantize(x, scale, amax, dtype, squared_relu, rows, transpose):
    flat = (x.shape[-1], x.shape[:-1].numel()) if transpose else (0, 0)
    return (
        x.new_empty(x.shape if rows else (0,), dtype=dtype),
        x.new_empty(flat, dtype=dtype),
        _scalar_like(x),
    )


quantize = register(
    FAMILY,
    "quantize_fp8(Tensor x, Tensor scale, Tensor(a!) amax, ScalarType dtype, bool squared_relu, "
    "bool rows, bool transpose) -> (Tensor, Tensor, Tensor)",
    reference=ref.quantize,
    fake=_fake_quantize,
    example=_example_quantize,
    cuda=_quantize_cuda,
)

dequantize = register(
    FAMILY,
    "dequantize_fp8(Tensor codes, Tensor scale_inv, ScalarType format, ScalarType dtype) -> Tensor",
    reference=ref.dequantize,
    fake=lambda codes, scale_inv, format, dtype: codes.new_empty(codes.shape, dtype=dtype),
    example=_example_dequantize,
    cuda=_dequantize_cuda,
)

current_scale = register(
    FAMILY,
    "fp8_current_scale(Tensor x, ScalarType dtype, bool squared_relu) -> Tensor",
    reference=ref.current_scale,
    fake=lambda x, dtype, squared_relu: _scalar_like(x),
    example=lambda device, dtype: (
        torch.randn(5, 48, device=device, dtype=dtype), ref.E4M3, False),
    cuda=_current_scale_cuda,
)  # fmt: skip

delayed_scaling_update = register(
    FAMILY,
    "delayed_scaling_update(Tensor(a!)[] scales, Tensor(b!)[] histories, Tensor? amax, "
    "float[] tops, bool most_recent) -> ()",
    reference=ref.delayed_scaling_update,
    fake=lambda *args: None,
    example=_example_update,
    cuda=_update_cuda,
)


def _fake_backward(
    dy, dy8, dy8_t, dy_inverse, x8_t, x_inverse, w8_t, w_inverse, grad_dtype, x_dtype, w_dtype,
    bias_dtype, layer,
):  # fmt: skip
    empty, outputs = (0,), dy.shape[-1]
    dx = empty if x_dtype is None else (*dy.shape[:-1], w8_t.shape[0])
    dw = empty if w_dtype is None else (outputs, x8_t.shape[0])
    db = empty if bias_dtype is None else (outputs,)
    return tuple(
        dy.new_empty(shape, dtype=dtype or dy.dtype)
        for shape, dtype in ((dx, x_dtype), (dw, w_dtype), (db, bias_dtype))
    )


product_backward = register(
    FAMILY,
    "fp8_product_backward(Tensor dy, Tensor dy8, Tensor dy8_t, Tensor dy_inverse, Tensor x8_t, "
    "Tensor x_inverse, Tensor w8_t, Tensor w_inverse, ScalarType grad_dtype, ScalarType? x_dtype, "
    "ScalarType? w_dtype, ScalarType? bias_dtype, str layer) -> (Tensor, Tensor, Tensor)",
    reference=_product_backward_cpu,
    fake=_fake_backward,
    example=_example_product_backward,
    cuda=_product_backward_cuda,
)


def cast(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    slot: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    squared_relu: bool = False,
    rows: bool = True,
    transpose: bool,
):
    """q, its transpose and 1 / scale, as bytes; scale None is current scaling, slot None none."""
    with torch.no_grad():
        x = x.detach()
        if scale is None:
            scale = current_scale(x, dtype, squared_relu)
        if slot is None:
            slot = torch.zeros_like(scale)
        q, q_t, inverse = quantize(x, scale, slot, dtype, squared_relu, rows, transpose)
        return q.view(torch.uint8), q_t.view(torch.uint8), inverse


def _setup(ctx, inputs, output):
    x, weight, bias, _, x8_t, x_inverse, w8, w8_t, w_inverse, *rest = inputs
    dy_scale, dy_amax, main_grad, grad_dtype, squared_relu, layer = rest
    wanted = ctx.needs_input_grad
    rows = x.shape[:-1].numel()
    for name, want, kept, shape in (
        ("x", wanted[0], w8_t, (w8.shape[1], w8.shape[0])),
        ("weight", wanted[1], x8_t, (w8.shape[1], rows)),
    ):
        if want and kept.shape != shape:
            raise RuntimeError(f"fp8_product: `{name}` needs a gradient, its operand was not kept")
    ctx.save_for_backward(x if squared_relu else None, x8_t, x_inverse, w8_t, w_inverse)
    # Not through save_for_backward, which forbids later writes: the scale is meant to be read as it
    # is when the backward runs, and slot and main gradient are written by every backward.
    ctx.dy_scale, ctx.dy_amax, ctx.main_grad = dy_scale, dy_amax, main_grad
    ctx.options = grad_dtype, layer
    ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)


def _backward(ctx, dy):
    x, *operands = ctx.saved_tensors
    (grad_dtype, layer), wanted = ctx.options, ctx.needs_input_grad[:3]
    dtypes = [dtype if want else None for dtype, want in zip(ctx.dtypes, wanted)]
    if wanted[1] and ctx.main_grad is not None:
        dtypes[1] = ctx.main_grad.dtype
    dy8 = cast(dy, ctx.dy_scale, ctx.dy_amax, grad_dtype, rows=wanted[0], transpose=wanted[1])
    dx, dw, db = product_backward(dy, *dy8, *operands, grad_dtype, *dtypes, layer)
    if x is not None and wanted[0]:
        dx = relu2_backward(dx, x)
    if wanted[1] and ctx.main_grad is not None:
        with torch.no_grad():
            ctx.main_grad.add_(dw)
        dw = None
    return *(g if want else None for g, want in zip((dx, dw, db), wanted)), *[None] * 12


def _fake_product(x, weight, bias, x8, x8_t, x_inverse, w8, *_):
    return x.new_empty((*x.shape[:-1], w8.shape[0]))


product = register(
    FAMILY,
    "fp8_product(Tensor x, Tensor weight, Tensor? bias, Tensor x8, Tensor x8_t, Tensor x_inverse, "
    "Tensor w8, Tensor w8_t, Tensor w_inverse, Tensor? dy_scale, Tensor? dy_amax, "
    "Tensor? main_grad, ScalarType grad_dtype, bool squared_relu, str layer) -> Tensor",
    reference=_product_cpu,
    fake=_fake_product,
    example=_example_product,
    cuda=_product_cuda,
    setup_context=_setup,
    backward=_backward,
)
