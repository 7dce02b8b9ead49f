"""Loaders of (x, y) made re-iterable and trustworthy: rows counted, determinism checked, random state left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.batch import Batch, Loader, empty_loader, size_in_bytes, split_batch
from estimators.batch_checks import check_batch, warn_of_probabilities
from estimators.errors import NonDeterministicError, NotFittedError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.link_check import LinkCheck
from estimators.network import Network
from estimators.pytrees import concatenate, select_rows
from estimators.rng import preserved_random_state
from estimators.sums import Sums

__all__ = ["AbsentBatches", "Batches", "FreeBatches"]

_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Batches:
    """The training data: iterate it as often as you like, the sums over it are the same each time.

    `n_data` is N, counted from what the loader yields; `stored` holds the batches where they are small enough to keep.
    `sums` tell these data from others, whatever their order.
    """

    loader: Loader
    n_data: int
    stored: tuple[Batch, ...] | None = None
    sums: Sums | None = None

    @classmethod
    def checked(cls, loader: Loader, network: Network, likelihood: Likelihood) -> Batches:
        """Two passes over `loader`: validate every batch, count N, and refuse data that differ between passes.

        Errors: DataError (empty, shapes, labels, dtypes, devices, NaN or Inf), NonDeterministicError.
        Warns: NotLogitsWarning where every output looks like a probability.
        """
        first, second = _Pass(LinkCheck(likelihood)), _Pass()
        with preserved_random_state():
            stored = first.run(loader, network, likelihood, keep=True)
            if first.n_data == 0:
                raise empty_loader()
            warn_of_probabilities(first.link, network)
            checked = network.routes.outputs_by_own_module
            second.run(loader, network, likelihood, keep=False, check=True)
            if network.routes.outputs_by_own_module != checked:  # the copy of the model gives other outputs
                first = _Pass()
                stored = first.run(loader, network, likelihood, keep=True)
        _check_same(first, second)
        network.data_seen(first.n_data)
        return cls(loader, first.n_data, stored, first.sums)

    @staticmethod
    def unchecked(loader: Loader, *, keep: bool) -> Batches:
        """For a training: one pass over `loader`, to count N and, with `keep`, to store what is small enough."""
        kept: list[Batch] | None = [] if keep else None
        n_data = size = 0
        for item in loader:
            batch = split_batch(item)
            n_data, size = n_data + len(batch), size + size_in_bytes(batch)
            if kept is not None:
                kept.append(batch)
            if size > _CACHE_BYTES:
                kept = None
        if n_data == 0:
            raise empty_loader()
        return FreeBatches(loader, n_data, None if kept is None else tuple(kept))

    def __iter__(self) -> Iterator[Batch]:
        if self.stored is not None:
            yield from self.stored
            return
        with preserved_random_state():
            for item in self.loader:
                yield split_batch(item)

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in an order drawn from `generator`: rows regrouped where the data are stored, else as they come."""
        if self.stored is None:
            yield from self
            return
        try:
            x = concatenate([batch.x for batch in self.stored])
        except RuntimeError:  # rows of different shapes (padding per batch): the batches are shuffled, not the rows
            for i in torch.randperm(len(self.stored), generator=generator).tolist():
                yield self.stored[i]
            return
        y = torch.cat([batch.y for batch in self.stored])
        order = torch.randperm(self.n_data, generator=generator).to(y.device)
        for index in order.split(batch_size):
            yield Batch(select_rows(x, index), y[index])


class FreeBatches(Batches):
    """The data of a training, whose epochs differ: what the loader and the network draw moves the random state on."""

    def __iter__(self) -> Iterator[Batch]:
        if self.stored is not None:
            return iter(self.stored)
        return (split_batch(item) for item in self.loader)


class AbsentBatches(Batches):
    """The data of a fit that was loaded from a file: counted and summed, but not here."""

    def __iter__(self) -> Iterator[Batch]:
        raise NotFittedError(
            "the training data, which this method or estimator needs again",
            received="a fitted state that was loaded without them",
            remedy="estimator.attach(train_loader).",
        )

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:  # noqa: ARG002
        return iter(self)


class _Pass:
    """What one pass saw: N, and the sums."""

    def __init__(self, link: LinkCheck | None = None) -> None:
        self.n_data, self.sums, self.link = 0, Sums(), link
        self._single: Batch | None = None
        self._paired = False

    def run(
        self, loader: Loader, network: Network, likelihood: Likelihood, *, keep: bool, check: bool = False
    ) -> tuple[Batch, ...] | None:
        """`check`: compare outputs with those of the user's own module, rows alone and together."""
        kept: list[Batch] | None = [] if keep else None
        size = 0
        for item in loader:
            batch = split_batch(item)
            f = check_batch(batch, network, likelihood)
            if self.link is not None:
                self.link.add(batch.x, f, batch.y)
            if check:
                f = self._compared(batch, network, f)
            self.sums = self.sums.plus(f, batch.y)
            self.n_data += len(batch)
            size += size_in_bytes(batch)
            if kept is not None:
                kept.append(batch)
            if size > _CACHE_BYTES:
                kept = None
        return None if kept is None else tuple(kept)

    def _compared(self, batch: Batch, network: Network, f: Tensor) -> Tensor:
        """f, compared with the user's own module; batches of one row are also tried in pairs."""
        f = network.check_batch(batch.x, f)
        before, self._single = self._single, batch if len(batch) == 1 else None
        if before is not None and self._single is not None and not self._paired:
            try:
                pair = concatenate([before.x, batch.x])
            except RuntimeError:  # rows of other shapes
                return f
            network.check_batch(pair, network.shaped_outputs(pair))
            self._paired = True
        return f


def _check_same(first: _Pass, second: _Pass) -> None:
    if second.n_data != first.n_data:
        raise NonDeterministicError(
            "the same rows in every pass over the loader",
            received=f"{first.n_data} rows in the first pass, {second.n_data} in the second",
            remedy="pass a re-iterable loader (a DataLoader or a list of batches), not an iterator or a generator.",
        )
    if not first.sums.agrees(second.sums):
        sums = [f"{sums.outputs:.8g} and {sums.targets:.8g}" for sums in (first.sums, second.sums)]
        raise NonDeterministicError(
            "the same rows and outputs in every pass over the loader (their order may differ)",
            received=f"a sum of outputs and one of targets: {sums[0]} in the first pass, {sums[1]} in the second",
            remedy="use drop_last=False when shuffling, no random augmentation, a sampler without replacement, "
            "and no randomness inside the model (functional dropout).",
        )
