"""The chunk scan's Triton kernels, interpreted, against its reference."""

from dataclasses import replace

import pytest
import torch
from scans import INPUTS, inputs

from nemokernels import testing
from nemokernels.ops.ssd import kernel, op, ref

INF = float("inf")
# Chunks of two tiles, whose scores are one square for float32 and three for float16.
CONFIG = op.Config("triton", chunk=16, span=32, square=16)
CONFIGS = {torch.float16: CONFIG, torch.float32: replace(CONFIG, square=32)}
GRADS = ("dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dinitial")


CHUNKS = (16, 5, 8, 11, 23, 32, 64)  # every one is as good a reference


def compare(made, config=None, softplus=True, limit=(0.0, INF)):
    """Forward and backward of the kernels within the budget of the reference; returns them."""
    config = config or CONFIGS[made["x"].dtype]
    args, options = [made[name] for name in INPUTS], (softplus, *limit)
    got = kernel.forward(*args, *options, config=config)
    exact = ref.forward(*testing.to_double(args), 16, *options, None)
    low = zip(*(ref.forward(*args, n, *options, None) for n in CHUNKS))
    for name, *three in zip(
        ("out", "final", "ungated"), got, exact, map(testing.worst, exact, low)
    ):
        testing.assert_matches(*three, name)
        assert three[0].dtype == three[2].dtype and three[0].is_contiguous()

    # States from outside are representable: how <G, S> rounds them is not the reference's way.
    dfinal = torch.randn_like(got[1]).to(got[0].dtype).float()
    args = [torch.randn_like(got[0]), dfinal, *args, got[2]]
    grads = kernel.backward(*args, *options, config=config)
    exact = ref.backward(*testing.to_double(args), 16, *options, None)
    low = zip(*(ref.backward(*args, n, *options, None) for n in CHUNKS))
    for name, *three in zip(GRADS, grads, exact, map(testing.worst, exact, low)):
        testing.assert_matches(*three, name)
        assert three[0].dtype == three[2].dtype and three[0].is_contiguous()
    return got, grads


SEQ_IDX = [[0] * 5 + [-1] * 3 + [0] * 4 + [3] * 10 + [4] * 11 + [-1] * 4,
           [-1] * 2 + [2] + [3] * 17 + [-1] * 13 + [3, 4, -1, 5]]  # fmt: skip
