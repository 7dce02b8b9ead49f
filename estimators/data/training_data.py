"""Loaders of (x, y) made re-iterable and trustworthy: rows counted, determinism checked, random state left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.data.batch import Batch, Loader, check_iterable, empty_loader, first_batch, size_in_bytes, split_batch
from estimators.data.batch_dimension import resolve_layout
from estimators.data.checks import check_batch, check_finite, naming_batch, warn_of_probabilities
from estimators.errors import NonDeterministicError, NotFittedError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.link_check import LinkCheck
from estimators.models.function_checks import check_outputs
from estimators.models.network import Network
from estimators.numerics.pytrees import ALL_ROWS, PyTree, RowLayout, concatenate, difference, select_rows
from estimators.persistence.checksums import DatasetChecksum
from estimators.runtime.rng import preserved_random_state

__all__ = ["AbsentTrainingData", "AugmentedData", "TrainingData"]

_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class TrainingData:
    """The training data as an iterable of batches: sums over it are the same in every pass.

    Args:
        loader: the user's loader, re-iterable.
        n_data: N, the number of rows that the loader yields.
        stored: copies of the batches if they are small enough to keep, else None.
        checksum: a checksum of the data that does not depend on the order of rows.
        layout: which input tensors have rows; the others are marked as shared in every batch.
    """

    loader: Loader
    n_data: int
    stored: tuple[Batch, ...] | None = None
    checksum: DatasetChecksum | None = None
    layout: RowLayout = ALL_ROWS

    @classmethod
    def checked(cls, loader: Loader, network: Network, likelihood: Likelihood) -> TrainingData:
        """Validate every batch of a loader in two passes, and check that both see the same rows and outputs.

        The first pass checks shapes, dtypes and values, counts N, and finds the input tensors that have rows. The
        second pass, which knows these, compares the outputs with those of the user's module, for all rows of a batch
        and for rows alone. The passes differ for one-shot iterators, `drop_last` with shuffling, random augmentation
        and random models. If the second pass finds that the copy of the module has other outputs than the module, a
        third pass repeats the first with the module itself.

        Warns with NotLogitsWarning if every output looks like a probability.

        Args:
            loader: an iterable of batches that can be iterated again.
            network: the network at θ̂.
            likelihood: the likelihood, which checks the targets.

        Returns:
            The training data.

        Raises:
            DataError: no rows, or a wrong shape, label, dtype or device, or NaN or Inf.
            NonDeterministicError: the passes differ.
        """
        check_iterable(loader)
        first, second = _Pass(), _Pass()
        first.link = LinkCheck(likelihood)
        with preserved_random_state():
            stored = first.run(loader, network, likelihood, keep=True)
            if first.n_data == 0:
                raise empty_loader()
            warn_of_probabilities(first.link, network)
            first.layout = _resolved(first.layout, loader, stored, network.shaped_outputs)
            second.layout = first.layout
            by_module = network.routes.outputs_by_user_module
            second.run(loader, network, likelihood, keep=False, check=True)
            if network.routes.outputs_by_user_module != by_module:  # found in the second pass
                first = _Pass(first.layout)
                stored = first.run(loader, network, likelihood, keep=True)
        _check_same(first, second)
        first.layout.check_lists()
        network.record_training_rows(first.n_data)
        return cls(loader, first.n_data, _marked(stored, first.layout), first.checksum, first.layout)

    @staticmethod
    def unchecked(loader: Loader, *, keep: bool, outputs: Callable[[PyTree], Tensor] | None = None) -> TrainingData:
        """Read the data of a training in one pass, which counts N; later passes may yield other rows.

        Args:
            loader: an iterable of batches, which may augment at random.
            keep: whether to store copies of the batches if they are small enough.
            outputs: the model, marked inputs -> f (B, ...). If all batches have one size, it decides which tensors have
                rows.

        Returns:
            The data, of which every pass iterates the loader again unless the batches are stored.
        """
        check_iterable(loader)
        kept, layout, n_data = _Kept(keep=keep), RowLayout(), 0
        for index, item in enumerate(loader):
            with naming_batch(index):
                batch = split_batch(item)
                check_finite(batch.mark_shared(ALL_ROWS))
                layout, n_data = layout.observe(batch.x, len(batch)), n_data + len(batch)
            kept.add(batch)
        if n_data == 0:
            raise empty_loader()
        layout.check_lists()
        if outputs is not None:
            layout = _resolved(layout, loader, kept.batches, outputs)
        return AugmentedData(loader, n_data, _marked(kept.batches, layout), layout=layout)

    def __iter__(self) -> Iterator[Batch]:
        if self.stored is not None:
            yield from self.stored
            return
        with preserved_random_state():
            for item in self.loader:  # a copy: the loader may fill one buffer again and again
                yield split_batch(item).copy().mark_shared(self.layout)

    def shuffled(self, batch_size: int, generator: torch.Generator, *, even: bool = False) -> Iterator[Batch]:
        """Iterate over one epoch in random order.

        Rows are regrouped if the data are stored and the batches differ only in their rows. Other stored batches
        (padding, a time or a temperature per batch) keep their rows, and their order is drawn. Data that are not
        stored keep the order of the loader.

        Args:
            batch_size: rows per batch if rows are regrouped.
            generator: the generator of the order.
            even: whether sizes of regrouped batches differ by at most 1, and none exceeds `batch_size`; otherwise the
                last batch has the remaining rows.

        Yields:
            Batches.
        """
        if self.stored is None:
            yield from self
            return
        if difference([batch.x for batch in self.stored]) or difference([batch.y for batch in self.stored]):
            for i in torch.randperm(len(self.stored), generator=generator).tolist():
                yield self.stored[i]
            return
        x = concatenate([batch.x for batch in self.stored])
        y = torch.cat([batch.y for batch in self.stored])
        order = torch.randperm(self.n_data, generator=generator).to(y.device)
        for index in order.tensor_split(-(-self.n_data // batch_size)) if even else order.split(batch_size):
            yield Batch(select_rows(x, index), y[index])


class AugmentedData(TrainingData):
    """Data of a training whose epochs may differ: the loader and the network draw from the global random state."""

    def __iter__(self) -> Iterator[Batch]:
        if self.stored is not None:
            return iter(self.stored)
        return (split_batch(item).mark_shared(self.layout) for item in self.loader)


class AbsentTrainingData(TrainingData):
    """Training data of a fit that was loaded from a file: N and the checksum are known, the rows are not."""

    def __iter__(self) -> Iterator[Batch]:
        raise NotFittedError(
            "the training data, which this method or estimator needs again",
            received="a fitted state that was loaded without them",
            remedy="estimator.attach_data(train_loader).",
        )

    def shuffled(
        self,
        batch_size: int,  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
        *,
        even: bool = False,  # noqa: ARG002
    ) -> Iterator[Batch]:
        return iter(self)


class _Pass:
    """Results of one pass: N, the checksum, and which tensors have rows."""

    def __init__(self, layout: RowLayout = ALL_ROWS) -> None:
        self.n_data, self.checksum, self.layout = 0, DatasetChecksum(), layout
        self.link: LinkCheck | None = None
        self._single: Batch | None = None
        self._paired = False

    def run(
        self, loader: Loader, network: Network, likelihood: Likelihood, *, keep: bool, check: bool = False
    ) -> tuple[Batch, ...] | None:
        """Iterate over the loader; `check` compares outputs with the user's own module, rows alone and together."""
        kept = _Kept(keep=keep)
        for index, item in enumerate(loader):
            with naming_batch(index):
                batch = split_batch(item)
                marked = batch.mark_shared(self.layout)  # in the first pass as far as it is known
                f = check_batch(marked, network, likelihood)
                if self.link is not None:
                    self.link.add(marked.x, f, batch.y)
                if check:
                    f = self._compared(marked, network, f)
                self.checksum = self.checksum.plus(f, batch.y)
                self.layout = self.layout.observe(batch.x, len(batch))
            self.n_data += len(batch)
            kept.add(batch)
        return kept.batches

    def _compared(self, batch: Batch, network: Network, f: Tensor) -> Tensor:
        """Return f, compared with the user's own module; batches of one row are also tried in pairs."""
        f = check_outputs(network, batch.x, f)
        before, self._single = self._single, batch if len(batch) == 1 else None
        if before is None or self._single is None or self._paired or difference([before.x, batch.x]):
            return f
        pair = concatenate([before.x, batch.x])
        check_outputs(network, pair, network.shaped_outputs(pair))
        self._paired = True
        return f


