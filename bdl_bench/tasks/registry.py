"""The registry of tasks, which are registered by a decorator and found by name."""

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

    Args:
        name: by which tables and the command line name it.
        summary: what it is, in one line.
        make: function of a seed that returns a `Problem`.
        default: whether it runs if no tasks are named.
        needs: what must be downloaded or installed first, in words; None if nothing.
        real: whether the rows were measured, or written by people, and not simulated.
    """

    name: str
    summary: str
    make: Factory
    default: bool = False
    needs: str | None = None
    real: bool = True

    @property
    def data(self) -> str:
        """Whether the data are real and where they are: "real, ships", "real, extra" or "real, --data-dir".

        Data that ship need neither a network nor another package; "--data-dir" stands for a download, too.
        """
        kind = "real" if self.real else "simulated"
        if self.needs is None:
            return f"{kind}, ships"
        return f"{kind}, {'--data-dir' if 'download' in self.needs else 'extra'}"

    def problem(self, seed: int) -> Problem:
        """Return the problem of one seed, with the global random state set by that seed while it is made.

        Args:
            seed: of the split, the initialisation and the batch order.

        Returns:
            The problem.

        Raises:
            OptionError: if `make` returns another object.
        """
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
    """Return the first line of the docstring of a factory; empty if it has none."""
    return (getattr(make, "__doc__", None) or "").strip().partition("\n")[0]


def register(
    name: str, *, default: bool = False, needs: str | None = None, summary: str | None = None, real: bool = True
) -> Callable[[Factory], Factory]:
    """Return a decorator that registers a function `make(seed) -> Problem` as a task.

    Args:
        name: of the task.
        default: whether it runs if no tasks are named.
        needs: what must be downloaded or installed first, in words; None if nothing.
        summary: what it is, in one line; None: the first line of the docstring of the function.
        real: whether the rows were measured, or written by people, and not simulated.

    Returns:
        The decorator, which returns the function unchanged.
    """

    def decorate(make: Factory) -> Factory:
        TASKS[name] = Task(name, summary or first_line(make), make, default, needs, real)
        return make

    return decorate


def resolve_task(spec: str) -> Task:
    """Return the task registered under a name, or that of a reference "module:factory".

    Args:
        spec: a name or a reference.

    Returns:
        The task.

    Raises:
        OptionError: for an unknown name, or a reference that cannot be imported.
    """
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
    """Return the task of a reference "module:factory", with `factory(seed) -> Problem`.

    Args:
        reference: to a function of an installed module, or of a module in the working directory.

    Returns:
        The task.

    Raises:
        OptionError: for a reference that cannot be imported.
    """
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
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
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
