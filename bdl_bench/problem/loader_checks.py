"""Every batch of every loader of a problem, looked at once: what cannot be used is named by loader, batch and row."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bdl_bench.problem.queries import Loader, Query, as_query
from estimators.data.batch import split_batch
from estimators.data.batch_dimension import resolved
from estimators.errors import DataError, EstimatorError, ModelError, UnsupportedError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.link_check import REMEDY, LinkCheck
from estimators.models.network import output_tensor
from estimators.numerics.pytrees import (
    ALL_ROWS,
    PyTree,
    RowLayout,
    forward_arguments,
    n_rows,
    plain_inputs,
    row_tensors,
    split_rows,
    tensors_of,
)
from estimators.runtime.rng import preserved_random_state

__all__ = ["LoaderChecks", "each_item", "located"]

_FORWARD_ERRORS = (RuntimeError, IndexError, TypeError, ValueError, KeyError)


@dataclass
class LoaderChecks:
    """Checks loaders against one network and likelihood.

    The first batch of a split goes through the network whole. Of other batches one row does, for each form that rows
    have: there may be many sets, and a network that takes one row takes another of the same shapes and dtypes. Targets
    and inputs are looked at in every batch.

    `layout` says which tensors of the inputs have rows, learned from all batches so far. Where shapes leave it open, it
    is found by computing rows of the first batch by themselves, as an estimator does.
    """

    network: nn.Module
    likelihood: Likelihood
    link: LinkCheck = field(init=False)
    layout: RowLayout = field(default=ALL_ROWS, init=False)
    _outputs: dict[object, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.link = LinkCheck(self.likelihood)

    def check_split(self, name: str, loader: Loader, *, scored: bool) -> None:
        """Every batch has targets that fit; `scored`: they are hard labels, which metrics need. Errors: DataError."""
        self._check(name, loader, _labelled, scored=scored, whole_first=True)

    def check_shift(self, name: str, loader: Loader) -> None:
        """As a split that is scored, one row through the network."""
        self._check(name, loader, _labelled, scored=True)

    def check_queries(self, name: str, loader: Loader) -> list[PyTree]:
        """Every batch, with targets that fit or without; the inputs of all batches. Errors: DataError."""
        return self._check(name, loader, as_query, scored=True, keep=True)

    def check_link(self) -> None:
        """The outputs of the splits are logits, not probabilities. Errors: ModelError."""
        found = self.link.found(lambda x: _forward(self.network, x))
        if found is not None:
            raise ModelError(f"a model whose outputs are logits for {self.likelihood!r}", received=found, remedy=REMEDY)

    def _check(
        self,
        name: str,
        loader: Loader,
        read: Callable[[object, RowLayout], Query],
        *,
        scored: bool,
        whole_first: bool = False,
        keep: bool = False,
    ) -> list[PyTree]:
        kept: list[PyTree] = []
        total = n_labels = n_targets = 0
        with closing(each_item(name, loader)) as items:  # at once, so that the random state is put back after an error
            for index, item in enumerate(items):
                with located(name, index):
                    query = read(item, self.layout)
                    self._check_inputs(name, index, query.x)
                    if query.y is not None:
                        _check_count(name, index, query.x, query.y)
                    query = self._observed(query)
                    f = self._outputs_of(query, whole=whole_first and index == 0)
                    if query.y is not None:
                        self._check_targets(name, index, f.expand(len(query), *f.shape[1:]), query.y, scored=scored)
                        n_labels, n_targets = n_labels + _n_labels(query.y, self.likelihood), n_targets + 1
                total += len(query)
                if keep:
                    kept.append(plain_inputs(query.x))
        if not total:
            raise DataError(
                f"a {name} loader that yields at least one row",
                received="an empty one",
                remedy="check the data set, drop_last and the sampler; pass a re-iterable loader, not an iterator.",
            )
        if scored and n_targets and not n_labels:
            raise DataError(
                f"a {name} loader with at least one label",
                received="one whose labels are all ignore_index",
                remedy="leave the set out, or give it labels to be scored by.",
            )
        return kept

    def _check_inputs(self, name: str, batch: int, x: PyTree) -> None:
        tensors = tensors_of(x)
        if not any(tensor.ndim for tensor in tensors):
            raise DataError("inputs with at least one tensor whose first dimension counts rows",
                            received=type(x).__name__, remedy="pass tensors of shape (rows, ...).")  # fmt: skip
        for tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DataError(
                    "finite inputs",
                    received=f"{_at(name, batch, _first_row(~torch.isfinite(tensor)))} a NaN or Inf",
                    remedy="clean or impute the data.",
                )

    def _observed(self, query: Query) -> Query:
        """The batch, marked by a layout that knows it, too."""
        rows = len(query)
        if not rows:
            return query
        is_first = not self.layout.sizes
        self.layout = self.layout.observe(query.x, rows)
        if is_first:
            with torch.no_grad():
                self.layout = resolved(self.layout, query.x, rows, lambda x: _forward(self.network, x))
        return Query(self.layout.mark(plain_inputs(query.x), rows), query.y)

    def _outputs_of(self, query: Query, *, whole: bool) -> Tensor:
        """Outputs of all rows, (B, ...), or of one row of this form, (1, ...)."""
        if whole:
            with torch.no_grad():
                f = _finite(_forward(self.network, query.x))
            if f.shape[:1] != (len(query),):
                raise DataError(
                    f"one output for each of the {len(query)} rows",
                    received=f"outputs of shape {tuple(f.shape)}",
                    remedy="let the first dimension of the outputs count the rows: view(len(x), -1) in forward.",
                )
            self.link.add(query.x, f, query.y)
            return f
        row = split_rows(query.x, 1)[0] if len(query) else query.x
        form = _form(row)
        if form not in self._outputs:
            with torch.no_grad():
                self._outputs[form] = _finite(_forward(self.network, row))
        return self._outputs[form]

    def _check_targets(self, name: str, batch: int, f: Tensor, y: Tensor, *, scored: bool) -> None:
        def check(f: Tensor, y: Tensor) -> None:
            if not bool(torch.isfinite(y).all()):
                raise DataError("finite targets", received="a NaN or Inf", remedy="clean the data.")
            self.likelihood.check_targets(f, y)
            if scored:
                _check_hard(y, self.likelihood)

        try:
            check(f, y)
        except (DataError, UnsupportedError) as error:
            row, of_row = _first_failure(check, f, y)
            # What is wrong with the row is told more exactly by its own error, unless that is about another shape.
            told = of_row if of_row is not None and of_row.expected == error.expected else error
            if name.startswith("ood "):  # often of other classes
                remedy = f"{told.remedy.rstrip('.')}; or leave the labels of {name} out: x alone, or [x]."
                told = type(told)(told.expected, received=told.received, remedy=remedy)
            with located(name, batch, row):
                raise told from None


@contextmanager
def located(name: str, batch: int, row: int | None = None) -> Iterator[None]:
    """Errors of data inside the block, with the loader, batch and row that they are of."""
    try:
        yield
    except (DataError, UnsupportedError) as error:
        if error.received.startswith("in the "):
            raise
        received = f"{_at(name, batch, row)} {error.received}"
        raise type(error)(error.expected, received=received, remedy=error.remedy) from error


def _at(name: str, batch: int, row: int | None) -> str:
    of_row = "" if row is None else f", row {row}"
    return f"in the {name} loader, batch {batch}{of_row} (counted from 0):"


def _first_failure(
    check: Callable[[Tensor, Tensor], None], f: Tensor, y: Tensor
) -> tuple[int, DataError | UnsupportedError | None]:
    for row in range(len(y)):
        try:
            check(f[row : row + 1], y[row : row + 1])
        except (DataError, UnsupportedError) as error:
            return row, error
    return 0, None


def _labelled(item: object, layout: RowLayout) -> Query:
    return as_query(split_batch(item), layout)


def each_item(name: str, loader: Loader) -> Generator[Any]:
    """Every item; the random state, and that of the loader's own generators, is left as it was."""
    if isinstance(loader, Iterator):
        raise DataError(
            f"a {name} loader that can be iterated more than once",
            received=f"a one-shot {type(loader).__name__}",
            remedy="pass a DataLoader or a list of batches.",
        )
    generators = list(_generators(loader))
    states = [generator.get_state() for generator in generators]
    try:
        with preserved_random_state():
            yield from loader
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(loader: Loader) -> Iterable[torch.Generator]:
    for holder in (loader, getattr(loader, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


def _forward(network: nn.Module, x: PyTree) -> Tensor:
    arguments, keywords = forward_arguments(x)
    try:
        return output_tensor(network(*arguments, **keywords))
    except EstimatorError:
        raise
    except _FORWARD_ERRORS as error:
        raise DataError(
            "batches that the network accepts",
            received=f"one for which its forward says: {error}",
            remedy="compare feature size, dtype and device with what the network was built for.",
        ) from error


def _form(row: PyTree) -> object:
    """What tells rows apart that a network may treat differently: shapes, dtypes, and values beside the tensors."""
    leaves, structure = pytree.tree_flatten(plain_inputs(row))
    named = (str(leaf.shape) + str(leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    return str(structure), tuple(named)


def _finite(f: Tensor) -> Tensor:
    if not bool(torch.isfinite(f).all()):
        raise DataError(
            "finite outputs", received="NaN or Inf", remedy="check the weights and the scale of the inputs."
        )
    return f.detach()


def _check_count(name: str, batch: int, x: PyTree, y: Tensor) -> None:
    """Some tensor of the inputs, beside those that rows share, has a row for each target. Errors: DataError."""
    if not y.ndim or all(len(tensor) != len(y) for tensor in row_tensors(x)):
        n = n_rows(x) or n_rows(plain_inputs(x))
        raise DataError(
            f"one target for each of the {n} rows",
            received=f"{_at(name, batch, min(n, len(y)) if y.ndim else 0)} targets of shape {tuple(y.shape)}",
            remedy="check how the loader pairs x and y.",
        )


def _check_hard(y: Tensor, likelihood: Likelihood) -> None:
    """Metrics compare a prediction with one label: a class index, or 0 or 1. Errors: DataError."""
    if likelihood.kind == "classification" and (y.is_floating_point() or y.dtype == torch.bool):
        raise DataError(
            "integer class indices to score by",
            received=f"targets of dtype {y.dtype}",
            remedy="y.argmax(-1) of soft or one-hot labels, for validation, test, ood and shift loaders.",
        )
    if likelihood.kind == "binary" and bool(((y != 0) & (y != 1)).any()):
        strange = y[(y != 0) & (y != 1)]
        raise DataError(
            "labels 0 or 1 to score by",
            received=f"a label {strange[0].item():g}",
            remedy="threshold soft labels, (y > 0.5), for validation, test, ood and shift loaders.",
        )


def _n_labels(y: Tensor, likelihood: Likelihood) -> int:
    ignored = getattr(likelihood, "ignore_index", None)
    if likelihood.kind != "classification" or ignored is None or y.is_floating_point():
        return y.numel()
    return int((y != ignored).sum())


def _first_row(bad: Tensor) -> int:
    return int(bad.reshape(len(bad), -1).any(1).nonzero()[0]) if bad.ndim else 0
