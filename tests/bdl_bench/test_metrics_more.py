"""Sparsification, conformal sets, l2 and maximum calibration error, disagreement: by hand, and in their limits."""

import numpy as np
import pytest

from bdl_bench.metrics import calibration, conformal, disagreement, evaluate, ood, sparsification
from estimators.errors import OptionError


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def test_ause_matches_the_hand_worked_curves():
    error = np.array([4.0, 1.0, 9.0])  # squared, of uncertainties in the order 3, 1, 2
    uncertainty = np.array([0.3, 0.1, 0.2])
    whole = np.sqrt(14 / 3)
    by_hand = np.sqrt([1, 10 / 2, 14 / 3]) / whole
    oracle = np.sqrt([1, 5 / 2, 14 / 3]) / whole
    assert sparsification.sparsification_curve(uncertainty, error) == near(by_hand)
    assert sparsification.ause(uncertainty, error) == near((by_hand - oracle).mean())


def test_ause_is_zero_for_the_order_of_the_errors_and_for_one_row_or_no_error():
    error = np.random.default_rng(0).gamma(1, size=50)
    assert sparsification.ause(np.sqrt(error), error) == near(0)
    assert sparsification.ause(-error, error) > sparsification.ause(np.zeros(50), error) > 0
    assert sparsification.ause(np.ones(1), np.ones(1)) == 0
    assert sparsification.ause(np.arange(3.0), np.zeros(3)) == 0


def test_tied_uncertainties_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(1)
    uncertainty, error = rng.integers(3, size=30).astype(float), rng.gamma(1, size=30)
    order = rng.permutation(30)
    assert sparsification.ause(uncertainty[order], error[order]) == near(sparsification.ause(uncertainty, error))
    constant = sparsification.sparsification_curve(np.zeros(30), error)
    assert constant == near(np.ones(30))


def test_conformal_sets_cover_at_their_level_over_200_splits():
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(200):
        probs = rng.dirichlet(0.5 * np.ones(4), size=120)
        labels = (probs.cumsum(-1) > rng.uniform(size=(120, 1))).argmax(-1)
        wrong = probs**0.3 / (probs**0.3).sum(-1, keepdims=True)  # underconfident: coverage holds for any prediction
        sets = conformal.class_sets(np.log(wrong[40:]), np.log(wrong[:40]), labels[:40])
        covered.append(sets[np.arange(80), labels[40:]].mean())
    mean, error = np.mean(covered), np.std(covered, ddof=1) / np.sqrt(200)
    expected = np.ceil(41 * 0.9) / 41  # exact without ties
    assert abs(mean - expected) < 3.3 * error
    assert error < 0.006


def test_conformal_sets_contain_a_validation_row_up_to_the_round_off_of_float32():
    rng = np.random.default_rng(5)
    log_probs = np.log(rng.dirichlet(np.ones(4), size=40))
    labels, again = log_probs.argmax(-1), log_probs * (1 + 2e-7)
    sets, expected = (conformal.class_sets(some, log_probs, labels) for some in (again, log_probs))
    assert (sets == expected).all()
    arrays = rng.normal(size=(40, 2)), np.zeros((40, 2)), np.ones((40, 2))
    inside, widths = conformal.intervals(arrays[0] * (1 + 2e-7), *arrays[1:], arrays)
    assert (inside.sum(0) == np.ceil(41 * 0.9)).all()
    assert widths.shape == (40, 2)


