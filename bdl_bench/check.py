"""The pre-flight check: a problem looked at before any method is run on it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bdl_bench.maps import Place, known_training, load_problem, map_path, prepare
from bdl_bench.problem import Problem
from estimators.atomic import write_bytes
from estimators.diagnostics import CHECKS, Cost, Diagnosis, Finding, diagnose
from estimators.diagnostics.table import in_bytes, in_seconds

__all__ = ["check_problem", "check_task", "preflight", "show"]

_CHEAP = ("forward", "overlap", "gradient")
_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}
_DONE: WeakKeyDictionary[Problem, dict[str, str]] = WeakKeyDictionary()


def check_problem(
    problem: Problem,
    *,
    weight_decay: float | torch.optim.Optimizer | None = None,
    checks: Collection[str] = tuple(CHECKS),
) -> Diagnosis:
    """The diagnosis of a problem whose network is trained, with its held-out rows."""
    return diagnose(
        problem.model,
        problem.likelihood,
        problem.train,
        prior_precision=problem.prior_precision,
        validation=problem.validation,
        test=problem.test,
        weight_decay=weight_decay,
        checks=checks,
    )


def check_task(task: str, seed: int, directory: Path, device: str = "cpu") -> Diagnosis:
    """The diagnosis of a task (a name, or "module:factory"): its network is trained first, or taken from `directory`.

    Errors: those of the task and of its training.
    """
    path = map_path(directory, task, seed)
    trained = prepare(Place(task, seed, device, known_training(path)))
    if trained.content is not None:
        write_bytes(path, trained.content)
    return check_problem(load_problem(trained.prepared, directory, device))


def preflight(problem: Problem) -> dict[str, str]:
    """What takes a few passes over the data: {"gradient": "note: |∇L| = ...", ...}; once for each problem."""
    if problem not in _DONE:
        diagnosis = check_problem(problem, checks=_CHEAP)
        _DONE[problem] = {finding.name: f"{finding.level}: {finding.measured}" for finding in diagnosis.findings}
    return _DONE[problem]


def show(diagnosis: Diagnosis, console: Console) -> int:
    """Print a diagnosis; the exit status, 1 where it has an error."""
    console.print(_findings(diagnosis.findings))
    if diagnosis.costs:
        console.print("", _costs(diagnosis.costs))
    return 1 if diagnosis.errors else 0


def _findings(findings: Collection[Finding]) -> Table:
    table = Table("level", "what", "measured", box=None, pad_edge=False)
    for finding in findings:
        colour = _COLOURS[finding.level]
        text = escape(finding.measured)
        if finding.level != "ok":
            advice = [finding.meaning, f"try: {finding.remedy}" if finding.remedy else ""]
            text += "".join(f"\n[dim]{escape(line)}[/dim]" for line in advice if line)
        table.add_row(f"[{colour}]{finding.level}[/{colour}]", escape(finding.name), text)
    return table


def _costs(costs: Collection[Cost]) -> Table:
    table = Table("what a fit would cost", "memory", "passes", "time", "fits", "", box=None, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    for cost in costs:
        fits = "[green]yes[/green]" if cost.fits else f"[red]no[/red], {in_bytes(cost.bytes_available)} are free"
        numbers = (in_bytes(cost.bytes_needed), f"{cost.passes:.3g}", in_seconds(cost.seconds))
        table.add_row(escape(cost.estimator), *numbers, fits, escape(cost.afterwards))
    return table
