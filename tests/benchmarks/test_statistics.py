"""The statistics of the report, on simulated comparisons of a method with itself: at most 7 % are called different."""

import numpy as np
import pytest

from bdl_bench.metrics import ood
from benchmarks.statistics import page
from benchmarks.statistics.measure import measure_columns, measure_level, measure_power
from benchmarks.statistics.worlds import DESIGNS, QUANTITIES

BOUND = 0.07
"""False significant differences at a nominal 5 %."""
NAMES = [design.name for design in DESIGNS]
QUICK = ("Gaussian scores", "heavy-tailed scores (NLL)", "accuracy")
N = 120


@pytest.mark.parametrize("quantity", QUICK)
@pytest.mark.parametrize("design", NAMES[:3])
def test_a_method_is_seldom_called_different_from_itself(design, quantity):
    found = measure_level(design, quantity, n_comparisons=N, rows=(5, 50), seeds=(3, 5))
    allowed = BOUND + 2 * np.sqrt(0.05 * 0.95 / N)  # two standard errors
    assert {(p["rows"], p["seeds"]) for p in found["points"]} == {(5, 3), (5, 5), (50, 3), (50, 5)}
    assert max(point["level"] for point in found["points"]) <= allowed
    assert all(point["unknown"] == 0 for point in found["points"])


def test_the_bootstrap_that_this_replaced_was_wrong_three_times_as_often():
    found = measure_level("new splits", "Gaussian scores", n_comparisons=N, rows=(50,), seeds=(2, 3))
    assert min(point["bootstrap"] for point in found["points"]) > 0.1


def test_two_seeds_one_shared_row_and_copies_are_not_tested():
    two = measure_level("new splits", "Gaussian scores", n_comparisons=5, rows=(5,), seeds=(2,))
    one_row = measure_level("one fixed test set", "Gaussian scores", n_comparisons=5, rows=(1,), seeds=(10,))
    copies = measure_level(
        "copies of one network", "heavy-tailed scores (NLL)", n_comparisons=5, rows=(50,), seeds=(10,)
    )
    for found in (two, one_row, copies):
        (point,) = found["points"]
        assert (point["unknown"], point["level"]) == (1, 0)
    assert one_row["points"][0]["coverage"] is copies["points"][0]["coverage"] is None


def test_a_difference_that_is_there_is_found():
    for design in NAMES[:2]:
        found = measure_power(design, "Gaussian scores", n_comparisons=60)
        power = {(p["shift"], p["seeds"]): p["power"] for p in found["points"]}
        assert power[2.0, 5] > 0.6
        assert power[1.0, 10] > 0.5
        assert power[0.5, 2] == 0


def test_intervals_of_a_metric_cover_it():
    for design in NAMES[:2]:
        found = measure_level(design, "Gaussian scores", n_comparisons=N, rows=(50,), seeds=(3, 5))
        assert min(point["coverage"] for point in found["points"]) > 0.95 - 3 * np.sqrt(0.05 * 0.95 / N)


def test_the_ranks_of_the_simulation_give_the_auroc_of_the_report():
    rng = np.random.default_rng(0)
    arrays = QUANTITIES["AUROC"].arrays(rng.normal(size=40).round(1), 0.3, rng)
    outside = arrays["ood/other/mean"].round(1)
    expected = ood.auroc(arrays["mean"], outside)
    assert QUANTITIES["AUROC"].metric.value({**arrays, "ood/other/mean": outside}) == pytest.approx(expected, rel=1e-12)


def test_the_page_has_a_table_per_design():
    rows = {d: measure_level(d, "Gaussian scores", n_comparisons=4, rows=(5,)) for d in NAMES}
    rows["columns"] = measure_columns(n_columns=3, n_rows=5)
    rows["power"] = measure_power("new splits", "Gaussian scores", n_comparisons=4)
    text = page.to_markdown(rows)
    assert all(f"## False significant differences: {design}" in text for design in NAMES)
    assert "| Gaussian scores | 5 | not tested |" in text
    assert text.count("\n## ") == 4 + 1 + 3


@pytest.mark.verification
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("design", NAMES)
def test_of_a_thousand_comparisons_at_most_seven_percent_are_called_different(design, quantity):
    found = measure_level(design, quantity)
    assert max(point["level"] for point in found["points"]) <= BOUND
    if design == NAMES[3]:
        assert all(point["unknown"] == 1 for point in found["points"])


@pytest.mark.verification
def test_of_a_thousand_columns_at_most_seven_percent_have_a_false_mark():
    for point in measure_columns()["points"]:
        assert point["baseline"] <= BOUND
        assert point["best"] <= BOUND
