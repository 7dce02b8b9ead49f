"""The command `python -m benchmarks.nightly`: run the set, compare it with the former version, and keep the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.nightly.changes import changes
from benchmarks.nightly.page import sentence, to_markdown
from benchmarks.nightly.run import SEEDS, run
from benchmarks.nightly.snapshot import load, of_run, save
from estimators.errors import EstimatorError
from estimators.persistence.atomic import write_text

__all__ = ["main"]

FAILED, USAGE = 1, 2
DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the set and compare its results with the newest ones of another version.

    Args:
        arguments: the words of the command line; None: those of this process.

    Returns:
        The exit status: 0, 1 if a method is worse or missing, 2 if nothing finished.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nightly", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of records; an earlier run is resumed")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent jobs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds")
    parser.add_argument(
        "--keep", action="store_true", help="store the results, and write the page of the documentation"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page and its records")
    options = parser.parse_args(arguments)
    folder = options.docs / "records" / "nightly"
    run(options.out, seeds=options.seeds, jobs=options.jobs)
    try:
        snapshot = of_run(options.out)
    except EstimatorError as error:
        print(error, file=sys.stderr)
        return USAGE
    others = [kept for kept in load(folder) if kept.version != snapshot.version]
    former = others[-1] if others else None
    found = [] if former is None else changes(former, snapshot)
    print(sentence(found, former))
    if options.keep:
        print(save(snapshot, folder).resolve())
        write_text(options.docs / "nightly.md", to_markdown([*others, snapshot]))
    return FAILED if any(change.verdict in ("worse", "missing") for change in found) else 0


if __name__ == "__main__":
    sys.exit(main())
