"""Registration of the W4A16 operators with torch.library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from nemokernels import _backends, _ext, _triton, _tuned
from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.moe_experts.op import Tile, too_many
from nemokernels.ops.moe_experts.passes import SLOT_BYTES
from nemokernels.ops.moe_route.ref import group_rows
from nemokernels.ops.nvfp4.ref import quantize_weight
from nemokernels.ops.w4a16 import native, ref

HALVES = (torch.bfloat16, torch.float16)


def _native(device: torch.device) -> str | None:
    # Its table of tiles, its sums over slots and the gradient are Triton's.
    return _ext.reason(device) or _triton.reason(device)


FAMILY = family("w4a16", {"csrc": _native, "triton": _triton.reason})


@dataclass(frozen=True)
class Config:
    """Which backend runs and its tile: ``rows`` of x, ``columns`` of the result (rows of the
    weight), ``depth``; csrc chooses the last two itself. Why neither, if the reference runs.
    ``slot_bytes``: the most that the results of all slots take at a time."""

    backend: str
    tile: Tile | None = None
    reason: str = ""
    slot_bytes: int = SLOT_BYTES


def plan(
    rows: int, experts: int, dtype: torch.dtype, unsupported: str, backends: tuple[str, ...],
    forward: bool = True,
) -> Config:  # fmt: skip
    """The configuration for so many rows over so many experts (one for a linear layer).

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    unsupported = unsupported or too_many(experts)
    proven = backends if "csrc" not in backends else (*backends, "triton")
    if _triton.needs_reference(FAMILY.name, unsupported, proven):
        return Config("reference", reason=unsupported)
    load = rows / max(experts, 1)
    if forward and dtype in HALVES and "csrc" in backends:
        # On an H100 it moved 84 to 101 % of what a copy does at 3 rows per expert, 70 to 75 % at
        # 12, and was 3 to 15 % faster than bfloat16 at 48; further up: not measured.
        if load <= 64 or "triton" not in backends:
            return Config("csrc", Tile(8 if load <= 4 else 16 if load <= 16 else 32, 32, 64, 4, 2))
    if forward and "triton" not in backends:
        raise RuntimeError(f"w4a16: csrc takes bfloat16 and float16, got {dtype}")
    if dtype == torch.float32:  # not measured
        return Config("triton", Tile(16, 64, 64, 4, 2))
    if load <= 12:
        return Config("triton", Tile(16, 64, 128, 4, 4))
    # Not measured.
    return Config("triton", Tile(64, 128, 64, 4, 3) if load <= 96 else Tile(128, 128, 64, 8, 3))


def _plan(
    x: torch.Tensor, rows: int, experts: int, *others: torch.Tensor, columns: int | None = None
) -> Config:
    """``columns`` of a forward's result; None for a backward, for which there is no table."""
    problem, forward = (rows, experts, x.dtype), columns is not None
    backends = _backends.usable(FAMILY.name, x.device)
    config = plan(*problem, _triton.unsupported(x, *others), backends, forward)
    if not forward:
        return config
    tuned = _tuned.tuned(FAMILY.name, x.device, problem, config)
    # The table may come from a machine that has csrc, and knows nothing of the other sizes.
    wide = tuned.backend == "csrc" and tuned.tile.rows == native.WIDE
    takes = not wide or (
        columns % 8 == 0 and x.shape[-1] > 0
        and torch.cuda.get_device_capability(x.device) == (9, 0)
    )  # fmt: skip
    return tuned if takes and tuned.backend in backends else config


def candidates(config: Config, backward: bool) -> Iterator[Config]:
    """What may be faster than ``config`` on some card: csrc with each of its tiles, Triton with
    one measure of its tile changed. Of a backward, nothing."""
    if backward:
        return
    for rows in (*native.ROWS, native.WIDE):
        columns = 128 if rows == native.WIDE else 32
        yield replace(config, backend="csrc", tile=Tile(rows, columns, 64, 4, 2))
    tile = config.tile if config.backend == "triton" else Tile(128, 128, 64, 8, 3)
    options = {"rows": (16, 64, 128), "columns": (64, 128), "depth": (64, 128),
               "num_warps": (4, 8), "num_stages": (2, 3, 4)}  # fmt: skip
    for measure, values in options.items():
        for value in values:
            yield replace(config, backend="triton", tile=replace(tile, **{measure: value}))


