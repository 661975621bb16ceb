"""The Triton kernels of attention_with_cache, interpreted, against the reference."""

import pytest
import torch

from nemokernels import testing
from nemokernels.ops.attention import kernel, op, ref

F32, F16 = torch.float32, torch.float16


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def problem(rows, tokens, H=6, KV=2, D=7, room=40, slots=4, dtype=F32, cache_dtype=F32):
    q = torch.randn(rows, tokens, H, D).to(dtype)
    k, v = torch.randn(2, rows, tokens, KV, D).to(dtype)
    caches = torch.randn(2, slots, room, KV, D).to(cache_dtype)
    return q, k, v, *caches.clone()


def config(q, cache, part=16):
    found = op.plan(q.shape[2], cache.shape[2], q.shape[3], cache.shape[1], q.dtype, "",
                    ("triton",))  # fmt: skip
    return op.Config("triton", part, found.block_h, 16, found.block_d, 1, 1) if part else found


RULE = None, 0.3, None, 0, 1.0, 1.0  # slopes, scale, window, global tokens, scales of the cache


def compare(tensors, lengths, slots, part=16, rule=RULE):
    """Output and caches; entries the kernel must not read are NaN."""
    for b, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for cache in tensors[3:]:
                cache[slot, lengths[b] :] = torch.nan
                if rule[2]:
                    cache[slot, rule[3] : max(lengths[b] + 1 - rule[2], rule[3])] = torch.nan
    copies = [[t.clone() for t in tensors], [t.clone() for t in tensors],
              testing.to_double([t.clone() for t in tensors])]  # fmt: skip
    got = kernel.with_cache(*copies[0], lengths, slots, *rule, config(*tensors[:4:3], part))
    low = ref.with_cache(*copies[1], lengths, slots, *rule)
    if tensors[3].dtype.itemsize > 1:
        copies[2][1:3] = [t.to(tensors[3].dtype).double() for t in tensors[1:3]]
    want = ref.with_cache(*copies[2], lengths, slots, *rule)
    assert got.dtype == low.dtype and got.is_contiguous()
    testing.assert_matches(got, want, low)
    for mine, theirs in zip(copies[0][3:], copies[1][3:]):
        assert torch.equal(mine.float().nan_to_num(9e3), theirs.float().nan_to_num(9e3))
    return got


@pytest.mark.parametrize("shape", [(1, 1, 1), (6, 2, 7), (32, 2, 16), (3, 3, 33)])
@pytest.mark.parametrize("dtype, cache_dtype", [(F32, F16), (F16, F32)])
def test_sizes(shape, dtype, cache_dtype):
    tensors = problem(3, 2, *shape, dtype=dtype, cache_dtype=cache_dtype)
    compare(tensors, int32(0, 17, 38), int32(2, 0, 3))


@pytest.mark.parametrize("part", [16, 32, None])
def test_parts(part):
    compare(problem(2, 3, room=70), int32(0, 61), int32(1, 0), part)
    tensors = problem(1, 1, room=16 * 9 + 3)
    tensors[1].mul_(5)  # the last part holds the peak of some heads
    compare(tensors, int32(16 * 9), int32(3), part)


@pytest.mark.parametrize(
    "window, global_tokens, slopes, part",
    [(4, 0, False, 16), (5, 20, False, 32), (16, 3, True, 16), (1, 0, True, 32),
     (40, 1, False, 16), (40, 40, False, 32), (1000, 1000, True, 16)],
)  # fmt: skip
def test_windows(window, global_tokens, slopes, part):
    """Over many parts: some hold no visible key, some only global ones, some both."""
    tensors = problem(3, 2, H=2, KV=1, room=16 * 12)
    rule = torch.tensor([0.2, -0.1]) if slopes else None, 0.3, window, global_tokens, 1.0, 1.0
    compare(tensors, int32(0, 21, 16 * 11 + 3), int32(3, 0, 2), part, rule)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_e4m3_cache(dtype):
    """With scales; values past 448 of them saturate, NaN stays."""
    tensors = problem(3, 2, dtype=dtype, cache_dtype=torch.float8_e4m3fn)
    tensors[1][0, 0], tensors[2][0, 1, 0, 0] = 300.0, -1e4
    tensors[2][1, 0, 0, 0] = torch.nan
    compare(tensors, int32(0, 17, 38), int32(2, 0, 3), rule=(None, 0.3, 20, 1, 0.37, 2.6))


