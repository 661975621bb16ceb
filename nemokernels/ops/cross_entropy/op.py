"""Registration of linear_log_sum_exp, of which linear_cross_entropy is made, with torch.library."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemokernels import _backends, _triton
from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.cross_entropy import ref

FAMILY = family("cross_entropy", {"triton": _triton.reason})

LEAST_BLOCK = 1 << 23  # logits; with fewer at a time, launches cost more than products


@dataclass(frozen=True)
class Tile:
    """The tile of a product and how it is launched."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """Which backend runs, and how; why not Triton if it does not.

    ``logits`` is the tile of hidden @ weight.T, ``grads`` that of both gradients. The backward has
    the logits of ``classes`` classes in memory at a time. ``tma``: operands whose layout allows it
    are loaded by the tensor memory accelerator.
    """

    backend: str
    logits: Tile | None = None
    grads: Tile | None = None
    classes: int = 0
    tma: bool = False
    reason: str = ""


def plan(
    tokens: int,
    features: int,
    dtype: torch.dtype,
    unsupported: str,
    backends: tuple[str, ...],
    processors: int,
    capability: tuple[int, int],
) -> Config:
    """The configuration for so many tokens of so many features.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    if not unsupported and features == 0:
        unsupported = "the Triton kernels need at least one feature"
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported)
    if dtype == torch.float32:
        logits = grads = Tile(64, 64, 32, 4, 2)
    elif capability in _triton.ROOMY:  # the tiles that won in grouped products on an H100
        logits = grads = Tile(128, 256, 64, 8, 3)
    else:
        logits = grads = Tile(64, 128, 32, 4, 3)
    # Not measured: half as many classes as there are features, so that the block of logits is half
    # as large as hidden, but whole waves of the tiles of dweight. Every block reads and writes the
    # float32 sum of dhidden once more; a larger one would no longer stay in the L2 cache.
    wave = grads.rows * max(processors // _triton.cdiv(features, grads.columns), 1)
    wanted = max(features // 2, LEAST_BLOCK // max(tokens, 1))
    classes = wave * max(round(wanted / wave), 1)
    return Config("triton", logits, grads, classes, capability >= (9, 0))


def _plan(hidden, weight) -> Config:
    return plan(
        *hidden.shape, hidden.dtype, _triton.unsupported(hidden, weight),
        _backends.usable(FAMILY.name, hidden.device), _triton.processors(hidden.device),
        torch.cuda.get_device_capability(hidden.device),
    )  # fmt: skip


def _example(device: torch.device, dtype: torch.dtype):
    """Classes 2 to 35 of 40."""
    hidden = torch.randn(7, 24, device=device, dtype=dtype)
    weight = torch.randn(33, 24, device=device, dtype=dtype)
    targets = torch.tensor([2, 34, -100, 5, 38, -100, 17], device=device)
    return hidden, weight, targets, -100, 2, 40, True


def _example_backward(device: torch.device, dtype: torch.dtype):
    args = _example(device, dtype)
    lse = ref.forward(*args)[0]
    grads = torch.randn(3, 7, device=device, dtype=lse.dtype).unbind()
    return *grads, *args[:3], lse, *args[3:6]


linear_log_sum_exp_backward = register(
    FAMILY,
    "linear_log_sum_exp_backward(Tensor dlse, Tensor dchosen, Tensor? dtotal, Tensor hidden, "
    "Tensor weight, Tensor targets, Tensor lse, int ignore_index, int first, int classes) "
    "-> (Tensor, Tensor)",
    reference=ref.backward,
    fake=lambda dlse, dchosen, dtotal, hidden, weight, *rest: (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
    ),
    example=_example_backward,
    plan=lambda dlse, dchosen, dtotal, hidden, weight, *rest: _plan(hidden, weight),
    kernel="cross_entropy.kernel:backward",
)


def _fake(hidden, *rest):
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=acc_dtype(hidden)) for _ in range(3))


def _setup(ctx, inputs, output):
    *tensors, ignore_index, first, classes, ctx.sums = inputs
    ctx.options = ignore_index, first, classes
    ctx.save_for_backward(*tensors, output[0])


def _backward(ctx, dlse, dchosen, dtotal):
    grads = dlse, dchosen, dtotal if ctx.sums else None
    dhidden, dweight = linear_log_sum_exp_backward(*grads, *ctx.saved_tensors, *ctx.options)
    return dhidden, dweight, *(None,) * 5


linear_log_sum_exp = register(
    FAMILY,
    "linear_log_sum_exp(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, "
    "int first, int classes, bool sums) -> (Tensor, Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    plan=lambda hidden, weight, *rest: _plan(hidden, weight),
    kernel="cross_entropy.kernel:forward",
    setup_context=_setup,
    backward=_backward,
)
