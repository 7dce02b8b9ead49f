"""The pre-flight check: a problem looked at before any method is run on it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from bdl_bench.problem.problem import Problem
from bdl_bench.runner.train_job import TrainingJob, checkpoint_path, known_training, load_problem, train_network
from estimators.diagnostics import CHECKS, Diagnosis, diagnose
from estimators.persistence.atomic import write_bytes

__all__ = ["check_problem", "check_task", "preflight"]

_CHEAP = ("forward", "overlap", "gradient")
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
    path = checkpoint_path(directory, task, seed)
    trained = train_network(TrainingJob(task, seed, device, known_training(path)))
    if trained.content is not None:
        write_bytes(path, trained.content)
    return check_problem(load_problem(trained.prepared, directory, device))


def preflight(problem: Problem) -> dict[str, str]:
    """What takes a few passes over the data: {"gradient": "note: |∇L| = ...", ...}; once for each problem."""
    if problem not in _DONE:
        diagnosis = check_problem(problem, checks=_CHEAP)
        _DONE[problem] = {finding.name: f"{finding.level}: {finding.measured}" for finding in diagnosis.findings}
    return _DONE[problem]
