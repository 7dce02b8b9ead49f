"""What a problem is made of, as a digest: weights, settings, and the rows of its data in whatever order they come."""

from __future__ import annotations

import hashlib

from torch import Tensor

from bdl_bench.problem import Loader, Problem, rows
from estimators.batch import Batch
from estimators.row_digests import bits, row_digests

__all__ = ["problem_digest"]


def problem_digest(problem: Problem) -> str:
    """Sixteen hexadecimal digits; the same for a loader that only shuffles, another for any changed value."""
    digest = hashlib.sha256()
    for name, tensor in sorted(problem.model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(name.encode() + bits(tensor.reshape(1, -1)).tobytes())
    settings = (problem.likelihood, problem.prior_precision, problem.recipe)
    digest.update(repr(settings).encode())
    for loader in (problem.train, problem.validation, problem.test):
        digest.update(_rows_digest(loader))
    return digest.hexdigest()[:16]


def _rows_digest(loader: Loader) -> bytes:
    """A sum of digests of rows, modulo 2²⁵⁶: it does not depend on their order, nor on the size of batches."""
    total = sum(_batch_digest(batch) for batch in rows(loader))
    return (total % 2**256).to_bytes(32, "little")


def _batch_digest(batch: Batch) -> int:
    return sum(int.from_bytes(digest, "little") for digest in row_digests((batch.x, batch.y)))
