"""Loaders of (x, y) made re-iterable and trustworthy: rows counted, determinism checked, random state left alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from estimators.errors import DataError, EstimatorError, NonDeterministicError, NotFittedError
from estimators.likelihoods import Likelihood
from estimators.network import Network
from estimators.pytrees import PyTree, concatenate, n_rows, select_rows, split_rows, tensors_of
from estimators.rng import preserved_random_state

__all__ = ["AbsentBatches", "Batch", "Batches", "Sums", "first_batch", "split_batch"]

Loader = Iterable[Any]
_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of B rows."""

    x: PyTree
    y: Tensor

    def __len__(self) -> int:
        return n_rows(self.x)

    def parts(self, size: int | None) -> list[Batch]:
        """Consecutive parts of at most `size` rows; None: the batch itself."""
        if size is None or len(self) <= size:
            return [self]
        return [Batch(x, y) for x, y in split_rows((self.x, self.y), size)]


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
        """
        first, second = _Pass(), _Pass()
        with preserved_random_state():
            stored = first.run(loader, network, likelihood, keep=True)
            if first.n_data == 0:
                raise _empty()
            second.run(loader, network, likelihood, keep=False)
        _check_same(first, second)
        return cls(loader, first.n_data, stored, first.sums)

    @classmethod
    def unchecked(cls, loader: Loader, *, keep: bool) -> Batches:
        """One pass over `loader`, to count N and, with `keep`, to store what is small enough."""
        kept: list[Batch] | None = [] if keep else None
        n_data = size = 0
        for item in loader:
            batch = split_batch(item)
            n_data, size = n_data + len(batch), size + _bytes(batch)
            if kept is not None:
                kept.append(batch)
            if size > _CACHE_BYTES:
                kept = None
        if n_data == 0:
            raise _empty()
        return cls(loader, n_data, None if kept is None else tuple(kept))

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


@dataclass(frozen=True)
class Sums:
    """Of a pass over the data, in double precision: outputs and targets weighted by column, and their sizes."""

    outputs: float = 0.0
    outputs_size: float = 0.0
    targets: float = 0.0
    targets_size: float = 0.0

    def plus(self, f: Tensor, y: Tensor) -> Sums:
        """With the rows of one more batch."""
        outputs, outputs_size = _weighted(f)
        targets, targets_size = _weighted(y)
        return Sums(
            self.outputs + outputs,
            self.outputs_size + outputs_size,
            self.targets + targets,
            self.targets_size + targets_size,
        )

    def agrees(self, other: Sums) -> bool:
        """Whether both are of the same rows, up to the round-off of another order or device."""
        outputs = abs(self.outputs - other.outputs) <= 1e-5 * self.outputs_size
        return outputs and abs(self.targets - other.targets) <= 1e-5 * self.targets_size


def _weighted(values: Tensor) -> tuple[float, float]:
    """Σ j·v_j + v_j² over the columns j, and the same of absolute values."""
    values = values.detach().double().flatten(1) if values.ndim > 1 else values.detach().double()[:, None]
    weights = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=torch.float64)
    squares = values.square().sum()
    return float((values * weights).sum() + squares), float((values.abs() * weights).sum() + squares)


class _Pass:
    """What one pass saw: N, and the sums."""

    def __init__(self) -> None:
        self.n_data, self.sums = 0, Sums()

    def run(self, loader: Loader, network: Network, likelihood: Likelihood, *, keep: bool) -> tuple[Batch, ...] | None:
        kept: list[Batch] | None = [] if keep else None
        size = 0
        for item in loader:
            batch = split_batch(item)
            self.sums = self.sums.plus(check_batch(batch, network, likelihood), batch.y)
            self.n_data += len(batch)
            size += _bytes(batch)
            if kept is not None:
                kept.append(batch)
            if size > _CACHE_BYTES:
                kept = None
        return None if kept is None else tuple(kept)


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


def split_batch(item: object) -> Batch:
    """(x, y), or a dict with "labels"."""
    if isinstance(item, dict) and isinstance(item.get("labels"), Tensor):
        return Batch({key: value for key, value in item.items() if key != "labels"}, item["labels"])
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], Tensor):
        return Batch(item[0], item[1])
    raise DataError(
        'batches (x, y) with a tensor y, or dicts with a tensor "labels"',
        received=f"{type(item).__name__}"
        + (f" of length {len(item)}" if isinstance(item, (tuple, list, dict)) else ""),
        remedy="wrap the loader so that it yields pairs.",
    )


def first_batch(loader: Loader) -> Batch:
    """The first batch, the random state left as it was."""
    with preserved_random_state():
        for item in loader:
            return split_batch(item)
    raise _empty()


def _empty() -> DataError:
    return DataError(
        "a loader that yields at least one row",
        received="an empty one",
        remedy="check the data set, drop_last and the sampler; pass a re-iterable loader, not an iterator.",
    )


def _bytes(batch: Batch) -> int:
    return sum(t.numel() * t.element_size() for t in [*tensors_of(batch.x), batch.y])


def check_batch(batch: Batch, network: Network, likelihood: Likelihood) -> Tensor:
    """Outputs (B, ...) at θ̂ of a valid batch; DataError for an invalid one."""
    f = check_inputs(batch.x, network, what="training batch")
    if batch.y.device != network.theta.device:
        raise DataError(
            f"targets on the device of the model, {network.theta.device}",
            received=f"{batch.y.device}",
            remedy="move both to one device: y.to(device).",
        )
    if not bool(torch.isfinite(batch.y).all()):
        raise DataError("finite targets", received="a NaN or Inf", remedy="clean the data.")
    if batch.y.shape[:1] != f.shape[:1]:
        raise DataError(
            f"one target for each of the {f.shape[0]} rows",
            received=f"{tuple(batch.y.shape)}",
            remedy="check the loader.",
        )
    likelihood.check_targets(f, batch.y)
    return f


def check_inputs(x: PyTree, network: Network, *, what: str) -> Tensor:
    """Outputs (B, ...) at θ̂ of valid inputs; DataError for invalid ones."""
    tensors = tensors_of(x)
    if not tensors:
        raise DataError("inputs with at least one tensor", received=type(x).__name__, remedy="pass tensors.")
    for tensor in tensors:
        _check_tensor(tensor, network.theta, what)
    try:
        f = network.shaped_outputs(x)
    except EstimatorError:
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise DataError(
            f"a {what} that the network accepts",
            received=f"inputs of shape {shapes}, for which its forward says: {error}",
            remedy="compare the feature size and shape with those of the training rows.",
        ) from error
    if not bool(torch.isfinite(f).all()):
        raise DataError(
            f"finite outputs for the {what}", received="NaN or Inf", remedy="check the weights and the scale of x."
        )
    return f


def _check_tensor(tensor: Tensor, theta: Tensor, what: str) -> None:
    if tensor.device != theta.device:
        raise DataError(
            f"a {what} on the device of the model, {theta.device}",
            received=f"a tensor on {tensor.device}",
            remedy="move model and data to one device.",
        )
    if tensor.is_floating_point():
        if tensor.dtype != theta.dtype:
            raise DataError(
                f"a {what} of the dtype of the model, {theta.dtype}",
                received=f"{tensor.dtype}",
                remedy=f"x.to({theta.dtype}), or convert the model.",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"a finite {what}", received="NaN or Inf in the inputs", remedy="clean or impute the data.")
