"""The error rule itself: what it lets pass, and what it stops."""

import math

import pytest
import torch

from fastattn.testing.compare import assert_close, errors, floor

TYPES = (torch.float32, torch.bfloat16, torch.float16)
TRUTH = torch.linspace(-1, 1, 65, dtype=torch.float64)


def off_by(error):
    """A result in float32 of which one element is off by so much."""
    x = TRUTH.float()
    x[40] += error
    return x


def test_exact_passes():
    assert_close(TRUTH.float(), TRUTH.float(), TRUTH)


def test_twice_the_error_of_base_passes():
    assert_close(off_by(0.2), off_by(0.1), TRUTH)
    assert_close(off_by(-0.2), off_by(0.1), TRUTH)


def test_more_than_twice_the_error_of_base_fails():
    with pytest.raises(AssertionError, match=r"dq: error 0.201 is over 0.2.*same type: 0.1"):
        assert_close(off_by(0.201), off_by(0.1), TRUTH, "dq")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_exact_base_leaves_a_floor(dtype):
    exact = torch.ones(3, dtype=dtype)
    truth = exact.double()
    ulp = torch.finfo(dtype).eps
    assert_close(exact + ulp, exact, truth)
    with pytest.raises(AssertionError, match="error"):
        assert_close(exact + 64 * ulp, exact, truth)


def test_the_floor_grows_with_the_result_but_not_below_one():
    assert floor(torch.float32, 1000 * TRUTH) == 1000 * floor(torch.float32, TRUTH)
    assert floor(torch.float32, TRUTH / 1000) == floor(torch.float32, TRUTH)
    assert floor(torch.float32, torch.tensor([-math.inf, 0.5])) == floor(torch.float32, TRUTH)


def test_a_wider_result_is_held_to_the_inputs_type():
    lse = off_by(5e-3)
    assert_close(lse, TRUTH.float(), TRUTH, "lse", torch.bfloat16)
    with pytest.raises(AssertionError, match="lse: error"):
        assert_close(lse, TRUTH.float(), TRUTH, "lse")


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_specials_must_stand_where_they_do_in_the_truth(special):
    with_it, without = off_by(special), TRUTH.float()
    truth_with_it = with_it.double()
    assert_close(with_it, with_it, truth_with_it)
    for x, truth in ((with_it, TRUTH), (without, truth_with_it), (with_it.roll(1), truth_with_it)):
        with pytest.raises(AssertionError, match="differs from the truth at"):
            assert_close(x, without, truth)


def test_the_sign_of_infinity_counts():
    with pytest.raises(AssertionError, match="isposinf differs"):
        assert_close(off_by(math.inf), TRUTH.float(), off_by(-math.inf).double())


def test_the_finite_part_is_compared_beside_an_infinity():
    truth = TRUTH.clone()
    truth[0] = -math.inf
    x = off_by(0.5)
    x[0] = -math.inf
    with pytest.raises(AssertionError, match=r"error 0\.5"):
        assert_close(x, truth.float(), truth)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_a_broken_base_excuses_nothing(special):
    with pytest.raises(AssertionError, match="error"):
        assert_close(off_by(0.5), off_by(special), TRUTH)


def test_shapes_must_be_the_same():
    with pytest.raises(AssertionError, match="differ"):
        assert_close(TRUTH.float()[:-1], TRUTH.float(), TRUTH)
    with pytest.raises(AssertionError, match="shapes differ"):
        errors(TRUTH.float()[None], TRUTH.float(), TRUTH)


def test_empty_results_pass():
    nothing = torch.zeros(0, 3)
    assert_close(nothing, nothing, nothing.double())


def test_errors_are_what_they_say():
    found = errors(off_by(0.25), off_by(0.5), TRUTH)
    assert found.ours == pytest.approx(0.25) and found.base == pytest.approx(0.5)
    assert found.allowed == pytest.approx(1.0 + floor(torch.float32, TRUTH))
