"""Intervals against textbook formulas and least squares, and verdicts on differences that are there or not."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import f_oneway, nct, ttest_1samp
from scipy.stats import t as student

from bdl_bench.stats import (
    Interval,
    compare_methods,
    detectable_difference,
    distinct_seeds,
    intervals_over_seeds,
    is_tie,
    mean_interval,
    merge_ties,
    not_significantly_worse,
    paired_intervals,
    seed_groups,
    verdicts,
)
from bdl_bench.stats.intervals import critical_value, interval_from


def verdict(difference, better):
    """The verdict on a single comparison."""
    return verdicts({"method": difference}, better)["method"]


def assert_equal(found, expected):
    assert found.components == expected.components
    numbers = [(i.mean, i.low, i.high, i.n, i.p_value, i.standard_error) for i in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-9)


def crossed(seeds, rows, *, of_seeds=1.0, of_rows=1.0, rest=1.0, mean=0.0, rng=0):
    """Values (seeds, rows) of the crossed model with these standard deviations."""
    rng = np.random.default_rng(rng)
    parts = (
        of_seeds * rng.normal(size=(seeds, 1)),
        of_rows * rng.normal(size=(1, rows)),
        rest * rng.normal(size=(seeds, rows)),
    )
    return mean + sum(parts)


def test_the_interval_of_a_mean_matches_scipy():
    values = [1.0, 2.0, 4.0, 4.5]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean_interval(values)
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9))
    assert found.p_value == pytest.approx(ttest_1samp(values, 0).pvalue, rel=1e-9)


def test_a_single_number_has_no_interval_and_two_have_no_test():
    assert mean_interval([3.0]) == Interval(3.0, None, None, 1)
    two = mean_interval([3.0, 3.1])
    assert two.half_width == pytest.approx(student.ppf(0.975, 1) * 0.05)
    assert two.p_value is None
    assert verdict(two, "lower") == "unknown"


def test_with_rows_of_its_own_each_seed_is_one_observation():
    rng = np.random.default_rng(0)
    rows = [rng.normal(0.2, size=(size, 2)) for size in (30, 7, 41)]
    for column, found in enumerate(intervals_over_seeds(rows, same_rows=False)):
        assert_equal(found, mean_interval([r[:, column].mean() for r in rows]))


def two_way(values):
    """Mean squares of seeds, rows and residuals, from the sums of squares of nested least-squares fits."""
    n_seeds, n_rows = values.shape
    seed, row = np.indices(values.shape).reshape(2, -1)
    y = values.reshape(-1)

    def residual(*factors):
        design = np.concatenate([np.ones((len(y), 1)), *(np.eye(f.max() + 1)[f] for f in factors)], axis=1)
        fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
        return np.square(y - fitted).sum()

    both = residual(seed, row)
    return (
        (residual(row) - both) / (n_seeds - 1),
        (residual(seed) - both) / (n_rows - 1),
        both / ((n_seeds - 1) * (n_rows - 1)),
    )


@pytest.mark.parametrize(("n_seeds", "n_rows"), [(3, 7), (5, 4), (2, 6)])
def test_with_the_same_rows_the_variance_is_that_of_the_crossed_model(n_seeds, n_rows):
    values = crossed(n_seeds, n_rows, of_seeds=0.8, of_rows=1.3, rest=0.4, mean=0.3)
    a, b, e = two_way(values)
    (found,) = intervals_over_seeds(list(values[..., None]), same_rows=True)
    variance = max(a + b - e, a, b) / (n_seeds * n_rows)
    assert found.standard_error**2 == pytest.approx(variance, rel=1e-9)
    critical = np.sqrt((a * student.ppf(0.975, n_seeds - 1) ** 2 + b * student.ppf(0.975, n_rows - 1) ** 2) / (a + b))
    half = critical * np.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-9)
    assert found.degrees_of_freedom == pytest.approx((a + b) ** 2 / (a**2 / (n_seeds - 1) + b**2 / (n_rows - 1)))


@pytest.mark.parametrize("ratio", [0.3, 2.0, 9.0, 60.0])
@pytest.mark.parametrize("share", [0.0, 1e-9, 0.4, 1.0])
def test_the_p_value_is_the_level_whose_critical_value_is_the_ratio(ratio, share):
    components = [(share, 2.0), (1 - share, 199.0)]
    found = interval_from(-ratio * 0.7, 0.7, components, 5)
    assert critical_value(found.p_value, components) == pytest.approx(ratio, rel=1e-6)
    alone = [2 * student.sf(ratio, freedom) for freedom in (2, 199)]
    assert min(alone) * (1 - 1e-9) <= found.p_value <= max(alone) * (1 + 1e-9)
    if share == 1:
        assert found.p_value == pytest.approx(alone[0], rel=1e-9)


def test_the_critical_value_of_a_tiny_level_does_not_overflow():
    components = [(0.4, 1.0), (0.6, 199.0)]
    found = interval_from(1e3, 1.0, components, 5)
    assert critical_value(found.p_value, components) == pytest.approx(1e3, rel=1e-6)
    assert critical_value(1e-300, components) == pytest.approx(math.sqrt(0.4) * 2 / (math.pi * 1e-300), rel=1e-6)


def test_rows_that_all_seeds_share_count_once():
    """Without variation between seeds, the interval is that of the rows, for any number of seeds."""
    rows = np.random.default_rng(0).normal(size=40)
    low, high = ttest_1samp(rows, 0).confidence_interval(0.95)
    (found,) = intervals_over_seeds([rows[:, None]] * 10, same_rows=True)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)


def test_one_row_that_all_seeds_share_has_no_interval():
    (found,) = intervals_over_seeds([np.array([[v]]) for v in (0.1, 0.2, 0.3)], same_rows=True)
    assert (found.low, found.p_value) == (None, None)


def test_an_infinite_score_leaves_the_other_columns_their_intervals():
    values = [np.full((20, 2), value) for value in (1.0, 2.0, 3.5)]
    values[1][3, 0] = np.inf
    infinite, finite = intervals_over_seeds(values, same_rows=True)
    assert infinite.low is None
    assert finite.mean == pytest.approx(6.5 / 3)
    (undefined,) = paired_intervals([v[:, :1] for v in values], [v[:, :1] for v in values], same_rows=True)
    assert verdict(undefined, "lower") == "unknown"


def test_equal_differences_have_the_p_value_of_the_sign_test():
    for n, p_value in ((3, 0.25), (5, 0.0625), (6, 0.03125)):
        assert mean_interval([0.2] * n).p_value == p_value
    assert mean_interval([0.0] * 6).p_value == 1


def test_only_differences_count():
    values, others = ([np.array([[v]]) for v in found] for found in ((101.0, 202.0, 305.0), (100.0, 200.0, 300.0)))
    (found,) = paired_intervals(values, others, same_rows=False)
    assert_equal(found, mean_interval([1.0, 2.0, 5.0]))


def test_a_difference_of_round_off_is_a_tie():
    values = [np.array([[v]]) for v in (0.3, 0.5, 0.7)]
    shifted = [v + 2.8e-17 + 1e-16 * i for i, v in enumerate(values)]
    (found,) = paired_intervals(shifted, values, same_rows=False)
    assert found.p_value == 1.0
    larger = [v + 1e-3 + 1e-6 * i for i, v in enumerate(values)]
    (found,) = paired_intervals(larger, values, same_rows=False)
    assert verdict(found, "higher") == "better"


def test_ties_are_relative_and_have_a_floor_and_do_not_chain():
    assert is_tie(1e6, 1e6 + 0.5)
    assert not is_tie(1.0, 1.00001)
    assert is_tie(0.0, 2.8e-17)
    assert is_tie(np.inf, np.inf)
    assert not is_tie(np.inf, 1.0)
    assert not is_tie(np.nan, np.nan)
    steps = np.array([1 + 0.7e-6 * k for k in range(4)])
    assert merge_ties(steps[::-1]).tolist() == [steps[2], steps[2], steps[0], steps[0]]


def test_the_detectable_difference_has_the_power_of_the_noncentral_t():
    difference = mean_interval([0.1, 0.3, 0.2, 0.5, 0.1])
    for n, power in ((1, 0.8), (11, 0.5)):
        needed = detectable_difference(difference, n_comparisons=n, power=power)
        critical = student.isf(0.025 / n, 4)
        assert nct.sf(critical, 4, needed / difference.standard_error) == pytest.approx(power, rel=1e-6)
    assert detectable_difference(mean_interval([0.1, 0.2])) is None
    assert detectable_difference(mean_interval([0.1] * 4)) is None


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


def columns(**methods):
    return {m: {s: np.array([v]) for s, v in enumerate(found)} for m, found in methods.items()}


def difference(values, a, b):
    return mean_interval([float((values[a][s] - values[b][s])[0]) for s in values[a]])


def test_the_baseline_is_one_family_and_all_pairs_another():
    rng = np.random.default_rng(0)
    shifts = {"map": 1.0, "b": 0.9, "c": 0.5, "d": 0.97}
    values = columns(**{name: rng.normal(shift, 0.05, 6) for name, shift in shifts.items()})
    found = compare_methods(values, "lower", same_rows=False, baseline="map")
    expected = {pair: difference(values, *pair) for pair in combinations(values, 2)}
    assert found.differences.keys() == expected.keys()
    for pair, interval in found.differences.items():
        assert_equal(interval, expected[pair])
    assert found.pairs == verdicts(expected, "lower")
    against = {m: difference(values, m, "map") for m in "bcd"}
    assert found.with_baseline == verdicts(against, "lower")
    for m, interval in found.baseline_differences.items():
        assert_equal(interval, against[m])
    assert found.with_method("c")["map"] == "worse"
    assert found.with_method("map")["c"] == "better"


def test_methods_are_compared_over_the_seeds_that_both_have():
    values = columns(a=[1.0, 2.0, 3.0, 4.0], b=[1.1, 2.2, 3.1, 9.0])
    del values["b"][3]
    values["c"] = {7: np.array([1.0])}
    found = compare_methods(values, "lower", same_rows=False)
    assert set(found.differences) == {("a", "b")}
    assert found.differences["a", "b"].mean == pytest.approx(-0.4 / 3)


def test_copies_of_a_seed_count_as_one():
    values = columns(a=[0.6, 0.6, 0.6, 0.5], b=[0.7, 0.7, 0.7, 0.8])
    copies = {"a": {0: 0, 1: 0, 2: 0, 3: 3}}
    found = compare_methods(values, "lower", same_rows=False, copies=copies)
    assert found.differences["a", "b"].n == 2
    assert found.pairs["a", "b"] == "unknown"


def test_seeds_are_grouped_by_the_copies_of_any_method():
    copies = {"a": {0: 0, 1: 0, 2: 2, 3: 3}, "b": {0: 0, 1: 1, 2: 1, 3: 3}}
    assert seed_groups([0, 1, 2, 3], ["a", "b"], copies) == {0: 0, 1: 0, 2: 0, 3: 3}
    assert distinct_seeds([0, 1, 2, 3], ["b"], copies) == [0, 1, 3]
    assert distinct_seeds([1, 2], ["c"], copies) == [1, 2]


def test_the_one_way_test_of_equal_seeds_agrees_on_independent_rows():
    """With seeds that differ by their rows alone, mean squares have the ratio of the analysis of variance."""
    values = crossed(4, 50, of_seeds=0.5, of_rows=0.0, rng=3)
    a, b, e = two_way(values)
    within = (b * 49 + e * 3 * 49) / (4 * 49)
    assert a / within == pytest.approx(f_oneway(*values).statistic, rel=1e-9)