def _plan_experts(x, *args) -> Config:
    _, _, up_scale, _, _, down_scale, _, weights, offsets, order = args
    scales = up_scale, down_scale, weights
    return _plan(x, order.shape[0], offsets.shape[0], *scales, columns=x.shape[1])


def _example_weight(device: torch.device, rows: int, columns: int):
    codes, scales, scale_2 = quantize_weight(torch.randn(rows, columns, device=device) / 7, None)
    return *ref.tile(codes, scales), scale_2


def _example_linear(device: torch.device, dtype: torch.dtype, rows: int = 5):
    x = torch.randn(2, rows, 48, device=device, dtype=dtype)
    return x, *_example_weight(device, 40, 48), 40


def _example_linear_backward(device: torch.device, dtype: torch.dtype):
    dy = torch.randn(2, 5, 40, device=device, dtype=dtype)
    return dy, *_example_weight(device, 40, 48), 48


def _example_experts(device: torch.device, dtype: torch.dtype, tokens: int = 6):
    """2 slots per token; experts 1 and 3 of four have no rows."""
    up, down = ([_example_weight(device, *s) for _ in range(4)] for s in ((80, 48), (48, 80)))
    weights = torch.rand(tokens, 2, device=device, dtype=acc_dtype(dtype))
    _, offsets, order = group_rows(2 * torch.randint(2, (tokens, 2), device=device), 4)
    x = torch.randn(tokens, 48, device=device, dtype=dtype)
    stacked = [torch.stack(parts) for parts in (*zip(*up), *zip(*down))]
    return x, *stacked, 80, weights, offsets, order


linear_backward = register(
    FAMILY,
    "nvfp4_linear_backward(Tensor dy, Tensor codes, Tensor scales, Tensor global_scale, "
    "SymInt columns) -> Tensor",
    reference=ref.linear_backward,
    fake=lambda dy, codes, scales, global_scale, columns: dy.new_empty((*dy.shape[:-1], columns)),
    example=_example_linear_backward,
    plan=lambda dy, codes, scales, global_scale, columns: _plan(
        dy, dy.shape[:-1].numel(), 1, global_scale
    ),
    kernel="w4a16.kernel:linear_backward",
)


def _setup(ctx, inputs, output):
    x, *weight, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.columns = x.shape[-1]


def _backward(ctx, dy):
    return linear_backward(dy, *ctx.saved_tensors, ctx.columns), None, None, None, None


linear = register(
    FAMILY,
    "nvfp4_linear(Tensor x, Tensor codes, Tensor scales, Tensor global_scale, SymInt rows) "
    "-> Tensor",
    reference=ref.linear,
    fake=lambda x, codes, scales, global_scale, rows: x.new_empty((*x.shape[:-1], rows)),
    example=_example_linear,
    probes={"csrc": [partial(_example_linear, rows=rows) for rows in (1, 20)]},
    plan=lambda x, codes, scales, global_scale, rows: _plan(
        x, x.shape[:-1].numel(), 1, global_scale, columns=rows
    ),
    kernel="w4a16.kernel:linear",
    setup_context=_setup,
    backward=_backward,
)

experts = register(
    FAMILY,
    "nvfp4_experts(Tensor x, Tensor up_codes, Tensor up_scales, Tensor up_global_scale, "
    "Tensor down_codes, Tensor down_scales, Tensor down_global_scale, SymInt width, "
    "Tensor weights, Tensor offsets, Tensor order) -> Tensor",
    reference=ref.experts,
    fake=lambda x, *_: x.new_empty(x.shape),
    example=_example_experts,
    probes={"csrc": [partial(_example_experts, tokens=tokens) for tokens in (24, 80)]},
    plan=_plan_experts,
    kernel="w4a16.kernel:experts",
)
