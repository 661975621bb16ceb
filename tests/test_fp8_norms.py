"""Norms that also emit FP8: the norm's own bits, and the quantisation's own bits of them."""

import numpy as np
import pytest
import torch

from nemokernels import (
    fp8_linear,
    gated_rms_norm_fp8,
    quantize_fp8,
    rms_norm,
    rms_norm_fp8,
    rmsnorm_fn,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCALE = torch.tensor([37.0])


def bits(t):
    return t.contiguous().reshape(-1).view(torch.uint8)


def check_codes(normed, format="e4m3", transpose=True):
    want = quantize_fp8(normed.y.detach(), SCALE, format=format, transpose=transpose)
    assert torch.equal(normed.codes.codes.reshape(-1), bits(want[0]))
    assert torch.equal(normed.amax, want[1])
    assert normed.codes.scale_inv == 1 / SCALE
    if transpose:
        assert normed.codes.transposed.shape == want[2].shape
        assert torch.equal(normed.codes.transposed.reshape(-1), bits(want[2]))
    else:
        assert normed.codes.transposed.numel() == 0


def outputs_and_gradients(fn, tensors, grads):
    leaves = [t.clone().requires_grad_() for t in tensors]
    outs = fn(*leaves)
    return [*outs, *torch.autograd.grad(outs, leaves, grads[: len(outs)])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("transpose", [False, True])
def test_rms_norm(transpose, format, dtype):
    x, dy, dtotal = torch.randn(3, 4, 5, 24).to(dtype)
    weight = torch.randn(24)
    options = dict(format=format, transpose=transpose, eps=1e-4)
    for kind in (None, torch.float32, torch.bfloat16, dtype):
        residual = None if kind is None else torch.randn(4, 5, 24).to(kind)
        tensors = [x, weight, *([] if residual is None else [residual])]
        grads = [dy, None if residual is None else dtotal.to(residual.dtype)]

        def emitting(x, weight, residual=None):
            normed = rms_norm_fp8(x, weight, SCALE, residual=residual, **options)
            check_codes(normed, format, transpose)
            return (normed.y,) if residual is None else (normed.y, normed.total)

        def alone(x, weight, residual=None):
            out = rms_norm(x, weight, residual=residual, eps=1e-4)
            return (out,) if residual is None else out

        got = outputs_and_gradients(emitting, tensors, grads)
        for a, b in zip(got, outputs_and_gradients(alone, tensors, grads), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("with_z, with_bias", [(True, False), (True, True), (False, False)])
def test_gated_rms_norm(with_z, with_bias, norm_before_gate, dtype):
    x, z, dy = torch.randn(3, 4, 5, 24).to(dtype)
    weight, bias = torch.randn(2, 24)
    tensors = [x, weight, *([z] if with_z else []), *([bias] if with_bias else [])]
    rest = dict(eps=1e-4, group_size=8, norm_before_gate=norm_before_gate)

    def named(tensors):
        tail = list(tensors)
        return dict(z=tail.pop(0) if with_z else None, bias=tail.pop(0) if with_bias else None)

    def emitting(x, weight, *tail):
        normed = gated_rms_norm_fp8(x, weight, SCALE, transpose=True, **named(tail), **rest)
        check_codes(normed)
        assert normed.total is None
        return (normed.y,)

    def alone(x, weight, *tail):
        return (rmsnorm_fn(x, weight, **named(tail), **rest),)

    got = outputs_and_gradients(emitting, tensors, [dy])
    for a, b in zip(got, outputs_and_gradients(alone, tensors, [dy]), strict=True):
        assert torch.equal(a, b)


def test_the_linear_layer_takes_the_codes():
    x, weight, norm_weight = torch.randn(6, 24), torch.randn(16, 24), torch.randn(24)
    results = []
    for fused in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight, norm_weight)]
        if fused:
            normed = rms_norm_fp8(leaves[0], leaves[2], SCALE, transpose=True)
            y = fp8_linear(normed.y, leaves[1], x_codes=normed.codes)
        else:
            y = fp8_linear(rms_norm(leaves[0], leaves[2]), leaves[1], x_scale=SCALE)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results):
        assert torch.equal(a, b)
    with torch.no_grad():
        normed = rms_norm_fp8(x, norm_weight, SCALE)
        assert torch.equal(fp8_linear(normed.y, weight, x_codes=normed.codes), results[0][0])
    with pytest.raises(ValueError, match="`x_codes` has shape .*which the gradient needs"):
        fp8_linear(normed.y, weight.requires_grad_(), x_codes=normed.codes)
    with pytest.raises(ValueError, match="excludes `squared_relu`"):
        fp8_linear(normed.y, weight, x_codes=normed.codes, squared_relu=True)


def test_a_nan_stays_in_its_row_and_out_of_the_amax():
    x, weight = torch.randn(4, 24), torch.randn(24)
    clean = rms_norm_fp8(x[[0, 2, 3]], weight, SCALE)
    x[1, 3] = np.nan
    normed = rms_norm_fp8(x, weight, SCALE)
    q = normed.codes.codes.view(torch.float8_e4m3fn).float()
    assert q[1].isnan().all() and normed.amax == clean.amax
    assert torch.equal(normed.codes.codes[[0, 2, 3]], clean.codes.codes)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_empty(shape):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    for normed in (
        rms_norm_fp8(x, weight, SCALE, residual=x, transpose=True),
        gated_rms_norm_fp8(x, weight, SCALE, z=x, transpose=True),
    ):
        assert normed.y.shape == normed.codes.codes.shape == shape and normed.amax == 0
        assert normed.codes.transposed.shape == (shape[-1], x.shape[:-1].numel())


X, W = torch.ones(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm_fp8(X, W[1:], SCALE), ValueError, "rms_norm_fp8: `weight` has shape"),
        (lambda: rms_norm_fp8(X, W, 1.0), TypeError, "`scale` must be a torch.Tensor"),
        (lambda: rms_norm_fp8(X, W, SCALE * 0), ValueError, "`scale` is 0.0, expected a positive"),
        (lambda: rms_norm_fp8(X, W, SCALE.to("meta")), ValueError, "`scale` is on meta"),
        (lambda: rms_norm_fp8(X, W, SCALE, residual=W), ValueError, "`residual` has shape"),
        (lambda: rms_norm_fp8(X, W, SCALE, format="fp8"), ValueError, "`format` is 'fp8'"),
        (lambda: gated_rms_norm_fp8(X, W, SCALE, z=W), ValueError, "norm_fp8: `z` has shape"),
        (lambda: gated_rms_norm_fp8(X, W, SCALE, group_size=3), ValueError, "`group_size` is 3"),
        (lambda: gated_rms_norm_fp8(X, W, SCALE, eps=-1), ValueError, "`eps` must not be"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
