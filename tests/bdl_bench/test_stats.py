"""Intervals against their textbook formula, and verdicts on differences that are there and that are not."""

import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp

from bdl_bench.stats import (
    Interval,
    bootstrap_differences,
    mean_interval,
    not_significantly_worse,
    paired_interval,
    verdicts,
)


def verdict(difference, better):
    """The verdict on a single comparison."""
    return verdicts({"method": difference}, better)["method"]


def bootstrap_difference(scores, others, **options):
    """The interval of one method against another."""
    (found,) = bootstrap_differences([(s - o)[:, None] for s, o in zip(scores, others, strict=True)], **options)
    return found


def resample_by_resample(differences, n_resamples):
    """The two-level bootstrap of one comparison, from the same random numbers, one resample after the other."""
    rng = np.random.default_rng(0)
    blocks = [[b.mean() for b in np.array_split(d, 2000)] if len(d) > 2000 else d for d in differences]
    picks = rng.integers(len(blocks), size=(n_resamples, len(blocks)))
    drawn = np.empty(picks.shape)
    for s, rows in enumerate(map(np.asarray, blocks)):
        drawn[picks == s] = [rows[i].mean() for i in rng.integers(len(rows), size=((picks == s).sum(), len(rows)))]
    return np.mean([np.mean(b) for b in blocks]), *np.quantile(drawn.mean(-1), (0.025, 0.975))


@pytest.mark.parametrize("sizes", [(30, 30, 30), (30, 41), (2500, 2100), (17,)])
def test_many_comparisons_at_once_have_the_intervals_of_one_at_a_time(sizes):
    rng = np.random.default_rng(0)
    differences = [rng.normal(0.2, size=(size, 4)) for size in sizes]
    found = bootstrap_differences(differences, n_resamples=200)
    for column, interval in enumerate(found):
        expected = resample_by_resample([d[:, column] for d in differences], 200)
        assert (interval.mean, interval.low, interval.high) == pytest.approx(expected, rel=1e-12)
        assert interval.n == len(sizes)


def test_an_infinite_score_leaves_the_other_columns_their_intervals():
    difference = np.ones((20, 2))
    difference[3, 0] = np.inf
    infinite, finite = bootstrap_differences([difference])
    assert infinite.low is None
    assert (finite.mean, finite.low, finite.high) == (1.0, 1.0, 1.0)


def test_a_seed_that_no_resample_draws_is_no_error():
    (found,) = bootstrap_differences([np.full((4, 1), float(s)) for s in range(6)], n_resamples=1)
    assert found.low == found.high


def test_the_interval_of_a_mean_matches_scipy():
    values = [1.0, 2.0, 4.0, 4.5]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean_interval(values)
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9))


def test_a_single_number_has_no_interval():
    assert mean_interval([3.0]) == Interval(3.0, None, None, 1)


def test_the_paired_interval_sees_only_the_differences():
    assert paired_interval([101.0, 202.0, 303.0], [100.0, 200.0, 300.0]) == mean_interval([1.0, 2.0, 3.0])


def test_a_common_shift_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    base = [rng.normal(size=400) for _ in range(3)]
    shifted = [b + 0.3 + 0.1 * rng.normal(size=400) for b in base]
    noisy = [b + 0.1 * rng.permutation(np.repeat([-1.0, 1.0], 200)) for b in base]
    assert verdict(bootstrap_difference(shifted, base), "lower") == "worse"
    assert verdict(bootstrap_difference(shifted, base), "higher") == "better"
    assert verdict(bootstrap_difference(noisy, base), "lower") == "no significant difference"


def test_seeds_that_disagree_give_no_significant_difference_for_any_number_of_rows():
    zero = [np.zeros(1000)] * 3
    disagreeing = [np.full(1000, value) for value in (-0.5, 0.4, 0.5)]
    assert verdict(bootstrap_difference(disagreeing, zero), "lower") == "no significant difference"