BOUNDS = [0, 5, 5, 23, 33]  # and four tokens of slack
CASES = {
    "all options": dict(batch=2, heads=4, groups=2),
    "none": dict(without=("D", "z", "dt_bias", "initial_states")),
    "no gate": dict(without=("z",), per_channel=True),
    "one token": dict(length=1, heads=16, groups=2),
    "whole chunks": dict(length=32),
    "odd group": dict(heads=3, without=("z",)),
    "group per head": dict(groups=2, per_channel=True),
    "padded blocks": dict(width=80, state=24, length=20, per_channel=True),
    "tiny blocks": dict(width=3, state=5, length=20, heads=6, groups=2),
    "sequences": dict(batch=2, heads=4, seq_idx=SEQ_IDX),
    "sequences, no gate": dict(seq_idx=SEQ_IDX[:1], without=("z", "initial_states")),
    "packed": dict(cu_seqlens=BOUNDS),
    "packed, padding": dict(cu_seqlens=BOUNDS, seq_idx=SEQ_IDX[:1], without=("z",)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype):
    compare(inputs(**CASES[case], dtype=dtype))


@pytest.mark.parametrize("case", ["no gate", "padded blocks", "one token"])
def test_descriptors(case):
    """The same bits as through pointers, which test_matches_reference holds to the reference."""
    made = inputs(**{**CASES[case], "heads": 2, "groups": 1}, dtype=torch.float16)
    x, *rest = args = [made[n] for n in INPUTS]
    sizes = kernel.layout(x, made["B"], None, None, chunk=16, block_p=64, tma=True)
    assert kernel._settle(sizes, x, made["B"]).TMA
    dout, results = torch.randn_like(x), []
    for tma_met in (None, False, True):
        config = CONFIG if tma_met is None else replace(CONFIG, tma=True, tma_met=tma_met)
        got = kernel.forward(*args, True, 0.0, INF, config=config)
        grads = kernel.backward(dout, got[1], *args, got[2], True, 0.0, INF, config=config)
        results.append((*got, *grads))
    assert all(map(torch.equal, *results[:2])) and all(map(torch.equal, *results[::2]))


@pytest.mark.parametrize("case", ["no gate", "padded blocks", "packed, padding"])
@pytest.mark.parametrize("tma", [False, True])
def test_joined_gradients_have_the_same_bits(case, tma):
    made = inputs(**{**CASES[case], "heads": 2}, dtype=torch.float16)
    args, config = [made[n] for n in INPUTS], replace(CONFIG, tma=tma, tma_met=tma)
    out, final, ungated = kernel.forward(*args, True, 0.0, INF, config=config)
    args = [torch.randn_like(out), final, *args, ungated, True, 0.0, INF]
    dx, ddt, dA, dB, dC, *rest = kernel.backward(*args, config=config)
    got = kernel.backward(*args, config=config, joined=True)
    whole = torch.cat([t.flatten(2) for t in (dx, dB, dC)], -1)
    assert all(map(torch.equal, got, (whole, ddt, dA, *rest)))
    assert got[0].is_contiguous()


def test_descriptors_only_where_aligned():
    """Width 3 in float16: rows are six bytes."""
    compare(inputs(width=3, length=5, dtype=torch.float16), replace(CONFIG, tma=True))


@pytest.mark.parametrize(
    ("case", "segment", "dtype"),
    [("none", 32, torch.float32), ("sequences", 32, torch.float32),
     ("sequences, no gate", 16, torch.float16), ("packed", 16, torch.float16)],
)  # fmt: skip
def test_segments(case, segment, dtype):
    config = replace(CONFIGS[dtype], segment=segment)
    if segment == 16:
        config = replace(config, span=16)
    compare(inputs(**CASES[case], dtype=dtype), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_planned_configuration(dtype):
    """What plan() returns for Nemotron's head, state and chunk sizes, on one group."""
    made = inputs(length=200, heads=4, width=64, state=128, dtype=dtype)
    compare(made, op.plan(1, 200, 4, 64, 128, (dtype,), None, ("triton",), (9, 0), 132))


def test_steps_without_softplus_and_with_limits():
    made = inputs()
    made["dt"][:, ::3] = 0
    compare({**made, "dt_bias": None}, softplus=False)
    compare(made, limit=(0.02, 0.05))
    made["dt"][0, :4] = torch.tensor([-60.0, -5, 19.5, 20.5])[:, None]
    compare({**made, "dt_bias": None, "z": None})


def test_strong_decay_neither_overflows_nor_becomes_nan():
    made = inputs(heads=6)
    made["A"] *= 1e30
    compare(made)


def test_any_strides():
    made = inputs(without=("z",))
    for name in ("x", "B", "C"):
        made[name] = made[name].transpose(1, 3).contiguous().transpose(1, 3)
    made["dt"] = made["dt"].transpose(0, 1).contiguous().transpose(0, 1)
    compare(made)


@pytest.mark.parametrize("shape", [dict(length=0), dict(batch=0), dict(cu_seqlens=[0]),
                                   dict(length=0, cu_seqlens=[0, 0])])  # fmt: skip
def test_nothing(shape):
    (out, final, _), grads = compare(inputs(**shape))
    assert (out == 0).all() and all((g == 0).all() for g in grads[1:6])


def test_packed_equals_separate_bit_for_bit():
    """And tokens after the last sequence, all NaN, reach nothing."""
    made = inputs(**CASES["packed"], dtype=torch.float16)
    per_token, end = ("x", "dt", "B", "C", "z"), BOUNDS[-1]
    for name in per_token:
        made[name] = made[name].clone()
        made[name][:, end:] = torch.nan
    args, options = [made[n] for n in INPUTS], (True, 0.0, INF)
    got = kernel.forward(*args, *options, config=CONFIG)
    douts = torch.randn_like(got[0]), torch.randn_like(got[1])
    douts[0][:, end:] = torch.nan
    grads = kernel.backward(*douts, *args, got[2], *options, config=CONFIG)
    assert (got[0][:, end:] == 0).all() and all((grads[i][:, end:] == 0).all() for i in (0, 1, 3))
    for n, (lo, hi) in enumerate(zip(BOUNDS[:-1], BOUNDS[1:])):
        own = {**made, **{k: made[k][:, lo:hi] for k in per_token}, "cu_seqlens": None}
        own["initial_states"] = made["initial_states"][n : n + 1]
        own = [own[k] for k in INPUTS]
        alone = kernel.forward(*own, *options, config=CONFIG)
        assert torch.equal(got[0][:, lo:hi], alone[0])
        assert torch.equal(got[1][n : n + 1], alone[1])
        one = kernel.backward(douts[0][:, lo:hi], douts[1][n : n + 1], *own, alone[2], *options,
                              config=CONFIG)  # fmt: skip
        for i in (0, 1, 3, 4, 6):
            assert torch.equal(grads[i][:, lo:hi], one[i])
        assert torch.equal(grads[8][n : n + 1], one[8])


def test_padding_is_zero_where_the_state_is_not_finite():
    made = inputs(seq_idx=SEQ_IDX[:1], without=("z",))
    made["initial_states"][:] = torch.nan
    args, options, pad = [made[n] for n in INPUTS], (True, 0.0, INF), made["seq_idx"] < 0
    out, final, ungated = kernel.forward(*args, *options, config=CONFIGS[torch.float32])
    nan = torch.full_like(final, torch.nan)
    grads = kernel.backward(out, nan, *args, ungated, *options, config=CONFIGS[torch.float32])
    assert out[:, 0].isnan().all() and grads[0][:, -5].isnan().all()
    assert all((t[pad] == 0).all() for t in (out, *(grads[i] for i in (0, 1, 3, 4))))


def test_malformed_bounds_stay_inside_the_tensors():
    made = inputs(cu_seqlens=[0, 90, -7, 20])
    kernel.forward(*[made[n] for n in INPUTS], True, 0.0, INF, config=CONFIGS[torch.float32])
