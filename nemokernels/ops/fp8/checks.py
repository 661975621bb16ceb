"""Formats, quantised operands, and the checks that the FP8 functions share."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemokernels._checks import FLOATS, check, check_tensor

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Fp8Codes(NamedTuple):
    """A quantised tensor (..., K) as an operand: codes as bytes, the same as (K, M), 1 / scale ().

    The transposed codes are empty where no gradient needs them.
    """

    codes: torch.Tensor
    transposed: torch.Tensor
    scale_inv: torch.Tensor


def format_dtype(where: str, name: str, value: str) -> torch.dtype:
    """The format of this name; ValueError if there is none."""
    check(where, value in FORMATS, "`{}` is {!r}, expected 'e4m3' or 'e5m2'", name, value)
    return FORMATS[value]


def check_float(where: str, dtype: torch.dtype) -> None:
    """Raise unless ``dtype`` is one that kernels return."""
    if dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{where}: `dtype` is {dtype}, expected one of {names}")


def check_scalar(where: str, name: str, value: object, device: torch.device) -> None:
    """Raise unless ``value`` is one float32 element on ``device`` without a gradient."""
    check_tensor(where, name, value, dtypes=(torch.float32,), device=device)
    check(where, value.numel() == 1, "`{}` has shape {}, expected one element", name,
          tuple(value.shape))  # fmt: skip
    check(where, not value.requires_grad, "`{}` requires a gradient; it has none", name)


def check_scale(where: str, name: str, value: object, device: torch.device) -> None:
    """The same, and positive and finite where that is known without a device's help."""
    check_scalar(where, name, value, device)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        number = value.item()
        check(where, 0 < number < float("inf"), "`{}` is {}, expected a positive finite number",
              name, number)  # fmt: skip


def check_no_grad(where: str, name: str, value: torch.Tensor) -> None:
    """Raise if autograd expects a gradient through ``value``."""
    wants = value.requires_grad and torch.is_grad_enabled()
    check(where, not wants, "`{}` requires a gradient; quantisation has none", name)


def check_codes(
    where: str, name: str, codes: Fp8Codes, like: torch.Tensor, transposed: bool
) -> None:
    """Raise unless these are codes of ``like``, with the transposed ones if they are needed."""
    q, q_t, scale_inv = codes
    byte, device = (torch.uint8,), like.device
    check_tensor(where, name, q, shape=like.shape, dims="its tensor's", dtypes=byte, device=device)
    if transposed:
        shape = (like.shape[-1], like.shape[:-1].numel())
        check_tensor(where, name, q_t, shape=shape, dims="transposed, which the gradient needs,",
                     dtypes=byte, device=device)  # fmt: skip
    check_scalar(where, name, scale_inv, device)
