"""Pre-flight diagnostics of a problem, before any method runs on it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from bdl_bench.problem.problem import Problem
from bdl_bench.runner.devices import check_device
from bdl_bench.runner.train_job import TrainingJob, checkpoint_path, known_training, load_problem, train_network
from estimators.diagnostics import CHECKS, Diagnosis, diagnose
from estimators.persistence.atomic import write_bytes

__all__ = ["check_problem", "check_task", "preflight", "relative_gradient"]

_FAST = ("forward", "overlap", "gradient")
"""Checks that need a few passes over the data."""
_DONE: WeakKeyDictionary[Problem, Diagnosis] = WeakKeyDictionary()


def check_problem(
    problem: Problem,
    *,
    weight_decay: float | torch.optim.Optimizer | None = None,
    checks: Collection[str] = tuple(CHECKS),
) -> Diagnosis:
    """Diagnose a problem whose network is trained, with its held-out rows.

    `weight_decay`, that of the training or its optimizer, is compared with the prior precision.
    """
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
    """Diagnose a task after training its network; the checkpoint in the directory is read or written.

    Raises:
        OptionError: for a device that is not here.
    """
    check_device(device)
    path = checkpoint_path(directory, task, seed)
    result = train_network(TrainingJob(task, seed, device, known_training(path)))
    if result.content is not None:
        write_bytes(path, result.content)
    return check_problem(load_problem(result.model, directory, device))


def preflight(problem: Problem) -> dict[str, str]:
    """Return the findings of the fast checks, such as {"gradient": "note: |∇L| = ...; try: ..."}, once per problem."""
    return {
        finding.name: f"{finding.level}: {finding.measured}"
        + (f"; try: {finding.remedy}" if finding.remedy and finding.level != "ok" else "")
        for finding in _diagnosis(problem).findings
    }


def relative_gradient(problem: Problem) -> float | None:
    """Return ‖∇L‖ / ‖δ(θ − θ₀)‖ of a problem whose network is trained; None if it could not be measured."""
    values = (
        f.values for f in _diagnosis(problem).findings if f.name == "gradient" and "relative_gradient" in f.values
    )
    return next((float(found["relative_gradient"]) for found in values), None)


def _diagnosis(problem: Problem) -> Diagnosis:
    if problem not in _DONE:
        _DONE[problem] = check_problem(problem, checks=_FAST)
    return _DONE[problem]
