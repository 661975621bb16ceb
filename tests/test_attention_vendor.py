"""What reaches torch's and flash-attn's kernels: stand-ins for both, in float64, on the CPU."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nemokernels.ops.attention import op, ref, vendor

BOUNDS = torch.tensor([0, 5, 6, 6, 19], dtype=torch.int32)


def problem(rows, queries, keys):
    q, dout = torch.randn(2, rows, queries, 4, 8, dtype=torch.float64)
    return q, *torch.randn(2, rows, keys, 2, 8, dtype=torch.float64), dout


def by_sdpa(q, k, v, of_q, of_k, scale, causal, left, right, slopes):
    """Packed attention as both libraries document it: aligned to the last query and key."""
    outs, sums = [], []
    for a, b, c, d in zip(of_q, of_q[1:], of_k, of_k[1:]):
        place = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        far = place - torch.arange(d - c)
        mask = (far >= 0) if causal else torch.ones_like(far, dtype=torch.bool)
        mask &= (far <= left) if left >= 0 else True
        mask &= (far >= -right) if right >= 0 else True
        bias = torch.zeros(4, *far.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        if slopes is not None:
            bias -= slopes[:, None, None].double() * far.abs()
        heads_first = [t.transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d])]
        options = dict(attn_mask=bias, scale=scale, enable_gqa=True)
        outs.append(F.scaled_dot_product_attention(*heads_first, **options).transpose(0, 1))
        keys = heads_first[1].repeat_interleave(2, 0)
        sums.append((heads_first[0] @ keys.mT * scale + bias).logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1)


def forward(q, k, v, of_q, of_k, max_q, max_k, dropout, causal, scale, left, right, slopes=None):
    assert q.dim() == 3 and all(t.stride(-1) == 1 for t in (q, k, v)) and dropout == 0.0
    assert of_q.dtype == of_k.dtype == torch.int32
    assert max_q >= of_q.diff().max() and max_k >= of_k.diff().max()
    return by_sdpa(q, k, v, of_q.tolist(), of_k.tolist(), scale, causal, left, right, slopes)


def backward(dout, q, k, v, out, lse, *rest, **options):
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        again, sums = forward(*leaves, *rest, **options)
    torch.testing.assert_close((again, sums), (out, lse))
    return torch.autograd.grad(again, leaves, dout)


class Torch:
    @staticmethod
    def _flash_attention_forward(q, k, v, of_q, of_k, max_q, max_k, dropout, causal, debug, *,
                                 scale, window_size_left, window_size_right):  # fmt: skip
        sides = window_size_left, window_size_right
        out, lse = forward(q, k, v, of_q, of_k, max_q, max_k, dropout, causal, scale, *sides)
        return out, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)

    @staticmethod
    def _flash_attention_backward(dout, q, k, v, out, lse, of_q, of_k, max_q, max_k, dropout,
                                  causal, state, unused, *, scale, window_size_left,
                                  window_size_right):  # fmt: skip
        sides = window_size_left, window_size_right
        lengths = of_q, of_k, max_q, max_k
        return backward(dout, q, k, v, out, lse, *lengths, dropout, causal, scale, *sides)


class FlashAttn:
    @staticmethod
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False,
    ):  # fmt: skip
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        sides = window_size_left, window_size_right
        rule = dropout_p, causal, softmax_scale, *sides, alibi_slopes
        return *forward(q, k, v, *lengths, *rule), None, None

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert deterministic and softcap == 0.0
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        sides = window_size_left, window_size_right
        rule = dropout_p, causal, softmax_scale, *sides, alibi_slopes
        grads = backward(dout, q, k, v, out, softmax_lse, *lengths, *rule)
        for mine, grad in zip((dq, dk, dv), grads):
            mine.copy_(grad)


@pytest.fixture(params=["torch", "flash_attn"])
def name(request, monkeypatch):
    monkeypatch.setattr(torch.ops, "aten", Torch)
    package = SimpleNamespace(flash_attn_interface=FlashAttn)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return request.param


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("queries, keys, bounds", [(19, 19, BOUNDS), (6, 11, None), (7, 7, None)])
@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.2, 0.1, 0.0])])
def test_equals_the_reference(name, window, queries, keys, bounds, slopes):
    if slopes is not None and name == "torch":
        assert vendor.unsupported(name, torch.bfloat16, 8, True, 0)
        slopes = None
    q, k, v, dout = problem(1 if bounds is not None else 2, queries, keys)
    rule = bounds, slopes, 0.3, window
    got = vendor.forward(name, q, k, v, *rule)
    got += vendor.backward(name, dout, q, k, v, *got, *rule)
    want = ref.forward(q, k, v, *rule, 0)
    want += ref.backward(dout, q, k, v, *want, *rule, 0)
    for a, b in zip(got, want):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_strides_and_bounds_outside_the_row(name):
    tensors = problem(1, 19, 19)
    turned = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in tensors]
    wild = BOUNDS.clone()
    wild[-1] = 10**6
    want, got = (vendor.forward(name, *t[:3], b, None, 0.3, None)
                 for t, b in ((tensors, BOUNDS), (turned, wild)))  # fmt: skip
    torch.testing.assert_close(got, want)


def test_plan():
    plan = lambda *args, **rest: op.plan_sequences(*args, **rest, capability=(9, 0))  # noqa: E731
    half, everything = torch.bfloat16, ("triton", "torch", "flash_attn", "reference")
    args = dict(backward=False, unsupported="")
    assert plan(128, half, False, 0, backends=everything, **args).backend == "triton"
    for dim in (64, 80, 96, 128, 160, 192):
        found = plan(dim, half, False, 0, backends=everything, **args)
        assert found.block_d >= dim and found.block_m >= 64
    vendors = everything[1:]
    assert plan(128, half, False, 0, backends=vendors, **args).backend == "torch"
    assert plan(128, half, True, 0, backends=vendors, **args).backend == "flash_attn"
    last = plan(128, half, True, 3, backends=vendors, **args)
    assert last.backend == "reference" and "flash_attn has no global tokens" in last.reason
    assert "multiples of 8" in plan(12, half, False, 0, backends=vendors, **args).reason
    assert "float32" in plan(16, torch.float32, False, 0, backends=vendors, **args).reason
    assert plan(257, half, False, 0, backends=everything, **args).reason.startswith("the Triton")
    with pytest.raises(RuntimeError, match="attention: torch has no ALiBi"):
        plan(16, half, True, 0, backends=("torch",), **args)


def test_reasons():
    for reason in (vendor.torch_reason, vendor.flash_attn_reason):
        assert "needs a CUDA device" in reason(torch.device("cpu"))
