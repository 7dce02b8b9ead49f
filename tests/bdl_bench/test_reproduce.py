"""Published comparisons: the printed numbers, our position relative to them, and a run that is resumed."""

import math
import os

import numpy as np
import pytest
from tiny_files import write_uci
from typer.testing import CliRunner

from bdl_bench.cli import app
from bdl_bench.records.record import Record, RecordStore
from bdl_bench.reproduce import STUDIES, page, study_named
from bdl_bench.reproduce.published import BDE, UCI, Published, parse
from bdl_bench.tasks import TASKS
from bdl_bench.tasks.uci import UCI_SETS
from estimators.errors import OptionError


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def record(task, method, seed, **tuned):
    return Record(key="k", task=task, task_summary="", method=method, method_summary="", seed=seed, status="ok",
                  kind="regression", tuned=tuned)  # fmt: skip


def write(store, made, *, at=0):
    """Write a finished record with the rows of its split, at a time in seconds."""
    rows = {"targets": np.ones((4, 1)), "row_id": np.arange(4) + 10 * made.seed}
    store.write(made, rows)
    os.utime(store.path(made.task, made.method, made.seed), (at, at))


@pytest.mark.parametrize(
    ("text", "value", "bar", "unit", "shown"),
    [
        ("5.67±.09", 5.67, 0.09, 0.01, "5.67 ± 0.09"),
        (".10", 0.1, None, 0.01, "0.10"),
        ("−3.73±.01", -3.73, 0.01, 0.01, "-3.73 ± 0.01"),
        (".6598±.0000", 0.6598, 0.0, 1e-4, "0.6598 ± 0.0000"),
    ],
)
def test_a_printed_number_keeps_its_digits(text, value, bar, unit, shown):
    assert parse(text) == Published(value, bar, pytest.approx(unit))
    assert str(parse(text)) == shown


@pytest.mark.parametrize(
    ("ours", "position"), [(5.0, "inside"), (5.509, "inside"), (5.511, "above"), (4.491, "inside"), (4.48, "below")]
)
def test_a_bar_is_extended_by_the_rounding_of_both_numbers(ours, position):
    assert Published(5.0, 0.5, 0.01).position(ours) == position


def test_a_number_without_a_bar_has_its_rounding():
    assert [Published(0.1, None, 0.01).position(v) for v in (0.0949, 0.0951, 0.1049, 0.1051)] == [
        "below", "inside", "inside", "above",
    ]  # fmt: skip


def test_a_bar_that_is_rounded_to_zero_is_extended_by_both_roundings():
    naval = UCI["NLL"]["naval"]["dropout, tuned per split"]
    assert (str(naval), str(UCI["RMSE"]["naval"]["PBP"])) == ("-4.45 ± 0.00", "0.01")
    assert [naval.position(v) for v in (-4.461, -4.459, -4.456, -4.441, -4.439)] == [
        "below", "inside", "inside", "inside", "above",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("ValueError: bad thing.", " ValueError: bad thing."),
        ("Expected a network.\nReceived `nothing`.", " Expected a network."),
        ("Two\nlines", " Two lines."),
        (None, ""),
    ],
)
def test_a_run_without_a_result_is_one_line_with_the_first_sentence_of_its_reason(tmp_path, reason, shown):
    store = RecordStore(tmp_path)
    store.write(record("uci-yacht", "map", 0).model_copy(update={"status": "failed", "reason": reason}))
    text = page(study_named("uci"), tmp_path)
    assert text.endswith(f"\n- failed: uci-yacht, split 0, `map`.{shown}\n")


def test_methods_that_did_not_run_are_not_counted(tmp_path):
    write(RecordStore(tmp_path), record("uci-yacht", "map", 0, **{"reg/RMSE": 1.0}))
    assert "Inside the published" not in page(study_named("uci"), tmp_path)
    write(RecordStore(tmp_path), record("uci-yacht", "dropout", 0, **{"reg/RMSE": 1.0}))
    lines = page(study_named("uci"), tmp_path).partition("Inside the published")[2].splitlines()
    assert [line for line in lines if line.startswith("-")] == ["- `dropout` and dropout: 1 of 1 sets. inside: yacht."]


def test_every_set_has_published_numbers_and_a_task_for_each_protocol():
    for metric in ("RMSE", "NLL"):
        assert set(UCI[metric]) == {each.name for each in UCI_SETS}
        assert set(BDE[metric]) == {"airfoil", "bike"}
    for study in STUDIES.values():
        assert {task.task for task in study.tasks} <= set(TASKS)
        columns = next(iter(study.published["RMSE"].values()))
        assert all(column.published in columns for by in study.columns.values() for column in by)
    assert UCI["RMSE"]["concrete"]["PBP"] == parse("5.67±.09")
    assert UCI["NLL"]["yacht"]["dropout, tuned per split"] == parse("1.25±.01")


def test_the_published_nll_of_bde_is_that_of_its_rmse():
    """½ log(2πe) + log RMSE to the digits that were printed: it has no information on the predicted variance."""
    for name, columns in BDE["RMSE"].items():
        for column, rmse in columns.items():
            nll = 0.5 * math.log(2 * math.pi * math.e) + math.log(rmse.value)
            assert BDE["NLL"][name][column].value == pytest.approx(nll, abs=0.01)


