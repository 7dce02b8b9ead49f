"""Bad usage is said in one line, with exit code 2; unreadable files are listed; the command shown runs again."""

import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bdl_bench import compare
from bdl_bench.cli import app
from bdl_bench.records import RecordStore
from bdl_bench.report import write_report
from bdl_bench.report.results import load_records
from bdl_bench.report.selection import Selection
from bdl_bench.report.view import build
from bdl_bench.runner.directories import new_directory, output_directory
from bdl_bench.runner.grid import Grid
from bdl_bench.tasks.names import name_in
from estimators.errors import OptionError, StateError

MODULES = {
    "raises_on_import": "1 / 0",
    "does_not_parse": "def make(seed:",
    "exits_on_import": "raise SystemExit(3)",
    "imports_nothing": "import no_such_module_at_all",
    "has_factories": "number = 3\ndef failing(seed):\n    return 1 / 0\ndef empty(seed):\n    return None\n",
}


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def assert_bad_usage(result, message):
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1
    assert isinstance(result.exception, SystemExit)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def bad_directories(tmp_path):
    """A file, a path below a file, a broken link, and a path that no process may create."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return [tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link", Path("/proc/self/no-such-place")]


@pytest.mark.parametrize("words", [("compare", "diabetes"), ("verify",), ("check", "diabetes")])
def test_a_directory_that_cannot_be_written_is_bad_usage(words, bad_directories):
    for directory in bad_directories:
        assert_bad_usage(invoke(*words, "--out", directory), "a directory to write into")


def test_a_directory_that_cannot_be_written_is_rejected_from_python(toy, bad_directories):
    for directory in bad_directories:
        with pytest.raises(OptionError, match="a directory to write into"):
            compare(toy, "map", out=directory, progress_bar=False)
        with pytest.raises(OptionError, match="a directory to write into"):
            Grid([toy], ["map"], [0], directory).run(lambda _: None)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("./has_factories:failing", "has_factories:failing, from the folder"),
        ("has_factories.py:failing", "has_factories:failing, from the folder"),
        ("../x/has_factories:failing", "looks like a path"),
        (".has_factories:failing", "looks like a path"),
        ("has_factories:", "module:factory"),
        (":failing", "module:factory"),
        ("has_factories:nothing", "no attribute 'nothing'"),
        ("has_factories:number", "a int"),
        ("raises_on_import:make", "ZeroDivisionError"),
        ("does_not_parse:make", "SyntaxError"),
        ("exits_on_import:make", "SystemExit"),
        ("imports_nothing:make", "no_such_module_at_all"),
        ("no_such_module:make", "no_such_module"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "verify", "check"])
@pytest.mark.usefixtures("modules")
def test_a_model_that_cannot_be_found_is_bad_usage(command, reference, message):
    assert_bad_usage(invoke(command, "--model", reference), message)
    assert not Path("bdl-results").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_here_is_bad_usage(device, toy, tmp_path):
    result = invoke("check", toy, "--device", device, "--out", tmp_path / "out")
    assert_bad_usage(result, "Expected a device that is here")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="a device that is here"):
        Grid([toy], ["map"], [0], tmp_path, device).check()


@pytest.mark.parametrize("command", ["verify", "check"])
@pytest.mark.parametrize(
    ("name", "message"), [("failing", "ZeroDivisionError: division by zero"), ("empty", "a NoneType")]
)
@pytest.mark.usefixtures("modules")
def test_a_factory_that_raises_is_bad_usage(command, name, message):
    assert_bad_usage(invoke(command, "--model", f"has_factories:{name}"), message)


@pytest.mark.usefixtures("modules")
def test_a_factory_that_raises_is_a_failed_record_with_its_traceback(tmp_path):
    words = ("--executor", "in-process", "--methods", "map", "--seeds", 1, "--out", tmp_path / "out")
    result = invoke("compare", "--model", "has_factories:failing", *words)
    assert result.exit_code == 1
    (record,) = RecordStore(tmp_path / "out").all()
    assert record.reason == "ZeroDivisionError: division by zero"
    assert "has_factories.py" in record.traceback


@pytest.mark.parametrize("text", ["", "a", "1,-2", "1.5", ","])
def test_seeds_that_are_none_are_bad_usage(text):
    assert_bad_usage(invoke("compare", "diabetes", "--seed-list", text), "--seed-list")


@pytest.mark.parametrize("seeds", ["3", 2.5, [1.5], ["1"], None])
def test_seeds_that_are_none_are_rejected_from_python(toy, seeds, tmp_path):
    with pytest.raises(OptionError, match="seeds"):
        compare(toy, "map", seeds=seeds, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_method_may_be_named_without_a_list(toy, tmp_path):
    found = compare(toy, methods="map", seeds=1, out=tmp_path, progress_bar=False)
    assert [r.method for r in found.records] == ["map"]
    with pytest.raises(OptionError, match="'nope'"):
        compare(toy, methods="nope", out=tmp_path)
    with pytest.raises(OptionError, match=r"Try: \['map'\]"):
        Grid([toy], "map", [0], tmp_path).check()
    with pytest.raises(OptionError, match="tasks as a list"):
        Grid(toy, ["map"], [0], tmp_path).check()


def test_directories_of_runs_that_start_at_the_same_time_are_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: new_directory(tmp_path / "results"), range(24)))
    assert len(set(found)) == 24
    assert all(directory.is_dir() for directory in found)


@pytest.mark.parametrize(
    "words",
    [
        ("compare", "diabetes", "--methods", "none-such"),
        ("compare", "--model", "has_factories:number"),
        ("check", "--model", "has_factories:failing"),
        ("verify", "--model", "has_factories:empty"),
        ("verify", "diabetes", "--curvature", "fisher"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("out", [("--out", "a/b"), ()], ids=["named", "new"])
def test_bad_usage_creates_no_directory(words, out, modules, tmp_path):  # noqa: ARG001
    before = sorted(path for path in tmp_path.iterdir() if path.is_dir() and path.name != "__pycache__")
    assert invoke(*words, *out).exit_code == 2
    after = sorted(path for path in tmp_path.iterdir() if path.is_dir() and path.name != "__pycache__")
    assert after == before


def test_only_what_is_empty_and_new_is_removed_after_an_error(tmp_path):
    (tmp_path / "old").mkdir()
    for out in (tmp_path / "old", tmp_path / "old" / "new", tmp_path / "written" / "into"):
        with pytest.raises(KeyError), output_directory(out) as directory:  # noqa: PT012
            if "written" in out.parts:
                (directory / "file").touch()
            raise KeyError
    assert list((tmp_path / "old").iterdir()) == []
    assert (tmp_path / "written" / "into" / "file").exists()


def test_names_of_problems_that_are_locked_at_the_same_time_differ(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda i: name_in(tmp_path, "problem", f"identity {i % 6}"), range(24)))
    assert len(set(names)) == 6
    assert all(len({names[i] for i in range(k, 24, 6)}) == 1 for k in range(6))


def test_a_report_lists_the_files_that_it_cannot_read(write_record, tmp_path):
    for seed in range(4):
        write_record("task", "map", seed)
    store = RecordStore(tmp_path)
    cut, other, empty = (store.path("task", "map", seed) for seed in range(3))
    cut.write_text(cut.read_text()[:70])
    other.write_text(other.read_text().replace('"seed": 1', '"seed": "first"'))
    empty.write_text("[]")
    found = build(tmp_path).unreadable
    assert list(found) == [path.relative_to(tmp_path).as_posix() for path in (cut, other, empty)]
    assert "JSON" in found["records/task/map.seed-0.json"]
    assert found["records/task/map.seed-1.json"].startswith("seed: ")
    page = write_report(tmp_path)
    for name in found:
        assert name in page.read_text()
        assert name.replace("_", "\\_") in (tmp_path / "report.md").read_text()


def test_a_report_of_nothing_but_unreadable_files_is_bad_usage_and_keeps_the_page(write_record, tmp_path):
    record = write_record("task", "map", 0)
    page = write_report(tmp_path)
    written = page.read_bytes()
    store = RecordStore(tmp_path)
    for content in ("{", record.model_copy(update={"kind": "ordinal"}).model_dump_json()):
        store.path("task", "map", 0).write_text(content)
        assert_bad_usage(invoke("report", tmp_path), "1 unreadable: records/task/map.seed-0.json (")
    assert store.unreadable() == {
        "records/task/map.seed-0.json": "kind: expected regression, classification, binary, received 'ordinal'"
    }
    assert page.read_bytes() == written


def test_the_number_of_unreadable_files_is_printed(write_record, tmp_path):
    for method in ("map", "laplace", "ensemble"):
        write_record("task", method, 0)
    assert invoke("report", tmp_path).stderr == ""
    for method in ("laplace", "ensemble"):
        RecordStore(tmp_path).path("task", method, 0).write_text("{")
    result = invoke("report", tmp_path)
    assert (result.exit_code, result.stderr[:44]) == (0, "Left out: 2 files that are no readable recor")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", ""), "Expected methods by name. Received no name."),
        (("--tasks", ","), "Expected tasks by name. Received no name."),
        (("--metrics", ""), "Expected metrics by name. Received no name."),
        (("--tasks", "a", "--methods", "laplace"), "Received tasks a; methods laplace."),
    ],
)
def test_a_selection_that_leaves_nothing_is_bad_usage_and_keeps_the_page(words, message, write_record, tmp_path):
    write_record("a", "map", 0)
    write_record("b", "laplace", 0)
    page = write_report(tmp_path)
    written = page.read_bytes()
    assert_bad_usage(invoke("report", tmp_path, *words), message)
    assert page.read_bytes() == written


def test_columns_of_a_task_without_a_finished_run_are_not_checked(write_record, tmp_path):
    write_record("a", "map", 0, status="failed", reason="x")
    found = build(tmp_path, selection=Selection(metrics=("NLL",)))
    assert (found.summary, [record.reason for record in found.failed]) == (None, ["x"])


@pytest.mark.parametrize("damage", ["truncated", "empty", "replaced", "gone"])
def test_a_record_with_damaged_arrays_is_reported_as_failed_and_read_with_a_typed_error(damage, write_record, tmp_path):
    record, _ = write_record("task", "map", 0), write_record("task", "laplace", 0)
    path, store = tmp_path / record.arrays, RecordStore(tmp_path)
    content = {"truncated": path.read_bytes()[:-40], "empty": b"", "replaced": b"no archive", "gone": None}[damage]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    found = {r.method: r for r in load_records(store)}
    assert (found["map"].status, found["laplace"].status) == ("failed", "ok")
    assert record.arrays in found["map"].reason
    with pytest.raises(StateError, match=r"task map seed 0 in records/task/map\.seed-0\.npz"):
        store.arrays(record)
    assert invoke("report", tmp_path).exit_code == 0


@pytest.mark.parametrize("path", ["file", "nowhere"])
def test_a_report_of_what_is_no_directory_of_records_is_bad_usage(path, tmp_path):
    (tmp_path / "file").write_text("x")
    assert_bad_usage(invoke("report", tmp_path / path), "a directory that bdl-bench compare wrote")


@pytest.mark.parametrize(
    ("seeds", "option"), [([5, 7], "--seed-list 5,7"), ([0, 1], "--seeds 2"), ([1], "--seed-list 1")]
)
def test_the_command_that_is_shown_names_the_seeds(seeds, option, toy, tmp_path):
    Grid([toy], ["map"], seeds, tmp_path).run(lambda _: None)
    assert option in build(tmp_path).command


@pytest.mark.parametrize(
    ("seeds", "option"),
    [
        ([5, 7], "--seed-list 5,7"),
        pytest.param([0, 1], "--seeds 2", marks=pytest.mark.verification),
        pytest.param([1], "--seed-list 1", marks=pytest.mark.verification),
    ],
)
def test_the_command_that_is_shown_runs_the_same_again(seeds, option, toy, tmp_path):
    records = Grid([toy], ["map", "last-layer-laplace"], seeds, tmp_path / "first", tune_budget=3).run(lambda _: None)
    write_report(tmp_path / "first")
    command = build(tmp_path / "first").command
    assert option in command
    words = shlex.split(command)[1:]
    result = invoke(*words, "--executor", "in-process", "--out", tmp_path / "second")
    assert result.exit_code == 0, result.output
    again = RecordStore(tmp_path / "second").all()
    assert sorted((r.method, r.seed, r.key) for r in again) == sorted((r.method, r.seed, r.key) for r in records)
    assert f"    {command}" in (tmp_path / "first" / "report.md").read_text()


def test_a_problem_made_in_python_is_reproduced_by_a_line_of_python(toy, tmp_path):
    from bdl_bench.tasks import TASKS

    compare(TASKS[toy].make, ["map"], seeds=[5, 7], tune_budget=2, out=tmp_path, progress_bar=False)
    assert build(tmp_path).command == "bdl_bench.compare(make_toy, ['map'], seeds=[5, 7], tune_budget=2)"
