"""A plugin package outside of the repository: its method, task, metric and section in every executor and on resume."""

import csv
import subprocess
import sys

import numpy as np
import pytest
from plugin_package import NAME, edit, forget, place_installed, write_package
from typer.testing import CliRunner

from bdl_bench import compare
from bdl_bench.cli import app
from bdl_bench.methods import METHODS, Method
from bdl_bench.metrics import METRICS, Metric
from bdl_bench.plugins import (
    SECTIONS,
    PluginError,
    PluginRegistry,
    load_installed_plugins,
    load_plugins,
    loaded_plugins,
    unload_plugin,
)
from bdl_bench.plugins.loading import AUTOLOAD
from bdl_bench.records import RecordStore
from bdl_bench.report import write_report
from bdl_bench.runner.executors import ONE_WORKER, Workers
from bdl_bench.runner.grid import Grid
from bdl_bench.tasks import TASKS, Task
from estimators.persistence import user_code

TASK, METHOD, METRIC, SECTION = "sine", "distance-to-data", "my/MAE", "largest variances"


@pytest.fixture(autouse=True)
def put_back():
    """No plugin stays after a test."""
    before = dict(METHODS), dict(TASKS), dict(METRICS), dict(SECTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user_code, "_TREATED", set())
        yield
    for reference in list(loaded_plugins()):
        unload_plugin(reference)
    forget()
    assert (dict(METHODS), dict(TASKS), dict(METRICS), dict(SECTIONS)) == before


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of the package, which can be imported and is not installed."""
    folder = write_package(tmp_path / "project")
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder of the package as an installation leaves it."""
    site = place_installed(tmp_path / "site-packages")
    monkeypatch.syspath_prepend(site)
    return site


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def run(directory, *, tasks=(TASK,), methods=("map", METHOD), workers=ONE_WORKER, seeds=(0, 1)):
    """The records of a grid by (task, method, seed), and the status of each event."""
    statuses = {}
    grid = Grid(list(tasks), list(methods), list(seeds), directory, workers=workers)
    records = grid.run(lambda event: statuses.update({(event.task, event.method, event.seed): event.status}))
    assert [record.status for record in records] == ["ok"] * len(records), [record.reason for record in records]
    return {(r.task, r.method, r.seed): r for r in records}, statuses


@pytest.mark.usefixtures("package")
def test_a_metric_is_still_in_a_report_without_its_plugin(tmp_path):
    words = ("compare", TASK, "--plugin", NAME, "--methods", "map", "--seeds", 2, "--out", tmp_path)
    assert invoke(*words, "--executor", "in-process").exit_code == 0

    def values():
        with (tmp_path / "report.csv").open() as file:
            rows = list(csv.DictReader(file))
        return {row["variant"]: row["mean"] for row in rows if row["quantity"] == METRIC}

    computed = values()
    unload_plugin(NAME)
    assert invoke("report", tmp_path).exit_code == 0
    kept = values()
    assert set(kept) == set(computed) != set()
    assert all(float(kept[v]) == pytest.approx(float(computed[v]), rel=1e-9) for v in kept)
    assert METRIC in (tmp_path / "report.html").read_text()
    assert invoke("report", tmp_path, "--metrics", METRIC).exit_code == 0