def test_padding_and_rows_the_cache_does_not_hold():
    tensors = problem(6, 2)
    before = [t.clone() for t in tensors[3:]]
    tensors[0][0], tensors[1][0], tensors[2][0] = torch.nan, torch.nan, torch.nan
    slots, lengths = int32(-1, -7, 4, 1, 2, 3), int32(3, 10**6, 0, 39, -1, 5)
    out = kernel.with_cache(*tensors, lengths, slots, *RULE, config(*tensors[:4:3]))
    assert not out[:5].any() and out[5].isfinite().all() and out[5].all()
    for old, new in zip(before, tensors[3:]):
        assert torch.equal(old[:3], new[:3]) and torch.equal(old[3, :5], new[3, :5])
        assert torch.equal(old[3, 7:], new[3, 7:]) and not torch.equal(old[3, 5:7], new[3, 5:7])


def test_neither_batch_nor_tokens_per_call_change_a_bit():
    tensors = problem(3, 3)
    lengths, slots = int32(14, 0, 30), int32(1, 3, 0)
    together = [t.clone() for t in tensors]
    want = kernel.with_cache(*together, lengths, slots, *RULE, config(*tensors[:4:3]))
    for b in range(3):
        for i in range(3):
            new = [t[b : b + 1, i : i + 1] for t in tensors[:3]]
            got = kernel.with_cache(*new, *tensors[3:], lengths[b : b + 1] + i, slots[b : b + 1],
                                    *RULE, config(*tensors[:4:3]))  # fmt: skip
            assert torch.equal(got[0, 0], want[b, i])
    assert all(torch.equal(a, b) for a, b in zip(together[3:], tensors[3:]))


def test_any_strides():
    tensors = problem(2, 2)
    lengths, slots = int32(20, 3), int32(0, 2)
    turned = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in tensors]
    want = kernel.with_cache(*tensors, lengths, slots, *RULE, config(*tensors[:4:3]))
    got = kernel.with_cache(*turned, lengths, slots, *RULE, config(*tensors[:4:3]))
    assert torch.equal(got, want) and all(map(torch.equal, turned[3:], tensors[3:]))


def test_nan_stays_in_its_row_and_after_its_position():
    tensors = problem(2, 3)
    args = int32(3, 3), int32(0, 1), *RULE, config(*tensors[:4:3])
    clean = kernel.with_cache(*tensors, *args)
    tensors[2][1, 1] = torch.nan
    out = kernel.with_cache(*tensors, *args)
    assert torch.equal(out[0], clean[0]) and torch.equal(out[1, 0], clean[1, 0])
    assert out[1, 1:].isnan().all()


@pytest.mark.parametrize("rows, tokens, slots, room", [(0, 2, 3, 5), (2, 0, 3, 5), (1, 1, 0, 5),
                                                       (1, 1, 2, 0)])  # fmt: skip
def test_empty(rows, tokens, slots, room):
    tensors = problem(rows, tokens, room=room, slots=slots)
    where = torch.full((rows,), -1, dtype=torch.int32)
    out = kernel.with_cache(*tensors, where, where, *RULE, config(*tensors[:4:3]))
    assert out.shape == tensors[0].shape and not out.any()


def test_plan():
    everywhere = ("triton", "reference")
    assert op.plan(32, 2, 128, 8192, torch.bfloat16, "", everywhere).part == 512
    assert op.plan(32, 2, 128, 131072, torch.bfloat16, "", everywhere).part == 2048
    assert op.plan(4, 2, 257, 99, F32, "", everywhere).reason.endswith("got 257")
    with pytest.raises(RuntimeError, match="per group, got 65"):
        op.plan(65, 1, 64, 99, F32, "", ("triton",))
