"""The application `bdl-bench`, its common options, and how errors are printed.

Nothing here imports PyTorch, so that `bdl-bench --help` does not wait for it. Commands import what they use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bdl_bench.citation import software_version

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "USAGE",
    "DataDir",
    "Device",
    "Model",
    "Plugin",
    "Seed",
    "app",
    "comma_separated",
    "console",
    "errors",
    "factory_errors",
    "load_named_plugins",
    "set_data_directory",
]

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


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bdl-bench {software_version()}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def load_named_plugins(plugins: list[str] | None) -> None:
    """Load the plugins of installed packages and those that the command line names."""
    from bdl_bench.plugins import load_installed_plugins, load_plugins

    load_installed_plugins()
    load_plugins(plugins or [])


def set_data_directory(directory: Path | None) -> None:
    """Set the data directory of the tasks, for this process and its worker processes."""
    if directory is not None:
        os.environ["BDL_BENCH_DATA"] = str(directory.resolve())


def comma_separated(text: str) -> list[str]:
    """Return comma-separated names as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def errors(status: int) -> Iterator[None]:
    """Print an error of the arguments or of a run in one line, without a traceback, and exit with this status."""
    try:
        yield
    except Exception as error:
        from estimators.errors import EstimatorError

        if not isinstance(error, (EstimatorError, OSError)):
            raise
        text = str(error) if isinstance(error, EstimatorError) else f"{type(error).__name__}: {error}"
        text = " ".join(text.split())
        Console(stderr=True).print(f"[red]{escape(text)}[/red]", highlight=False, soft_wrap=True)
        raise typer.Exit(status) from error


@contextmanager
def factory_errors(model: str | None) -> Iterator[None]:
    """Raise any error of a user's factory as a typed error that names the factory."""
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        from estimators.errors import EstimatorError, ModelError

        if model is None or isinstance(error, EstimatorError):
            raise
        raise ModelError(
            f"a factory {model} that returns a valid problem",
            received=f"{type(error).__name__}: {error}",
            remedy="call the factory in Python to see where it raises.",
        ) from error


def console() -> Console:
    """Return a console on the standard output."""
    return Console(file=sys.stdout)
