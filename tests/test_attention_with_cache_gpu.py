"""The Triton kernels of attention_with_cache on a GPU."""

import on_gpu
import pytest
import torch

from nemokernels import attention_with_cache, testing, use_backend

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("attention_with_cache", "triton"):
        yield


def problem(rows, tokens, H=32, KV=2, D=128, room=2000, dtype=BF16, device="cpu"):
    q = torch.randn(rows, tokens, H, D, device=device).to(dtype)
    k, v = torch.randn(2, rows, tokens, KV, D, device=device).to(dtype)
    k_cache, v_cache = torch.randn(2, rows + 1, room, KV, D, device=device).to(dtype)
    lengths = torch.randint(room - tokens + 1, (rows,), device=device, dtype=torch.int32)
    slots = torch.randperm(rows + 1, device=device)[:rows].int()
    return q, k, v, k_cache, v_cache, lengths, slots


def run(q, k, v, k_cache, v_cache, lengths, slots, **options):
    return attention_with_cache(q, k, v, k_cache, v_cache, lengths, slots=slots, **options)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    "shape", [(32, 2, 128), (64, 2, 128), (96, 8, 192), (16, 16, 80), (3, 3, 33)]
)
@pytest.mark.parametrize("rows, tokens", [(1, 1), (5, 1), (3, 5)])
def test_against_the_reference(rows, tokens, shape, dtype):
    args = problem(rows, tokens, *shape, dtype=dtype)
    args[6][0] = args[6][0] if rows == 1 else -1
    on = on_gpu.to("cuda", args)
    got = run(*on)
    want = run(*testing.to_double(args))
    testing.assert_matches(got, want, run(*args))
    for mine, theirs in zip(on[3:5], args[3:5]):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("shape", [(32, 2, 128), (96, 8, 192), (16, 16, 80)])
def test_e4m3_cache(shape):
    args = list(problem(5, 3, *shape))
    args[3:5] = [t.to(torch.float8_e4m3fn) for t in args[3:5]]
    scales = dict(k_scale=0.7, v_scale=1.9, window=700, global_tokens=5)
    on = on_gpu.to("cuda", args)
    got = run(*on, **scales)
    codes = [t.clone() for t in args[3:5]]
    low = run(*args, **scales)
    want = run(*testing.to_double(args[:3]), *codes, *args[5:], **scales)
    testing.assert_matches(got, want, low)
    for mine, theirs in zip(on[3:5], args[3:5]):
        assert torch.equal(mine.cpu().float(), theirs.float())


def test_neither_batch_nor_tokens_per_call_change_a_bit():
    q, k, v, k_cache, v_cache, lengths, slots = problem(16, 4, device="cuda")
    caches = k_cache.clone(), v_cache.clone()
    want = run(q, k, v, k_cache, v_cache, lengths, slots)
    for b in range(16):
        for i in range(4):
            new = [t[b : b + 1, i : i + 1] for t in (q, k, v)]
            got = run(*new, *caches, lengths[b : b + 1] + i, slots[b : b + 1])
            assert torch.equal(got[0, 0], want[b, i])


def test_graph():
    args = problem(4, 2, device="cuda")
    first = run(*args)
    assert on_gpu.same_bits((first,), (on_gpu.replay(lambda: run(*args)),))


def test_past_two_to_the_31_elements():
    room = (1 << 31) // 256 + 8
    cache = torch.zeros(1, room, 2, 128, device="cuda", dtype=BF16)
    q, k, v = problem(1, 2, room=8, device="cuda")[:3]
    last = torch.tensor([room - 2], device="cuda", dtype=torch.int32)
    slots = torch.zeros(1, device="cuda", dtype=torch.int32)
    out = run(q, k, v, cache, cache.clone(), last, slots)
    assert torch.equal(cache[0, -2:], k[0]) and out.isfinite().all()
