"""The grid: train once, run every cell, go on after a failure or an interruption, do nothing twice."""

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from bdl_bench.data.folder import MissingDataError
from bdl_bench.methods import METHODS
from bdl_bench.problem import Problem
from bdl_bench.records import RecordStore, versions
from bdl_bench.report.results import load_records
from bdl_bench.runner.events import ENDINGS
from bdl_bench.runner.executors import Workers
from bdl_bench.runner.grid import Grid
from bdl_bench.runner.locks import FileLocks
from bdl_bench.runner.train_job import TrainingJob, known_training, load_problem, train_network
from bdl_bench.tasks import TASKS
from bdl_bench.tasks.registry import Task
from estimators.errors import OptionError
from estimators.training import Recipe


def run(grid):
    events = []
    records = grid.run(events.append)
    return records, [(e.method, e.seed, e.status) for e in events if e.status in ENDINGS]


def test_a_run_trains_once_a_seed_and_records_every_cell(toy, tmp_path):
    records, events = run(Grid([toy], ["map", "last-layer-laplace"], [0, 1], tmp_path))
    assert [(method, status) for method, _, status in events[:2]] == [(None, "trained")] * 2
    assert [(r.method, r.seed, r.status) for r in records] == [
        (method, seed, "ok") for method in ("map", "last-layer-laplace") for seed in (0, 1)
    ]
    assert RecordStore(tmp_path).all() == sorted(records, key=lambda r: (r.method, r.seed))


def test_a_record_says_what_was_run(toy, tmp_path):
    (record,), _ = run(Grid([toy], ["last-layer-laplace"], [0], tmp_path))
    arrays = RecordStore(tmp_path).arrays(record)
    assert arrays["mean"].shape == arrays["targets"].shape == (14, 2)
    assert record.configuration["train_rows"] == "24"
    assert record.configuration["test_rows"] == "14"
    assert record.configuration["prior_precision"] == "0.5"
    assert "epochs=2" in record.training.recipe
    assert record.metrics["reg/RMSE"] > 0


