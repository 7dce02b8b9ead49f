"""Contributions of rows to a metric: their mean is the metric, their spread that of the rows."""

import numpy as np
import pytest

from bdl_bench.metrics import METRICS, Metric, metrics_of
from bdl_bench.metrics.contributions import row_contributions


def arrays(kind, rows, rng):
    mean = rng.normal(size=(rows, 3))
    if kind == "regression":
        targets = mean + rng.normal(size=mean.shape)
        return {"mean": mean, "epistemic_variance": 1 + 0 * mean, "total_variance": 1 + mean**2, "targets": targets}
    probs = np.exp(mean) / np.exp(mean).sum(-1, keepdims=True)
    targets = np.array([rng.choice(3, p=p) for p in probs]).astype(float)
    found = {"mean": mean, "epistemic_variance": mean**2, "probs": probs, "targets": targets}
    half = slice(rows // 2)
    outside = {"mean": 0.3 * mean[half], "probs": (probs[half] + 1) / 4, "epistemic_variance": 1 + mean[half] ** 2}
    return found | {f"ood/far/{name}": array for name, array in outside.items()}


@pytest.mark.parametrize("rows", [1, 7, 60, 403, 1001])
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_the_mean_of_the_contributions_is_the_metric(kind, rows):
    found = arrays(kind, rows, np.random.default_rng(rows))
    if rows == 1:
        found = {name: array for name, array in found.items() if not name.startswith("ood/")}
    for metric in metrics_of(kind, found):
        values = row_contributions(metric, found)
        assert values.mean() == pytest.approx(metric.value(found), rel=1e-9, abs=1e-12), metric.key
        assert len(values) <= 400


def test_few_rows_are_their_own_contributions_and_many_are_blocks_of_equal_spread():
    metric = METRICS["classification"][0]
    few, many = (arrays("classification", rows, np.random.default_rng(0)) for rows in (399, 40_000))
    assert np.array_equal(row_contributions(metric, few), metric.scores(few))
    blocks, scores = row_contributions(metric, many), metric.scores(many)
    assert len(blocks) == 200
    assert blocks.std() / np.sqrt(200) == pytest.approx(scores.std() / np.sqrt(40_000), rel=0.15)


def test_blocks_of_different_size_add_no_spread():
    constant = Metric("m", "m", "m", "lower", scores=lambda arrays: arrays["mean"])
    assert row_contributions(constant, {"mean": np.full(500, 3.0)}) == pytest.approx(np.full(200, 3.0))


def test_the_spread_of_a_root_is_that_of_the_delta_method():
    rmse = METRICS["regression"][1]
    found = arrays("regression", 300, np.random.default_rng(1))
    squares = rmse.scores(found)
    error = row_contributions(rmse, found).std() / np.sqrt(300)
    assert error == pytest.approx(squares.std() / np.sqrt(300) / (2 * np.sqrt(squares.mean())), rel=1e-9)
    exact = {name: np.zeros((4, 1)) for name in found}
    assert row_contributions(rmse, exact).tolist() == [0.0] * 4


@pytest.mark.parametrize("key", ["ood/AUROC/far/entropy", "sc/AURC", "cal/ECE"])
def test_the_spread_of_other_metrics_is_that_over_new_rows(key):
    """The jackknife estimates the standard deviation over test sets, and overstates that of a small ECE."""
    example = arrays("classification", 200, np.random.default_rng(0))
    metric = next(m for m in metrics_of("classification", example) if m.key == key)
    sets = [arrays("classification", 400, np.random.default_rng(seed)) for seed in range(60)]
    true = np.std([metric.value(found) for found in sets], ddof=1)
    stated = [row_contributions(metric, found) for found in sets[:12]]
    assert all(len(values) == 20 for values in stated)
    ratio = np.mean([values.std(ddof=1) / np.sqrt(20) for values in stated]) / true
    assert 0.7 < ratio < (2.0 if key == "cal/ECE" else 1.4)
