"""A digest of a problem: its network, its settings, and the rows of its data in any order."""

from __future__ import annotations

from collections.abc import Iterator

from bdl_bench.problem.kept_rows import CheckedRows, KeptRows
from bdl_bench.problem.loader_checks import located
from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import Loader, queries
from bdl_bench.records.content_digests import content_digest
from estimators.numerics.pytrees import RowLayout
from estimators.persistence.checksums import digest, row_hashes

__all__ = ["problem_digest", "row_set_digests"]


def problem_digest(problem: Problem) -> str:
    """Return 16 hexadecimal digits, which any changed value of the problem changes. Its loaders may shuffle."""
    trained = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    settings = (
        problem.likelihood, problem.prior_precision, problem.recipe, problem.trained, problem.make_model, trained,
        problem.decision,
    )  # fmt: skip
    own = (problem.trained_members, problem.dropout_model)
    rows = (f"{name}\0{rows}" for name, rows in sorted(row_set_digests(problem).items()))
    return digest(content_digest(problem.model, own, settings), *rows).hex()[:16]


def row_set_digests(problem: Problem) -> dict[str, str]:
    """Return a digest of the rows of each set by its name: a sum of digests of rows, modulo 2²⁵⁶.

    It depends neither on the order of the rows nor on the size of batches.
    """
    sets = problem.sets().items()
    return {name: f"{sum(_row_numbers(name, loader, problem.layout)) % 2**256:064x}" for name, loader in sets}


def _row_numbers(name: str, loader: Loader, layout: RowLayout) -> Iterator[int]:
    if isinstance(loader, (KeptRows, CheckedRows)):
        yield from (int.from_bytes(digest, "little") for digest in loader.digests)
        return
    batches, number = queries(loader, layout), 0
    while True:
        with located(name, number):
            batch = next(batches, None)
        if batch is None:
            return
        yield from (int.from_bytes(digest, "little") for digest in row_hashes(batch.x, batch.y))
        number += 1
