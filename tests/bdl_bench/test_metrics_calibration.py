"""Calibration errors against hand-worked bins, loops over rows, and the mean that a debiased estimator must have."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from bdl_bench.metrics import calibration, regression


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.fixture
def predictions():
    """Confidences with ties, and exact ones, with their hits."""
    rng = np.random.default_rng(0)
    confidence = np.round(rng.beta(4, 1, size=203), 2)
    return confidence, (rng.uniform(size=203) < confidence**2).astype(float)


def bins_one_by_one(index):
    return [np.flatnonzero(index == b) for b in np.unique(index)]


def test_the_debiased_error_matches_the_hand_worked_value():
    confidence = np.array([0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    correct = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    # Two bins of three. Below: confidence 0.7, accuracy 1/3; above: 2.9/3, 2/3. Both variances are (1/3)(2/3)/2 = 1/9.
    below = (0.7 - 1 / 3) ** 2 - 1 / 9
    above = (2.9 / 3 - 2 / 3) ** 2 - 1 / 9
    assert calibration.debiased_ece(confidence, correct, n_bins=2) == near(np.sqrt((below + above) / 2))


def test_a_negative_debiased_square_is_an_error_of_zero():
    assert calibration.debiased_ece(np.full(4, 0.5), np.array([1.0, 0.0, 1.0, 0.0])) == 0.0


def test_bins_of_the_debiased_error_have_two_rows_unless_there_is_but_one():
    assert calibration.debiased_ece(np.array([0.5, 1.0]), np.array([0.0, 1.0])) == near(
        np.sqrt(max((0.75 - 0.5) ** 2 - 0.25, 0))
    )
    assert calibration.debiased_ece(np.array([0.9]), np.array([0.0])) == 0.0


def test_the_debiased_error_follows_its_sum_over_bins(predictions):
    confidence, correct = predictions
    edges = [part[-1] for part in np.array_split(np.sort(confidence), 15)[:-1]]
    index = np.array([sum(c > edge for edge in edges) for c in confidence])
    square = 0.0
    for rows in bins_one_by_one(index):
        accuracy = correct[rows].mean()
        gap = (confidence[rows].mean() - accuracy) ** 2
        square += len(rows) / 203 * (gap - accuracy * (1 - accuracy) / (len(rows) - 1)) if len(rows) > 1 else 0.0
    assert calibration.debiased_ece(confidence, correct) == near(np.sqrt(square))


def test_the_square_of_the_debiased_error_has_no_bias_where_the_plug_in_has():
    rng = np.random.default_rng(1)
    confidence = np.repeat([0.6, 0.9], 30)
    truth = np.repeat([0.4, 0.6], 30)
    correct = (rng.uniform(size=(20_000, 60)) < truth).astype(float)
    square = np.mean([calibration.debiased_ece(confidence, hits, n_bins=2) ** 2 for hits in correct])
    exact = (0.2**2 + 0.3**2) / 2
    hits = correct.reshape(-1, 2, 30).mean(-1)
    plug_in = np.square(np.array([0.6, 0.9]) - hits).mean()
    assert square == pytest.approx(exact, rel=0.01)
    assert plug_in == pytest.approx(exact + (0.24 + 0.24) / 2 / 30, rel=0.01)


@pytest.mark.parametrize("error", [calibration.ece, calibration.adaptive_ece, calibration.debiased_ece])
def test_no_error_depends_on_the_order_of_tied_rows(error, predictions):
    order = np.random.default_rng(2).permutation(203)
    assert error(*(values[order] for values in predictions)) == near(error(*predictions))


def test_the_bins_have_the_error_of_the_function(predictions):
    assert calibration.equal_width_bins(*predictions).error == near(calibration.ece(*predictions))
    assert calibration.equal_mass_bins(*predictions).error == near(calibration.adaptive_ece(*predictions))


def test_rows_of_equal_confidence_stay_in_one_bin():
    confidence = np.array([0.5, 1.0, 1.0, 1.0, 1.0, 1.0])
    bins = calibration.equal_mass_bins(confidence, np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]), n_bins=3)
    assert bins.count.tolist() == [6]
    apart = calibration.equal_mass_bins(confidence[:2], np.array([0.0, 1.0]), n_bins=3)
    assert apart.confidence.tolist() == [0.5, 1.0]


def test_the_interval_of_a_bin_is_that_of_wilson(predictions):
    bins = calibration.equal_mass_bins(*predictions, n_bins=6)
    low, high = bins.interval(0.9)
    for place, (accuracy, count) in enumerate(zip(bins.accuracy, bins.count, strict=True)):
        expected = binomtest(round(accuracy * count), int(count)).proportion_ci(0.9, method="wilson")
        assert (low[place], high[place]) == (near(expected.low), near(expected.high))


def test_the_classwise_error_is_the_mean_of_the_classes_alone():
    rng = np.random.default_rng(4)
    probs, targets = rng.dirichlet(np.ones(3), size=90), rng.integers(3, size=90)
    alone = [calibration.ece(probs[:, c], (targets == c).astype(float), n_bins=7) for c in range(3)]
    assert calibration.classwise_ece(probs, targets, n_bins=7) == near(np.mean(alone))


def test_the_pit_of_the_prediction_itself_is_uniform_and_its_coverage_nominal():
    quantiles = (np.arange(2000) + 0.5) / 2000
    mean, variance = np.full((2000, 1), 1.5), np.full((2000, 1), 0.49)
    targets = norm.ppf(quantiles, 1.5, 0.7)[:, None]
    assert regression.pit(mean, variance, targets)[:, 0] == near(quantiles)
    needed = regression.central_level(mean, variance, targets).reshape(-1)
    assert regression.coverage_curve(needed) == pytest.approx(regression.CURVE_LEVELS, abs=1e-3)
    assert regression.coverage_error(needed) < 1e-3


def test_the_coverage_curve_agrees_with_coverage_at_a_level():
    rng = np.random.default_rng(5)
    arrays = rng.normal(size=(50, 2)), rng.gamma(2, size=(50, 2)), rng.normal(size=(50, 2))
    needed = regression.central_level(*arrays).reshape(-1)
    for level, share in zip(regression.CURVE_LEVELS, regression.coverage_curve(needed), strict=True):
        assert share == near(regression.coverage(*arrays, level=level).mean())


def test_the_coverage_error_of_a_variance_of_nothing_is_the_mean_level():
    # All targets lie outside of every interval: |0 − level| averages (5 % + ... + 95 %)/19 = 50 %.
    assert regression.coverage_error(np.ones(8)) == near(0.5)


def test_rows_of_equal_confidence_are_ordered_by_a_finer_score():
    confidence, correct = np.full(4, 0.6), np.array([1.0, 1.0, 0.0, 0.0])
    order = np.array([4.0, 3.0, 2.0, 1.0])  # as log-odds that all round to 0.6
    assert calibration.adaptive_ece(confidence, correct, n_bins=2) == near(0.1)  # one bin of accuracy 1/2
    assert calibration.adaptive_ece(confidence, correct, order, n_bins=2) == near((0.4 + 0.6) / 2)
    assert calibration.equal_mass_bins(confidence, correct, order, n_bins=2).error == near(0.5)
    # Each bin has no spread: nothing is subtracted.
    assert calibration.debiased_ece(confidence, correct, order, n_bins=2) == near(np.sqrt((0.4**2 + 0.6**2) / 2))