def test_a_cost_has_the_seconds_of_the_fit_and_of_the_prediction_apart(toy, tmp_path, monkeypatch):
    clock = iter([10.0, 13.0, 18.0])  # before the fit, after it, after the prediction
    monkeypatch.setattr("bdl_bench.runner.evaluate_job.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    (record,), _ = run(Grid([toy], ["map"], [0], tmp_path))
    assert (record.cost.fit_seconds, record.cost.predict_seconds) == (3.0, 5.0)


def test_every_method_starts_from_the_same_network(toy, tmp_path):
    records, _ = run(Grid([toy], ["map", "last-layer-laplace"], [0], tmp_path))
    first, second = (RecordStore(tmp_path).arrays(record)["mean"] for record in records)
    assert (first == second).all()


def test_seeds_give_different_problems(toy, tmp_path):
    records, _ = run(Grid([toy], ["map"], [0, 1], tmp_path))
    first, second = (RecordStore(tmp_path).arrays(record)["targets"] for record in records)
    assert (first != second).all()


def test_a_second_run_does_nothing_again(toy, tmp_path):
    grid = Grid([toy], ["map", "last-layer-laplace"], [0], tmp_path)
    first, _ = run(grid)
    again, events = run(grid)
    assert {status for _, _, status in events} == {"cached"}
    assert again == first


def test_a_second_run_makes_what_is_new_or_damaged(toy, tmp_path):
    (record,), _ = run(Grid([toy], ["map"], [0], tmp_path))
    (tmp_path / record.arrays).write_bytes(b"")
    _, events = run(Grid([toy], ["map", "last-layer-laplace"], [0], tmp_path))
    assert events == [(None, 0, "cached"), ("map", 0, "ok"), ("last-layer-laplace", 0, "ok")]


def test_a_damaged_network_file_is_trained_again(toy, tmp_path):
    grid = Grid([toy], ["map"], [0], tmp_path)
    run(grid)
    (path,) = (tmp_path / "checkpoints").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    assert run(grid)[1] == [(None, 0, "trained"), ("map", 0, "cached")]


def test_other_code_makes_everything_again(toy, tmp_path, monkeypatch):
    grid = Grid([toy], ["map"], [0], tmp_path)
    run(grid)
    monkeypatch.setattr("bdl_bench.runner.train_job.source_digest", lambda: "another")
    assert run(grid)[1] == [(None, 0, "trained"), ("map", 0, "ok")]


def test_another_tuning_budget_makes_the_records_again_and_keeps_the_network(toy, tmp_path):
    grid = Grid([toy], ["map"], [0], tmp_path)
    run(grid)
    assert run(replace(grid, tune_budget=1))[1] == [(None, 0, "cached"), ("map", 0, "ok")]
    assert run(replace(grid, tune_budget=1))[1] == [(None, 0, "cached"), ("map", 0, "cached")]


def test_the_code_digest_covers_the_library_and_not_the_report():
    names = {path.name for path in versions._sources()}
    assert {"laplace.py", "gaussian.py", "evaluate_job.py", "calibration.py", "scikit_learn.py"} <= names
    assert not {"html.py", "cli.py", "local.py", "estimate.py"} & names


def test_a_failing_cell_is_recorded_and_the_others_go_on(toy, broken, tmp_path):
    records, _ = run(Grid([toy], [broken, "map"], [0], tmp_path))
    assert [r.status for r in records] == ["failed", "ok"]
    assert records[0].reason == "ZeroDivisionError: on purpose"
    assert "in _fit" in records[0].traceback


def test_a_cell_that_would_not_fit_into_memory_is_skipped_with_the_size(toy, oversized, tmp_path):
    records, _ = run(Grid([toy], [oversized, "map"], [0], tmp_path))
    assert [r.status for r in records] == ["skipped", "ok"]
    assert "1048576.00 GiB" in records[0].reason


def test_a_task_that_cannot_be_made_fails_its_own_cells_only(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "bad", Task("bad", "raises", lambda seed: 1 / seed))
    records, _ = run(Grid(["bad", toy], ["map"], [0], tmp_path))
    assert [r.status for r in records] == ["failed", "ok"]
    assert "division by zero" in records[0].reason


def test_a_method_that_retrains_is_skipped_without_make_model(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "map", replace(METHODS["map"], retrains=True))
    (record,), _ = run(Grid([toy], ["map"], [0], tmp_path))
    assert record.status == "skipped"
    assert "make_model" in record.reason


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(toy, tmp_path):
    grid = Grid([toy], ["map", "last-layer-laplace"], [0, 1], tmp_path)
    seen = []

    def interrupt(event):
        seen.append(event)
        if sum(e.status == "ok" for e in seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid.run(interrupt)
    assert len(RecordStore(tmp_path).all()) == 2
    _, events = run(grid)
    assert sorted(status for method, _, status in events if method) == ["cached", "cached", "ok", "ok"]


def test_two_processes_give_the_same_numbers_as_one(tmp_path):
    one, _ = run(Grid(["diabetes"], ["map", "last-layer-laplace"], [0], tmp_path / "one"))
    two, _ = run(Grid(["diabetes"], ["map", "last-layer-laplace"], [0], tmp_path / "two", workers=Workers(jobs=2)))
    assert [r.status for r in two] == ["ok", "ok"]
    for a, b in zip(one, two, strict=True):
        assert a.metrics == pytest.approx(b.metrics, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"methods": ["nope"]}, {"tasks": ["nope"]}, {"tasks": []}, {"workers": Workers(jobs=0)}, {"device": "abacus"}],
)
def test_a_grid_that_cannot_run_is_rejected_before_anything_is_written(toy, tmp_path, change):
    arguments = {"tasks": [toy], "methods": ["map"], "seeds": [0], "directory": tmp_path / "out", **change}
    with pytest.raises(OptionError):
        Grid(**arguments).run(lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_cost_is_exclusive_where_nothing_else_was_at_work(toy, tmp_path):
    (alone,), _ = run(Grid([toy], ["map"], [0], tmp_path / "alone"))
    with FileLocks(tmp_path / "beside"):
        (beside,), _ = run(Grid([toy], ["map"], [0], tmp_path / "beside"))
    assert alone.cost.exclusive
    assert not beside.cost.exclusive


def test_a_cost_is_not_exclusive_if_another_run_begins_meanwhile(toy, tmp_path):
    with ExitStack() as another:

        def begin(event):
            if event.method == "map" and event.status == "started":
                another.enter_context(FileLocks(tmp_path))

        (record,) = Grid([toy], ["map"], [0], tmp_path).run(begin)
    assert record.status == "ok"
    assert not record.cost.exclusive


def test_weights_of_another_training_are_rejected(toy, tmp_path):
    grid = Grid([toy], ["map"], [0], tmp_path)

    def exchange(event):
        if event.status == "trained":  # as a run of other code would, between the training and the cell
            (path,) = (tmp_path / "checkpoints").rglob("*.safetensors")
            metadata = {"key": "another", "seconds": "1.0"}
            path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), metadata=metadata))

    (record,) = grid.run(exchange)
    assert record.status == "failed"
    assert "key another" in record.reason


def test_a_failure_of_another_run_during_this_one_is_taken_over_and_a_later_run_tries_again(toy, broken, tmp_path):
    other = Grid([toy], [broken], [0], tmp_path)
    events = []

    def run_beside(event):
        events.append(event)
        if (event.method, event.status) == ("map", "started"):
            other.run(print)

    _, record = Grid([toy], ["map", broken], [0], tmp_path).run(run_beside)
    assert record.status == "failed"
    assert [e.status for e in events if e.method == broken] == ["planned", "failed"]
    later = []
    other.run(later.append)
    assert [e.status for e in later if e.method == broken] == ["planned", "started", "failed"]


