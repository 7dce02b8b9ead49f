"""Selective risks against hand-worked curves, every order of ties, all thresholds, and AUROC by scikit-learn."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bdl_bench.metrics import selective


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.fixture
def rows():
    """Confidences with ties, and losses 0 and 1."""
    rng = np.random.default_rng(0)
    confidence = np.round(rng.uniform(size=120), 1)
    return confidence, (rng.uniform(size=120) > confidence).astype(float)


def trapezoids(coverage, risk):
    return sum((risk[i] + risk[i - 1]) / 2 * (coverage[i] - coverage[i - 1]) for i in range(1, len(risk)))


def test_the_areas_match_hand_worked_values():
    confidence = np.array([0.2, 0.9, 0.6, 0.4])
    losses = np.array([1.0, 0.0, 1.0, 0.0])
    # In order of confidence the losses are 0, 1, 0, 1; their sums 0, 1, 1, 2.
    assert selective.aurc(confidence, losses) == near((0 / 1 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert selective.augrc(confidence, losses) == near(((0 + 0) / 2 + (0 + 1) / 2 + (1 + 1) / 2 + (1 + 2) / 2) / 4 / 4)
    best = (0 + 0 + 1 / 3 + 2 / 4) / 4
    assert selective.excess_aurc(confidence, losses) == near((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4 - best)


def test_the_curves_have_the_areas():
    rng = np.random.default_rng(1)
    confidence, losses = rng.uniform(size=50), rng.gamma(2, size=50)
    curve = selective.risk_coverage(confidence, losses)
    assert curve.coverage[[0, -1]].tolist() == [0.02, 1.0]
    assert curve.selective_risk.mean() == near(selective.aurc(confidence, losses))
    from_zero = [np.append(0, values) for values in (curve.coverage, curve.generalized_risk)]
    assert trapezoids(*from_zero) == near(selective.augrc(confidence, losses))


def test_ties_have_the_mean_over_all_their_orders():
    confidence, losses = np.array([0.9, 0.5, 0.5, 0.5, 0.1]), np.array([0.3, 1.0, 0.0, 0.2, 0.7])
    untied = [np.array([9.0, *order, 0.0]) for order in permutations([1.0, 2.0, 3.0])]
    for area in (selective.aurc, selective.augrc):
        assert area(confidence, losses) == near(np.mean([area(one, losses) for one in untied]))


def test_the_generalized_area_is_that_over_thresholds(rows):
    confidence, losses = rows
    points = [(0.0, 0.0)]
    for threshold in sorted(set(confidence), reverse=True):
        accepted = confidence >= threshold
        points.append((accepted.mean(), (accepted * losses).mean()))
    assert selective.augrc(*rows) == near(trapezoids(*zip(*points, strict=True)))


def test_the_selective_area_is_that_over_thresholds():
    rng = np.random.default_rng(2)
    confidence, losses = rng.uniform(size=80), rng.gamma(2, size=80)
    risks = [losses[confidence >= threshold].mean() for threshold in confidence]
    assert selective.aurc(confidence, losses) == near(np.mean(risks))


def test_the_generalized_area_follows_from_accuracy_and_auroc(rows):
    confidence, losses = rows
    accuracy = 1 - losses.mean()
    auroc = roc_auc_score(1 - losses, confidence)
    assert selective.augrc(*rows) == near((1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2)


def test_a_constant_confidence_has_the_risk_of_answering_at_random(rows):
    _, losses = rows
    assert selective.aurc(np.zeros(120), losses) == near(losses.mean())
    assert selective.augrc(np.zeros(120), losses) == near(losses.mean() / 2)


def test_the_best_order_has_no_excess_and_no_order_is_below_it():
    losses = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    assert selective.excess_aurc(1 - losses, losses) == near(0.0)
    orders = np.array(list(permutations(range(5))), dtype=float)
    assert min(selective.excess_aurc(order, losses) for order in orders) > -1e-12
    assert selective.augrc(1 - losses, losses) == near((0 + 0 + 0.5 + 1.5 + 2.5) / 25)
