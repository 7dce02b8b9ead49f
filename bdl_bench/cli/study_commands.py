"""The commands `bdl-bench sbc` and `bdl-bench reproduce`, which run studies of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bdl_bench.cli.application import (
    FAILED,
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
from bdl_bench.cli.commands import method_names, run_grid

__all__ = ["app", "reproduce", "sbc"]


@app.command()
def sbc(
    task: Annotated[str | None, typer.Argument(help="A bundled task; none: two small networks.")] = None,
    *,
    model: Model = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated presets; default: the sampler and some approximations.")
    ] = None,
    n_replications: Annotated[int, typer.Option(min=1, help="Data sets that are simulated.")] = 150,
    n_queries: Annotated[
        int | None, typer.Option(min=1, help="Test rows at which f is ranked, of a task. Default: 8.")
    ] = None,
    seed: Seed = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Concurrent worker processes.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Directory to write; an earlier run in it is resumed.")] = None,
    plugin: Plugin = None,
) -> None:
    """Simulation-based calibration: ranks of the true function under each method, on data drawn from the network."""
    from bdl_bench.cli import sbc_study
    from bdl_bench.runner.directories import output_directory
    from bdl_bench.verify.sbc import write_sbc
    from estimators.errors import OptionError

    with errors(USAGE), factory_errors(model), output_directory(out) as directory:
        load_named_plugins(plugin)
        source = model or task
        if n_queries is not None and source is None:
            raise OptionError(
                "--n-queries with a task or --model",
                received="neither",
                remedy="omit it: the small cases have their own.",
            )
        names = list(sbc_study.DEFAULT_METHODS) if methods is None else method_names(methods)
        result = sbc_study.run(
            sbc_study.cases_of(source, seed, n_queries or 8),
            names,
            directory,
            n_replications=n_replications,
            seed=seed,
            jobs=jobs,
            plugins=plugin or [],
        )
        page = write_sbc(result)
    sbc_study.show(result, Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200))
    print(page.resolve())
    raise typer.Exit(FAILED if sbc_study.unexpected(result) else 0)


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
    from bdl_bench.runner.directories import make_directory
    from bdl_bench.runner.disk import Disk
    from bdl_bench.runner.executors import Workers
    from bdl_bench.runner.grid import Grid
    from estimators.persistence.atomic import write_text

    with errors(USAGE):
        load_named_plugins(None)
        set_data_directory(data_dir)
        chosen = study_named(study)
        tasks = chosen.chosen(*(None if text is None else comma_separated(text) for text in (sets, epochs)))
        directory = make_directory(out or Path("bdl-results") / f"reproduce-{study}")
        workers = Workers(jobs, 1, executor, None)
        wanted = list(chosen.methods) if methods is None else method_names(methods)
        grids = [Grid([t.task], wanted, t.seeds(splits), directory, device, workers, tune_budget) for t in tasks]
        for grid in grids:
            grid.check()
    failed = 0
    written = directory / f"{study}.md"
    for grid in grids:
        console().print(f"{grid.tasks[0]}, {len(grid.seeds)} splits", highlight=False)
        failed += sum(record.status == "failed" for record in run_grid(grid))
        with errors(FAILED), Disk(directory).writing():
            write_text(written, page(chosen, directory))
    print(written.read_text(encoding="utf-8"))
    print(written.resolve())
    raise typer.Exit(FAILED if failed else 0)
