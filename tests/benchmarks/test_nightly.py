"""The nightly comparison: its snapshots, what counts as a change, and when the command fails."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from synthetic_records import write_cell

from bdl_bench.records import RecordStore
from bdl_bench.tasks import TASKS as BUNDLED
from benchmarks.nightly import __main__ as command
from benchmarks.nightly.changes import changes
from benchmarks.nightly.page import to_markdown
from benchmarks.nightly.run import METHODS, TASKS
from benchmarks.nightly.snapshot import MethodResult, Snapshot, load, of_run, save
from estimators.errors import StateError


def snapshot(version, date, **tasks):
    """Of tasks: {method: [NLL by seed]}."""

    def result(values):
        return MethodResult({"cls/NLL": {str(seed): value for seed, value in enumerate(values)}}, 1.5)

    found = {task: {m: result(values) for m, values in methods.items()} for task, methods in tasks.items()}
    return Snapshot(version, date, {"bdl-bench": version, "torch": "9"}, found)


def no_run(*arguments, **options):
    """In place of a run whose records are there."""


@pytest.fixture
def run_directory(tmp_path):
    store = RecordStore(tmp_path / "run")
    for seed in range(3):
        for method in ("map", "regvar"):
            write_cell(store, "a", "regression", method, seed)
            write_cell(store, "b", "classification", method, seed)
    return tmp_path / "run"


def test_the_set_is_of_bundled_tasks_with_real_data():
    assert set(TASKS) <= set(BUNDLED)
    assert {"map", "ensemble", "dropout", "laplace-kron", "last-layer-laplace", "regvar"} <= set(METHODS)


def test_a_snapshot_has_the_tuned_scores_of_every_seed(run_directory, tmp_path):
    found = of_run(run_directory)
    store = RecordStore(run_directory)
    assert [(task, *methods) for task, methods in found.tasks.items()] == [
        ("a", "map", "regvar"),
        ("b", "map", "regvar"),
    ]
    scores = {task: methods["regvar"].scores for task, methods in found.tasks.items()}
    assert [list(of_task) for of_task in scores.values()] == [["reg/NLL", "reg/RMSE"], ["cls/NLL", "cls/Acc"]]
    for seed in range(3):
        a, b = (store.arrays(store.read(task, "regvar", seed)) for task in "ab")
        density = stats.norm(a["tuned/mean"], np.sqrt(a["tuned/total_variance"])).logpdf(a["targets"])
        assert scores["a"]["reg/NLL"][str(seed)] == pytest.approx(-density.mean())
        assert scores["b"]["cls/Acc"][str(seed)] == (b["tuned/probs"].argmax(1) == b["targets"]).mean()
    assert load(tmp_path / "kept") == []
    save(found, tmp_path / "kept")
    assert load(tmp_path / "kept") == [found]


def test_a_directory_without_finished_runs_has_no_snapshot(tmp_path):
    with pytest.raises(StateError, match="finished runs"):
        of_run(tmp_path)


def test_a_change_is_a_relevant_difference_of_the_common_seeds():
    earlier = snapshot("1", "2026-01-01", a={"map": [1.0, 2.0], "regvar": [1.0, 1.0], "swag": [0.5], "dropout": [1.0]})
    later = snapshot(
        "2", "2026-02-01", a={"map": [1.012, 2.006, 9.0], "regvar": [0.9, 1.3], "swag": [0.4], "ivon": [1.0]}
    )
    found = {change.method: change for change in changes(earlier, later)}
    assert list(found) == ["map", "regvar", "swag", "ivon", "dropout"]
    assert (found["map"].verdict, found["map"].mean) == ("same", pytest.approx(0.009)), "the third seed is new"
    assert found["map"].largest == pytest.approx(0.012)
    assert (found["regvar"].verdict, found["regvar"].mean) == ("worse", pytest.approx(0.1))
    assert found["regvar"].largest == pytest.approx(0.3)
    verdicts = {method: change.verdict for method, change in found.items()}
    assert verdicts == {"map": "same", "regvar": "worse", "swag": "better", "ivon": "new", "dropout": "missing"}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [([1.0, 1.0], [1.0, np.nan], "worse"), ([1.0, 1.0], [1.0, np.inf], "worse"), ([1.0, 1.0], [1.0], "missing"),
     ([np.nan, 1.0], [7.0, 1.0], "same"), ([np.nan, np.nan], [1.0, 1.0], "new"), ([], [1.0], "new"),
     ([1.0], [], "missing"), ([], [np.nan, np.nan], "worse"), ([1.0], [1.0, np.nan], "worse"),
     ([np.nan], [np.nan], "worse")],
)  # fmt: skip
def test_values_that_are_not_finite_and_lost_seeds_are_no_improvements(before, after, verdict):
    one, other = ({"map": values, "swag": [0.0, 0.0]} for values in (before, after))
    change, _ = changes(snapshot("1", "2026-01-01", a=one), snapshot("2", "2026-02-01", a=other))
    assert change.verdict == verdict


def test_seeds_that_no_method_was_run_at_are_not_missing():
    one, other = {"map": [1.0, 2.0], "swag": [1.0, 3.0]}, {"map": [1.0], "swag": [1.5]}
    found = changes(snapshot("1", "2026-01-01", a=one), snapshot("2", "2026-02-01", a=other))
    assert [change.verdict for change in found] == ["same", "worse"]


def test_a_method_without_a_likelihood_is_missing_and_the_page_shows_it():
    def of(version, **scores):
        return Snapshot(version, "2026-01-01", {}, {"a": {"map": MethodResult(scores, 1.0)}})

    before, after = of("1", **{"reg/NLL": {"0": 1.0}, "reg/RMSE": {"0": 1.0}}), of("2", **{"reg/RMSE": {"0": 9.0}})
    assert changes(before, after)[0].verdict == "missing"
    assert "map on a (missing)" in to_markdown([before, after])
    assert changes(of("1"), of("2"))[0].verdict == "missing"


def test_the_page_shows_the_newest_version_beside_the_one_before_it():
    first = snapshot("0.1.0", "2026-01-01", a={"map": [1.0], "regvar": [2.0]})
    second = snapshot("0.2.0", "2026-02-01", a={"map": [1.0], "regvar": [2.25]})
    assert "There is no former version" in to_markdown([first])
    page = to_markdown([first, second])
    assert "Compared with 0.1.0 (2026-01-01): 1 same, 1 worse. Look at: regvar on a (worse)." in page
    assert "| `regvar` | 2.2500 | 1.5 s | +0.2500 | worse |" in " ".join(page.split("  "))
    assert "| 0.1.0 | 2026-01-01 | 9 | 1.0000 | 2.0000 |" in " ".join(page.split("  "))


@pytest.mark.parametrize(("change", "status"), [(0.0, 0), (-0.3, 1), (0.3, 0)])
def test_the_command_fails_if_a_method_is_worse_than_in_the_former_version(
    run_directory, tmp_path, monkeypatch, change, status
):
    """`change` is added to the scores of the former version."""
    monkeypatch.setattr(command, "run", no_run)
    now = of_run(run_directory)
    docs = tmp_path / "docs"
    before = {s: v + change for s, v in now.tasks["a"]["regvar"].scores["reg/NLL"].items()}
    tasks = now.tasks | {"a": now.tasks["a"] | {"regvar": MethodResult({"reg/NLL": before}, 1.0)}}
    save(replace(now, version="0.0.1", date="2020-01-01", tasks=tasks), docs / "records" / "nightly")
    words = ["--out", str(run_directory), "--docs", str(docs), "--keep"]
    assert command.main(words) == status
    kept = sorted(path.name for path in (docs / "records" / "nightly").iterdir())
    assert kept == sorted(["0.0.1.json", f"{now.version}.json"])
    assert "## All versions" in (docs / "nightly.md").read_text(encoding="utf-8")
    assert json.loads((docs / "records" / "nightly" / f"{now.version}.json").read_text(encoding="utf-8"))["tasks"]
    assert command.main(words) == status, "the results of this version are not compared with themselves"


def test_the_command_says_what_to_do_if_nothing_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", no_run)
    assert command.main(["--out", str(tmp_path), "--docs", str(tmp_path)]) == 2
    assert "Try: python -m benchmarks.nightly" in capsys.readouterr().err
