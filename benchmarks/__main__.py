"""The command `python -m benchmarks`: measure time and memory, and write the pages of docs/benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.run import run_bench
from estimators.errors import EstimatorError

__all__ = ["main"]

USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the command line asks for and print the paths of their pages.

    Args:
        arguments: the words of the command line; None: those of this process.

    Returns:
        The exit status: 0, or 2 for a page or row that does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure time and memory of the estimators and of laplace-torch.",
    )
    parser.add_argument(
        "--select",
        action="append",
        default=[],
        help="a page (core, regvar, tolerance, reference, quality, serving, statistics, fisher, large) or a row; "
        "default: core and regvar; repeatable",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    options = parser.parse_args(arguments)
    try:
        pages = run_bench(options.select, options.out, lambda row: print(row, flush=True))
    except (EstimatorError, OSError) as error:
        print(error, file=sys.stderr)
        return USAGE
    for page in pages:
        print(page.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
