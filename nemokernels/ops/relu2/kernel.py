"""Triton kernels of relu2, elementwise over contiguous tensors, in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemokernels import _triton
from nemokernels._tl import offset64, squared_relu
from nemokernels._triton import cdiv

# ``elements`` stays specialised: a mask needs its divisor for vectors, which is that of the width,
# whatever the rows.


@triton.jit
def relu2_forward_kernel(x_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    at = offset64(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < elements).to(tl.float32)
    tl.store(y_ptr + at, squared_relu(x).to(y_ptr.dtype.element_ty), mask=at < elements)


@triton.jit
def relu2_backward_kernel(dy_ptr, x_ptr, dx_ptr, elements, BLOCK: tl.constexpr):
    at = offset64(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < elements).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < elements).to(tl.float32)
    dx = 2.0 * tl.where(x < 0.0, 0.0, x) * dy
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < elements)


def forward(x, config):
    """As ref.forward."""
    y = x.new_empty(x.shape)
    if elements := x.numel():
        relu2_forward_kernel[(cdiv(elements, config.block),)](
            x.contiguous(), y, elements, BLOCK=config.block, num_warps=config.num_warps
        )
    return y


def backward(dy, x, config):
    """As ref.backward."""
    dx = x.new_empty(x.shape)
    if elements := x.numel():
        relu2_backward_kernel[(cdiv(elements, config.block),)](
            dy.contiguous(), x.contiguous(), dx, elements, BLOCK=config.block,
            num_warps=config.num_warps,
        )  # fmt: skip
    return dx


def specialisations():
    """Launches to compile without a GPU: the widest activation of Nemotron-H 8B, bfloat16."""
    from nemokernels.ops.relu2.op import plan

    x = torch.empty(32768, 21504, device="meta", dtype=torch.bfloat16)
    config = plan(x.numel(), "", ("triton",))
    yield _triton.Specialisation("21504 forward", lambda: forward(x, config))
    yield _triton.Specialisation("21504 backward", lambda: backward(x, x, config))
