"""The bootstrap of statistics against a loop over resamples, the bootstrap of means, and differences that are known."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bdl_bench.metrics import METRICS, calibration, ood
from bdl_bench.stats import bootstrap_difference, bootstrap_replicates, bootstrap_statistic, verdict


def mean_of(sample):
    return sample[0][0].mean(-1)


def ece_of(sample):
    return calibration.ece(*sample[0])


def auroc_of(sample):
    (inside,), (outside,) = sample
    return ood.auroc(inside, outside)


def test_the_bootstrap_of_a_mean_is_that_of_its_scores():
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=80) for _ in range(3)]
    others = [s + 0.05 * rng.normal(size=80) + 0.01 for s in scores]
    found = bootstrap_statistic([((s,),) for s in scores], [((s,),) for s in others], mean_of, n_resamples=4000)
    expected = bootstrap_difference(scores, others, n_resamples=4000)
    assert found.mean == pytest.approx(expected.mean, abs=1e-12)
    assert found.half_width == pytest.approx(expected.half_width, rel=0.08)
    assert found.n == 3


def test_replicates_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    samples = [((rng.normal(size=12),), (rng.normal(size=5),)) for _ in range(2)]
    drawn = bootstrap_replicates(samples, auroc_of, n_resamples=20, seed=4)
    again = np.random.default_rng(4)
    picks = again.integers(2, size=(20, 2))
    values = np.empty((20, 2))
    for s, ((inside,), (outside,)) in enumerate(samples):
        places = picks == s
        rows = [again.integers(m, size=(places.sum(), m), dtype=np.int32) for m in (12, 5)]
        labels = np.repeat([0, 1], [12, 5])
        values[places] = [
            roc_auc_score(labels, np.concatenate([inside[i], outside[j]])) for i, j in zip(*rows, strict=True)
        ]
    assert drawn == pytest.approx(values.mean(-1), rel=1e-9)


def test_the_same_rows_are_drawn_for_both_methods():
    rows = np.arange(50.0)
    samples, others = [((rows,),)] * 2, [((2 * rows + 3,),)] * 2
    one, two = (bootstrap_replicates(s, mean_of, n_resamples=30) for s in (samples, others))
    assert two == pytest.approx(2 * one + 3)
    assert np.ptp(one) > 0


def test_arrays_of_a_group_share_their_rows_and_outputs_stay_with_their_row():
    values = np.arange(10.0)
    group = (values, np.stack([values, values, values], axis=-1))

    def mismatch(sample):
        (one, three) = sample[0]
        return np.abs(three.reshape(*one.shape, 3) - one[..., None]).max((-2, -1))

    assert bootstrap_replicates([(group,)], mismatch, n_resamples=40).max() == 0


def test_many_rows_are_resampled_some_at_a_time(monkeypatch):
    monkeypatch.setattr("bdl_bench.stats.bootstrap._ENTRIES", 100)
    sizes = []

    def watched(sample):
        sizes.append(len(sample[0][0]))
        return mean_of(sample)

    bootstrap_replicates([((np.arange(30.0),),)], watched, n_resamples=10)
    assert sizes == [3, 3, 3, 1]


def test_a_seed_that_no_resample_draws_is_no_error():
    samples = [((np.full(4, float(s)),),) for s in range(6)]
    assert bootstrap_replicates(samples, mean_of, n_resamples=1).shape == (1,)


def made_calibration(seed, *, sharpness):
    """Two classes; 1 is calibrated, more is overconfident."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.55, 0.95, size=500)
    odds = (p / (1 - p)) ** sharpness
    return ((odds / (1 + odds), (rng.uniform(size=500) < p).astype(float)),)


def test_a_worse_calibration_is_found_and_none_is_not():
    good, bad, slight = ([made_calibration(s, sharpness=sharpness) for s in range(3)] for sharpness in (1.0, 2.0, 1.02))
    assert verdict(bootstrap_statistic(bad, good, ece_of), "lower") == "worse"
    assert verdict(bootstrap_statistic(good, bad, ece_of), "lower") == "better"
    assert verdict(bootstrap_statistic(slight, good, ece_of), "lower") == "not distinguishable"
    assert verdict(bootstrap_statistic(good, good, ece_of), "lower") == "not distinguishable"


def test_the_interval_of_a_biased_statistic_is_about_its_difference():
    good, bad = ([made_calibration(s, sharpness=sharpness) for s in range(2)] for sharpness in (1.0, 1.5))
    found = bootstrap_statistic(bad, good, ece_of)
    expected = np.mean([ece_of(s) for s in bad]) - np.mean([ece_of(s) for s in good])
    assert found.mean == pytest.approx(expected)
    spread = np.subtract(*(bootstrap_replicates(method, ece_of) for method in (bad, good)))
    assert abs(spread.mean() - expected) > 0.2 * found.half_width
    around = np.quantile(spread, (0.025, 0.975)) - spread.mean()
    assert (found.low - expected, found.high - expected) == pytest.approx(tuple(around))


def test_the_interval_of_auroc_has_the_width_of_its_known_variance():
    # Hanley and McNeil: the variance of AUROC of two uniform samples of one distribution is (m + n + 1)/(12 m n).
    rng = np.random.default_rng(5)
    widths = []
    for _ in range(20):
        sample = ((rng.uniform(size=60),), (rng.uniform(size=40),))
        fixed = ((np.zeros(60),), (np.zeros(40),))
        widths.append(bootstrap_statistic([sample], [fixed], auroc_of, n_resamples=400).half_width)
    assert np.mean(widths) == pytest.approx(1.96 * np.sqrt(101 / (12 * 60 * 40)), rel=0.1)


def test_the_same_data_give_the_same_interval_and_another_seed_another():
    good, bad = ([made_calibration(s, sharpness=sharpness) for s in range(2)] for sharpness in (1.0, 1.2))
    one = bootstrap_statistic(bad, good, ece_of, n_resamples=50)
    assert one == bootstrap_statistic(bad, good, ece_of, n_resamples=50)
    assert one != bootstrap_statistic(bad, good, ece_of, n_resamples=50, seed=1)


def test_an_infinite_statistic_gives_no_verdict():
    infinite, plain = [((np.array([np.inf, 1.0]),),)], [((np.zeros(2),),)]
    assert verdict(bootstrap_statistic(infinite, plain, mean_of, n_resamples=10), "lower") == "unknown"


@pytest.mark.parametrize("kind", sorted(METRICS))
def test_every_metric_can_be_bootstrapped(kind):
    rng = np.random.default_rng(6)
    shape = (20, 2)
    classes = rng.integers(2, size=20 if kind == "classification" else shape).astype(float)
    arrays = {
        "mean": rng.normal(size=shape),
        "total_variance": rng.gamma(2, size=shape),
        "probs": rng.dirichlet([1, 1], size=20),
        "targets": rng.normal(size=shape) if kind == "regression" else classes,
    }
    for metric in METRICS[kind]:
        drawn = bootstrap_replicates([metric.sample(arrays)], metric.statistic, n_resamples=200)
        assert drawn.shape == (200,)
        assert drawn.min() <= metric.value(arrays) <= drawn.max()
