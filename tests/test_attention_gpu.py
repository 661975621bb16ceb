"""attention on a GPU: our kernels and torch's."""

import on_gpu
import pytest
import torch

from nemokernels import attention, testing, use_backend

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RULES = [(None, 0, False), (100, 0, False), (70, 40, True)]


def problem(rows, queries, keys, heads=4, groups=2, dim=128, dtype=BF16):
    q, dout = torch.randn(2, rows, queries, heads, dim).to(dtype)
    return q, *torch.randn(2, rows, keys, groups, dim).to(dtype), dout


def call(rule, bounds=None):
    window, global_tokens, alibi = rule

    def fn(q, k, v):
        slopes = torch.linspace(0.5, 0.01, q.shape[2], device=q.device) if alibi else None
        cu_seqlens = bounds if bounds is None else bounds.to(q.device)
        options = dict(window=window, global_tokens=global_tokens, alibi_slopes=slopes)
        return attention(q, k, v, cu_seqlens=cu_seqlens, **options)

    return fn


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", [33, 64, 80, 128, 192, 256])
def test_triton(rule, dtype, dim):
    tensors = problem(2, 300, 300, dim=dim, dtype=dtype)
    with use_backend("attention", "triton"):
        on_gpu.compare(call(rule), tensors[:3], tensors[3:])


@pytest.mark.parametrize("backend", ["triton", "torch", "flash_attn"])
@pytest.mark.parametrize("rule", RULES[:2])
@pytest.mark.parametrize("queries, keys", [(257, 257), (100, 300)])
def test_backends(backend, rule, queries, keys):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    tensors = problem(2, queries, keys)
    with use_backend("attention", backend):
        on_gpu.compare(call(rule), tensors[:3], tensors[3:])
        if queries == keys:
            packed = [t.flatten(0, 1)[None] for t in tensors]
            bounds = torch.tensor([0, 200, 201, 201, 514], dtype=torch.int32)
            on_gpu.compare(call(rule, bounds), packed[:3], packed[3:])


@pytest.mark.parametrize("rule", RULES)
def test_packed_equals_separate_and_twice_the_same(rule):
    tensors = [t.cuda() for t in problem(1, 700, 700, 32, 2)]
    bounds = torch.tensor([0, 300, 301, 700], dtype=torch.int32)
    with use_backend("attention", "triton"):
        got = testing.gradients(call(rule, bounds), tensors[:3], tensors[3:])
        again = testing.gradients(call(rule, bounds), tensors[:3], tensors[3:])
        assert on_gpu.same_bits(got, again)
        for a, b in ((0, 300), (300, 301), (301, 700)):
            part = [t[:, a:b] for t in tensors]
            alone = testing.gradients(call(rule), part[:3], part[3:])
            assert on_gpu.same_bits([t[:, a:b] for t in sum(got, [])], sum(alone, []))


def test_graph():
    tensors = [t.cuda() for t in problem(1, 500, 500)]
    bounds = torch.tensor([0, 300, 500], dtype=torch.int32, device="cuda")
    with use_backend("attention", "triton"):
        fn = lambda: testing.gradients(call(RULES[2], bounds), tensors[:3], tensors[3:])[1]  # noqa: E731
        assert on_gpu.same_bits(fn(), on_gpu.replay(fn))
