"""Registration of moe_experts with torch.library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from nemokernels import _backends, _ext, _triton, _tuned
from nemokernels._registry import acc_dtype, family, register
from nemokernels.ops.moe_experts import native, ref
from nemokernels.ops.moe_experts.passes import SLOT_BYTES
from nemokernels.ops.moe_route.ref import group_rows


def _native(device: torch.device) -> str | None:
    # Its table of tiles, its sums over slots and the weights' gradients are Triton's.
    why = _ext.reason(device) or _triton.reason(device)
    if why is None and torch.cuda.get_device_capability(device) != (9, 0):
        why = "its products are written for sm_90 alone"
    return why


# Which is faster has not been measured: csrc runs where a table of measured configurations names it
# (nemokernels bench --tune), or when it is asked for.
FAMILY = family("moe_experts", {"triton": _triton.reason, "csrc": _native})

MOST_EXPERTS = 2048  # lanes of the program that lays out the tiles


def too_many(experts: int) -> str:
    """Why no table of tiles can be laid out for so many experts; empty if it can."""
    if experts <= MOST_EXPERTS:
        return ""
    return f"the kernels take up to {MOST_EXPERTS} experts, got {experts}"


@dataclass(frozen=True)
class Tile:
    """The tile of a product and how it is launched; ``swap`` makes the weights its left operand."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    swap: bool = False


@dataclass(frozen=True)
class Config:
    """Which backend runs, its tiles over rows and for weight gradients; why none if none does.

    csrc chooses its tiles over rows itself. ``tma``: operands whose layout allows it are loaded by
    the tensor memory accelerator. ``slot_bytes``: the most that the results of all slots take at a
    time; see passes.py.
    """

    backend: str
    rows: Tile | None = None
    weights: Tile | None = None
    tma: bool = False
    reason: str = ""
    slot_bytes: int = SLOT_BYTES