class _Kept:
    """Copies of batches if they are small: a loader may change its own tensors later."""

    def __init__(self, *, keep: bool) -> None:
        self._batches: list[Batch] | None = [] if keep else None
        self._size = 0

    @property
    def batches(self) -> tuple[Batch, ...] | None:
        return None if self._batches is None else tuple(self._batches)

    def add(self, batch: Batch) -> None:
        self._size += size_in_bytes(batch)
        if self._size > _CACHE_BYTES:
            self._batches = None
        if self._batches is not None:
            self._batches.append(batch.copy())


def _resolved(
    layout: RowLayout, loader: Loader, stored: tuple[Batch, ...] | None, outputs: Callable[[PyTree], Tensor]
) -> RowLayout:
    """Return the layout; if shapes leave it open, rows of the first batch computed alone decide."""
    if len(layout.sizes) != 1 or len(layout.with_rows - layout.unequal) < 2:
        return layout
    batch = stored[0] if stored else first_batch(loader)
    return resolve_layout(layout, batch.x, len(batch), outputs)


def _marked(batches: tuple[Batch, ...] | None, layout: RowLayout) -> tuple[Batch, ...] | None:
    return None if batches is None else tuple(batch.mark_shared(layout) for batch in batches)


def _check_same(first: _Pass, second: _Pass) -> None:
    if second.n_data != first.n_data:
        raise NonDeterministicError(
            "the same rows in every pass over the loader",
            received=f"{first.n_data} rows in the first pass, {second.n_data} in the second",
            remedy="pass a re-iterable loader (a DataLoader or a list of batches), not an iterator or a generator.",
        )
    if not first.checksum.agrees(second.checksum):
        sums = [f"outputs {seen.outputs:.8g}, targets {seen.targets:.8g}" for seen in (first.checksum, second.checksum)]
        raise NonDeterministicError(
            "the same rows and outputs in every pass over the loader (their order may differ)",
            received=f"other checksums in the second pass ({sums[1]}) than in the first ({sums[0]})",
            remedy="use drop_last=False when shuffling, no random augmentation, a sampler without replacement, "
            "and no randomness inside the model (functional dropout).",
        )