def test_the_bootstrap_of_one_seed_matches_the_standard_error():
    scores = np.random.default_rng(1).normal(size=500)
    found = bootstrap_difference([scores], [np.zeros(500)], n_resamples=4000)
    assert found.half_width == pytest.approx(1.96 * scores.std() / np.sqrt(500), rel=0.1)


def test_averaging_blocks_keeps_mean_and_spread():
    scores = np.random.default_rng(2).normal(size=20_000)
    found = bootstrap_difference([scores], [np.zeros(20_000)])
    assert found.mean == pytest.approx(scores.mean(), abs=1e-12)
    assert found.half_width == pytest.approx(1.96 * scores.std() / np.sqrt(20_000), rel=0.15)


def test_the_same_data_give_the_same_interval_and_another_seed_another():
    a, b = [np.arange(10.0)], [np.ones(10)]
    assert bootstrap_difference(a, b) == bootstrap_difference(a, b)
    assert bootstrap_difference(a, b) != bootstrap_difference(a, b, seed=1)


def test_equal_scores_are_no_significant_difference():
    scores = [np.arange(5.0)]
    assert verdict(bootstrap_difference(scores, scores), "lower") == "no significant difference"


def test_an_infinite_difference_gives_no_verdict():
    assert verdict(bootstrap_difference([np.array([np.inf, 1.0])], [np.zeros(2)]), "lower") == "unknown"


def test_the_p_value_of_a_mean_matches_scipy():
    values = [1.0, 2.0, 4.0, -0.5]
    assert mean_interval(values).p_value == pytest.approx(ttest_1samp(values, 0).pvalue, rel=1e-9)
    assert mean_interval([2.0, 2.0]).p_value == 0
    assert mean_interval([0.0, 0.0]).p_value == 1


def test_the_p_value_of_the_bootstrap_of_one_seed_is_that_of_the_z_test():
    scores = np.random.default_rng(1).normal(0.08, size=500)
    found = bootstrap_difference([scores], [np.zeros(500)], n_resamples=4000)
    assert found.p_value == pytest.approx(ztest_p_value(scores), rel=0.15)
    constant = bootstrap_difference([np.full(7, 0.1)], [np.zeros(7)])
    assert constant.p_value == 0


def ztest_p_value(scores):
    return 2 * norm.sf(abs(scores.mean()) / (scores.std() / np.sqrt(len(scores))))


def test_more_comparisons_need_smaller_p_values():
    difference = Interval(1.0, 0.2, 1.8, 3, p_value=0.02)
    equal = Interval(0.0, -1.0, 1.0, 3, p_value=1.0)
    assert verdict(difference, "lower") == "worse"
    alone = verdicts({"a": difference, "b": equal}, "lower")
    among_many = verdicts({"a": difference, "b": equal, "c": equal}, "lower")
    assert alone == {"a": "worse", "b": "no significant difference"}
    assert set(among_many.values()) == {"no significant difference"}


def test_holm_is_applied_step_by_step():
    small, larger = (Interval(-1.0, -2.0, -0.1, 3, p_value=p) for p in (0.02, 0.04))
    assert verdicts({"a": small, "b": larger}, "lower") == {"a": "better", "b": "better"}
    undefined = Interval(float("inf"), None, None, 3)
    assert verdicts({"a": larger, "b": undefined}, "higher") == {"a": "worse", "b": "unknown"}


def test_methods_that_are_not_significantly_worse_than_the_best():
    assert not_significantly_worse({"b": "no significant difference", "c": "worse"}, "a") == {"a", "b"}


def test_no_method_is_marked_if_none_is_significantly_worse_or_a_verdict_is_unknown():
    assert not_significantly_worse({"b": "no significant difference"}, "a") == set()
    assert not_significantly_worse({"b": "worse", "c": "unknown"}, "a") == set()
    assert not_significantly_worse({}, "a") == set()
