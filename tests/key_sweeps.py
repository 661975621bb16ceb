"""Calls of one model at any length, whose compilations test_triton_keys.py counts.

Widths, heads and experts are a model's and fixed. A problem takes ``call(operator, *args)``, the
rows and tokens of this call, ``slices(rows, *widths)``, which makes tensors in the layout that is
tried, and options that a model fixes too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nemokernels.ops.ssd.op import SEGMENT


@dataclass(frozen=True)
class Sweep:
    """``most``: compilations of a kernel for all lengths; one if not listed."""

    problem: Callable
    options: tuple[dict, ...] = ({},)
    most: dict[str, int] = field(default_factory=dict)

    def allows(self, kernel: str) -> int:
        return self.most.get(kernel, 1)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def ints(*shape):
    return zeros(*shape, dtype=torch.int32)


def heads(*tensors, width=16):
    return [t.unflatten(-1, (-1, width)) for t in tensors]


def ssd_of_segments(call, rows, tokens, slices):
    """A sequence so long that several programs share it: up to 16 segments."""
    tokens = SEGMENT * max(rows, 2) - tokens
    x, B, C, dt = slices((1, tokens), 32, 16, 16, 2)
    (x,), (B, C), one = heads(x), heads(B, C), zeros(2)
    call("ssd_chunk_scan", x, dt, one, B, C, one, None, one, None, None, None, 64, True, 0.0, 1.0,
         None)  # fmt: skip


def relu2(call, rows, tokens, slices):
    x, dy = slices((rows, tokens), 48, 48)
    call("relu2", x)
    call("relu2_backward", dy, x)


def attention(call, rows, tokens, slices, packed=False, slopes=False, rule=(None, 0)):
    q, k, v = heads(*slices((rows, tokens), 64, 32, 32))
    dout, _ = heads(*slices((rows, tokens), 64, 32))
    rule = (zeros(4) if slopes else None, 0.1, *rule)
    if packed:  # as many sequences as rows
        q, k, v, dout = (t.flatten(0, 1)[None] for t in (q, k, v, dout))
    bounds = ints(rows + 1) if packed else None
    out, lse = call("attention", q, k, v, bounds, *rule)
    call("attention_backward", dout, q, k, v, out, lse, bounds, *rule)


def attention_with_cache(call, rows, tokens, slices, dtype=torch.bfloat16, rule=(None, 0)):
    q, k, v = heads(*slices((rows, tokens), 96, 32, 32))
    caches = [t.to(dtype) for t in heads(*slices((rows, tokens + 1), 32, 32))]
    call("attention_with_cache", q, k, v, *caches, ints(rows), ints(rows), None, 0.1, *rule, 1.0,
         1.0)  # fmt: skip


def mtp_verify(call, rows, tokens, slices, sampled=False, cut=False):
    """As many requests as there are tokens; one draft or fifteen."""
    drafts = max(rows - 1, 1)
    (logits,) = slices((tokens, drafts + 1), 48)
    probs, knobs = None, [None] * 3
    if sampled:
        (probs,) = slices((tokens, drafts), 48)
        knobs = [zeros(tokens), None, None]
    if cut:
        knobs = [zeros(tokens), ints(tokens), zeros(tokens)]
    ids = zeros(tokens, drafts, dtype=torch.int64)
    seeds = ids.new_zeros(tokens)
    call("mtp_verify", logits, ids, ints(tokens), probs, *knobs, seeds, seeds, seeds)


def selective_scan(call, rows, tokens, slices, packed=False, gate=True):
    u, delta, z = slices((rows, tokens), 48, 48, 48)
    dout, B, C, _ = slices((rows, tokens), 48, 16, 16, 16)
    given = [u, delta, B[:, :, None], C[:, :, None], z, dout]
    if packed:  # as many sequences as rows
        given = [t.flatten(0, 1)[None] for t in given]
    u, delta, B, C, z, dout = given
    states, bounds = zeros(rows, 48, 16), ints(rows + 1) if packed else None
    A, D = zeros(48, 16), zeros(48)
    inputs = (u, delta, A, B, C, D, z if gate else None, D, states, bounds, True)
    call("selective_scan", *inputs)
    call("selective_scan_backward", dout, states, *inputs)


def moe_route(call, rows, tokens, slices, **groups):
    logits, _ = slices((rows * tokens + tokens % 2,), 48, 48)  # not always a multiple of rows
    groups = [groups.get(name, 1) for name in ("n_group", "topk_group")]
    weights, experts, *_ = call("moe_route", logits, zeros(48), 6, *groups, True, 2.5)
    call("moe_route_backward", weights, logits, experts, True, 2.5)


@functools.cache
def _head():
    return zeros(8528, 1024, dtype=torch.bfloat16)


def cross_entropy(call, rows, tokens, slices, sums=False):
    hidden, _ = slices((rows * tokens,), 1024, 16)
    labels = -100, 0, len(_head())
    targets = zeros(rows * tokens, dtype=torch.int64)
    lse, chosen, total = call("linear_log_sum_exp", hidden, _head(), targets, *labels, sums)
    call("linear_log_sum_exp_backward", lse, chosen, total if sums else None, hidden, _head(),
         targets, lse, *labels)  # fmt: skip


def fp8(call, rows, tokens, slices, transpose=False):
    x, _ = slices((rows, tokens), 48, 16)
    one, format = zeros(1), torch.float8_e4m3fn
    codes, *_ = call("quantize_fp8", x, one, one, format, False, True, transpose)
    call("fp8_current_scale", x, format, False)
    call("dequantize_fp8", codes.view(torch.uint8), one, format, torch.bfloat16)
    call("delayed_scaling_update", [one], [zeros(4, 1)], one, [448.0], False)


def fp8_norms(call, rows, tokens, slices, transpose=False):
    x, z = slices((rows, tokens), 48, 48)
    weight, one, format = zeros(48), zeros(1), torch.float8_e4m3fn
    if x.numel():
        call("rms_norm_fp8", x, z, weight, one, 1e-5, format, transpose)
        call("gated_rms_norm_fp8", x, weight, None, z, one, 1e-5, 16, False, format, transpose)


def nvfp4(call, rows, tokens, slices, swizzled=False, stochastic=False):
    x, _ = slices((rows * tokens,), 48, 16)
    amax = None if stochastic else zeros(1)
    seed = zeros(dtype=torch.int64) if stochastic else None
    if swizzled:
        call("quantize_nvfp4", x.unflatten(0, (rows, tokens)), amax, 1, seed, 0, True)
    else:
        codes = call("quantize_nvfp4", x, amax, 1, seed, 0, False)
        call("dequantize_nvfp4", *codes, torch.bfloat16)
    call("hadamard16", x)
    call("hadamard16_backward", x)
    if rows % 16 == 0:
        call("quantize_nvfp4_pair", x, amax, amax, 1, True, seed, swizzled)


def mamba_step(call, rows, tokens, slices, gate=True):
    """Up to three tokens per sequence, of as many sequences as there are tokens."""
    rows = min(rows, 3)
    xBC, z, _ = slices((tokens, rows), 1280, 1024, 16)
    conv, state = zeros(1, 1280, 3 + rows), zeros(1, rows, 16, 64, 128)
    call("mamba_step", xBC, z[..., :16], z if gate else None, conv, state, zeros(1280, 4), None,
         *[zeros(16)] * 3, ints(tokens), None, 1, 0.0, 1.0, None, 5)  # fmt: skip


def state_update(call, rows, tokens, slices, packed=False):
    """One token, or up to ``rows``, of as many sequences as there are tokens."""
    width = rows if packed else 1
    x, B, C = slices((tokens * width,), 1024, 128, 128)
    x, B, C = x.unflatten(1, (16, 64)), B[:, None], C[:, None]
    head = zeros(16, 1).expand(16, 64)
    places = [ints(tokens, rows) if packed else ints(tokens), None]
    places += [ints(tokens), ints(tokens + 1)] if packed else [None, None]
    call("selective_state_update", zeros(1, 16, 64, 128), x, x[..., :1], zeros(16, 1, 1), B, C,
         head, x, head, True, *places, None, 5)  # fmt: skip


def moe_experts(call, rows, tokens, slices, ragged=False):
    """Four slots per token, or as many in all and any per token."""
    tokens *= rows
    x, dy = slices((tokens,), 128, 128)
    up = zeros(16, 128, 128, dtype=torch.bfloat16)
    weights = zeros(4 * tokens) if ragged else zeros(tokens, 4)
    route = weights, ints(16), ints(4 * tokens), ints(tokens + 1) if ragged else None
    _, hidden = call("moe_experts", x, up, up, *route)
    call("moe_experts_backward", dy, x, up, up, *route, hidden)


def moe_experts_fp8(call, rows, tokens, slices, per_row=False):
    tokens *= rows
    x, up = zeros(tokens, 128, dtype=torch.uint8), zeros(16, 128, 128, dtype=torch.uint8)
    each = zeros(16, 128) if per_row else zeros(16)
    scale = zeros(tokens) if per_row else zeros(1)
    route = zeros(tokens, 4), ints(16), ints(4 * tokens)
    call("moe_experts_fp8", x, scale, up, each, zeros(16), up, each, *route, torch.bfloat16)


def _matrix(*sizes, columns=128):
    *count, rows = sizes
    byte = dict(dtype=torch.uint8)
    tiles = (*count, rows // 16, columns // 64, 16)
    return zeros(*tiles, 32, **byte), zeros(*tiles, 4, **byte), zeros(*count)


def w4a16(call, rows, tokens, slices):
    x, _ = slices((rows * tokens,), 128, 16)
    call("nvfp4_linear", x, *_matrix(128), 128)
    call("nvfp4_linear_backward", x, *_matrix(128), 128)
    route = zeros(rows * tokens, 4), ints(16), ints(4 * rows * tokens)
    call("nvfp4_experts", x, *_matrix(16, 128), *_matrix(16, 128), 128, *route)


SWEEPS = (
    Sweep(ssd_of_segments),
    Sweep(relu2),
    Sweep(
        attention,
        ({}, dict(packed=True), dict(slopes=True, rule=(9, 32))),
        # Lengths are 1, divisible by 16, or neither.
        most={"attention_dkdv_kernel": 3},
    ),
    Sweep(
        attention_with_cache,
        ({}, dict(dtype=torch.float8_e4m3fn), dict(rule=(9, 32))),
    ),
    # Forward, and what the backward walks first.
    Sweep(
        selective_scan,
        ({}, dict(packed=True), dict(gate=False)),
        most={"selective_scan_kernel": 2},
    ),
    Sweep(
        moe_route,
        ({}, dict(n_group=4, topk_group=2)),
        # Few slots are counted and sorted by one program, many by several.
        most={"moe_route_choose_kernel": 2, "moe_route_order_kernel": 2},
    ),
    Sweep(
        cross_entropy,
        ({}, dict(sums=True)),
        # Of the weights; of hidden, whole, or the first block of classes and the others.
        most={"cross_entropy_product_kernel": 4},
    ),
    # Transposed, the rows are divisible by 16 or not. The current scale only looks.
    Sweep(fp8, ({}, dict(transpose=True)), most={"quantize_kernel": 3}),
    Sweep(
        fp8_norms,
        ({}, dict(transpose=True)),
        most={"rms_norm_fp8_kernel": 2, "gated_rms_norm_fp8_kernel": 2},
    ),
    Sweep(
        nvfp4,
        ({}, dict(swizzled=True), dict(stochastic=True)),
        # Along the rows and in both orientations; forward and backward.
        most={"nvfp4_quantize_kernel": 2, "nvfp4_amax_kernel": 2, "hadamard16_kernel": 2},
    ),
    # For one token and for several; few sequences have P cut into two or four times the parts.
    Sweep(mamba_step, ({}, dict(gate=False)), most={"mamba_step_kernel": 6}),
    Sweep(state_update, ({}, dict(packed=True)), most={"state_update_kernel": 3}),
    # Tiles for few, some and many rows; up, down and a linear layer.
    Sweep(
        w4a16,
        most={"w4a16_kernel": 11, "w4a16_backward_kernel": 3, "moe_experts_tiles_kernel": 3},
    ),
    # Tiles for few, some and many rows per expert, of two products forward and two backward; few
    # with a table and, below a row per expert, without one.
    Sweep(
        moe_experts,
        ({}, dict(ragged=True)),
        most={
            "moe_experts_tiles_kernel": 3,
            "moe_experts_rows_kernel": 16,
            "moe_experts_weight_grad_kernel": 2,
            "moe_experts_slot_sum_kernel": 2,
            "column_sum_kernel": 2,  # over slots, in vectors where 16 divides them
        },
    ),
    Sweep(
        moe_experts_fp8,
        ({}, dict(per_row=True)),
        # The scale of a lone token is that of a tensor.
        most={"moe_experts_tiles_kernel": 3, "moe_experts_fp8_kernel": 9},
    ),
    Sweep(mtp_verify, ({}, dict(sampled=True), dict(cut=True))),
)
