"""The commands `bdl-bench report` and `bdl-bench cite`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bdl_bench.citation import bibtex
from bdl_bench.cli.application import USAGE, Plugin, app, comma_separated, errors, load_named_plugins

__all__ = ["app", "cite", "report"]


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A directory that compare wrote.")],
    *,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated tasks to show; default: all.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated methods to show; default: all.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Comma-separated columns to show, by label or key, such as NLL,cal/ECE; default: all."),
    ] = None,
    figures: Annotated[
        str | None, typer.Option(help="Also save every figure as a file of its own: svg or pdf.")
    ] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Also save the tables for LaTeX (booktabs).")] = False,
    plugin: Plugin = None,
) -> None:
    """Render the report of a directory of records, of all or some of its tasks, methods and columns."""
    with errors(USAGE):
        from bdl_bench.report import Selection, write_report

        load_named_plugins(plugin)
        selection = Selection(*(_names(text) for text in (tasks, methods, metrics)))
        page = write_report(directory, figures=figures, latex=latex, selection=selection)
        _warn_of_unreadable(directory)
    print(page.resolve())


def _warn_of_unreadable(directory: Path) -> None:
    """Print how many files are no readable records on stderr."""
    from bdl_bench.records import RecordStore

    n = len(RecordStore(directory).unreadable())
    if n:
        files = "1 file that is no readable record" if n == 1 else f"{n} files that are no readable records"
        print(f"Left out: {files}; the report lists the reason.", file=sys.stderr)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(comma_separated(text))


@app.command()
def cite() -> None:
    """Print BibTeX entries of the paper and of the software."""
    print(bibtex(), end="")
