"""Registration of the norms that also emit FP8. Their gradients are the plain norms'."""

from __future__ import annotations

import torch

from nemokernels import _triton
from nemokernels._registry import acc_dtype, reference_on_cuda, register
from nemokernels.ops.fp8 import norm_ref, op, ref
from nemokernels.ops.fp8.op import FAMILY, Config
from nemokernels.ops.gated_rms_norm.op import gated_rms_norm_backward
from nemokernels.ops.rms_norm.op import add_rms_norm_backward, rms_norm_backward


def plan(width: int, transpose: bool, unsupported: str, backends: tuple[str, ...]) -> Config:
    """The configuration for rows, or groups, of ``width``; ``unsupported`` says what bars Triton.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported)
    # Not measured. 32 rows fill a sector of the transposed codes.
    if transpose:
        return Config("triton", 32, min(_triton.next_power_of_2(width), 128), 8)
    block = min(_triton.next_power_of_2(width), 4096)
    rows = max(2048 // block, 1)
    return Config("triton", rows, block, max(rows * block // 512, 1))


def _norm_cuda(*args):
    x, residual, weight, _, _, _, transpose = args
    config = plan(x.shape[-1], transpose, _triton.unsupported(x, residual, weight), op.usable(x))
    return _run("rms_norm_fp8", "rms_norm", args, config)


def _gated_cuda(*args):
    x, weight, bias, z, _, _, group_size, _, _, transpose = args
    config = plan(group_size, transpose, _triton.unsupported(x, weight, bias, z), op.usable(x))
    return _run("gated_rms_norm_fp8", "gated_rms_norm", args, config)


def _run(name: str, function: str, args, config: Config):
    reference = getattr(norm_ref, function)
    if config.backend == "reference":
        return reference_on_cuda(name, reference)(*args)
    if not args[0].numel():
        return reference(*args)
    from nemokernels.ops.fp8 import kernel_norm

    with torch.cuda.device_of(args[0]):
        return getattr(kernel_norm, function)(*args, config)


def _tame(device: torch.device, dtype: torch.dtype):
    # Rows whose norm is plus or minus the weight, and codes that no last digit of it can move.
    x = torch.randn(3, 5, 48, device=device).sign().to(dtype)
    weight = 2.0 ** torch.randint(-2, 3, (48,), device=device)
    return x, weight.to(dtype), torch.tensor([64.0], device=device)


def _example_norm(device: torch.device, dtype: torch.dtype):
    x, weight, scale = _tame(device, dtype)
    return x, x.clone(), weight, scale, 1e-5, ref.E4M3, True


def _example_gated(device: torch.device, dtype: torch.dtype):
    x, weight, scale = _tame(device, dtype)
    return x, weight, None, torch.ones_like(x), scale, 1e-5, 16, False, ref.E4M3, True


def _fake_codes(x: torch.Tensor, transpose: bool):
    flat = (x.shape[-1], x.shape[:-1].numel()) if transpose else (0, 0)
    single = [x.new_empty((), dtype=torch.float32) for _ in range(2)]
    codes = (x.new_empty(shape, dtype=torch.uint8) for shape in (x.shape, flat))
    return *codes, *single


def _fake_norm(x, residual, weight, scale, eps, dtype, transpose):
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    wide = acc_dtype(x if residual is None else residual)
    rstd = x.new_empty(x.shape[:-1], dtype=wide)
    return x.new_empty(x.shape), total, rstd, *_fake_codes(x, transpose)


def _setup_norm(ctx, inputs, output):
    x, residual, weight, *_ = inputs
    _, total, rstd, *codes = output
    ctx.mark_non_differentiable(rstd, *codes, *([total] if residual is None else []))
    ctx.save_for_backward(x if residual is None else total, weight, rstd)
    ctx.added = residual is not None
    ctx.x_dtype = None if ctx.added and x.dtype == residual.dtype else x.dtype


def _backward_norm(ctx, dy, dtotal, *_):
    saved = ctx.saved_tensors
    if not ctx.added:
        dx, dweight = rms_norm_backward(dy, *saved)
        return dx, None, dweight, *[None] * 4
    dx, dresidual, dweight = add_rms_norm_backward(dy, dtotal, *saved, ctx.x_dtype)
    return dresidual if ctx.x_dtype is None else dx, dresidual, dweight, *[None] * 4


rms_norm_fp8 = register(
    FAMILY,
    "rms_norm_fp8(Tensor x, Tensor? residual, Tensor weight, Tensor scale, float eps, "
    "ScalarType dtype, bool transpose) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=norm_ref.rms_norm,
    fake=_fake_norm,
    example=_example_norm,
    cuda=_norm_cuda,
    setup_context=_setup_norm,
    backward=_backward_norm,
)


def _fake_gated(x, weight, bias, z, scale, eps, group_size, norm_before_gate, dtype, transpose):
    groups = x.shape[-1] // group_size
    rstd = x.new_empty((*x.shape[:-1], groups), dtype=acc_dtype(x))
    return x.new_empty(x.shape), rstd, *_fake_codes(x, transpose)


def _setup_gated(ctx, inputs, output):
    x, weight, bias, z, _, _, group_size, norm_before_gate, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, z, output[1])
    ctx.options = group_size, norm_before_gate


def _backward_gated(ctx, dy, *_):
    _, _, bias, z, _ = saved = ctx.saved_tensors
    dx, dweight, dbias, dz = gated_rms_norm_backward(dy, *saved, *ctx.options)
    return dx, dweight, None if bias is None else dbias, None if z is None else dz, *[None] * 6


gated_rms_norm_fp8 = register(
    FAMILY,
    "gated_rms_norm_fp8(Tensor x, Tensor weight, Tensor? bias, Tensor? z, Tensor scale, float eps, "
    "int group_size, bool norm_before_gate, ScalarType dtype, bool transpose) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=norm_ref.gated_rms_norm,
    fake=_fake_gated,
    example=_example_gated,
    cuda=_gated_cuda,
    setup_context=_setup_gated,
    backward=_backward_gated,
)
