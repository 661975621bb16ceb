"""The Triton kernels of attention, interpreted, against the reference."""

import pytest
import torch

from nemokernels import testing
from nemokernels.ops.attention import kernel_sequence, op, ref

F32, F16 = torch.float32, torch.float16
PLAIN = None, 0.3, None, 0  # slopes, scale, window, global tokens


def problem(rows, queries, keys, H=2, KV=1, D=5, dtype=F32):
    q, dout = torch.randn(2, rows, queries, H, D).to(dtype)
    return q, *torch.randn(2, rows, keys, KV, D).to(dtype), dout


def config(q, block_m=32, block_n=16):
    block_d = op.plan_sequences(q.shape[3], q.dtype, False, 0, False, "", ("triton",), (9, 0))
    return op.SequenceConfig("triton", block_m, block_n, block_d.block_d, 1, 1)


def run(module, q, k, v, dout, bounds, rule, *config):
    out, lse = module.forward(q, k, v, bounds, *rule, *config)
    return out, lse, *module.backward(dout, q, k, v, out, lse, bounds, *rule, *config)


def compare(tensors, bounds=None, rule=PLAIN, how=None):
    how = how or config(tensors[0])
    got = run(kernel_sequence, *tensors, bounds, rule, how)
    low = run(ref, *tensors, bounds, rule)
    want = run(ref, *testing.to_double(tensors), bounds, rule)
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), got, want, low):
        assert a.dtype == c.dtype and a.is_contiguous()
        testing.assert_matches(a, b, c, name)
    return got


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("heads", [(1, 1, 1), (4, 2, 16), (3, 3, 20)])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_heads(heads, dtype):
    compare(problem(2, 20, 20, *heads, dtype=dtype))


@pytest.mark.parametrize("queries, keys", [(1, 1), (33, 33), (70, 70), (5, 60), (40, 90), (64, 64)])
@pytest.mark.parametrize("blocks", [(32, 16), (16, 32)])
def test_lengths(queries, keys, blocks):
    tensors = problem(1, queries, keys)
    compare(tensors, how=config(tensors[0], *blocks))


@pytest.mark.parametrize(
    "window, global_tokens, slopes",
    [(1, 0, False), (7, 0, True), (16, 20, False), (33, 3, True), (50, 40, False), (70, 70, True),
     (200, 0, False), (None, 3, True), (40, 1, False), (47, 2, True)],
)  # fmt: skip
@pytest.mark.parametrize("queries, keys, blocks", [(100, 100, (32, 16)), (60, 90, (16, 32))])
def test_windows(window, global_tokens, slopes, queries, keys, blocks):
    tensors = problem(1, queries, keys)
    rule = torch.tensor([0.2, -0.05]) if slopes else None, 0.3, window, global_tokens
    compare(tensors, rule=rule, how=config(tensors[0], *blocks))


@pytest.mark.parametrize("rule", [PLAIN, (torch.tensor([0.2, -0.05]), 0.3, 18, 2)])
def test_packed_equals_separate_bit_for_bit(rule):
    tensors, bounds = problem(1, 60, 60), [0, 20, 20, 21, 58, 60]
    how = config(tensors[0])
    got = compare(tensors, int32(*bounds), rule)
    for start, end in zip(bounds, bounds[1:]):
        alone = run(kernel_sequence, *(t[:, start:end] for t in tensors), None, rule, how)
        for i, (a, b) in enumerate(zip(got, alone)):
            assert torch.equal(a[:, :, start:end] if i == 1 else a[:, start:end], b)


def test_batch_equals_separate_bit_for_bit():
    tensors = problem(3, 20, 35)
    how = config(tensors[0])
    got = run(kernel_sequence, *tensors, None, PLAIN, how)
    for b in range(3):
        alone = run(kernel_sequence, *(t[b : b + 1] for t in tensors), None, PLAIN, how)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(got, alone))


def test_more_sequences_than_lanes(monkeypatch):
    monkeypatch.setattr(kernel_sequence, "LANES", 4)
    tensors = problem(1, 41, 41, 1, 1, 2)
    compare(tensors, int32(0, 1, 1, 3, 20, 20, 38, 39, 40, 40, 41), how=config(tensors[0], 16, 16))


@pytest.mark.parametrize("bounds", [[0, 999], [-5, 7, 90], [0, 60, 30, 90], [40, 50], [0]])
def test_bounds_that_are_none(bounds):
    """Nothing outside is touched, and what no sequence holds is zero."""
    tensors = problem(1, 90, 90)
    got = run(kernel_sequence, *tensors, int32(*bounds), PLAIN, config(tensors[0]))
    assert all(t.isfinite().all() for t in got)
    if bounds[0] == 40:
        out = got[0][0].flatten(1).any(1)
        assert out[40:50].all() and not out[:40].any() and not out[50:].any()


def test_any_strides():
    tensors = problem(2, 20, 20)
    turned = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in tensors]
    spread = [torch.stack([t, t], -1)[..., 0] for t in tensors]
    want = run(kernel_sequence, *tensors, None, PLAIN, config(tensors[0]))
    for other in (turned, spread):
        got = run(kernel_sequence, *other, None, PLAIN, config(tensors[0]))
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_nan_stays_in_its_sequence_and_after_its_position():
    bounds = int32(0, 40, 90)
    tensors = problem(1, 90, 90)
    clean = run(kernel_sequence, *tensors, bounds, PLAIN, config(tensors[0]))
    for t in tensors[:3]:
        t[:, 60] = torch.nan
    dirty = run(kernel_sequence, *tensors, bounds, PLAIN, config(tensors[0]))
    for i, (a, b) in enumerate(zip(clean, dirty)):
        a, b = (t.transpose(1, 2) if i == 1 else t for t in (a, b))
        assert torch.equal(a[:, :40], b[:, :40]) and b[:, 60].isnan().all()


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_scores_stay_finite(scale):
    tensors = problem(1, 40, 40)
    got = run(kernel_sequence, *tensors, None, (None, scale, 9, 2), config(tensors[0]))
    assert all(t.isfinite().all() for t in got[:2])


@pytest.mark.parametrize("rows, queries, keys", [(0, 3, 3), (2, 0, 0), (1, 0, 4)])
def test_empty(rows, queries, keys):
    tensors = problem(rows, queries, keys)
    got = run(kernel_sequence, *tensors, None, PLAIN, config(tensors[0]))
    assert [t.shape for t in got[2:]] == [t.shape for t in tensors[:3]]
    assert not any(t.any() for t in got)
