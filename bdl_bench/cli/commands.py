"""The command line: parses and prints, nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bdl_bench.cli.progress import shown
from bdl_bench.methods import METHODS, default_methods
from bdl_bench.problem.problem import Problem
from bdl_bench.records.record import Record
from bdl_bench.report import write_report
from bdl_bench.runner.directories import make_directory, new_directory, output_directory
from bdl_bench.runner.disk import Disk
from bdl_bench.runner.executors import Workers
from bdl_bench.runner.grid import Grid
from bdl_bench.tasks import TASKS, resolve_task
from bdl_bench.verify.run import VerifyResult, verify_problem, verify_test_problems
from bdl_bench.verify.table import to_terminal
from estimators.errors import EstimatorError, ModelError, OptionError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Compare and verify estimators of predictive uncertainty, on bundled tasks and on your own model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED, USAGE, INTERRUPTED = 1, 2, 130


@app.command()
def compare(
    tasks: Annotated[list[str] | None, typer.Argument(help="Bundled tasks; none: the default ones.")] = None,
    *,
    methods: Annotated[
        str | None, typer.Option(help="Presets with commas between, or all; none: the default ones.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ..., N-1.")] = 3,
    seed_list: Annotated[
        str | None, typer.Option(help="Seeds with commas between, for instance 5,7; instead of --seeds.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; an earlier one is resumed.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Jobs at a time; none: one, with ray as many as there is room for.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads in each; more pays for large networks.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    model: Annotated[list[str] | None, typer.Option(help="Your own module:factory, factory(seed) -> Problem.")] = None,
    tune_budget: Annotated[
        int, typer.Option(min=0, help="Fits a method may spend on its option; 0: no tuning, 1: scale and temperature.")
    ] = 1,
    data_dir: Annotated[Path | None, typer.Option(help="Where data sets that need a download are, or go.")] = None,
    executor: Annotated[str, typer.Option(help="local, in-process, or ray.")] = "local",
    timeout: Annotated[
        float | None, typer.Option(help="Seconds a cell may take; one that needs more is skipped. None: no limit.")
    ] = None,
) -> None:
    """Train each task once a seed, fit every method on it, and write records and a report."""
    names = [*(tasks or []), *(model or [])] or [name for name, task in TASKS.items() if task.default]
    with _bad_usage():
        _find_data_in(data_dir)
        workers = Workers(jobs, threads, executor, timeout)
        wanted = range(seeds) if seed_list is None else _seeds(seed_list)
        grid = Grid(names, _methods(methods), wanted, out or Path(), device, workers, tune_budget)
        grid.check()
        directory = new_directory() if out is None else make_directory(out)
    records = _run(replace(grid, directory=directory))
    _print_totals(records)
    with _failures(), Disk(directory).writing():
        print(write_report(directory).resolve())
    raise typer.Exit(FAILED if any(record.status == "failed" for record in records) else 0)


@app.command()
def verify(
    task: Annotated[
        str | None, typer.Argument(help="A bundled task; none: a pairwise_cover of small networks.")
    ] = None,
    *,
    model: Annotated[str | None, typer.Option(help="Your own module:factory, factory(seed) -> Problem.")] = None,
    curvature: Annotated[str, typer.Option(help="ggn or hessian, of the network proved on.")] = "ggn",
    subset: Annotated[str, typer.Option(help="all, last_layer, or globs with commas between them.")] = "all",
    n_queries: Annotated[int, typer.Option(min=1, help="Rows of the test loader to prove it at.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the problem.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to write.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads; more pays for large networks.")] = 1,
) -> None:
    """Prove RegVar against a dense reference: λ ladder, orders of convergence, and where an error comes from."""
    torch.set_num_threads(threads)
    with _bad_usage(), _of_the_factory(model), output_directory(out) as directory:
        problem = None if (name := model or task) is None else resolve_task(name).problem(seed)
        result = _verified(name, problem, _Wanted(curvature, subset, n_queries, directory))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(to_terminal(result.proofs))
    print((result.out / "verify.md").resolve())
    raise typer.Exit(0 if result.holds else FAILED)


@app.command()
def check(
    task: Annotated[str | None, typer.Argument(help="A bundled task.")] = None,
    *,
    model: Annotated[str | None, typer.Option(help="Your own module:factory, factory(seed) -> Problem.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the problem.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where the trained network is kept, or is from an earlier run.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    data_dir: Annotated[Path | None, typer.Option(help="Where data sets that need a download are, or go.")] = None,
) -> None:
    """Look at a problem before any method runs on it: its weights, data and settings, and what methods cost."""
    from bdl_bench.cli.diagnosis import show
    from bdl_bench.runner.preflight import check_task

    with _bad_usage(), _of_the_factory(model):
        _find_data_in(data_dir)
        subject = model or task
        if subject is None:
            raise OptionError("a task or --model module:factory", received="neither", remedy="bdl-bench check digits.")
        resolve_task(subject)
        with output_directory(out) as directory:
            diagnosis = check_task(subject, seed, directory, device)
    raise typer.Exit(show(diagnosis, _console()))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A directory that compare wrote.")],
    *,
    figures: Annotated[str | None, typer.Option(help="Every figure as a file, too: svg or pdf.")] = None,
) -> None:
    """Render the report again from its records."""
    with _bad_usage():
        page = write_report(directory, figures=figures)
    print(page.resolve())


@app.command(name="list")
def list_() -> None:
    """List the bundled tasks and the methods."""
    console = _console()
    tasks = Table("tasks", "what it is", "what it needs", box=None, pad_edge=False)
    for name, task in TASKS.items():
        tasks.add_row(_starred(name, task.default), escape(task.summary), escape(task.needs or ""))
    methods = Table("methods", "what it is", "tuned by", box=None, pad_edge=False)
    for name, method in METHODS.items():
        axis = method.axis.option if method.axis else ""
        methods.add_row(_starred(name, method.default), escape(method.summary), escape(axis))
    console.print(tasks, "", methods, "", "* runs where none is named")


def main() -> None:
    """The entry point of `bdl-bench`."""
    app()


@dataclass(frozen=True)
class _Wanted:
    """What `verify` was asked for."""

    curvature: str
    subset: str
    n_queries: int
    out: Path


def _verified(name: str | None, problem: Problem | None, wanted: _Wanted) -> VerifyResult:
    if name is None or problem is None:
        return verify_test_problems(out=wanted.out, listener=lambda case: print(case, flush=True))
    subset = wanted.subset.split(",")
    return verify_problem(
        problem,
        out=wanted.out,
        name=name,
        curvature=wanted.curvature,
        subset_of_weights=subset[0] if len(subset) == 1 else subset,
        n_queries=wanted.n_queries,
    )


def _starred(name: str, default: bool) -> str:
    return escape(name) + (" *" if default else "")


def _find_data_in(directory: Path | None) -> None:
    """Tell the tasks, in this process and in those that it starts."""
    if directory is not None:
        os.environ["BDL_BENCH_DATA"] = str(directory.resolve())


def _methods(names: str | None) -> list[str]:
    if names is None:
        return default_methods()
    return list(METHODS) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    numbers = [word.strip() for word in text.split(",") if word.strip()]
    if not numbers or not all(word.isdecimal() for word in numbers):
        raise OptionError("--seed-list with seeds >= 0 and commas between", received=repr(text), remedy="5,7.")
    return [int(word) for word in numbers]


def _run(grid: Grid) -> list[Record]:
    console = _console()
    try:
        with _failures(), shown(console, grid.n_jobs) as listener:
            return grid.run(listener)
    except KeyboardInterrupt:
        where = escape(str(grid.directory))
        text = f"Interrupted. What is done is kept; the same command with --out {where} goes on from there."
        console.print(text, soft_wrap=True, highlight=False)
        raise typer.Exit(INTERRUPTED) from None


def _print_totals(records: list[Record]) -> None:
    counts = {status: sum(r.status == status for r in records) for status in ("ok", "skipped", "failed")}
    _console().print(", ".join(f"{n} {status}" for status, n in counts.items() if n), highlight=False)


@contextmanager
def _failures() -> Iterator[None]:
    """What ends a run that had begun: a full disk, a directory that is gone, workers that cannot start."""
    try:
        yield
    except (EstimatorError, OSError) as error:
        _say(error)
        raise typer.Exit(FAILED) from error


@contextmanager
def _bad_usage() -> Iterator[None]:
    """What cannot be run as it was asked for: said in a line, without a traceback."""
    try:
        yield
    except (EstimatorError, OSError) as error:
        _say(error)
        raise typer.Exit(USAGE) from error


@contextmanager
def _of_the_factory(model: str | None) -> Iterator[None]:
    """Whatever a factory of the user's raises, as a typed error that names it."""
    try:
        yield
    except (EstimatorError, typer.Exit):
        raise
    except Exception as error:
        if model is None:
            raise
        raise ModelError(
            f"a problem from {model} that can be made and looked at",
            received=f"{type(error).__name__}: {error}",
            remedy="call the factory in Python to see where it raises.",
        ) from error


def _say(error: Exception) -> None:
    text = str(error) if isinstance(error, EstimatorError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    Console(stderr=True).print(f"[red]{escape(text)}[/red]", highlight=False, soft_wrap=True)


def _console() -> Console:
    return Console(file=sys.stdout)