def test_unknown_names_are_rejected():
    study = study_named("uci")
    with pytest.raises(OptionError, match="uci, bde"):
        study_named("cifar")
    with pytest.raises(OptionError, match="--sets among yacht"):
        study.chosen(["boston"], None)
    with pytest.raises(OptionError, match="--epochs among 40, 400"):
        study.chosen(None, ["100"])
    assert [task.task for task in study.chosen(["protein"], ["40", "400"])] == ["uci-protein", "uci-protein-400"]
    assert [len(task.seeds(None)) for task in study.chosen(["yacht", "protein"], None)] == [20, 5]


def test_a_page_has_means_over_splits_and_marks_what_lies_outside(tmp_path):
    store = RecordStore(tmp_path)
    ensemble, dropout = (1.4, 1.6, 1.8), (0.5, 0.6, 0.7)
    for seed, (a, b) in enumerate(zip(ensemble, dropout, strict=True)):
        write(store, record("uci-yacht", "ensemble", seed, **{"reg/RMSE": a, "reg/NLL": 2.0, "cp/coverage": 0.9}))
        write(store, record("uci-yacht", "dropout", seed, **{"reg/RMSE": b, "reg/NLL": 1.5, "cp/coverage": 0.8}))
    write(store, record("uci-yacht", "map", 0, **{"reg/RMSE": 1.0, "reg/NLL": 1.0}))
    failed = record("uci-yacht", "map", 1).model_copy(
        update={"status": "failed", "reason": "ModelError: Expected x. y"}
    )
    store.write(failed)
    text = page(study_named("uci"), tmp_path)
    assert "- failed: uci-yacht, split 1, `map`. ModelError: Expected x.\n" in text
    error = np.std(ensemble, ddof=1) / math.sqrt(3)
    rmse, nll = (next(line for line in part.splitlines() if line.startswith("| yacht"))
                 for part in (text.partition("### RMSE")[2], text.partition("### NLL")[2]))  # fmt: skip
    cells = [cell.strip() for cell in rmse.strip("|").split("|")]
    assert cells[:6] == ["yacht", "3", "1.02 ± 0.05", "1.11 ± 0.38", "1.58 ± 0.48", "0.67 ± 0.05"]
    assert cells[6:] == ["1.00 (1)", "0.600 ± 0.058 ↓", f"1.60 ± {error:.2f}"]
    assert nll.rstrip("| ").endswith("2.00 ↑")
    assert "`ensemble` and ensemble: 1 of 1 sets" in text
    assert "`dropout` and dropout: 0 of 1 sets. below: yacht" in text
    assert "| yacht | – | 0.80 | 0.90 |" in text
    assert "400 epochs" not in text


def test_the_command_runs_prints_and_resumes(tmp_path):
    write_uci(tmp_path / "data", "yacht", inputs=6)
    command = ("reproduce", "uci", "--sets", "yacht", "--methods", "map,last-layer-laplace", "--tune-budget", 1,
               "--data-dir", tmp_path / "data", "--out", tmp_path / "out", "--executor", "in-process")  # fmt: skip
    first = invoke(*command, "--splits", 1)
    assert first.exit_code == 0, first.output
    assert "published: PBP" in first.stdout
    assert (tmp_path / "out" / "uci.md").is_file()
    (found,) = (r for r in RecordStore(tmp_path / "out").all() if r.method == "map")
    arrays = RecordStore(tmp_path / "out").arrays(found)
    table = np.loadtxt(tmp_path / "data" / "yacht" / "data.txt")
    rows = np.loadtxt(tmp_path / "data" / "yacht" / "index_test_0.txt").astype(int)
    assert np.sort(arrays["targets"].ravel()) == pytest.approx(np.sort(table[rows, 6]), rel=1e-9)
    written = (tmp_path / "out" / "records" / "uci-yacht" / "map.seed-0.json").stat().st_mtime_ns
    second = invoke(*command, "--splits", 2)
    assert second.exit_code == 0, second.output
    assert (tmp_path / "out" / "records" / "uci-yacht" / "map.seed-0.json").stat().st_mtime_ns == written
    assert "| yacht | 2 |" in second.stdout


@pytest.mark.parametrize(
    ("field", "old", "new", "reason"),
    [
        ("task_code", "a learning rate of 0.1", "of 0.03", "made with other code than the newest run of its task"),
        ("method_code", "old", "new", "made with other code or options of its method"),
        ("configuration", {"tune_budget": "1"}, {"tune_budget": "5"}, "made with another tuning budget"),
    ],
)
def test_a_mean_is_over_runs_of_one_experiment_and_the_others_are_listed(tmp_path, field, old, new, reason):
    store = RecordStore(tmp_path)
    for seed, (value, found) in enumerate([(9.0, old), (0.5, new), (0.7, new)]):
        made = record("uci-energy", "dropout", seed, **{"reg/RMSE": value, "reg/NLL": 1.0})
        write(store, made.model_copy(update={field: found}), at=seed)
    text = page(study_named("uci"), tmp_path)
    rmse = next(line for line in text.partition("### RMSE")[2].splitlines() if line.startswith("| energy"))
    assert [cell.strip() for cell in rmse.strip("|").split("|")][1::5] == ["2", "0.60 ± 0.10 ↓"]
    assert f"- failed: uci-energy, split 0, `dropout`. {reason}" in text
    assert "split 1" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [(("mnist",), "uci, bde"), (("uci", "--sets", "boston"), "--sets"), (("bde", "--epochs", "40"), "--epochs")],
)
def test_bad_usage_exits_with_two(tmp_path, words, message):
    result = invoke("reproduce", *words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
