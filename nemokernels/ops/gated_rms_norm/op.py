"""Registration of gated_rms_norm with torch.library."""

from __future__ import annotations

import math

import torch

from nemokernels import _backends, _triton
from nemokernels._registry import acc_dtype, family, filling, reference_on_cuda, register
from nemokernels._triton import RowConfig
from nemokernels.ops.gated_rms_norm import ref

FAMILY = family("gated_rms_norm", {"triton": _triton.reason})

WIDEST = {"forward": 16384, "backward": 8192}  # a group that the registers of one program hold


def plan(
    rows: int,
    groups: int,
    group_size: int,
    backward: bool,
    unsupported: str,
    backends: tuple[str, ...],
    processors: int,
) -> RowConfig:
    """The configuration for (rows, groups * group_size); ``unsupported`` says what bars Triton.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    widest = WIDEST["backward" if backward else "forward"]
    if not unsupported and group_size > widest:
        unsupported = f"the Triton kernels take groups up to {widest}, got {group_size}"
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return RowConfig("reference", reason=unsupported)
    # Not measured. The backward takes 96 registers per thread at 8 elements and 124 with a bias,
    # so that 16 warps fit a multiprocessor; all its programs have to run at the same time.
    block = _triton.next_power_of_2(group_size)
    together = max((512 if backward else 2048) // block, 1)
    num_warps = min(max(together * block // (256 if backward else 512), 1), 16)
    blocks = _triton.cdiv(max(rows, 1), together)
    side_by_side = processors * (16 // num_warps)
    programs = min(blocks, max(side_by_side // max(groups, 1), 1))
    return RowConfig("triton", together, block, programs, num_warps, 3 if block <= 4096 else 1)


def _plan(x, group_size, *others, backward=False) -> RowConfig:
    return plan(
        math.prod(x.shape[:-1]), x.shape[-1] // group_size, group_size, backward,
        _triton.unsupported(x, *others), _backends.usable(FAMILY.name, x.device),
        _triton.processors(x.device),
    )  # fmt: skip


def backward_cuda(dy, x, weight, bias, z, rstd, group_size, norm_before_gate, *, dz=None):
    config = _plan(x, group_size, dy, weight, bias, z, rstd, backward=True)
    args = (dy, x, weight, bias, z, rstd, group_size, norm_before_gate)
    if config.backend == "reference":
        reference = reference_on_cuda("gated_rms_norm_backward", ref.backward)
        return filling(reference, dz=3)(*args, dz=dz)
    from nemokernels.ops.gated_rms_norm import kernel

    with torch.cuda.device_of(x):
        return kernel.backward(*args, config, dz=dz)


def _example(device: torch.device, dtype: torch.dtype):
    x = torch.randn(3, 5, 48, device=device, dtype=dtype)
    z = torch.randn(3, 5, 96, device=device, dtype=dtype)[..., 48:]
    weight = torch.randn(48, device=device, dtype=dtype)
    return x, weight, torch.randn_like(weight), z, 1e-5, 16, False


def _example_backward(device: torch.device, dtype: torch.dtype):
    *tensors, eps, group_size, norm_before_gate = _example(device, dtype)
    rstd = ref.forward(*tensors, eps, group_size, norm_before_gate)[1]
    dy = torch.randn_like(tensors[0])
    return dy, *tensors, rstd, group_size, norm_before_gate


def _fake(x, weight, bias, z, eps, group_size, norm_before_gate):
    groups = x.shape[-1] // group_size
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], groups), dtype=acc_dtype(x))


def _fake_backward(dy, x, weight, bias, z, rstd, group_size, norm_before_gate):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if z is None else z.new_empty(z.shape),
    )


gated_rms_norm_backward = register(
    FAMILY,
    "gated_rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? z, "
    "Tensor rstd, int group_size, bool norm_before_gate) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=ref.backward,
    fake=_fake_backward,
    example=_example_backward,
    cuda=backward_cuda,
)


def _setup(ctx, inputs, output):
    x, weight, bias, z, _, group_size, norm_before_gate = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, z, output[1])
    ctx.options = group_size, norm_before_gate


def _backward(ctx, dy, _drstd):
    _, _, bias, z, _ = saved = ctx.saved_tensors
    dx, dweight, dbias, dz = gated_rms_norm_backward(dy, *saved, *ctx.options)
    return dx, dweight, None if bias is None else dbias, None if z is None else dz, None, None, None


gated_rms_norm = register(
    FAMILY,
    "gated_rms_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? z, float eps, int group_size, "
    "bool norm_before_gate) -> (Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    plan=lambda x, weight, bias, z, eps, group_size, norm_before_gate: _plan(
        x, group_size, weight, bias, z
    ),
    kernel="gated_rms_norm.kernel:forward",
    setup_context=_setup,
    backward=_backward,
)
