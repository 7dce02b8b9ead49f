"""The comparison from Python."""

from __future__ import annotations

import copy
import operator
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bdl_bench.cli.progress import show_progress
from bdl_bench.methods import default_methods, methods_named
from bdl_bench.plugins import load_installed_plugins, load_plugins
from bdl_bench.plugins.loading import Plugin
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

ProblemSource = str | Problem | Callable[[int], Problem]


def compare(
    problem: ProblemSource | Sequence[str],
    methods: str | Sequence[str] | None = None,
    *,
    seeds: int | Sequence[int] = 3,
    tune_budget: int = 1,
    out: str | Path | None = None,
    device: str = "cpu",
    threads: int = 1,
    converged_map: bool = False,
    progress_bar: bool = True,
    plugins: Sequence[Plugin] = (),
) -> Comparison:
    """Run methods on a problem and return their records and report. A notebook shows the report.

    Args:
        problem: a function from a seed to a `Problem`; a `Problem`, whose split is the same for all seeds; the name of
            a bundled task, or several names; or "module:factory".
        methods: names of presets (`bdl-bench list`), or a single name; None: the default methods.
        seeds: the number of seeds (0, 1, ...), or the seeds themselves.
        tune_budget: number of fits that each method may use to tune its option on the validation rows; 0: no tuning,
            1: only the variance scale, temperature and noise.
        out: directory of records and report. An earlier run in it is resumed; a different problem of the same name
            gets a number ("problem-2"). None: a new temporary directory.
        device: "cpu", "cuda", "cuda:1", ...
        threads: number of torch threads.
        converged_map: whether the training of each network is continued by full-batch L-BFGS to a stationary point of
            L. A problem whose network came trained is then skipped.
        progress_bar: whether to show progress on the standard error stream.
        plugins: modules with a function `register(registry)`, as "module", "module:function", the module, or the
            function. Plugins of installed packages are loaded, too.

    Returns:
        The records, as `records` or a data frame by `to_frame()`, and the path of the report. A method that fails has a
        record with the reason.

    Raises:
        PluginError: if a plugin cannot be loaded, or takes a name that exists.
        OptionError: for unknown names of tasks or methods, and for seeds that are not integers.
        EstimatorError: if the problem is invalid.
    """
    directory = Path(tempfile.mkdtemp(prefix="bdl-bench-")) if out is None else Path(out)
    load_installed_plugins()
    load_plugins(plugins)
    numbers = _seeds(seeds)
    chosen = [methods] if isinstance(methods, str) else list(methods or default_methods())
    methods_named(chosen)
    with _named(problem, directory) as tasks:
        workers = Workers(1, threads)
        grid = Grid(tasks, chosen, numbers, directory, device, workers, tune_budget, converged_map)
        console = Console(stderr=True, quiet=not progress_bar)
        with show_progress(console, grid.n_jobs) as listener:
            grid.run(listener)
        write_report(directory)
    return Comparison(directory, tasks)


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    """Return the seeds as a list. Raises OptionError for anything but a number of seeds or a list of seeds."""
    try:
        return list(range(seeds)) if isinstance(seeds, int) else [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise OptionError(
            "a number of seeds, or a list of seeds", received=repr(seeds), remedy="seeds=3 or seeds=[5, 7]."
        ) from error


@contextmanager
def _named(problem: ProblemSource | Sequence[str], directory: Path) -> Iterator[list[str]]:
    """Yield the names of the tasks; a problem or factory is registered as a task while the comparison runs."""
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


def _with_new_model(problem: Problem) -> Problem:
    """Return the problem with a copy of its untrained network."""
    copied = copy.copy(problem)
    copied.model = copy.deepcopy(problem.model)
    return copied


def _task(problem: object) -> Task:
    if isinstance(problem, Problem):
        return Task("problem", "a custom problem", lambda seed: _with_new_model(problem))  # noqa: ARG005
    if not callable(problem):
        raise OptionError(
            "a Problem, a function from a seed to one, or names of tasks",
            received=f"a {type(problem).__name__}",
            remedy="compare(make_problem) with make_problem(seed) -> Problem.",
        )
    name, summary = getattr(problem, "__name__", "problem"), first_line(problem) or "a custom problem"
    return Task(name, summary, problem)