@pytest.mark.usefixtures("package")
def test_a_plugin_that_is_named_is_in_list_compare_and_report(tmp_path):
    listed = invoke("list", "--plugin", NAME)
    assert listed.exit_code == 0, listed.output
    for words in (TASK, METHOD, METRIC, SECTION, NAME):
        assert words in listed.stdout
    out = tmp_path / "out"
    words = ("compare", TASK, "--plugin", NAME, "--methods", f"map,{METHOD}", "--seeds", 2, "--out", out)
    result = invoke(*words, "--executor", "in-process")
    assert result.exit_code == 0, result.output
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for shown in (page, text):
        assert METHOD in shown
        assert "Largest variances" in shown
        assert METRIC in shown
        assert f"--plugin {NAME}" in shown
    with (out / "report.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == METRIC and row["variant"] == "untuned"]
    arrays = [RecordStore(out).arrays(r) for r in RecordStore(out).all() if r.method == METHOD]
    expected = np.mean([abs(a["mean"] - a["targets"]).mean() for a in arrays])
    assert {row["method"]: float(row["mean"]) for row in rows}[METHOD] == pytest.approx(expected, rel=1e-6)
    assert all(record.metrics[METRIC] > 0 for record in RecordStore(out).all())
    again = invoke(*words, "--executor", "in-process")
    assert again.stdout.count("cached") == 2 * 3


def test_without_the_plugin_its_names_are_unknown(tmp_path):
    assert invoke("compare", TASK, "--out", tmp_path / "out").exit_code == 2
    missing = invoke("compare", "diabetes", "--plugin", "no_such_plugin", "--out", tmp_path / "out")
    assert missing.exit_code == 2
    assert "no_such_plugin" in missing.stderr


@pytest.mark.usefixtures("installed")
def test_an_installed_plugin_needs_no_option_and_can_be_turned_off(monkeypatch):
    monkeypatch.setenv(AUTOLOAD, "0")
    assert load_installed_plugins() == []
    assert METHOD not in invoke("list").stdout
    monkeypatch.setenv(AUTOLOAD, "1")
    listed = invoke("list").stdout
    assert METHOD in listed
    assert load_installed_plugins() == load_plugins([NAME]) == [NAME]


def test_a_package_that_pip_installs_is_found(tmp_path, monkeypatch):
    project, site = write_package(tmp_path / "project"), tmp_path / "site-packages"
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(project)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("an environment without pip")
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(site)
    assert load_installed_plugins() == [NAME]
    records, _ = run(tmp_path / "out", seeds=[0])
    assert records[TASK, METHOD, 0].plugins == {"task": NAME, "method": NAME, f"metric {METRIC}": NAME}


@pytest.mark.usefixtures("installed")
def test_the_records_of_worker_processes_are_those_of_this_process(tmp_path):
    load_installed_plugins()
    here, _ = run(tmp_path / "here")
    there, _ = run(tmp_path / "there", workers=Workers(2, executor="local"))
    assert {name: (r.key, r.metrics) for name, r in here.items()} == {n: (r.key, r.metrics) for n, r in there.items()}
    _, statuses = run(tmp_path / "there")
    assert set(statuses.values()) == {"cached"}


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("installed")
def test_the_records_of_a_cluster_are_those_of_this_process(tmp_path):
    ray = pytest.importorskip("ray")
    load_installed_plugins()
    here, _ = run(tmp_path / "here", seeds=[0])
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        there, _ = run(tmp_path / "there", workers=Workers(executor="ray"), seeds=[0])
    finally:
        ray.shutdown()
    assert {name: (r.key, r.metrics) for name, r in here.items()} == {n: (r.key, r.metrics) for n, r in there.items()}


@pytest.mark.parametrize("where", ["package", "installed"])
def test_an_edit_of_a_module_makes_the_records_of_the_plugin_again_and_no_others(where, request, tmp_path, toy):
    folder = request.getfixturevalue(where)
    grid = {"tasks": (TASK, toy), "seeds": (0,)}

    def again():
        forget()
        load_plugins([NAME])
        return run(tmp_path / "out", **grid)

    first, _ = again()
    variances = RecordStore(tmp_path / "out").arrays(first[TASK, METHOD, 0])["epistemic_variance"]
    assert set(again()[1].values()) == {"cached"}
    edit(folder / NAME / "methods.py", "SCALE = 2.0", "SCALE = 6.0")
    second, statuses = again()
    evaluations = {name: status for name, status in statuses.items() if name[1] is not None}
    assert {name for name, status in evaluations.items() if status == "cached"} == {(toy, "map", 0)}
    assert first[TASK, METHOD, 0].key != second[TASK, METHOD, 0].key
    assert RecordStore(tmp_path / "out").arrays(second[TASK, METHOD, 0])["epistemic_variance"] == pytest.approx(
        3 * variances, rel=1e-6
    )
    assert set(again()[1].values()) == {"cached"}


def test_a_reloaded_plugin_replaces_what_it_had_added(package):
    load_plugins([NAME])
    before = METHODS[METHOD]
    forget()
    edit(package / NAME / "methods.py", 'squared distance to the closest training row"', 'other text"')
    load_plugins([NAME])
    assert METHODS[METHOD] is not before
    assert METHODS[METHOD].summary.startswith("other text")
    assert [m.key for m in METRICS["regression"]].count(METRIC) == 1


@pytest.mark.usefixtures("package")
def test_compare_takes_modules_functions_and_names(tmp_path):
    def register(registry):
        registry.add_metric(Metric("mine/max", "max", "largest error", "lower", compute=largest), "regression")

    def largest(arrays):
        return float(abs(arrays["mean"] - arrays["targets"]).max())

    __import__(NAME)
    options = {"seeds": 1, "out": tmp_path / "out", "progress_bar": False}
    found = compare(TASK, ["map"], plugins=[sys.modules[NAME], register], **options)
    assert found.records[0].metrics["mine/max"] >= found.records[0].metrics[METRIC]
    assert "mine/max" in (tmp_path / "out" / "report.html").read_text()


BUILT_IN = sorted(
    {m.key.partition("/")[0] for kind in METRICS.values() for m in kind}
    | {*("cp", "ood", "shift", "al", "bo", "dis"), *("agreement", "cost", "fidelity")}
)
"""Prefixes of metrics and of other quantities that the report computes."""


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda r: r.add_method(Method("map", "another", print)), "'map', which is of bdl-bench"),
        (lambda r: r.add_task(Task("diabetes", "another", print)), "'diabetes', which is of bdl-bench"),
        (lambda r: r.add_method(Method("a,b", "another", print)), "without commas"),
        (lambda r: r.add_task(Task("a:b", "another", print)), "colons"),
        (lambda r: r.add_method("map"), "Received a str"),
        (lambda r: r.add_metric(METRICS["regression"][0], "regression"), "'reg/NLL', which is of bdl-bench"),
        (lambda r: r.add_metric(Metric("a/b", "b", "b", None, scores=len), "count"), "kinds of likelihood"),
        (lambda r: r.add_metric(Metric("a/b", "b", "b", None, scores=len)), "kinds of likelihood"),
        *(
            (lambda r, key=key: r.add_metric(Metric(key, "b", "b", None, scores=len), "binary"), f"Received '{key}'")
            for key in ("c", "/b", "a/", *(f"{prefix}/mine" for prefix in BUILT_IN))
        ),
        (lambda r: r.add_metric(Metric("a/b", "b", "b", None), "binary"), "either scores or compute"),
        (lambda r: r.add_section("a", "text"), "function of the results"),
        (lambda _: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_added_is_an_error_that_leaves_nothing_behind(add, message):
    def register(registry):
        registry.add_section("before", lambda _: None)
        add(registry)

    with pytest.raises(PluginError, match=message):
        load_plugins([register])
    assert "before" not in SECTIONS
    assert not loaded_plugins()


@pytest.mark.usefixtures("package")
def test_two_plugins_with_the_same_name_are_named_in_the_error():
    load_plugins([NAME])

    def other(registry):
        registry.add_section(SECTION, lambda _: None)

    with pytest.raises(PluginError, match=f"'{SECTION}', which is of {NAME}"):
        load_plugins([other])


@pytest.mark.parametrize("plugin", [3, f"{NAME}:missing", f"{NAME}:__doc__", "os"])
@pytest.mark.usefixtures("package")
def test_what_is_no_plugin_is_an_error(plugin):
    with pytest.raises(PluginError):
        load_plugins([plugin])


def test_a_broken_installed_plugin_names_its_package(installed):
    edit(installed / NAME / "__init__.py", "def register", "raise ValueError('broken')\ndef register")
    with pytest.raises(PluginError, match=r"my-bdl-plugin.*broken.*BDL_BENCH_PLUGIN_AUTOLOAD=0"):
        load_installed_plugins()


def test_a_metric_that_raises_or_has_another_shape_names_its_plugin():
    registry = PluginRegistry("mine")
    try:
        registry.add_metric(Metric("a/raises", "a", "a", None, compute=lambda arrays: arrays["none"]), "regression")
        registry.add_metric(Metric("a/shape", "a", "a", None, scores=lambda arrays: arrays["mean"]), "regression")
        for metric, message in zip(METRICS["regression"][-2:], ("KeyError", r"shape \(4, 2\)"), strict=True):
            with pytest.raises(PluginError, match=f"a/.* of mine.*{message}"):
                metric.value({"mean": np.zeros((4, 2)), "targets": np.zeros((4, 2))})
    finally:
        registry.remove_all()


def test_a_section_that_raises_is_shown_with_its_error(write_record, tmp_path):
    write_record("t", "map", 0)

    def register(registry):
        registry.add_section("broken", lambda _: 1 / 0)
        registry.add_section("text", lambda _: "text")
        registry.add_section("none", lambda _: None)

    load_plugins([register])
    page = write_report(tmp_path).read_text()
    assert "ZeroDivisionError: division by zero" in page
    assert page.count("This section of a plugin could not be made.") == 2
