"""The pre-flight check of problems and tasks."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from bdl_bench.cli.diagnosis import show
from bdl_bench.problem import Problem
from bdl_bench.runner.preflight import check_problem, check_task, preflight


def printed(diagnosis, width=120):
    console = Console(file=io.StringIO(), width=width)
    status = show(diagnosis, console)
    return status, console.file.getvalue()


def problem(*, shared=0, name="0"):
    """A regression with `shared` training rows in its test set."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    test_x = torch.cat([x[:shared], torch.randn(20, 3, generator=generator, dtype=torch.float64)])
    test_y = torch.cat([y[:shared], torch.randn(20, 2, generator=generator, dtype=torch.float64)])
    parts = [(x[:24], y[:24]), (x[24:], y[24:]), (test_x, test_y)]
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 2).double())
    loaders = (list(zip(a.split(7), b.split(7), strict=True)) for a, b in parts)
    return Problem(model.eval(), "regression", *loaders, prior_precision=0.7)


def test_a_task_is_trained_and_looked_at(toy, tmp_path):
    diagnosis = check_task(toy, 0, tmp_path)
    assert not diagnosis["gradient"].values["relative_gradient"] < 1e-12
    assert {"modes", "train/test overlap", "distance to the optimum", "cost"} <= {f.name for f in diagnosis.findings}
    assert (tmp_path / "checkpoints").exists()


def test_an_overlap_of_train_and_test_is_an_error_and_the_exit_status_says_so():
    clean, leaky = check_problem(problem()), check_problem(problem(shared=5))
    assert printed(clean)[0] == 0
    status, text = printed(leaky)
    assert status == 1
    assert leaky["train/test overlap"].values["shared"] == 5
    assert "train/test overlap" in text
    assert "5 of 25" in text


def test_what_is_printed_has_every_finding_and_every_cost():
    diagnosis = check_problem(problem())
    text = printed(diagnosis, width=250)[1]
    for finding in diagnosis.findings:
        assert finding.name in text
    for cost in diagnosis.costs:
        assert cost.estimator in text


def test_markup_in_a_name_is_printed_as_it_is():
    case = problem(name="[red]x[/red]")
    case.model.get_submodule("[red]x[/red]").register_parameter("idle", nn.Parameter(torch.ones(2).double()))
    assert "[red]x[/red].idle" in printed(check_problem(case, checks=["forward"]), width=200)[1]


def test_the_preflight_is_made_once_for_a_problem_and_is_cheap():
    calls = []
    case = problem()
    case.model.register_forward_pre_hook(lambda *_: calls.append(1))
    first = preflight(case)
    made = len(calls)
    assert preflight(case) == first
    assert len(calls) == made
    assert {"modes", "gradient", "train/test overlap"} <= first.keys()
    assert all(text.split(":")[0] in ("ok", "note", "warning", "error") for text in first.values())
    assert "smallest curvature" not in first


@pytest.mark.parametrize("shared", [0, 1])
def test_the_preflight_says_what_the_check_says(shared):
    case = problem(shared=shared)
    finding = check_problem(case)["train/test overlap"]
    remedy = f"; try: {finding.remedy}" if shared else ""
    assert preflight(case)["train/test overlap"] == f"{finding.level}: {finding.measured}{remedy}"