def test_tasks_methods_and_seeds_that_are_named_twice_run_once(toy, tmp_path):
    grid = Grid([toy, toy], ["map", "map"], [0, 0], tmp_path)
    records, events = run(grid)
    assert [status for *_, status in events] == ["trained", "ok"]
    assert len(records) == 8
    assert grid.n_jobs == 2


@pytest.mark.parametrize(
    ("workers", "device", "says"),
    [
        (Workers(2, executor="in-process"), "cpu", "executor local"),
        (Workers(executor="abacus"), "cpu", "abacus"),
        (Workers(jobs=0), "cpu", "jobs"),
        (Workers(threads=0), "cpu", "threads"),
        (Workers(executor="ray"), "cuda:1", "whose number is 0"),
    ],
)
def test_what_cannot_be_run_is_rejected_before_anything_is_written(workers, device, says, toy, tmp_path, monkeypatch):
    monkeypatch.setattr("bdl_bench.runner.executors.choice.importlib.util.find_spec", lambda name: name)
    with pytest.raises(OptionError, match=says):
        Grid([toy], ["map"], [0], tmp_path / "out", device, workers).run(print)
    assert not (tmp_path / "out").exists()


def test_frozen_weights_are_not_kept_with_those_that_were_trained(tmp_path, monkeypatch):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(24, n, generator=generator, dtype=torch.float64) for n in (3, 2))
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        network[0].requires_grad_(False)
        batches = list(zip(x.split(7), y.split(7), strict=True))
        recipe = Recipe(epochs=2)
        return Problem(network, "regression", batches, batches, batches[:2], prior_precision=0.5, recipe=recipe)

    monkeypatch.setitem(TASKS, "frozen", Task("frozen", "a toy with a frozen layer", make))
    run(Grid(["frozen"], ["map"], [0], tmp_path))
    (path,) = (tmp_path / "checkpoints").rglob("*.safetensors")
    kept = safetensors.torch.load_file(path)
    assert set(kept) == {"2.weight", "2.bias"}
    fresh = TASKS["frozen"].problem(0).model
    trained = load_problem(
        train_network(TrainingJob("frozen", 0, "cpu", known_training(path))).model, tmp_path, "cpu"
    ).model
    assert torch.equal(trained[0].weight, fresh[0].weight)
    assert torch.equal(trained[2].weight, kept["2.weight"])
    assert not torch.equal(trained[2].weight, fresh[2].weight)


def test_finished_records_outlive_a_task_that_cannot_be_made_any_more(toy, tmp_path, monkeypatch):
    grid = Grid([toy], ["map", "last-layer-laplace"], [0], tmp_path)
    (first, _), _ = run(grid)
    good = TASKS[toy]

    def missing(seed):  # noqa: ARG001
        raise MissingDataError("files", received="none", remedy="--data-dir.")

    monkeypatch.setitem(TASKS, toy, replace(good, make=missing))
    records, _ = run(grid)
    assert {r.status for r in records} == {"skipped"}
    assert RecordStore(tmp_path).finished(toy, "map", 0) == first
    monkeypatch.setitem(TASKS, toy, good)
    assert {status for _, _, status in run(grid)[1]} == {"cached"}


def test_records_of_another_problem_are_not_compared(toy, tmp_path, monkeypatch):
    run(Grid([toy], ["map", "last-layer-laplace"], [0], tmp_path))
    other = TASKS[toy].make
    monkeypatch.setitem(TASKS, toy, replace(TASKS[toy], make=lambda seed: other(seed + 1)))
    run(Grid([toy], ["map"], [0], tmp_path))
    found = {r.method: (r.status, r.reason) for r in load_records(RecordStore(tmp_path))}
    assert found["map"] == ("ok", None)
    assert found["last-layer-laplace"][0] == "failed"
    assert "other data" in found["last-layer-laplace"][1]


def test_dropout_of_the_network_itself_is_tuned_by_its_calibration_alone(tmp_path, monkeypatch):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(24, n, generator=generator, dtype=torch.float64) for n in (3, 2))
        batches = list(zip(x.split(7), y.split(7), strict=True))
        network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2)).double()
        recipe = Recipe(epochs=2)
        return Problem(network, "regression", batches, batches, batches[:2], prior_precision=0.5, recipe=recipe)

    monkeypatch.setitem(TASKS, "dropping", Task("dropping", "a toy with dropout", make))
    (record,), _ = run(Grid(["dropping"], ["dropout"], [0], tmp_path, tune_budget=3))
    assert record.status == "ok"
    assert (record.tuning.option, record.tuning.fits) == (None, 0)
