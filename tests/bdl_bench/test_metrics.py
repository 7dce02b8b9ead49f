"""Metrics against values worked by hand, and against scipy and scikit-learn where they have them."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import logit
from scipy.stats import entropy, linregress, norm
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, mean_squared_error

from bdl_bench.metrics import METRICS, agreement, calibration, classification, evaluate, regression, worst_points
from bdl_bench.metrics.log_space import logs

PROBS = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]])
TARGETS = np.array([0, 1, 1])


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.fixture
def random_classes():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), size=200)
    return probs, rng.integers(4, size=200)


@pytest.fixture
def random_gaussians():
    rng = np.random.default_rng(1)
    return rng.normal(size=(40, 2)), rng.gamma(2, size=(40, 2)), rng.normal(size=(40, 2))


def test_nll_and_brier_match_the_hand_worked_values():
    assert classification.nll(logs(PROBS), TARGETS) == near(-np.log([0.7, 0.1, 0.5]))
    assert classification.brier(logs(PROBS), TARGETS) == near(
        [0.09 + 0.04 + 0.01, 0.01 + 0.81 + 0.64, 0.0625 * 2 + 0.25]
    )
    assert classification.correct(logs(PROBS), TARGETS).tolist() == [1, 0, 1]


def test_class_scores_match_sklearn(random_classes):
    probs, targets = random_classes
    assert classification.nll(logs(probs), targets).mean() == near(log_loss(targets, probs, labels=range(4)))
    assert classification.correct(logs(probs), targets).mean() == near(accuracy_score(targets, probs.argmax(-1)))
    two = probs[:, :1]
    pairs, labels = classification.as_two_classes(logit(two), (targets == 0)[:, None].astype(float))
    assert classification.brier(pairs, labels).mean() == near(2 * brier_score_loss(targets == 0, two[:, 0]))


def test_a_class_given_probability_zero_scores_infinity_not_a_large_number():
    assert classification.nll(logs(np.array([[1.0, 0.0]])), np.array([1]))[0] == np.inf


def test_ece_matches_the_hand_worked_value():
    confidence = np.array([0.55, 0.58, 0.95, 0.92])
    correct = np.array([1.0, 0.0, 1.0, 1.0])
    by_hand = 2 / 4 * abs(0.565 - 0.5) + 2 / 4 * abs(0.935 - 1)
    assert calibration.ece(confidence, correct, n_bins=10) == near(by_hand)
    assert calibration.adaptive_ece(confidence, correct, n_bins=2) == near(by_hand)


def test_a_confidence_of_exactly_one_is_in_the_last_bin():
    bins = calibration.equal_width_bins(np.array([1.0, 0.95]), np.array([1.0, 0.0]), n_bins=10)
    assert bins.count.tolist() == [2]
    assert calibration.ece(np.array([1.0, 0.95]), np.array([1.0, 0.0]), n_bins=10) == near(0.975 - 0.5)


def test_an_edge_belongs_to_the_bin_below_it():
    bins = calibration.equal_width_bins(np.array([0.5, 0.75, 0.0, 0.4]), np.ones(4), n_bins=4)
    assert bins.confidence == near([0.0, 0.45, 0.75])


def test_equal_mass_bins_hold_equally_many():
    bins = calibration.equal_mass_bins(np.random.default_rng(0).uniform(size=100), np.ones(100), n_bins=15)
    assert bins.count.sum() == 100
    assert np.ptp(bins.count) <= 1


def test_a_perfectly_calibrated_predictor_has_no_calibration_error():
    assert calibration.ece(np.full(4, 0.75), np.array([1.0, 1.0, 1.0, 0.0])) == near(0.0)


def test_gaussian_nll_matches_scipy(random_gaussians):
    mean, variance, targets = random_gaussians
    expected = -norm.logpdf(targets, mean, np.sqrt(variance)).sum(-1)
    assert regression.nll(mean, variance, targets) == near(expected)


def test_squared_error_matches_sklearn(random_gaussians):
    mean, _, targets = random_gaussians
    assert regression.squared_error(mean, targets).mean() == near(mean_squared_error(targets, mean))


def test_crps_equals_its_defining_integral():
    mean, s, y = 0.3, 0.8, 1.1
    below = quad(lambda t: norm.cdf(t, mean, s) ** 2, -np.inf, y, epsabs=1e-13)[0]
    above = quad(lambda t: norm.sf(t, mean, s) ** 2, y, np.inf, epsabs=1e-13)[0]
    crps = regression.crps(np.array([[mean]]), np.array([[s**2]]), np.array([[y]]))
    assert crps[0] == pytest.approx(below + above, abs=1e-9)


def test_crps_at_the_mean_is_the_known_constant():
    zero, one = np.zeros((1, 1)), np.ones((1, 1))
    assert regression.crps(zero, one, zero)[0] == near((np.sqrt(2) - 1) / np.sqrt(np.pi))


def test_crps_follows_its_closed_form(random_gaussians):
    mean, variance, targets = random_gaussians
    s = np.sqrt(variance)
    z = (targets - mean) / s
    expected = s * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    assert regression.crps(mean, variance, targets) == near(expected.mean(-1))


def test_entropies_match_scipy(random_classes, random_gaussians):
    probs, _ = random_classes
    assert classification.entropy(logs(probs)) == near(entropy(probs, axis=-1))
    _, variance, _ = random_gaussians
    assert regression.entropy(variance) == near(norm.entropy(scale=np.sqrt(variance)).sum(-1))
    assert classification.entropy(logs(np.array([[1.0, 0.0]])))[0] == 0.0


def test_coverage_and_width_use_the_central_interval():
    mean, variance = np.zeros((3, 1)), np.full((3, 1), 4.0)
    targets = np.array([[0.0], [3.9], [-4.0]])
    assert regression.coverage(mean, variance, targets, level=0.95).tolist() == [1, 1, 0]
    assert regression.width(variance, level=0.95) == near(2 * 2 * norm.ppf(0.975))


def test_agreement_of_a_rescaled_variance_is_perfect_in_rank_and_off_in_level():
    exact = np.array([[1.0, 2.0], [3.0, 4.0]])
    found = agreement(1.5 * exact, exact)
    assert (found.spearman, found.mean_ratio, found.relative_rmse) == (near(1.0), near(1.5), near(0.5))


def test_agreement_matches_hand_worked_ranks():
    exact = np.array([[1.0], [2.0], [3.0], [4.0]])
    found = agreement(np.array([[2.0], [1.0], [3.0], [4.0]]), exact)
    assert found.spearman == near(1 - 6 * 2 / (4 * 15))
    assert found.mean_ratio == near((2 + 0.5 + 1 + 1) / 4)


def test_a_constant_variance_has_no_rank_correlation_and_no_slope():
    found = agreement(np.zeros((2, 2)), np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert found.spearman is None
    assert found.slope == 0.0
    assert found.geometric_level is None
    assert agreement(np.array([1.0, 2.0]), np.ones(2)).slope is None


def test_level_and_slope_match_hand_worked_values():
    # Ratios 2, 1/2, 1: their geometric mean is 1. Variances 2, 1, 4 on 1, 2, 4: means 7/3 both.
    found = agreement(np.array([2.0, 1.0, 4.0]), np.array([1.0, 2.0, 4.0]))
    assert found.geometric_level == near(1.0)
    covariance = (1 * 2 + 2 * 1 + 4 * 4) - 3 * (7 / 3) ** 2
    assert found.slope == near(covariance / ((1 + 4 + 16) - 3 * (7 / 3) ** 2))
    # |q − 1| is 0, 0.5, 1: the 95th percentile lies nine tenths of the way from the second to the third.
    assert found.error_95 == near(0.5 + 0.9 * 0.5)


def test_the_slope_matches_scipy_and_sees_a_shift_that_level_does_not():
    rng = np.random.default_rng(3)
    exact, variance = rng.gamma(2, size=(20, 2)), rng.gamma(2, size=(20, 2))
    assert agreement(variance, exact).slope == near(linregress(exact.reshape(-1), variance.reshape(-1)).slope)
    assert agreement(exact + 0.5, exact).slope == near(1.0)
    assert agreement(0.3 * exact + 0.5, exact).slope == near(0.3)


def test_the_worst_points_are_the_furthest_ratios_in_order():
    exact = np.array([[1.0, 2.0], [4.0, 5.0]])
    found = worst_points(np.array([[1.1, 6.0], [0.0, 5.0]]), exact, k=3)
    assert found.indices.tolist() == [[0, 1], [1, 0], [0, 0]]
    assert found.ratios == near([3.0, 0.0, 1.1])
    assert len(worst_points(exact, exact).ratios) == 4


@pytest.mark.parametrize("kind", sorted(METRICS))
def test_a_metric_with_scores_is_their_mean(kind):
    rng = np.random.default_rng(2)
    mean, variance = rng.normal(size=(30, 2)), rng.gamma(2, size=(30, 2))
    if kind == "regression":
        arrays = {"mean": mean, "total_variance": variance, "targets": rng.normal(size=(30, 2))}
    elif kind == "binary":
        arrays = {"probs": rng.uniform(size=(30, 2)), "targets": rng.integers(2, size=(30, 2)).astype(float)}
    else:
        arrays = {"probs": rng.dirichlet([1, 1], size=30), "targets": rng.integers(2, size=30).astype(float)}
    values = evaluate(kind, arrays)
    assert list(values) == [metric.key for metric in METRICS[kind]]
    assert all(type(value) is float for value in values.values())
    for metric in METRICS[kind]:
        if metric.scores is not None:
            assert metric.scores(arrays).shape == (30,)
            mean_score = metric.scores(arrays).mean()
            assert values[metric.key] == near(np.sqrt(mean_score) if metric.root else mean_score)
