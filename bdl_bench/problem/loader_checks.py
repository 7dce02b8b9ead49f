"""Checks of every batch of every loader of a problem. Errors name the loader, batch and row."""

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
from estimators.data.batch_dimension import resolve_layout
from estimators.errors import DataError, EstimatorError, ModelError, UnsupportedError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.link_check import REMEDY, LinkCheck
from estimators.models.outputs import output_tensor
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
    """Checks of loaders against one network and likelihood.

    Inputs and targets are checked in every batch. The network computes the first batch of a split, and one row of
    other batches for each combination of shapes and dtypes, since there may be many sets.

    `layout` says which tensors of the inputs have rows, as observed in all batches so far. If shapes do not determine
    it, single rows of the first batch are computed, as in the estimators.
    """

    network: nn.Module
    likelihood: Likelihood
    link: LinkCheck = field(init=False)
    layout: RowLayout = field(default=ALL_ROWS, init=False)
    _outputs: dict[object, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.link = LinkCheck(self.likelihood)

    def check_split(self, name: str, loader: Loader, *, scored: bool) -> None:
        """Check that every batch has targets that fit, and hard labels if they are scored. Raises DataError."""
        self._check(name, loader, _labelled, scored=scored, whole_first=True)

    def check_shift(self, name: str, loader: Loader) -> None:
        """Check a shifted set like a scored split, with one row through the network. Raises DataError."""
        self._check(name, loader, _labelled, scored=True)

    def check_queries(self, name: str, loader: Loader) -> list[PyTree]:
        """Check batches that may have no targets, and return the inputs of all batches. Raises DataError."""
        return self._check(name, loader, as_query, scored=True, keep=True)

    def check_link(self) -> None:
        """Check that the outputs of the splits are logits, not probabilities. Raises ModelError."""
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
        with closing(each_item(name, loader)) as items:  # restores the random state after an error, too
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
                remedy="omit the set, or give it labels.",
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
        """Return the batch, marked by the layout of all batches including this one."""
        rows = len(query)
        if not rows:
            return query
        is_first = not self.layout.sizes
        self.layout = self.layout.observe(query.x, rows)
        if is_first:
            with torch.no_grad():
                self.layout = resolve_layout(self.layout, query.x, rows, lambda x: _forward(self.network, x))
        return Query(self.layout.mark(plain_inputs(query.x), rows), query.y)

    def _outputs_of(self, query: Query, *, whole: bool) -> Tensor:
        """Return the outputs of all rows, (B, ...), or of one row with these shapes and dtypes, (1, ...)."""
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
        signature = _signature(row)
        if signature not in self._outputs:
            with torch.no_grad():
                self._outputs[signature] = _finite(_forward(self.network, row))
        return self._outputs[signature]

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
            # The error of the row alone is more specific, unless it is about another shape.
            shown = of_row if of_row is not None and of_row.expected == error.expected else error
            if name.startswith("ood "):  # OOD rows often have other classes
                remedy = f"{shown.remedy.rstrip('.')}; or omit the labels of {name}: x alone, or [x]."
                shown = type(shown)(shown.expected, received=shown.received, remedy=remedy)
            with located(name, batch, row):
                raise shown from None


@contextmanager
def located(name: str, batch: int, row: int | None = None) -> Iterator[None]:
    """Name the loader, batch and row in every error of data that is raised inside the block."""
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
    """Yield every item, then restore the global random state and that of the loader's generators."""
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
            received=f"one for which its forward raises: {error}",
            remedy="compare feature size, dtype and device with what the network was built for.",
        ) from error


def _signature(row: PyTree) -> object:
    """Return what a network may treat differently: shapes and dtypes of a row, and its values beside tensors."""
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
    """Check that some tensor of the inputs, beside shared ones, has one row per target. Raises DataError."""
    if not y.ndim or all(len(tensor) != len(y) for tensor in row_tensors(x)):
        n = n_rows(x) or n_rows(plain_inputs(x))
        raise DataError(
            f"one target for each of the {n} rows",
            received=f"{_at(name, batch, min(n, len(y)) if y.ndim else 0)} targets of shape {tuple(y.shape)}",
            remedy="check how the loader pairs x and y.",
        )


def _check_hard(y: Tensor, likelihood: Likelihood) -> None:
    """Check that targets are hard labels, class indices or 0 and 1, as metrics need. Raises DataError."""
    if likelihood.kind == "classification" and (y.is_floating_point() or y.dtype == torch.bool):
        raise DataError(
            "integer class indices as labels of scored rows",
            received=f"targets of dtype {y.dtype}",
            remedy="y.argmax(-1) of soft or one-hot labels, for validation, test, ood and shift loaders.",
        )
    if likelihood.kind == "binary" and bool(((y != 0) & (y != 1)).any()):
        other = y[(y != 0) & (y != 1)]
        raise DataError(
            "labels 0 or 1 of scored rows",
            received=f"a label {other[0].item():g}",
            remedy="threshold soft labels, (y > 0.5), for validation, test, ood and shift loaders.",
        )


def _n_labels(y: Tensor, likelihood: Likelihood) -> int:
    ignored = getattr(likelihood, "ignore_index", None)
    if likelihood.kind != "classification" or ignored is None or y.is_floating_point():
        return y.numel()
    return int((y != ignored).sum())


def _first_row(bad: Tensor) -> int:
    return int(bad.reshape(len(bad), -1).any(1).nonzero()[0]) if bad.ndim else 0
