"""The selective scan's Triton kernels, interpreted, against its reference."""

import pytest
import torch
from selective_scans import low_gradients

from nemokernels import testing
from nemokernels.ops.selective_scan import kernel, op, ref

TILE = op.Tile(8, 4, 4)
INPUTS = "u delta A B C D z delta_bias initial_states cu_seqlens".split()
GRADS = "du ddelta dA dB dC dD dz ddelta_bias dinitial".split()


def inputs(batch=1, length=9, dim=12, groups=1, state=4, dtype=torch.float32, without=(),
           cu_seqlens=None):  # fmt: skip
    """Inputs of the operator by name; u, z, B and C are slices of wider tensors."""

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape).to(dtype)

    wide = torch.float32
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    u, z = randn(batch, length, 2 * dim + 1).split([dim, dim + 1], -1)
    B, C = randn(batch, groups, 2 * state, length).split(state, 2)
    made = dict(
        u=u,
        delta=randn(batch, dim, length).transpose(1, 2),
        A=-1 - 15 * torch.rand(dim, state),
        B=B.permute(0, 3, 1, 2),
        C=C.permute(0, 3, 1, 2),
        D=randn(dim, dtype=wide),
        z=z[..., 1:],
        delta_bias=torch.rand(dim) * 4 - 4,
        initial_states=randn(rows, dim, state, dtype=wide),
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens).int(),
    )
    return {**made, **dict.fromkeys(without)}


def compare(made, softplus=True, tile=TILE):
    """Forward and backward of the kernels within the budget of the reference; returns them."""
    args = [*(made[name] for name in INPUTS), softplus]
    with testing.poisoned_empty():
        got = kernel.forward(*args, tile)
    exact, low = ref.forward(*testing.to_double(args)), ref.forward(*args)
    for name, *three in zip(("out", "last"), got, exact, low):
        testing.assert_matches(*three, name)
        assert three[0].dtype == three[2].dtype and three[0].is_contiguous()
    args = [torch.randn_like(got[0]), torch.randn_like(got[1]), *args]
    with testing.poisoned_empty():
        grads = kernel.backward(*args, tile)
    exact = ref.backward(*testing.to_double(args))
    for name, *three in zip(GRADS, grads, exact, low_gradients(args, exact)):
        testing.assert_matches(*three, name)
        assert three[0].dtype == three[2].dtype and three[0].is_contiguous()
    return got, grads


CASES = {
    "all options": dict(batch=2),
    "none": dict(without=("D", "z", "delta_bias", "initial_states")),
    "groups of odd width": dict(groups=3, dim=15, length=6, state=3),
    "one token": dict(length=1),
    "whole tiles": dict(length=8, dim=4, without=("z",)),
    "no tokens": dict(length=0),
    "packed": dict(length=13, cu_seqlens=[0, 4, 4, 5, 11]),  # and two tokens of slack
    "packed, no initial state": dict(cu_seqlens=[0, 5, 9], without=("initial_states", "D")),
    "no sequence": dict(length=3, cu_seqlens=[0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype):
    compare(inputs(**CASES[case], dtype=dtype))


def test_without_softplus():
    made = inputs()
    made["delta"] = made["delta"].abs() / 4
    made["delta_bias"] = made["delta_bias"].exp()
    compare(made, softplus=False)


def test_large_steps():
    """Above softplus's threshold, where its gradient is one."""
    made = inputs(length=6)
    made["delta"] = made["delta"] * 4 + 20
    made["A"] = made["A"] / 200
    compare(made)


def test_planned_tiles():
    """What plan() returns for Mamba's state size, and one tile more."""
    config = op.plan(16, "", ("triton",))
    compare(inputs(length=17, dim=16, state=16), tile=config.backward)
    compare(inputs(length=17, dim=8, state=16, without=("z",)), tile=config.forward)


def test_infinity_and_nan_stay_in_their_channel():
    """State size 3 leaves a masked column, which must not turn an infinity into NaN."""
    made = inputs(length=6, dim=4, state=3, without=("z", "D"))
    made["u"], made["B"], made["C"] = made["u"].clone(), made["B"].abs(), made["C"].abs()
    made["u"][0, 2, 1], made["u"][0, 3, 2] = float("inf"), float("nan")
    args = [*(made[name] for name in INPUTS), True]
    for mine, want in zip(kernel.forward(*args, TILE), ref.forward(*args)):
        assert torch.equal(mine.isnan(), want.isnan())
        assert torch.equal(mine.isinf(), want.isinf())
        assert not mine.isnan().all() and mine.isnan().any() and mine.isinf().any()


def test_packed_equals_separate_bit_for_bit():
    bounds = [0, 4, 4, 5, 11]
    made = inputs(length=12, cu_seqlens=bounds)
    args = [made[name] for name in INPUTS]
    out, last = kernel.forward(*args, True, TILE)
    dout = torch.randn_like(out)
    grads = kernel.backward(dout, last, *args, True, TILE)
    assert (out[:, 11:] == 0).all() and (grads[0][:, 11:] == 0).all()
    for n, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:])):
        own = [a[:, lo:hi] if i in (0, 1, 3, 4, 6) else a for i, a in enumerate(args)]
        own[8], own[9] = args[8][n : n + 1], None
        alone = kernel.forward(*own, True, TILE)
        assert torch.equal(out[:, lo:hi], alone[0]) and torch.equal(last[n : n + 1], alone[1])
        own = kernel.backward(dout[:, lo:hi], last[n : n + 1], *own, True, TILE)
        for at in (0, 1, 3, 4, 6):
            assert torch.equal(grads[at][:, lo:hi], own[at])
        assert torch.equal(grads[8][n : n + 1], own[8])
