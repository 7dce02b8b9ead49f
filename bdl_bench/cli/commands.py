"""The commands of `bdl-bench`: they parse arguments and print results."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bdl_bench.cli.progress import show_progress
from bdl_bench.methods import METHODS, default_methods
from bdl_bench.plugins import load_installed_plugins, load_plugins, loaded_plugins
from bdl_bench.records.record import Record
from bdl_bench.report import write_report
from bdl_bench.runner.directories import make_directory, new_directory, output_directory
from bdl_bench.runner.disk import Disk
from bdl_bench.runner.executors import Workers
from bdl_bench.runner.grid import Grid
from bdl_bench.tasks import TASKS, resolve_task
from bdl_bench.verify.run import verify_problems
from bdl_bench.verify.table import to_terminal
from estimators.errors import EstimatorError, ModelError, OptionError
from estimators.persistence.atomic import write_text

__all__ = ["app", "main"]

app = typer.Typer(
    help="Compare and verify estimators of predictive uncertainty, on bundled tasks and on your own model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED, USAGE, INTERRUPTED = 1, 2, 130

Model = Annotated[str | None, typer.Option(help="Custom module:factory, factory(seed) -> Problem.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
DataDir = Annotated[Path | None, typer.Option(help="Directory of downloaded data sets.")]
Plugin = Annotated[
    list[str] | None, typer.Option(help="Module with a function register(registry), or module:function; repeatable.")
]
Seed = Annotated[int, typer.Option(help="Seed of the problem.")]

_VERIFIED_TASKS = ("toy-gap", "wine", "breast-cancer")
"""Tasks that `verify` takes by default: one per likelihood, small enough for the dense reference."""


_DATA_ORDER = ("ships", "extra", "--data-dir")
_DATA_LEGEND = (
    "ships: in this package or in scikit-learn, nothing to download",
    "extra: in a package of an extra",
    "--data-dir: files in a directory, or a download",
)


@app.command()
def compare(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Bundled tasks; default: those marked * by bdl-bench list.")
    ] = None,
    *,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated presets, or all; default: those marked * by bdl-bench list.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds N: seeds 0, 1, ..., N-1.")] = 3,
    seed_list: Annotated[
        str | None, typer.Option(help="Comma-separated seeds, such as 5,7; instead of --seeds.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write; an earlier run in it is resumed.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Concurrent jobs; default: 1, and with ray as many as fit.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads per job.")] = 1,
    device: Device = "cpu",
    model: Annotated[list[str] | None, typer.Option(help="Custom module:factory, factory(seed) -> Problem.")] = None,
    tune_budget: Annotated[
        int,
        typer.Option(
            min=0,
            help="Fits that each method may use for tuning; 0: no tuning, 1: variance scale and temperature only.",
        ),
    ] = 1,
    converged_map: Annotated[
        bool,
        typer.Option("--converged-map", help="Continue each training by L-BFGS until the gradient vanishes."),
    ] = False,
    data_dir: DataDir = None,
    executor: Annotated[str, typer.Option(help="local, in-process, or ray.")] = "local",
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that a run may take; one that needs more is skipped. Default: no timeout."),
    ] = None,
    plugin: Plugin = None,
) -> None:
    """Train the network of each task and seed, fit every method to it, and write records and a report."""
    with _errors(USAGE):
        _load_plugins(plugin)
        names = [*(tasks or []), *(model or [])] or [name for name, task in TASKS.items() if task.default]
        _set_data_directory(data_dir)
        workers = Workers(jobs, threads, executor, timeout)
        wanted = range(seeds) if seed_list is None else _seeds(seed_list)
        grid = Grid(names, _methods(methods), wanted, out or Path(), device, workers, tune_budget, converged_map)
        grid.check()
        directory = new_directory() if out is None else make_directory(out)
    records = _run(replace(grid, directory=directory))
    counts = {status: sum(r.status == status for r in records) for status in ("ok", "skipped", "failed")}
    _console().print(", ".join(f"{n} {status}" for status, n in counts.items() if n), highlight=False)
    with _errors(FAILED), Disk(directory).writing():
        print(write_report(directory).resolve())
    raise typer.Exit(FAILED if any(record.status == "failed" for record in records) else 0)


@app.command()
def verify(
    task: Annotated[str | None, typer.Argument(help="A bundled task; none: three small ones.")] = None,
    *,
    model: Model = None,
    curvature: Annotated[str, typer.Option(help="ggn or hessian.")] = "ggn",
    subset: Annotated[str, typer.Option(help="all, last_layer, or comma-separated globs of parameter names.")] = "all",
    n_queries: Annotated[int, typer.Option(min=1, help="Number of test rows at which the variances are compared.")] = 8,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Directory to write.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 1,
    plugin: Plugin = None,
) -> None:
    """Verify RegVar against a dense reference: λ sweep, orders of convergence, and the parts of the error of draws."""
    torch.set_num_threads(threads)
    with _errors(USAGE), _factory_errors(model), output_directory(out) as directory:
        _load_plugins(plugin)
        subsets = subset.split(",")
        names = _VERIFIED_TASKS if (name := model or task) is None else (name,)
        result = verify_problems(
            {name: resolve_task(name).problem(seed) for name in names},
            out=directory,
            curvature=curvature,
            subset_of_weights=subsets[0] if len(subsets) == 1 else subsets,
            n_queries=n_queries,
            listener=lambda name: print(name, flush=True),
        )
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(to_terminal(result.verifications))
    print((result.out / "verify.md").resolve())
    raise typer.Exit(0 if result.passed else FAILED)


@app.command()
def check(
    task: Annotated[str | None, typer.Argument(help="A bundled task.")] = None,
    *,
    model: Model = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the trained network; one of an earlier run is reused.")
    ] = None,
    device: Device = "cpu",
    data_dir: DataDir = None,
    plugin: Plugin = None,
) -> None:
    """Diagnose a problem before any method runs on it: its weights, data and settings, and the costs of methods."""
    from bdl_bench.cli.diagnosis import show
    from bdl_bench.runner.preflight import check_task

    with _errors(USAGE), _factory_errors(model):
        _load_plugins(plugin)
        _set_data_directory(data_dir)
        source = model or task
        if source is None:
            raise OptionError("a task or --model module:factory", received="neither", remedy="bdl-bench check digits.")
        resolve_task(source)
        with output_directory(out) as directory:
            diagnosis = check_task(source, seed, directory, device)
    raise typer.Exit(show(diagnosis, _console()))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A directory that compare wrote.")],
    *,
    figures: Annotated[str | None, typer.Option(help="Also save every figure as a file: svg or pdf.")] = None,
    plugin: Plugin = None,
) -> None:
    """Render the report of a directory of records."""
    with _errors(USAGE):
        _load_plugins(plugin)
        page = write_report(directory, figures=figures)
    print(page.resolve())


@app.command()
def reproduce(
    study: Annotated[str, typer.Argument(help="uci, or bde (airfoil and bike sharing).")] = "uci",
    *,
    sets: Annotated[
        str | None, typer.Option(help="Comma-separated data sets; default: all, the smallest first.")
    ] = None,
    splits: Annotated[
        int | None, typer.Option(min=1, help="Published splits, from 0; default: all, 5 of naval and protein.")
    ] = None,
    epochs: Annotated[str | None, typer.Option(help="Protocols of uci, comma-separated: 40, 400; default: 40.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated presets; default: those of the study.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to write, resumed if it exists; default: bdl-results/reproduce-STUDY."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Concurrent jobs; default: 1.")] = None,
    tune_budget: Annotated[int, typer.Option(min=1, help="Fits that each method may use for tuning.")] = 5,
    data_dir: DataDir = None,
    device: Device = "cpu",
    executor: Annotated[str, typer.Option(help="local, in-process, or ray.")] = "local",
) -> None:
    """Run a published comparison by its own protocol, and print our numbers beside the published ones."""
    from bdl_bench.reproduce import page, study_named

    with _errors(USAGE):
        load_installed_plugins()
        _set_data_directory(data_dir)
        chosen = study_named(study)
        tasks = chosen.chosen(_names(sets), _names(epochs))
        directory = make_directory(out or Path("bdl-results") / f"reproduce-{study}")
        workers = Workers(jobs, 1, executor, None)
        wanted = list(chosen.methods) if methods is None else _methods(methods)
        grids = [Grid([t.task], wanted, t.seeds(splits), directory, device, workers, tune_budget) for t in tasks]
        for grid in grids:
            grid.check()
    failed = 0
    written = directory / f"{study}.md"
    for grid in grids:
        _console().print(f"{grid.tasks[0]}, {len(grid.seeds)} splits", highlight=False)
        failed += sum(record.status == "failed" for record in _run(grid))
        with _errors(FAILED), Disk(directory).writing():
            write_text(written, page(chosen, directory))
    print(written.read_text(encoding="utf-8"))
    print(written.resolve())
    raise typer.Exit(FAILED if failed else 0)


@app.command(name="list")
def list_(*, plugin: Plugin = None) -> None:
    """List the tasks, with where their data are, the methods, and what plugins add."""
    with _errors(USAGE):
        _load_plugins(plugin)
    console = _console()
    tasks = Table("tasks", "data", "what it is", "what it needs", box=None, pad_edge=False)
    for name, task in sorted(TASKS.items(), key=lambda item: _DATA_ORDER.index(item[1].data.partition(", ")[2])):
        tasks.add_row(_starred(name, task.default), task.data, escape(task.summary), escape(task.needs or ""))
    methods = Table("methods", "what it is", "tuned by", box=None, pad_edge=False)
    for name, method in METHODS.items():
        axis = method.tuned_option.option if method.tuned_option else ""
        methods.add_row(_starred(name, method.default), escape(method.summary), escape(axis))
    console.print(tasks, "", methods, "", "* default", "", *_DATA_LEGEND)
    if loaded_plugins():
        plugins = Table("plugins", "kind", "name", box=None, pad_edge=False)
        for origin, registry in loaded_plugins().items():
            for kind, name in registry.added or [("", "nothing")]:
                plugins.add_row(escape(origin), kind, escape(name))
        console.print("", plugins)


def main() -> None:
    """The entry point of `bdl-bench`."""
    app()


def _load_plugins(plugins: list[str] | None) -> None:
    load_installed_plugins()
    load_plugins(plugins or [])


def _starred(name: str, default: bool) -> str:
    return escape(name) + (" *" if default else "")


def _set_data_directory(directory: Path | None) -> None:
    """Set the data directory of the tasks, for this process and its worker processes."""
    if directory is not None:
        os.environ["BDL_BENCH_DATA"] = str(directory.resolve())


def _methods(names: str | None) -> list[str]:
    if names is None:
        return default_methods()
    return list(METHODS) if names == "all" else _names(names) or []


def _names(text: str | None) -> list[str] | None:
    """Return comma-separated names as a list."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    numbers = [word.strip() for word in text.split(",") if word.strip()]
    if not numbers or not all(word.isdecimal() for word in numbers):
        raise OptionError("--seed-list with comma-separated seeds >= 0", received=repr(text), remedy="5,7.")
    return [int(word) for word in numbers]


