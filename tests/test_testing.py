"""What judges every result is judged here."""

import pytest
import torch

from nemokernels import testing

WANT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
LOW = WANT.bfloat16() * 1.01  # its error is the budget's larger part


def test_twice_the_error_of_plain_torch_is_allowed_and_no_more():
    budget = testing.error_budget(WANT, LOW)
    assert budget == 2 * (LOW.double() - WANT).abs().max() + 2 * 2**-6
    assert testing.assert_matches(WANT + 0.9 * budget, WANT, LOW) == pytest.approx(0.9)
    with pytest.raises(AssertionError, match="output: error .* exceeds the budget"):
        testing.assert_matches(WANT + 1.1 * budget, WANT, LOW)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_must_be_where_it_belongs(value):
    want, low = WANT.clone(), LOW.clone()
    want[1] = low[1] = value
    assert testing.assert_matches(want, want, low) == 0
    with pytest.raises(AssertionError, match="masks differ"):
        testing.assert_matches(WANT, want, low)
    with pytest.raises(AssertionError, match="`low` is not finite where `reference` is"):
        testing.assert_matches(WANT, WANT, low)


def test_worst_of_several_references():
    near, far = WANT.bfloat16(), WANT.bfloat16() * 1.1
    assert testing.worst(WANT, [near, far, LOW]) is far
    assert testing.worst(WANT, [near]) is near
    empty = torch.empty(0)
    assert testing.worst(empty.double(), [empty, empty.clone()]) is empty
    wrong = near.clone()
    wrong[0] = torch.nan  # no budget: found, not passed over
    assert testing.worst(WANT, [far, wrong]) is wrong
    want = WANT.clone()
    want[1] = torch.inf
    same = want.bfloat16()
    assert testing.worst(want, [same, same * 1.1]) is not same
