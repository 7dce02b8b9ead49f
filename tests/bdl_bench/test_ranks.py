"""Comparisons over tasks against the tables and the example of Demšar (2006), and against closed testing."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import f as fisher
from scipy.stats import norm

from bdl_bench.stats import critical_difference, holm, rank_methods
from estimators.errors import DataError


def tasks(table, names="abcdefgh"):
    return {f"task {i}": dict(zip(names, row, strict=False)) for i, row in enumerate(table)}


@pytest.mark.parametrize(
    ("level", "quantiles"),
    [(0.95, {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 10: 3.164}), (0.9, {2: 1.645, 4: 2.291, 7: 2.693})],
)
def test_the_critical_difference_has_the_quantiles_of_demsars_table(level, quantiles):
    for k, q in quantiles.items():
        assert critical_difference(k, 14, level=level) == pytest.approx(q * np.sqrt(k * (k + 1) / 84), rel=5e-4)


def test_demsars_example_of_four_classifiers_on_fourteen_sets():
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert critical_difference(4, 14, level=0.9) == pytest.approx(1.12, abs=5e-3)


def test_two_methods_have_the_normal_quantile():
    assert critical_difference(2, 6) == pytest.approx(norm.ppf(0.975) * np.sqrt(2 * 3 / 36), rel=1e-6)


def test_average_ranks_match_hand_worked_ones_in_both_directions():
    table = [[0.1, 0.2, 0.2], [0.3, 0.1, 0.5], [0.1, 0.2, 0.3]]
    # Lower is better: ranks (1, 2.5, 2.5), (2, 1, 3), (1, 2, 3).
    assert rank_methods(tasks(table), "lower").average == pytest.approx({"a": 4 / 3, "b": 5.5 / 3, "c": 8.5 / 3})
    assert list(rank_methods(tasks(table), "higher").average) == ["c", "b", "a"]
    assert rank_methods(tasks(table), "higher").average["c"] == pytest.approx(4 - 8.5 / 3)


def test_the_p_value_is_that_of_iman_and_davenport():
    table = np.random.default_rng(0).normal(size=(7, 4)) + np.array([0, 0.5, 1.0, 1.0])
    ranks = table.argsort(1).argsort(1) + 1
    chi = 12 * 7 / (4 * 5) * (np.square(ranks.mean(0)).sum() - 4 * 25 / 4)
    expected = fisher.sf(6 * chi / (7 * 3 - chi), 3, 18)
    assert rank_methods(tasks(table), "lower").p_value == pytest.approx(expected, rel=1e-9)


def test_methods_that_keep_their_order_are_told_apart_and_equal_ones_are_not():
    ordered = rank_methods(tasks([[1.0, 2.0, 3.0]] * 30), "lower")
    assert ordered.p_value == 0.0
    assert ordered.groups == ()
    equal = rank_methods(tasks([[1.0, 1.0, 1.0]] * 3), "lower")
    assert equal.p_value == 1.0
    assert equal.groups == (("a", "b", "c"),)


def test_groups_are_the_longest_runs_within_one_critical_difference():
    rng = np.random.default_rng(1)
    table = rng.normal(size=(12, 6)) + 0.8 * np.arange(6)
    found = rank_methods(tasks(table), "lower")
    names = list(found.average)
    runs = [
        set(names[i:j])
        for i, j in combinations(range(len(names) + 1), 2)
        if j - i > 1 and found.average[names[j - 1]] - found.average[names[i]] <= found.critical_difference
    ]
    longest = [run for run in runs if not any(run < other for other in runs)]
    assert [set(group) for group in found.groups] == longest
    assert 1 < len(longest) < 6


def test_what_cannot_be_ranked_is_rejected_with_its_reason():
    with pytest.raises(DataError, match="task 1 lacks c"):
        rank_methods({"task 0": {"a": 1.0, "b": 2.0, "c": 3.0}, "task 1": {"a": 1.0, "b": 2.0}}, "lower")
    with pytest.raises(DataError, match="3 tasks and 2 methods"):
        rank_methods(tasks([[1.0, 2.0]] * 3), "lower")
    with pytest.raises(DataError, match="NaN"):
        rank_methods(tasks([[1.0, 2.0, 3.0], [1.0, np.nan, 3.0]]), "lower")


def test_holm_matches_hand_worked_values():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]


def test_holm_is_closed_testing_with_bonferroni():
    p = dict(zip("abcde", np.random.default_rng(2).uniform(0, 0.3, size=5), strict=True))
    subsets = [s for size in range(1, 6) for s in combinations(p, size)]
    closed = {name: max(min(1.0, len(s) * min(p[member] for member in s)) for s in subsets if name in s) for name in p}
    assert holm(p) == pytest.approx(closed)
    assert holm({}) == {}