def _run(grid: Grid) -> list[Record]:
    console = _console()
    try:
        with _errors(FAILED), show_progress(console, grid.n_jobs) as listener:
            return grid.run(listener)
    except KeyboardInterrupt:
        where = escape(str(grid.directory))
        text = f"Interrupted. Finished runs are kept; the same command with --out {where} resumes."
        console.print(text, soft_wrap=True, highlight=False)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _errors(status: int) -> Iterator[None]:
    """Print an error of the arguments or of a run in one line, without a traceback, and exit with this status."""
    try:
        yield
    except (EstimatorError, OSError) as error:
        text = str(error) if isinstance(error, EstimatorError) else f"{type(error).__name__}: {error}"
        text = " ".join(text.split())
        Console(stderr=True).print(f"[red]{escape(text)}[/red]", highlight=False, soft_wrap=True)
        raise typer.Exit(status) from error


@contextmanager
def _factory_errors(model: str | None) -> Iterator[None]:
    """Raise any error of a user's factory as a typed error that names the factory."""
    try:
        yield
    except (EstimatorError, typer.Exit):
        raise
    except Exception as error:
        if model is None:
            raise
        raise ModelError(
            f"a factory {model} that returns a valid problem",
            received=f"{type(error).__name__}: {error}",
            remedy="call the factory in Python to see where it raises.",
        ) from error


def _console() -> Console:
    return Console(file=sys.stdout)
