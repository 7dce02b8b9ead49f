"""What a report says of its seeds: new rows or the same ones, copies, too few; and no verdict that was not tested."""

import csv
import re

import numpy as np
import pytest

from bdl_bench.records import Cost, Record, RecordStore, Training
from bdl_bench.report import write_report
from bdl_bench.report.results import group_by_task, load_records
from bdl_bench.report.scores import score_table
from bdl_bench.report.seed_design import seed_design
from bdl_bench.report.view import build


def regression(mean, targets, *, ids, variance=0.5):
    variances = np.full_like(mean, variance)
    return {"mean": mean, "epistemic_variance": variances, "total_variance": variances + 1.0, "targets": targets,
            "row_id": np.asarray(ids, dtype=np.uint64)}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """write(method, seed, arrays) -> a record of the one task."""
    store = RecordStore(tmp_path)

    def one(method, seed, arrays):
        cost = Cost(fit_seconds=1.0, predict_seconds=0.1, peak_bytes=1, peak_increase_bytes=1, peak_reset=True)
        store.write(
            Record(key="k", task="t", task_summary="made up", method=method, method_summary="made up", seed=seed,
                   status="ok", kind="regression", cost=cost, training=Training(seconds=None, recipe=None)), arrays
        )  # fmt: skip

    return one


def results(directory):
    store = RecordStore(directory)
    (found,) = group_by_task(store, load_records(store))
    return found


def two_methods(write, *, seeds, rows, same_rows, shift=0.3, copies=False, spread=0.05):
    """map and "other", whose errors differ by `shift`; the same rows in another order per seed if `same_rows`."""
    fixed = np.random.default_rng(99)
    targets, difficulty = fixed.normal(size=(rows, 1)), fixed.normal(size=(rows, 1))
    for seed in range(seeds):
        rng = np.random.default_rng(0 if copies else seed)
        order = rng.permutation(rows) if same_rows else np.arange(rows)
        ids = order if same_rows else 1000 * (seed + 1) + order
        y, error = (targets, difficulty) if same_rows else (rng.normal(size=(rows, 1)), rng.normal(size=(rows, 1)))
        for method, extra in (("map", 0.0), ("other", shift)):
            found = y + (1 + extra) * error + spread * rng.normal(size=(rows, 1))
            write(method, seed, regression(found[order], y[order], ids=ids))


def test_seeds_with_other_rows_are_the_sample(write, tmp_path):
    two_methods(write, seeds=4, rows=30, same_rows=False)
    found = results(tmp_path)
    design = seed_design(found)
    assert not design.same_rows
    assert design.repeats == 1
    assert "Each of the 4 seeds has its own 30 test rows" in design.description
    table = score_table(found, design, found.methods)
    values = found.values("other", "reg/NLL"), found.values("map", "reg/NLL")
    interval = table.tests["reg/NLL"].differences["map", "other"]
    assert interval.mean == pytest.approx(np.mean(values[1]) - np.mean(values[0]))
    assert interval.degrees_of_freedom == 3


def test_a_fixed_test_set_is_found_by_its_rows_in_any_order(write, tmp_path):
    two_methods(write, seeds=3, rows=50, same_rows=True)
    found = results(tmp_path)
    design = seed_design(found)
    assert design.same_rows
    assert design.repeats == 3
    assert "share the same 50 test rows" in design.description
    assert not design.warnings
    table = score_table(found, design, found.methods)
    for key in ("reg/NLL", "reg/RMSE", "cal/QCE"):
        assert table.entries["map"][key].interval.mean == pytest.approx(np.mean(found.values("map", key)), rel=1e-9)
    # The errors are those of the rows: about 49 degrees of freedom, far more than the 2 of the seeds.
    interval = table.tests["reg/NLL"].differences["map", "other"]
    assert 30 < interval.degrees_of_freedom < 60
    assert table.entries["other"]["reg/NLL"].against_baseline == "worse"


def test_rows_of_seeds_are_matched_before_they_are_compared(write, tmp_path):
    """With rows in another order per seed, row effects would be taken for noise if they were matched by position."""
    two_methods(write, seeds=5, rows=200, same_rows=True, spread=0.0, shift=0.02)
    found = results(tmp_path)
    # Without a spread over seeds these are copies, so the differences are taken from the tests of all seeds.
    design = seed_design(found)
    assert design.n_distinct == 1
    table = score_table(found, type(design)(design.seeds, design.n_rows, design.orders), found.methods)
    interval = table.tests["reg/NLL"].differences["map", "other"]
    fixed = np.random.default_rng(99)
    _, error = fixed.normal(size=200), fixed.normal(size=200)
    rows = 0.5 * (1.02**2 - 1) * error**2 / 1.5
    assert interval.standard_error == pytest.approx(rows.std(ddof=1) / np.sqrt(200), rel=1e-6)


