"""Detection against pairs counted by hand and scikit-learn, with and without ties."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bdl_bench.metrics import ood


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.fixture(params=[1, 8], ids=["ties", "no ties"])
def scores(request):
    rng = np.random.default_rng(0)
    return np.round(rng.normal(size=150), request.param), np.round(rng.normal(0.8, 1.5, size=70), request.param)


def labelled(inside, outside):
    return np.repeat([0, 1], [len(inside), len(outside)]), np.concatenate([inside, outside])


def test_detection_matches_hand_worked_values():
    inside, outside = np.array([0.1, 0.3, 0.5]), np.array([0.3, 0.9])
    # 0.9 beats all three; 0.3 beats one and ties with one: (3 + 1 + 1/2) of 6 pairs.
    assert ood.auroc(inside, outside) == near(4.5 / 6)
    # Falling thresholds 0.9, 0.5, 0.3: half of the rows found at precision 1, the other half at 2 of 4.
    assert ood.average_precision(inside, outside) == near(1 / 2 * 1 + 1 / 2 * 2 / 4)
    # Both are found at 0.3 only, where 0.3 and 0.5 are called too.
    assert ood.fpr_at_recall(inside, outside) == near(2 / 3)
    assert ood.fpr_at_recall(inside, outside, recall=0.5) == 0.0


def test_detection_matches_sklearn(scores):
    labels, values = labelled(*scores)
    assert ood.auroc(*scores) == near(roc_auc_score(labels, values))
    assert ood.average_precision(*scores) == near(average_precision_score(labels, values))
    fpr, tpr, _ = roc_curve(labels, values, drop_intermediate=False)
    assert ood.fpr_at_recall(*scores) == near(fpr[np.argmax(tpr >= 0.95)])


def test_auroc_counts_pairs(scores):
    inside, outside = scores
    pairs = (outside[:, None] > inside).mean() + (outside[:, None] == inside).mean() / 2
    assert ood.auroc(inside, outside) == near(pairs)


def test_perfect_separation_is_perfect():
    inside, outside = np.array([0.0, 1.0, 2.0]), np.array([3.0, 4.0])
    assert (ood.auroc(inside, outside), ood.average_precision(inside, outside)) == (1.0, 1.0)
    assert ood.fpr_at_recall(inside, outside) == 0.0
    assert ood.auroc(outside, inside) == 0.0


def test_a_constant_score_detects_at_random():
    inside, outside = np.zeros(30), np.zeros(10)
    assert ood.auroc(inside, outside) == near(0.5)
    assert ood.average_precision(inside, outside) == near(0.25)
    assert ood.fpr_at_recall(inside, outside) == 1.0


def test_swapping_the_classes_reverses_auroc(scores):
    assert ood.auroc(*scores) + ood.auroc(*reversed(scores)) == near(1.0)


def test_the_threshold_finds_95_percent_of_the_rows_and_no_more_than_needed():
    inside, outside = np.arange(20) - 0.5, np.arange(20.0)
    # 19 of 20 are found at threshold 1, where the 18 inside rows above it are called.
    assert ood.fpr_at_recall(inside, outside) == near(18 / 20)
