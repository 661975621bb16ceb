"""Argument checks. Every message names function, argument, what was given and what is expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    where: str,
    name: str,
    value: object,
    *,
    shape: Sequence[int | None] | None = None,
    dims: str | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise unless ``value`` is a tensor of this shape (None = any size), dtype and device.

    Args:
        where: name of the public function, put in front of the message.
        name: the argument's name.
        shape: expected sizes; None as a size means any.
        dims: the shape in symbols, for the message, for example ``"(B, T, H)"``.
        dtypes: accepted dtypes.
        device: the device the other arguments are on.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: a wrong shape or device.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where}: `{name}` must be a torch.Tensor, got {type(value).__name__}")
    if shape is not None and (
        value.dim() != len(shape)
        or any(want is not None and got != want for got, want in zip(value.shape, shape))
    ):
        want = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
        symbols = f"{dims} = " if dims else ""
        raise ValueError(
            f"{where}: `{name}` has shape {tuple(value.shape)}, expected {symbols}{want}"
        )
    if dtypes is not None and value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{where}: `{name}` is {value.dtype}, expected one of {names}")
    if device is not None and value.device != device:
        raise ValueError(
            f"{where}: `{name}` is on {value.device}, expected {device} like the other arguments"
        )


def check_unshared(where: str, name: str, value: torch.Tensor) -> None:
    """Raise ``ValueError`` if elements of ``value`` share memory (``expand``): it is written to."""
    shared = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape))
    check(where, not shared, "elements of `{}` share memory (strides {}), expected memory of their "
          "own, as they are written to", name, value.stride())  # fmt: skip


def check(where: str, condition: bool, message: str, *values: object) -> None:
    """Raise ``ValueError("<where>: <message>")`` unless ``condition`` holds.

    ``values`` fill the ``{}`` of the message, and only on failure: torch.compile cannot format a
    symbolic size or float, so a message that shows one must not be an f-string.
    """
    if not condition:
        raise ValueError(f"{where}: {message.format(*values) if values else message}")
