"""Orders of convergence fitted to errors whose order is known."""

import numpy as np
import pytest

from bdl_bench.verify.lambda_sweep import QUADRATIC, fit_order

LAMS = np.array([3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6])
ROUND_OFF = 1e-13 / LAMS * np.array([1.1, 0.8, 1.3, 0.7, 1.2, 0.9, 1.4, 0.6, 1.0])


@pytest.mark.parametrize(("difference", "order"), [("forward", 1), ("central", 2)])
@pytest.mark.parametrize("constant", [0.01, 0.3, 2.0])
def test_the_order_is_found_between_the_nonlinear_range_and_round_off(difference, order, constant):
    errors = constant * LAMS**order * (1 + (20 * LAMS) ** order) + ROUND_OFF
    found = fit_order(LAMS, errors)
    assert found.slope == pytest.approx(order, abs=0.1)
    assert found.as_expected(difference)
    assert found.constant == pytest.approx(constant, rel=0.5)
    assert max(found.lams) < LAMS[0] or constant * LAMS[0] < 1


def test_an_order_of_another_kind_is_not_taken_for_the_expected_one():
    assert not fit_order(LAMS, 0.3 * LAMS).as_expected("central")
    assert not fit_order(LAMS, 0.3 * LAMS**2).as_expected("forward")
    assert not fit_order(LAMS, 0.3 * LAMS**0.5).as_expected("forward")


def test_a_quadratic_refit_has_no_slope():
    found = fit_order(LAMS, np.full(len(LAMS), 0.9 * QUADRATIC))
    assert (found.slope, found.note) == (None, "quadratic")
    assert found.as_expected("forward")
    assert found.as_expected("central")


def test_a_plateau_is_not_quadratic_and_has_no_order():
    assert not fit_order(LAMS, np.full(len(LAMS), 1e-3)).as_expected("central")


def test_steps_that_raised_are_left_out():
    errors = [None, None, *(0.3 * LAMS[2:] ** 2)]
    found = fit_order(LAMS, errors)
    assert found.slope == pytest.approx(2)
    assert max(found.lams) == LAMS[2]


@pytest.mark.parametrize("errors", [[None] * 9, [0.1, *[None] * 8], [0.1, 0.01, *[None] * 7], []])
def test_too_few_steps_have_no_order_and_a_note(errors):
    found = fit_order(LAMS[: len(errors)], errors)
    assert found.slope is None
    assert "fewer than" in found.note
    assert not found.as_expected("central")
