"""The registry of tasks: one file each, added by a decorator, found by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bdl_bench.problem.problem import Problem
from estimators.errors import OptionError
from estimators.runtime.rng import seeded

__all__ = ["TASKS", "Task", "first_line", "from_reference", "register", "resolve_task"]

Factory = Callable[[int], Problem]


@dataclass(frozen=True)
class Task:
    """A named source of problems. The seed changes the split, the initialisation and the batch order.

    `needs` says what must be had first (a download and its size, an extra to install); None: nothing.
    """

    name: str
    summary: str
    make: Factory
    default: bool = False
    needs: str | None = None

    def problem(self, seed: int) -> Problem:
        """The problem of one seed; whatever `make` draws, it draws from that seed."""
        with seeded(seed):
            problem = self.make(seed)
        if not isinstance(problem, Problem):
            raise OptionError(
                f"a bdl_bench.Problem from the factory of {self.name}",
                received=f"a {type(problem).__name__}",
                remedy="return Problem(model, likelihood, train, validation, test, prior_precision=...).",
            )
        return problem


TASKS: dict[str, Task] = {}


def first_line(make: object) -> str:
    """Of the docstring of a factory, which sums a task up; empty where it has none."""
    return (getattr(make, "__doc__", None) or "").strip().partition("\n")[0]


def register(
    name: str, *, default: bool = False, needs: str | None = None, summary: str | None = None
) -> Callable[[Factory], Factory]:
    """Register a factory `make(seed) -> Problem` under `name`; the summary is the first line of its docstring."""

    def decorate(make: Factory) -> Factory:
        TASKS[name] = Task(name, summary or first_line(make), make, default, needs)
        return make

    return decorate


def resolve_task(spec: str) -> Task:
    """The task registered as `spec`, or the one that the reference "module:factory" makes."""
    if spec in TASKS:
        return TASKS[spec]
    if ":" in spec:
        return from_reference(spec)
    raise OptionError(
        f"a task among {', '.join(sorted(TASKS))}",
        received=repr(spec),
        remedy="bdl-bench list, or --model module:factory.",
    )


def from_reference(reference: str) -> Task:
    """A task from "module:factory", with `factory(seed) -> Problem`; modules of the working directory are found too."""
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise OptionError(
            'a reference "module:factory"', received=repr(reference), remedy="--model my_module:make_problem."
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if any(sign in module_name for sign in "/\\") or module_name.endswith(".py") or not all(module_name.split(".")):
        raise OptionError(
            'a module by the name that Python imports it by, in "module:factory"',
            received=f"{module_name!r}, which looks like a path",
            remedy=f"{Path(module_name).stem or 'my_module'}:{attribute}, from the folder of the module.",
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise OptionError(
            f"an importable factory {reference!r}",
            received=f"{type(error).__name__}: {error}",
            remedy="run from the folder of the module, or install it; the factory takes a seed and returns a Problem.",
        ) from error
    if not callable(factory):
        raise OptionError(
            f"a function at {reference!r}",
            received=f"a {type(factory).__name__}",
            remedy="name a factory(seed) -> Problem.",
        )
    return Task(reference, first_line(factory) or "your own problem", factory)
