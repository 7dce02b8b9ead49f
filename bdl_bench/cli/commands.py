"""The commands of `bdl-bench`: they parse arguments and print results. Each imports what it uses, when it runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from bdl_bench.cli.application import (
    FAILED,
    INTERRUPTED,
    USAGE,
    DataDir,
    Device,
    Model,
    Plugin,
    Seed,
    app,
    comma_separated,
    console,
    errors,
    factory_errors,
    load_named_plugins,
    set_data_directory,
)

if TYPE_CHECKING:
    from bdl_bench.records.record import Record
    from bdl_bench.runner.grid import Grid
    from bdl_bench.tasks.registry import Task

__all__ = ["app", "main", "method_names", "run_grid"]

_DATA_ORDER = ("ships", "extra", "--data-dir")
_DATA_LEGEND = (
    "ships: in this package or in scikit-learn, nothing to download",
    "extra: in a package of an extra",
    "--data-dir: files in a directory, or a download",
)

_VERIFIED_TASKS = ("toy-gap", "wine", "breast-cancer")
"""Tasks that `verify` takes by default: one per likelihood, small enough for the dense reference."""


@app.command()
def compare(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Bundled tasks; default: those marked * by bdl-bench list.")
    ] = None,
    *,
    more_tasks: Annotated[
        str | None, typer.Option("--tasks", help="Comma-separated tasks, as for bdl-bench report.")
    ] = None,
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
    from bdl_bench.report import write_report
    from bdl_bench.runner.directories import make_directory, new_directory
    from bdl_bench.runner.disk import Disk
    from bdl_bench.runner.executors import Workers
    from bdl_bench.runner.grid import Grid
    from bdl_bench.tasks import TASKS

    with errors(USAGE):
        load_named_plugins(plugin)
        bundled = comma_separated(",".join([*(tasks or []), more_tasks or ""]))
        names = [*bundled, *(model or [])] or [name for name, task in TASKS.items() if task.default]
        set_data_directory(data_dir)
        workers = Workers(jobs, threads, executor, timeout)
        wanted = range(seeds) if seed_list is None else _seeds(seed_list)
        grid = Grid(names, method_names(methods), wanted, out or Path(), device, workers, tune_budget, converged_map)
        grid.check()
        directory = new_directory() if out is None else make_directory(out)
    records = run_grid(replace(grid, directory=directory))
    counts = {status: sum(r.status == status for r in records) for status in ("ok", "skipped", "failed")}
    console().print(", ".join(f"{n} {status}" for status, n in counts.items() if n), highlight=False)
    with errors(FAILED), Disk(directory).writing():
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
    import torch

    from bdl_bench.runner.directories import output_directory
    from bdl_bench.tasks import resolve_task
    from bdl_bench.verify.run import verify_problems
    from bdl_bench.verify.table import to_terminal

    torch.set_num_threads(threads)
    with errors(USAGE), factory_errors(model), output_directory(out) as directory:
        load_named_plugins(plugin)
        subsets = comma_separated(subset) or [subset]
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
    from bdl_bench.runner.directories import output_directory
    from bdl_bench.runner.preflight import check_task
    from bdl_bench.tasks import resolve_task
    from estimators.errors import OptionError

    with errors(USAGE), factory_errors(model):
        load_named_plugins(plugin)
        set_data_directory(data_dir)
        source = model or task
        if source is None:
            raise OptionError("a task or --model module:factory", received="neither", remedy="bdl-bench check digits.")
        resolve_task(source)
        with output_directory(out) as directory:
            diagnosis = check_task(source, seed, directory, device)
    raise typer.Exit(show(diagnosis, console()))


@app.command(name="list")
def list_(*, plugin: Plugin = None) -> None:
    """List the tasks, with where their data are, the methods, and what plugins add."""
    from bdl_bench.methods import METHODS
    from bdl_bench.plugins import loaded_plugins
    from bdl_bench.tasks import TASKS

    with errors(USAGE):
        load_named_plugins(plugin)
    screen = console()
    tasks = Table(_names("tasks"), _names("data"), "what it is", box=None, pad_edge=False)
    for name, task in sorted(TASKS.items(), key=lambda item: _sort_key(item[1])):
        needs = f"\n[dim]needs {escape(task.needs)}[/dim]" if task.needs else ""
        tasks.add_row(_starred(name, task.default), task.data, escape(task.summary) + needs)
    methods = Table(_names("methods"), "what it is", _names("tuned by"), box=None, pad_edge=False)
    for name, method in METHODS.items():
        axis = method.tuned_option.option if method.tuned_option else ""
        methods.add_row(_starred(name, method.default), escape(method.summary), escape(axis))
    screen.print(tasks, "", methods, "", "* default", "", *_DATA_LEGEND)
    if loaded_plugins():
        plugins = Table("plugins", "kind", "name", box=None, pad_edge=False)
        for origin, registry in loaded_plugins().items():
            for kind, name in registry.added or [("", "nothing")]:
                plugins.add_row(escape(origin), kind, escape(name))
        screen.print("", plugins)


def method_names(names: str | None) -> list[str]:
    """Return the methods of a comma-separated list; None: the default ones, "all": all."""
    from bdl_bench.methods import METHODS, default_methods

    if names is None:
        return default_methods()
    return list(METHODS) if names == "all" else comma_separated(names)


def _seeds(text: str) -> list[int]:
    from estimators.errors import OptionError

    numbers = comma_separated(text)
    if not numbers or not all(word.isdecimal() for word in numbers):
        raise OptionError("--seed-list with comma-separated seeds >= 0", received=repr(text), remedy="5,7.")
    return [int(word) for word in numbers]


def run_grid(grid: Grid) -> list[Record]:
    """Run a grid with progress on the terminal; return its records. An interrupted run says how to resume."""
    from bdl_bench.cli.progress import show_progress

    screen = console()
    try:
        with errors(FAILED), show_progress(screen, grid.n_jobs) as listener:
            return grid.run(listener)
    except KeyboardInterrupt:
        where = escape(str(grid.directory))
        text = f"Interrupted. Finished runs are kept; the same command with --out {where} resumes."
        screen.print(text, soft_wrap=True, highlight=False)
        raise typer.Exit(INTERRUPTED) from None


def _names(header: str) -> Column:
    """Return a column of names to be copied, which a narrow screen neither wraps nor cuts off."""
    return Column(header, no_wrap=True, overflow="ignore")


def _sort_key(task: Task) -> tuple[int, bool]:
    """Return a key that sorts tasks by where their data are, and the default ones first."""
    return _DATA_ORDER.index(task.data.partition(", ")[2]), not task.default


def _starred(name: str, default: bool) -> str:
    return escape(name) + (" *" if default else "")


def main() -> None:
    """The entry point of `bdl-bench`."""
    app()
