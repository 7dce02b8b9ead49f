"""The command line: exit codes, and the path of the report as the last line."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bdl_bench.citation import software_version
from bdl_bench.cli import app
from bdl_bench.cli import commands as cli
from bdl_bench.methods import METHODS
from bdl_bench.report import Selection
from bdl_bench.runner.executors import Workers
from bdl_bench.runner.grid import Grid
from bdl_bench.tasks import TASKS

MODULE = '''
import torch
from bdl_bench import Problem

def make_problem(seed):
    """A problem of my own."""
    x, y = torch.randn(9, 2), torch.randint(0, 2, (9, 1)).float()
    return Problem(torch.nn.Linear(2, 1).eval(), "binary", [(x, y)], [(x, y)], [(x, y)], prior_precision=2.0)
'''


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def compare(out, *words):
    """In process, where the toy tasks are known, unless the words say otherwise."""
    return invoke("compare", "--executor", "in-process", *words, "--seeds", 1, "--out", out)


def test_compare_ends_with_the_path_of_its_report(toy, tmp_path):
    result = compare(tmp_path, toy, "--methods", "map,last-layer-laplace")
    assert result.exit_code == 0, result.output
    page = Path(result.stdout.splitlines()[-1])
    assert page == tmp_path / "report.html"
    assert "last-layer-laplace" in page.read_text()


def test_compare_prints_plain_lines_where_there_is_no_terminal(toy, tmp_path):
    lines = compare(tmp_path, toy, "--methods", "map").stdout.splitlines()
    assert lines[0].startswith("[1/2] toy seed 0 training: trained")
    assert lines[1].startswith("[2/2] toy seed 0 map: ok")
    assert "\x1b" not in "".join(lines)


def test_a_skipped_cell_leaves_the_exit_code_at_zero(toy, oversized, tmp_path):
    result = compare(tmp_path, toy, "--methods", f"{oversized},map")
    assert result.exit_code == 0
    assert "1 ok, 1 skipped" in result.stdout


def test_a_failed_cell_makes_the_exit_code_one_and_there_is_a_report(toy, broken, tmp_path):
    result = compare(tmp_path, toy, "--methods", f"{broken},map")
    assert result.exit_code == 1
    assert Path(result.stdout.splitlines()[-1]).is_file()


def test_one_s_own_model_is_compared_like_any_task(tmp_path, monkeypatch):
    (tmp_path / "my_own_problem.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = compare(
        tmp_path / "out", "--model", "my_own_problem:make_problem", "--methods", "map,laplace", "--executor", "local"
    )
    assert result.exit_code == 0, result.output
    assert "A problem of my own." in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-task"], "no-such-task"),
        (["diabetes", "--methods", "nope"], "nope"),
        (["--model", "nowhere:make"], "nowhere"),
        (["diabetes", "--executor", "abacus"], "abacus"),
        (["diabetes", "--device", "abacus"], "abacus"),
        (["diabetes", "--jobs", "0"], "jobs"),
    ],
)
def test_bad_usage_exits_with_two_and_says_why(words, message, tmp_path):
    result = compare(tmp_path / "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_report_renders_again_from_the_records(toy, tmp_path):
    compare(tmp_path, toy, "--methods", "map")
    (tmp_path / "report.html").unlink()
    result = invoke("report", tmp_path)
    assert result.exit_code == 0
    assert Path(result.stdout.splitlines()[-1]).is_file()


def test_report_of_nothing_exits_with_two(tmp_path):
    assert invoke("report", tmp_path).exit_code == 2


def test_list_has_every_name_whole_on_a_narrow_screen_and_the_default_tasks_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = [line.split()[0] for line in invoke("list").stdout.splitlines() if line[:1].strip()]
    assert {*TASKS, *METHODS} <= set(words)
    default = [name for name, task in TASKS.items() if task.default]
    assert set(words[1 : 1 + len(default)]) == set(default)


def test_an_interruption_says_how_to_go_on(toy, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bdl_bench.runner.grid.GridRun", interrupted)
    result = compare(tmp_path, toy)
    assert result.exit_code == 130
    assert "--out" in result.stdout


def test_each_option_of_compare_reaches_the_grid(toy, tmp_path, monkeypatch):
    grids = []

    def run(grid):
        grids.append(grid)
        return []

    monkeypatch.setattr(cli, "run_grid", run)
    monkeypatch.setattr("bdl_bench.report.write_report", lambda directory: directory / "report.html")
    monkeypatch.setenv("BDL_BENCH_DATA", "elsewhere")
    words = ["--methods", "map", "--seed-list", "5,7", "--out", tmp_path, "--tune-budget", 4, "--timeout", 30]
    words += ["--data-dir", tmp_path / "data"]
    result = invoke("compare", toy, *words, "--jobs", 2, "--threads", 3)
    assert result.exit_code == 0, result.output
    assert grids == [Grid([toy], ["map"], [5, 7], tmp_path, "cpu", Workers(2, 3, "local", 30.0), 4)]
    assert os.environ["BDL_BENCH_DATA"] == str(tmp_path / "data")


def test_report_passes_the_wanted_parts_on(tmp_path, monkeypatch):
    passed = []

    def write(directory, **options):
        passed.append((directory, options))
        return directory / "report.html"

    monkeypatch.setattr("bdl_bench.report.write_report", write)
    words = ["--figures", "svg", "--latex", "--tasks", "wine", "--methods", "map, laplace", "--metrics", "NLL,cal/ECE"]
    assert invoke("report", tmp_path, *words).exit_code == 0
    assert invoke("report", tmp_path).exit_code == 0
    chosen = Selection(("wine",), ("map", "laplace"), ("NLL", "cal/ECE"))
    assert passed == [
        (tmp_path, {"figures": "svg", "latex": True, "selection": chosen}),
        (tmp_path, {"figures": None, "latex": False, "selection": Selection()}),
    ]


def test_a_misspelt_name_is_answered_with_those_that_are_spelt_like_it(toy, tmp_path):
    assert "did you mean diabetes" in compare(tmp_path / "a", "diabets").stderr
    assert "did you mean laplace, " in compare(tmp_path / "b", toy, "--methods", "lapace").stderr
    compare(tmp_path, toy, "--methods", "map")
    for words in (["--tasks", "toi"], ["--methods", "mpa"], ["--metrics", "NNLL"]):
        result = invoke("report", tmp_path, *words)
        assert result.exit_code == 2
        assert "did you mean" in result.stderr
    assert "Did you mean 'compare'" in invoke("compere").stderr


def test_tasks_may_be_words_an_option_or_separated_by_commas(toy, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(cli, "run_grid", lambda grid: taken.append(list(grid.tasks)) or [])
    for words in ([toy, "wine"], [f"{toy},wine"], ["--tasks", f"{toy}, wine"], [toy, "--tasks", "wine"]):
        compare(tmp_path, *words)
    assert taken == [[toy, "wine"]] * 4


def test_a_report_of_some_methods_and_columns_has_no_others(toy, tmp_path):
    compare(tmp_path, toy, "--methods", "map,last-layer-laplace")
    assert invoke("report", tmp_path, "--methods", "map", "--metrics", "RMSE").exit_code == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text(encoding="utf-8"))))
    assert {row["method"] for row in rows} == {"map"}
    assert {row["quantity"] for row in rows if "/" in row["quantity"] and row["variant"]} == {"reg/RMSE"}


def test_help_version_and_citation_do_not_import_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from bdl_bench.cli import app; run = CliRunner().invoke; "
        "found = [run(app, [word]).stdout for word in ('--help', '--version', 'cite')]; "
        "found += [run(app, [word, '--help']).stdout for word in ('compare', 'report')]; "
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules; print(chr(10).join(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Compare and verify" in done.stdout
    assert f"bdl-bench {software_version()}" in done.stdout
    assert "@inproceedings{mcinerney2025variation" in done.stdout
    assert "--tune-budget" in done.stdout
