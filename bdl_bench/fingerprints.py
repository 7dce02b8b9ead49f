"""What a problem is made of, as a digest: weights, settings, and the rows of its data in whatever order they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from torch import Tensor, nn

from bdl_bench.loaders import Loader, Query, queries
from bdl_bench.problem import Problem
from bdl_bench.versions import source_of
from estimators.row_digests import bits, row_digests

__all__ = ["problem_digest"]


def problem_digest(problem: Problem) -> str:
    """Sixteen hexadecimal digits; the same for a loader that only shuffles, another for any changed value."""
    digest = hashlib.sha256()
    for network in (problem.model, *(problem.trained_members or ()), problem.dropout_model):
        digest.update(_weights(network))
    trained = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    settings = (problem.likelihood, problem.prior_precision, problem.recipe, problem.trained, trained)
    digest.update(repr(settings).encode())
    for text in _architecture(problem):
        digest.update(text.encode() + b"\0")
    for name, loader in sorted(problem.sets().items()):
        digest.update(name.encode() + b"\0" + _rows_digest(loader))
    return digest.hexdigest()[:16]


def _weights(network: nn.Module | None) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()) if network is not None else ():
        if isinstance(tensor, Tensor):
            digest.update(name.encode() + bits(tensor.reshape(1, -1)).tobytes())
    return digest.digest()


def _architecture(problem: Problem) -> Iterator[str]:
    """What a network is beside its weights: its layers, and the source of those that are not torch's own."""
    networks = [network for network in (problem.model, problem.dropout_model) if network is not None]
    yield from map(repr, networks)
    kinds = {type(module) for network in networks for module in network.modules()}
    own = sorted(
        (k for k in kinds if not k.__module__.startswith("torch.")), key=lambda k: (k.__module__, k.__qualname__)
    )
    yield from map(source_of, [*own, problem.make_model])


def _rows_digest(loader: Loader) -> bytes:
    """A sum of digests of rows, modulo 2²⁵⁶: it does not depend on their order, nor on the size of batches."""
    total = sum(_batch_digest(batch) for batch in queries(loader))
    return (total % 2**256).to_bytes(32, "little")


def _batch_digest(batch: Query) -> int:
    return sum(int.from_bytes(digest, "little") for digest in row_digests((batch.x, batch.y), len(batch)))