def plan(
    slots: int,
    experts: int,
    dtype: torch.dtype,
    backward: bool,
    unsupported: str,
    backends: tuple[str, ...],
    capability: tuple[int, int],
    refusal: str = "",
) -> Config:
    """The configuration for so many slots over so many experts of ``dtype``.

    ``unsupported``: why no kernel takes the tensors; ``refusal``: why csrc does not; empty if so.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    unsupported = unsupported or too_many(experts)
    if _by_csrc(unsupported or refusal, backends):
        weights = Tile(128, 128, 64, 8, 3) if backward else None
        return Config("csrc", Tile(native.ROWS, 256, 64, 8, 3), weights, True)
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported or refusal)
    if dtype == torch.float32:  # not measured
        tile = Tile(64, 64, 32, 4, 2)
        return Config("triton", tile, tile if backward else None)
    tma = capability >= (9, 0)
    load = slots / max(experts, 1)
    if capability not in _triton.ROOMY:  # not measured
        rows = Tile(16, 64, 64, 4, 3, True) if load <= 12 else Tile(64, 128, 32, 4, 3)
        return Config("triton", rows, Tile(64, 128, 32, 4, 3) if backward else None, tma)
    # The forward's tiles won on an H100 at 3, 48 and 704 rows per expert; where one takes over from
    # the other, and the backward's: not measured.
    if load <= 12:
        rows = Tile(16, 64, 128, 4, 4, True)
    elif load <= 96:
        rows = Tile(64, 128 if backward else 256, 64, 4, 3)
    elif backward:
        rows = Tile(128, 128, 64, 8, 3)
    else:
        rows = Tile(128, 256, 64, 8, 4 if capability >= (9, 0) else 3)
    return Config("triton", rows, Tile(128, 128, 64, 8, 3) if backward else None, tma)


def plan_fp8(
    slots: int,
    experts: int,
    unsupported: str,
    backends: tuple[str, ...],
    capability: tuple[int, int],
    refusal: str = "",
) -> Config:
    """The configuration of experts in FP8; as :func:`plan`.

    Raises:
        RuntimeError: none of ``backends`` takes the problem.
    """
    unsupported = unsupported or too_many(experts)
    if not unsupported and capability < (8, 9):
        unsupported = "FP8 products need sm_89 or newer, this is sm_{}{}".format(*capability)
    if _by_csrc(unsupported or refusal, backends):
        return Config("csrc", Tile(native.ROWS, 160, 128, 8, 4), None, True)
    if _triton.needs_reference(FAMILY.name, unsupported, backends):
        return Config("reference", reason=unsupported or refusal)
    # Not measured.
    load = slots / max(experts, 1)
    roomy = capability in _triton.ROOMY
    if load <= 12:
        tile = Tile(16, 64, 128, 4, 4, True)
    elif load <= 96 or not roomy:
        tile = Tile(64, 128, 128, 4, 3)
    else:
        tile = Tile(128, 128, 128, 8, 4)
    return Config("triton", tile, None, capability >= (9, 0))


def _by_csrc(barred: str, backends: tuple[str, ...]) -> bool:
    # Where only csrc is proven, or was asked for: that it cannot is an error then.
    if "csrc" not in backends or "triton" in backends:
        return False
    return not _triton.needs_reference(FAMILY.name, barred, ("triton", *backends))


def _tuned_plan(plan, device, problem, unsupported, refusal) -> Config:
    """The configuration of ``problem``, with what a table knows better."""
    backends = _backends.usable(FAMILY.name, device)
    capability = torch.cuda.get_device_capability(device)
    config = plan(problem, unsupported, backends, capability, refusal)
    tuned = _tuned.tuned(FAMILY.name, device, problem, config)
    # The table may come from a machine that has csrc.
    lacks = tuned.backend == "csrc" and (refusal or "csrc" not in backends)
    return config if lacks else tuned


def _plan(x, up, down, weights, offsets, order, starts, backward=False) -> Config:
    problem = (order.shape[0], offsets.shape[0], x.dtype, backward)
    return _tuned_plan(
        lambda problem, *rest: plan(*problem, *rest), x.device, problem,
        _triton.unsupported(x, weights), native.refusal(up, down),
    )  # fmt: skip


def candidates(config: Config, backward: bool) -> Iterator[Config]:
    """What may be faster than ``config`` on some card: csrc, one measure of one tile changed."""
    names = (["rows"] if config.backend == "triton" else []) + (["weights"] if backward else [])
    if config.backend == "triton" and not config.rows.swap:
        yield replace(config, backend="csrc")
    options = {"rows": (64, 128), "columns": (64, 128, 256), "depth": (32, 64, 128),
               "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}  # fmt: skip
    for name in names:
        tile = getattr(config, name)
        for measure, values in options.items():
            if not (tile.swap and measure == "rows"):  # as wide as the tokens of an expert
                for value in values:
                    yield replace(config, **{name: replace(tile, **{measure: value})})


def _plan_fp8(
    x, x_scale, up, up_scale, hidden_scale, down, down_scale, weights, offsets, order, dtype
):
    unsupported = _triton.unsupported(x_scale, up_scale, hidden_scale, down_scale, weights)
    if dtype not in _triton.DTYPES:
        unsupported = f"the Triton kernels do not return {dtype}"
    refusal = native.refusal(up, down)
    if dtype != torch.bfloat16:
        refusal = f"csrc returns bfloat16, not {dtype}"
    return _tuned_plan(
        lambda problem, *rest: plan_fp8(*problem[:2], *rest), x.device,
        (order.shape[0], up.shape[0], torch.float8_e4m3fn, False), unsupported, refusal,
    )  # fmt: skip


def _example(device: torch.device, dtype: torch.dtype):
    """6 tokens, 2 slots; experts 1 and 3 of four have no rows."""
    randn = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    weights = torch.rand(6, 2, device=device, dtype=acc_dtype(dtype))
    offsets = torch.tensor([5, 5, 12, 12], device=device, dtype=torch.int32)
    order = torch.tensor([0, 3, 5, 6, 10, 1, 2, 4, 7, 8, 9, 11], device=device, dtype=torch.int32)
    return randn(6, 16), randn(4, 24, 16) / 4, randn(4, 16, 24) / 4, weights, offsets, order, None


def _probe(width: int, hidden: int):
    """150 tokens of such sizes, 3 slots each, over four experts of which one has no rows."""

    def make(device: torch.device, dtype: torch.dtype):
        randn = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
        weights = torch.rand(150, 3, device=device, dtype=acc_dtype(dtype))
        _, offsets, order = group_rows(torch.randint(3, (150, 3), device=device), 4)
        up, down = randn(4, hidden, width) / width**0.5, randn(4, width, hidden) / hidden**0.5
        return randn(150, width), up, down, weights, offsets, order, None

    return make


# csrc has tiles of 256 and 232, 224 and 192 columns for these.
PROBES = [_probe(256, 232), _probe(224, 192)]


def _before_backward(example):
    def make(device: torch.device, dtype: torch.dtype):
        args = example(device, dtype)
        return torch.randn_like(args[0]), *args, ref.forward(*args)[1]

    return make


def _example_fp8(device: torch.device, dtype: torch.dtype, width: int = 32, hidden: int = 48):
    *_, weights, offsets, order, _ = _example(device, torch.float32)
    rand = lambda *shape: torch.rand(shape, device=device) + 0.5  # noqa: E731

    def byte(*shape):
        values = torch.randn(shape, device=device).to(torch.float8_e4m3fn)
        return values.view(torch.uint8)

    return (
        byte(6, width), rand(6), byte(4, hidden, width), rand(4, hidden) / 4, rand(4),
        byte(4, width, hidden), rand(4) / 4, weights, offsets, order, dtype,
    )  # fmt: skip


def _fake(x, up, down, weights, offsets, order, starts):
    return x.new_empty(x.shape), x.new_empty((order.shape[0], up.shape[1]))


def _fake_backward(dy, x, up, down, weights, offsets, order, starts, hidden):
    return tuple(t.new_empty(t.shape) for t in (x, up, down, weights))


moe_experts_backward = register(
    FAMILY,
    "moe_experts_backward(Tensor dy, Tensor x, Tensor up, Tensor down, Tensor weights, "
    "Tensor offsets, Tensor order, Tensor? starts, Tensor hidden) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=ref.backward,
    fake=_fake_backward,
    example=_before_backward(_example),
    probes={"csrc": [_before_backward(probe) for probe in PROBES]},
    plan=lambda dy, x, up, down, weights, offsets, order, starts, hidden: _plan(
        x, up, down, weights, offsets, order, starts, backward=True
    ),
    kernel="moe_experts.kernel:backward",
)


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, dy, _dhidden):
    return *moe_experts_backward(dy, *ctx.saved_tensors), None, None, None


moe_experts = register(
    FAMILY,
    "moe_experts(Tensor x, Tensor up, Tensor down, Tensor weights, Tensor offsets, Tensor order, "
    "Tensor? starts) -> (Tensor, Tensor)",
    reference=ref.forward,
    fake=_fake,
    example=_example,
    probes={"csrc": PROBES},
    plan=lambda *args: _plan(*args),
    kernel="moe_experts.kernel:forward",
    setup_context=_setup,
    backward=_backward,
)

moe_experts_fp8 = register(
    FAMILY,
    "moe_experts_fp8(Tensor x, Tensor x_scale, Tensor up, Tensor up_scale, Tensor hidden_scale, "
    "Tensor down, Tensor down_scale, Tensor weights, Tensor offsets, Tensor order, "
    "ScalarType dtype) -> Tensor",
    reference=ref.forward_fp8,
    fake=lambda x, *rest: x.new_empty(x.shape, dtype=rest[-1]),
    example=_example_fp8,
    probes={"csrc": [partial(_example_fp8, width=160, hidden=160)]},
    plan=_plan_fp8,
    kernel="moe_experts.kernel_fp8:forward",
)