def test_copies_of_one_experiment_count_as_one_seed_and_are_said(write, tmp_path):
    two_methods(write, seeds=4, rows=30, same_rows=True, copies=True)
    found = results(tmp_path)
    design = seed_design(found)
    assert design.copies["map"] == dict.fromkeys(range(4), 0)
    assert design.n_distinct == 1
    (copies, too_few) = design.warnings
    assert copies.startswith("Identical predictions for seeds 0, 1, 2, 3: map, other. Identical seeds count as one.")
    assert too_few.startswith("Too few seeds for a test: 1 distinct.")
    entry = score_table(found, design, found.methods).entries["other"]["reg/NLL"]
    assert entry.interval.n == 1
    assert entry.interval.half_width is None
    assert entry.against_baseline == "unknown"
    page = write_report(tmp_path).read_text()
    assert "Identical seeds count as one" in page
    assert "not tested, since the seeds are too few" in page
    assert "±" not in page.partition("Test metrics</h3>")[2].partition("</table>")[0]


def test_a_network_that_is_the_same_for_all_seeds_makes_the_seeds_copies_for_every_method(write, tmp_path):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(20, 1))
    for seed in range(3):
        write("map", seed, regression(0.9 * y, y, ids=range(20)))
        write("random", seed, regression(0.9 * y + 0.1 * rng.normal(size=(20, 1)), y, ids=range(20)))
    design = seed_design(results(tmp_path))
    assert design.copies == {"map": {0: 0, 1: 0, 2: 0}, "random": {0: 0, 1: 0, 2: 0}}


def test_two_seeds_are_too_few(write, tmp_path):
    two_methods(write, seeds=2, rows=30, same_rows=False, shift=3.0)
    (task,) = build(tmp_path).tasks
    assert any(sentence.startswith("Too few seeds for a test: 2.") for sentence in task.findings)
    assert any("not tested, since the seeds are too few" in sentence for sentence in task.findings)
    assert not any("significantly" in sentence for sentence in task.findings)
    assert {e["reg/NLL"].against_baseline for e in task.scores.untuned.entries.values()} == {None, "unknown"}


def test_one_row_of_all_seeds_is_no_test(write, tmp_path):
    two_methods(write, seeds=5, rows=1, same_rows=True, shift=3.0)
    (task,) = build(tmp_path).tasks
    assert "All seeds share a single test row, so differences cannot be tested." in task.findings
    assert task.scores.untuned.entries["other"]["reg/NLL"].against_baseline == "unknown"


def test_methods_that_differ_by_round_off_are_ties_in_the_choice_of_the_best(write, tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(4):
        y = rng.normal(size=(30, 1))
        for method, extra in (("b", 0.0), ("a", 2.8e-17), ("c", 0.5)):
            write(method, seed, regression(0.5 * y + extra, y, ids=range(100 * seed, 100 * seed + 30)))
    (task,) = build(tmp_path).tasks
    table = task.scores.untuned
    assert {table.best["reg/RMSE"], *table.tied_with_best("reg/RMSE")} == {"a", "b"}
    assert table.tests["reg/RMSE"].pairs["a", "b"] == "no significant difference"
    assert any(sentence.startswith("Best mean NLL: a, b (") for sentence in task.findings)


def test_the_detectable_difference_is_stated_for_these_seeds_and_for_ten(write, tmp_path):
    two_methods(write, seeds=3, rows=40, same_rows=False)
    (task,) = build(tmp_path).tasks
    start = "With 3 seeds and 40 test rows, a difference in NLL from map of "
    assert any(sentence.startswith(start) for sentence in task.findings)
    now, more = detectable(tmp_path)
    assert more < now / 2


def test_the_detectable_difference_is_larger_after_a_correction_for_more_tests(write, tmp_path):
    two_methods(write, seeds=3, rows=40, same_rows=False)
    stated = [detectable(tmp_path)]
    store = RecordStore(tmp_path)
    for record in load_records(store):
        if record.method == "other":
            write("third", record.seed, dict(store.arrays(record)))
    stated.append(detectable(tmp_path))
    assert (stated[1] > 1.1 * stated[0]).all()


def detectable(directory):
    """The differences from map that these seeds and ten of them can show."""
    (task,) = build(directory).tasks
    (sentence,) = (s for s in task.findings if "is detected with probability 0.8" in s)
    return np.array([float(re.search(rf"{words} ([0-9]+\.[0-9]+)", sentence)[1]) for words in ("map of", "about")])


def test_shifted_rows_of_copies_count_once_in_the_csv(write, tmp_path):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(20, 1))
    for seed in range(3):
        arrays = regression(0.9 * y, y, ids=range(20))
        arrays |= {f"shift/noise-1/{n}": a for n, a in regression(0.5 * y, y, ids=range(20)).items()}
        write("map", seed, arrays)
    write_report(tmp_path)
    with (tmp_path / "report.csv").open() as file:
        (row,) = (r for r in csv.DictReader(file) if r["quantity"] == "shift/NLL/noise-1" and r["variant"] == "untuned")
    assert row["seeds"] == "1"
    assert row["low95"] == ""