@pytest.mark.parametrize("kind", ["regression", "classification", "binary"])
def test_conformal_metrics_of_arrays_match_loops(kind):
    rng = np.random.default_rng(4)

    def predicted(rows):
        if kind == "regression":
            mean, variance = rng.normal(size=(rows, 2)), rng.gamma(2, size=(rows, 2))
            targets = mean + rng.normal(size=mean.shape)
            return {"mean": mean, "epistemic_variance": variance, "total_variance": variance + 1, "targets": targets}
        probs = rng.dirichlet(np.ones(3), size=rows) if kind == "classification" else rng.uniform(size=(rows, 2))
        targets = rng.integers(3, size=rows) if kind == "classification" else rng.integers(2, size=(rows, 2))
        return {"epistemic_variance": rng.gamma(2, size=probs.shape), "probs": probs, "targets": targets.astype(float)}

    test, validation = predicted(50), predicted(25)
    found = evaluate(kind, test | {f"validation/{name}": array for name, array in validation.items()})
    if kind == "regression":
        k = 24  # ⌈26 · .9⌉
        covered, widths = [], []
        for c in range(2):
            scores = sorted(
                abs(validation["targets"] - validation["mean"])[:, c] / validation["total_variance"][:, c] ** 0.5
            )
            half = scores[k - 1] * test["total_variance"][:, c] ** 0.5
            covered.append(abs(test["targets"] - test["mean"])[:, c] <= half)
            widths.append(2 * half)
        assert found["cp/width"] == near(np.mean(widths))
    else:

        def options(arrays):
            if kind == "classification":
                return [(list(p), int(y)) for p, y in zip(arrays["probs"], arrays["targets"], strict=True)]
            flat = zip(arrays["probs"].ravel(), arrays["targets"].ravel(), strict=True)
            return [([1 - p, p], int(y)) for p, y in flat]

        known = sorted(1 - p[y] for p, y in options(validation))
        threshold = known[{25: 24, 50: 46}[len(known)] - 1]
        sets = [([c for c, q in enumerate(p) if 1 - q <= threshold], y) for p, y in options(test)]
        covered = [y in chosen for chosen, y in sets]
        assert found["cp/size"] == near(np.mean([len(chosen) for chosen, _ in sets]))
    assert found["cp/coverage"] == near(np.mean(covered))


def test_without_enough_validation_rows_there_is_no_conformal_number():
    test = {"epistemic_variance": np.ones((5, 2)), "probs": np.full((5, 2), 0.5), "targets": np.zeros(5)}
    validation = {f"validation/{name}": array for name, array in test.items()}
    assert not any(key.startswith("cp/") for key in evaluate("classification", test | validation))
    assert not any(key.startswith("cp/") for key in evaluate("classification", test))


def test_l2_ece_and_mce_match_the_hand_worked_values():
    confidence = np.array([0.55, 0.58, 0.95, 0.92, 0.93])
    correct = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    gaps = np.array([0.565 - 0.5, (0.95 + 0.92 + 0.93) / 3 - 2 / 3])
    assert calibration.l2_ece(confidence, correct, n_bins=10) == near(
        np.sqrt(2 / 5 * gaps[0] ** 2 + 3 / 5 * gaps[1] ** 2)
    )
    assert calibration.mce(confidence, correct, n_bins=10) == near(abs(gaps).max())


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_calibration_errors_of_all_right_all_wrong_and_one_row(right):
    for confidence in (np.full(7, 0.8), np.array([0.8])):
        correct = np.full(len(confidence), right)
        found = {
            calibration.ece(confidence, correct),
            calibration.l2_ece(confidence, correct),
            calibration.mce(confidence, correct),
        }
        assert all(value == near(abs(0.8 - right)) for value in found)


def test_ece_is_at_most_l2_ece_which_is_at_most_mce():
    rng = np.random.default_rng(5)
    confidence = rng.uniform(0.5, 1, size=300)
    correct = (rng.uniform(size=300) < confidence**2).astype(float)
    errors = [f(confidence, correct) for f in (calibration.ece, calibration.l2_ece, calibration.mce)]
    assert errors == sorted(errors)
    assert errors[0] < errors[2]


def test_disagreement_matches_hand_worked_values():
    probs = np.array([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3]])
    others = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    assert disagreement.top_label_disagreement(probs, others) == 0.5
    assert disagreement.total_variation(probs, others) == near([0.2, 0.2])
    assert disagreement.top_label_disagreement(probs, probs) == 0
    mean, variance = np.array([[1.0], [2.0]]), np.array([[1.0], [4.0]])
    found = disagreement.mean_difference(mean, variance, mean + 1, variance + 2)
    assert found == near((1 / np.sqrt(2) + 1 / np.sqrt(5)) / 2)


def test_without_rows_inside_or_outside_detection_is_not_a_number():
    some, none = np.arange(3.0), np.empty(0)
    for score in (ood.auroc, ood.average_precision, ood.fpr_at_recall):
        assert np.isnan(score(some, none))
        assert np.isnan(score(none, some))


@pytest.mark.parametrize("recall", [95, 0.0, -0.1, 1.01, float("nan")])
def test_recall_is_a_share(recall):
    with pytest.raises(OptionError, match="recall"):
        ood.fpr_at_recall(np.arange(3.0), np.arange(3.0), recall=recall)
    assert ood.fpr_at_recall(np.arange(3.0), np.arange(3.0), recall=1) == 1.0
