"""The optimal temperature against a search, against the temperature that made the labels, and at its bounds."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logit, softmax
from sklearn.metrics import log_loss

from bdl_bench.metrics import METRICS, classification, evaluate, temperature
from bdl_bench.metrics.log_space import logs
from estimators.baselines.temperature import TEMPERATURE_BOUNDS


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def labels(probs, seed):
    draws = np.random.default_rng(seed).uniform(size=len(probs))
    return (probs.cumsum(-1) < draws[:, None]).sum(-1).clip(max=probs.shape[-1] - 1)


@pytest.fixture
def overconfident():
    """Logits, and labels drawn at temperature 2.5."""
    logits = 4 * np.random.default_rng(0).normal(size=(400, 5))
    return logits, labels(softmax(logits / 2.5, axis=-1), 1)


def nll_star(arrays):
    (metric,) = (m for m in METRICS["classification"] if m.key == "cls/NLL*")
    return metric.scores(arrays)


def test_tempering_probabilities_divides_the_logits(overconfident):
    logits, targets = overconfident
    assert temperature.tempered(log_softmax(logits, axis=-1), 1.7) == near(log_softmax(logits / 1.7, axis=-1))
    expected = log_loss(targets, softmax(logits / 1.7, axis=-1), labels=range(5))
    assert temperature.nll_at(log_softmax(logits, axis=-1), targets, 1.7).mean() == near(expected)


def test_tempering_matches_hand_worked_values():
    assert np.exp(temperature.tempered(logs(np.array([[0.8, 0.2]])), 0.5)) == near(
        np.array([[0.64 / 0.68, 0.04 / 0.68]])
    )
    assert np.exp(temperature.tempered(logs(np.array([[0.5, 0.5, 0.0]])), 3.0)) == near(np.array([[0.5, 0.5, 0.0]]))


def test_temperature_one_gives_the_nll(overconfident):
    logits, targets = overconfident
    probs = softmax(logits, axis=-1)
    assert np.exp(temperature.tempered(logs(probs), 1.0)) == near(probs)
    assert temperature.nll_at(logs(probs), targets, 1.0).tolist() == classification.nll(logs(probs), targets).tolist()
    assert temperature.nll_at(logs(probs), targets, 1 + 1e-12) == near(classification.nll(logs(probs), targets))


def test_the_temperature_is_that_of_a_search_and_near_the_true_one(overconfident):
    logits, targets = overconfident
    found = temperature.optimal_temperature(log_softmax(logits, axis=-1), targets)
    searched = minimize_scalar(
        lambda t: log_loss(targets, softmax(logits / t, axis=-1), labels=range(5)), bounds=(0.5, 10), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    assert found == pytest.approx(searched.x, rel=1e-5)
    assert found == pytest.approx(2.5, rel=0.15)


def test_the_slope_at_the_optimum_is_zero(overconfident):
    logits, targets = overconfident
    probs = softmax(logits, axis=-1)
    found = temperature.optimal_temperature(logs(probs), targets)
    around = [temperature.nll_at(logs(probs), targets, found * factor).mean() for factor in (1 - 1e-3, 1, 1 + 1e-3)]
    assert around[1] < min(around[0], around[2])
    assert around[0] == pytest.approx(around[2], rel=1e-7)


def test_two_classes_have_the_hand_worked_temperature():
    # Three of four are right at probability 0.9: the best single probability is 0.75, so 9^(1/T) = 3 and T = 2.
    probs, targets = np.tile([0.9, 0.1], (4, 1)), np.array([0, 0, 0, 1])
    assert temperature.optimal_temperature(logs(probs), targets) == near(2.0)


def test_labels_that_are_always_right_determine_no_temperature_and_those_always_wrong_reach_the_bound():
    probs = np.tile([0.8, 0.2], (6, 1))
    assert temperature.optimal_temperature(logs(probs), np.zeros(6, dtype=int)) == 1.0
    assert temperature.optimal_temperature(logs(probs), np.ones(6, dtype=int)) == TEMPERATURE_BOUNDS[1]


def test_one_wrong_row_bounds_the_temperature_of_an_underconfident_method():
    # 199 of 200 right at probability 0.51: the optimum, 0.04 / log 199, is 0.0076, far below the bound.
    probs, targets = np.tile([0.51, 0.49], (200, 1)), np.array([1, *[0] * 199])
    assert temperature.optimal_temperature(logs(probs), targets) == temperature.SMALLEST_TEMPERATURE


def test_a_wrong_test_row_costs_no_more_than_before_if_every_validation_row_is_right():
    wrong = np.array([[0.999, 0.001]])
    arrays = {
        "probs": wrong, "targets": np.ones(1),
        "validation/probs": np.tile([0.9, 0.1], (20, 1)), "validation/targets": np.zeros(20),
    }  # fmt: skip
    assert nll_star(arrays) == near(-np.log(0.001))


def test_a_row_of_probability_zero_has_no_say_in_the_temperature_and_still_costs_infinity():
    probs, targets = np.tile([0.9, 0.1, 0.0], (5, 1)), np.array([0, 0, 0, 1, 2])
    assert temperature.optimal_temperature(logs(probs), targets) == near(2.0)
    assert temperature.nll_at(logs(probs), targets, 2.0)[-1] == np.inf
    assert temperature.optimal_temperature(logs(probs[4:]), targets[4:]) == 1.0


def test_the_validation_rows_choose_and_the_test_rows_are_scored(overconfident):
    logits, targets = overconfident
    probs = softmax(logits, axis=-1)
    arrays = {
        "probs": probs[:150], "targets": targets[:150].astype(float),
        "validation/probs": probs[150:], "validation/targets": targets[150:].astype(float),
    }  # fmt: skip
    chosen = temperature.optimal_temperature(logs(probs[150:]), targets[150:])
    expected = temperature.nll_at(logs(probs[:150]), targets[:150], chosen)
    assert nll_star(arrays) == near(expected)
    values = evaluate("classification", arrays)
    assert values["cls/NLL*"] == near(expected.mean())
    assert values["cls/NLL*"] < values["cls/NLL"]


def test_without_validation_rows_each_half_is_scored_at_the_temperature_of_the_other(overconfident):
    logits, targets = overconfident
    probs = softmax(logits, axis=-1)
    rng, runs = np.random.default_rng(0), []
    for _ in range(5):
        first = rng.permutation(400) < 200
        scores = np.empty(400)
        for scored, chosen_on in ((first, ~first), (~first, first)):
            chosen = temperature.optimal_temperature(logs(probs[chosen_on]), targets[chosen_on])
            scores[scored] = temperature.nll_at(logs(probs[scored]), targets[scored], chosen)
        runs.append(scores)
    assert nll_star({"probs": probs, "targets": targets.astype(float)}) == near(np.mean(runs, axis=0))


def test_cross_validation_does_not_see_its_own_labels():
    # With one row a half the other row alone decides; a right row determines no T, a wrong one wants the largest.
    probs, targets = np.array([[0.6, 0.4], [0.6, 0.4]]), np.array([0, 1])
    right, wrong = (temperature.nll_at(logs(probs), targets, t) for t in (1.0, TEMPERATURE_BOUNDS[1]))
    assert temperature.cross_validated_nll(logs(probs), targets) == near([wrong[0], right[1]])


def test_the_outputs_of_a_row_are_halved_together():
    rng = np.random.default_rng(3)
    p = rng.uniform(size=(40, 3))
    arrays = {"probs": p, "targets": (rng.uniform(size=(40, 3)) < p).astype(float)}
    pairs, targets = classification.as_two_classes(logit(p), arrays["targets"])
    whole = temperature.cross_validated_nll(pairs, targets, n_rows=40).reshape(40, 3)
    split = temperature.cross_validated_nll(pairs, targets).reshape(40, 3)
    assert not np.allclose(whole, split)
    (metric,) = (m for m in METRICS["binary"] if m.key == "cls/NLL*")
    assert metric.scores(arrays) == near(whole.mean(-1))


def test_a_single_row_is_scored_as_it_is():
    assert temperature.cross_validated_nll(logs(np.array([[0.3, 0.7]])), np.array([1])) == near([-np.log(0.7)])
