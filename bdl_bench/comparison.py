"""The comparison from Python: a problem, some methods, some seeds; the records as a data frame, and the report."""

from __future__ import annotations

import copy
import operator
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bdl_bench.cli.progress import shown
from bdl_bench.methods import default_methods, methods_named
from bdl_bench.problem.problem import Problem
from bdl_bench.report import write_report
from bdl_bench.report.notebook import Comparison
from bdl_bench.runner.directories import make_directory
from bdl_bench.runner.executors import Workers
from bdl_bench.runner.grid import Grid
from bdl_bench.tasks import TASKS, resolve_task
from bdl_bench.tasks.names import identity_of, name_in
from bdl_bench.tasks.registry import Task, first_line
from estimators.errors import OptionError

__all__ = ["compare"]

Subject = str | Problem | Callable[[int], Problem]


def compare(
    problem: Subject | Sequence[str],
    methods: str | Sequence[str] | None = None,
    *,
    seeds: int | Sequence[int] = 3,
    tune_budget: int = 1,
    out: str | Path | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress_bar: bool = True,
) -> Comparison:
    """Run methods on a problem and give back what was found; in a notebook, the report is shown in the cell.

    Args:
        problem: a function from a seed to a `Problem`; a `Problem`, for which a seed then changes the training and the
            methods but not the split; the name of a bundled task, or several; or "module:factory".
        methods: names of presets (`bdl-bench list`), or a single name; None: the default ones.
        seeds: how many, or which.
        tune_budget: number of fits that each method may spend on its option, scored on the validation rows; 0 tunes
            nothing, 1 tunes the scale of the variance, the temperature and the noise alone.
        out: where records and report go; an earlier folder is gone on with, and another problem with the same name
            gets a number there ("problem-2"). None: a new temporary one.
        device: "cpu", "cuda", "cuda:1", ...
        threads: of torch; more pays for large networks.
        progress_bar: shown on the standard error stream.

    Errors: OptionError for unknown names; those of the problem. A method that fails is in the records, with its reason.
    """
    directory = Path(tempfile.mkdtemp(prefix="bdl-bench-")) if out is None else Path(out)
    numbers = _seeds(seeds)
    chosen = [methods] if isinstance(methods, str) else list(methods or default_methods())
    methods_named(chosen)
    with _named(problem, directory) as tasks:
        grid = Grid(tasks, chosen, numbers, directory, device, Workers(1, threads), tune_budget=tune_budget)
        console = Console(stderr=True, quiet=not progress_bar)
        with shown(console, grid.n_jobs) as listener:
            grid.run(listener)
        write_report(directory)
    return Comparison(directory, tasks)


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    """Errors: OptionError for what is neither a number of seeds nor some seeds."""
    try:
        return list(range(seeds)) if isinstance(seeds, int) else [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise OptionError(
            "a number of seeds, or a list of seeds", received=repr(seeds), remedy="seeds=3 or seeds=[5, 7]."
        ) from error


@contextmanager
def _named(problem: Subject | Sequence[str], directory: Path) -> Iterator[list[str]]:
    """The names of tasks; a problem or a factory is registered for as long as it runs."""
    if isinstance(problem, str):
        yield [resolve_task(problem).name]
    elif isinstance(problem, (list, tuple)):
        yield [resolve_task(name).name for name in problem]
    else:
        task = _task(problem)
        name = name_in(make_directory(directory), task.name, identity_of(problem), taken=TASKS)
        TASKS[name] = replace(task, name=name)
        try:
            yield [name]
        finally:
            TASKS.pop(name)


def _again(problem: Problem) -> Problem:
    """The same problem with a network of its own, as it was before any training."""
    again = copy.copy(problem)
    again.model = copy.deepcopy(problem.model)
    return again


def _task(problem: object) -> Task:
    if isinstance(problem, Problem):
        return Task("problem", "a problem of your own", lambda seed: _again(problem))  # noqa: ARG005
    if not callable(problem):
        raise OptionError(
            "a Problem, a function from a seed to one, or names of tasks",
            received=f"a {type(problem).__name__}",
            remedy="compare(make_problem) with make_problem(seed) -> Problem.",
        )
    name, summary = getattr(problem, "__name__", "problem"), first_line(problem) or "a problem of your own"
    return Task(name, summary, problem)
