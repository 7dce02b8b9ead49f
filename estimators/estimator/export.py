"""`export`: the predictive distribution of a fit as a module that torch alone can load and run."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from estimators.errors import ModelError, OptionError, UnsupportedError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.prediction import Prediction
from estimators.models.exclusive import exclusively
from estimators.models.failures import FAILURES, is_final_error, short
from estimators.models.network import Network
from estimators.models.preserved_state import preserved_state
from estimators.models.row_graph import graph_of_row, graph_of_rows, rows_in_turn
from estimators.numerics.pytrees import PyTree, Shared, forward_arguments, n_rows, row_as_batch, select_rows
from estimators.numerics.tracing import tracing
from estimators.persistence.atomic import write_bytes

__all__ = ["ExportMixin"]

Moments = tuple[Tensor, Tensor]
"""Mean and epistemic variance of the outputs, both in the shape of the outputs."""
Finish = Callable[[Prediction], Prediction]
"""Post-processing of the prediction that is made of the moments, such as its calibration."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-5}
"""The largest relative error of the exported module, beside `predict`, that is accepted, by dtype.

In float32 derivatives of the 22 million weights of MiniLM round to 1e-5 in another order of operations, those of small
networks to 1e-7.
"""
_LARGE_JACOBIAN = 2**25
"""Size of the Jacobian of one row, 32 MiB, above which an exported module computes one row after the other."""
_NUMBERS_OF_ROWS = (37, 41, 43, 47, 53, 59, 61, 67, 71, 73)
"""Numbers of rows at which a network is recorded: primes, since torch.export takes equal sizes for one."""
_OUTPUTS = ("mean", "epistemic_variance", "total_variance", "probs")
"""The attributes of a prediction that the exported module returns, if the prediction has them."""


class ExportMixin(ABC):
    """`export` of a fit. A subclass chooses a route, and may override the moments that are recorded."""

    export_route: ClassVar[str | None] = None
    """How the moments are recorded: "batch" if all rows are computed at once without derivatives, "rows" if derivatives
    of each row are needed, None if the variance is no closed expression."""

    model: nn.Module
    likelihood: Likelihood

    @exclusively
    def export(self, path: str | Path, example: PyTree) -> None:
        """Write a module that returns the predictive distribution to a file that torch loads without this library.

            module = torch.export.load(path).module()
            module(x)["epistemic_variance"]

        The module takes the inputs of the model, with any number of rows; all other sizes are those of `example`. It
        returns a dict with the attributes of `predict(x)` by their names: "mean" and "epistemic_variance", in
        regression "total_variance", in classification and binary "probs". Inputs are not checked.

        The saved module is compared with `predict` at the rows of `example`, at one row, and at other numbers of rows.

        Args:
            path: the file, whose name ends in ".pt2".
            example: a query of at least one row, as for `predict`.

        Raises:
            UnsupportedError: if the variance is no closed expression of the network and its derivatives.
            ModelError: if torch cannot export the network, or the exported module differs from `predict` by more than
                1e-6 of the largest value (in float32 3e-5, in half precision 4 eps).
            OptionError: if the file has another ending.
            NotFittedError, ModelChangedError, DataError: as `variance`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LastLayerLaplace
            >>> laplace = LastLayerLaplace(nn.Linear(3, 2), "regression").fit([(torch.randn(8, 3), torch.randn(8, 2))])
            >>> x = torch.randn(4, 3)
            >>> laplace.export("posterior.pt2", x)
            >>> module = torch.export.load("posterior.pt2").module()
            >>> torch.allclose(module(x)["epistemic_variance"], laplace.variance(x))
            True
        """
        self._export(path, example, self.predict, self._finish_prediction)

    def _export(
        self, path: str | Path, example: PyTree, predict: Callable[[PyTree], Prediction], finish: Finish
    ) -> None:
        """Write a module that returns what `predict` does: `finish` of the prediction of the moments."""
        path = Path(path)
        if path.suffix != ".pt2":
            raise OptionError('a file name that ends in ".pt2"', received=path.name, remedy='export("model.pt2", x).')
        x = self._prepare_query(example)
        self._check_query(x)
        self._check_exportable()
        predict(example)  # fills what a first query computes once, before the recording
        try:
            content = self._exported(x, finish)
            self._check_exported(content, x, predict)
        except FAILURES as error:
            if is_final_error(error):
                raise
            raise ModelError(
                "a network that torch.export can record, without branches on the values of its inputs",
                received=f"one for which torch says: {short(error)}",
                remedy="LastLayerLaplace, whose exported module needs no derivatives; or save and load with this "
                "library.",
            ) from error
        write_bytes(path, content)

    def _exported(self, x: PyTree, finish: Finish) -> bytes:
        """Return the content of the file."""
        x = _with_enough_rows(x)
        arguments, keywords = forward_arguments(x)
        with tracing(), torch.no_grad(), _quiet(), preserved_state(self.model):
            moments = self._record_moments(x)
            kind = _ServedKeywords.of_names(keywords) if keywords else _Served
            served = kind(self.network_.module, moments, self._outputs(finish))
            rows = torch.export.Dim("rows", min=1)
            shapes = pytree.tree_map(lambda leaf: _dynamic(leaf, rows), x)
            dynamic = shapes if keywords else {"x": shapes}
            program = torch.export.export(served, arguments, keywords, dynamic_shapes=dynamic, strict=False)
            file = io.BytesIO()
            torch.export.save(program, file)
        return file.getvalue()

    def _outputs(self, finish: Finish) -> Callable[[Moments], dict[str, Tensor]]:
        """Return the function from the moments to the outputs of the module."""
        return lambda moments: _as_dict(finish(self._export_prediction(*moments)))

    def _record_moments(self, x: PyTree) -> Callable[[PyTree], Moments]:
        """Return a function from inputs to the moments that torch.export can record."""
        if self.export_route == "batch":
            marks = pytree.tree_map(lambda leaf: isinstance(leaf, Shared), x)
            return lambda given: self._export_moments(_marked(given, marks))
        leaves, spec = pytree.tree_flatten(x)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (Tensor, Shared))]
        has_rows = [isinstance(leaves[i], Tensor) for i in where]

        def one_row(*tensors: Tensor) -> Moments:
            filled = list(leaves)
            for i, tensor, own in zip(where, tensors, has_rows, strict=True):
                filled[i] = tensor if own else Shared(tensor)
            mean, variance = self._export_moments(row_as_batch(pytree.tree_unflatten(filled, spec)))
            return mean[0], variance[0]

        rows = [leaves[i] if own else leaves[i].value for i, own in zip(where, has_rows, strict=True)]
        of_row = graph_of_row(one_row, [t[0] if own else t for t, own in zip(rows, has_rows, strict=True)])
        of_rows = self._for_all_rows(x, of_row, rows, has_rows)
        return lambda given: of_rows(*(pytree.tree_leaves(given)[i] for i in where))

    def _for_all_rows(
        self, x: PyTree, of_row: fx.GraphModule, rows: Sequence[Tensor], has_rows: Sequence[bool]
    ) -> Callable[..., Moments]:
        """Return the function of one row for any number of rows: all at once, or in turn.

        In turn if the derivatives of a row are large, since those of all rows might not fit into memory, and together
        they take the same time; and if an operation of the network cannot be applied to any number of rows at once.
        """
        theta, n_outputs = self.network_.theta, self.network_.outputs(x).shape[-1]
        if n_outputs * theta.numel() * theta.element_size() > _LARGE_JACOBIAN:
            return rows_in_turn(of_row, has_rows)
        try:
            return graph_of_rows(of_row, rows, has_rows)
        except ModelError:
            return rows_in_turn(of_row, has_rows)

    def _export_moments(self, x: PyTree) -> Moments:
        """Return the moments at checked inputs, as `predict` has them."""
        mean = self._mean(x)
        return mean, self._to_output_dtype(self._variance(x)).reshape(mean.shape)

    def _export_prediction(self, mean: Tensor, variance: Tensor) -> Prediction:
        """Return the prediction of moments."""
        return self.likelihood.predict(mean, variance, None)

    def _finish_prediction(self, prediction: Prediction) -> Prediction:
        """Return what `predict` returns, from the prediction of the moments."""
        return prediction

    def _check_exportable(self) -> None:
        """Raise UnsupportedError if the fit has no route."""
        if self.export_route is None:
            raise self._not_exportable(type(self).__name__)

    def _not_exportable(self, received: str) -> UnsupportedError:
        return UnsupportedError(
            "an estimator whose variance is a closed expression of the network and its derivatives",
            received=received,
            remedy='LastLayerLaplace, LinearizedLaplace with inverse="cholesky" or "dual" or another '
            "hessian_structure, RegVar with PosteriorDraws, or DeepEnsemble.",
        )

    def _check_exported(self, content: bytes, x: PyTree, predict: Callable[[PyTree], Prediction]) -> None:
        """Compare the saved module with `predict` at several numbers of rows. Raises ModelError."""
        module = torch.export.load(io.BytesIO(content)).module()
        n = n_rows(x)
        for index in (torch.arange(n), torch.arange(1), torch.arange(n + 1) % n):
            some = select_rows(x, index.to(self.network_.theta.device))
            expected = _as_dict(predict(some))
            arguments, keywords = forward_arguments(some)
            with torch.no_grad():
                found = module(*arguments, **keywords)
            for name, value in expected.items():
                _check_equal(name, found[name], value, len(index))

    @property
    @abstractmethod
    def network_(self) -> Network:
        """The network that was fitted."""

    @abstractmethod
    def _prepare_query(self, x: PyTree) -> PyTree: ...

    @abstractmethod
    def _check_query(self, x: PyTree) -> torch.Size: ...

    @abstractmethod
    def predict(self, x: PyTree) -> Prediction: ...

    @abstractmethod
    def _mean(self, x: PyTree) -> Tensor: ...

    @abstractmethod
    def _variance(self, x: PyTree) -> Tensor: ...

    @abstractmethod
    def _to_output_dtype(self, values: Tensor) -> Tensor: ...


class _Served(nn.Module):
    """The module that is exported, for a model that takes one argument."""

    def __init__(
        self,
        network: nn.Module,
        moments: Callable[[PyTree], Moments],
        finish: Callable[[Moments], dict[str, Tensor]],
    ) -> None:
        super().__init__()
        self.network = network  # its weights have their names in the exported module
        self.moments, self.finish = moments, finish

    def forward(self, x: PyTree) -> dict[str, Tensor]:
        return self.finish(self.moments(x))


class _ServedKeywords(_Served):
    """The module that is exported, for a model that takes keywords."""

    @classmethod
    def of_names(cls, names: Iterable[str]) -> type[_ServedKeywords]:
        """Return the class for these keywords; torch.export reads them from the signature."""

        def forward(self: _ServedKeywords, **keywords: PyTree) -> dict[str, Tensor]:
            return self.finish(self.moments(keywords))

        kind, either = inspect.Parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [kind("self", either), *(kind(name, either) for name in names)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return type(cls.__name__, (cls,), {"forward": forward})


def _as_dict(prediction: Prediction) -> dict[str, Tensor]:
    """Return the outputs of the exported module."""
    return {name: value for name in _OUTPUTS if (value := getattr(prediction, name)) is not None}


def _marked(x: PyTree, shared: PyTree) -> PyTree:
    """Return inputs with the tensors that rows share wrapped in `Shared`."""
    return pytree.tree_map(lambda leaf, is_shared: Shared(leaf) if is_shared else leaf, x, shared)


def _dynamic(leaf: object, rows: Any) -> dict[int, Any] | None:  # noqa: ANN401
    """Return the sizes of an input that are free: the rows."""
    return {0: rows} if isinstance(leaf, Tensor) and leaf.ndim else None


def _with_enough_rows(x: PyTree) -> PyTree:
    """Return rows of x, repeated to a number that no tensor has as another size.

    torch takes equal sizes of inputs for the same size, and a size of one for fixed.
    """
    sizes = {size for leaf in pytree.tree_leaves(x) if isinstance(leaf, (Tensor, Shared)) for size in _sizes(leaf)}
    n = next(n for n in _NUMBERS_OF_ROWS if n not in sizes)
    first = next(leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim)
    return select_rows(x, torch.arange(n, device=first.device) % n_rows(x))


def _sizes(leaf: Tensor | Shared) -> tuple[int, ...]:
    return tuple(leaf.value.shape) if isinstance(leaf, Shared) else tuple(leaf.shape[1:])


def _check_equal(name: str, found: Tensor, expected: Tensor, n: int) -> None:
    """Raise ModelError unless an output of the exported module agrees with `predict`."""
    tolerance = _TOLERANCE.get(expected.dtype, 4 * torch.finfo(expected.dtype).eps)
    scale = float(expected.double().abs().max())
    difference = float((found.double() - expected.double()).abs().max()) if found.shape == expected.shape else scale
    if found.shape != expected.shape or not difference <= tolerance * scale:
        raise ModelError(
            f"an exported module that agrees with predict within {tolerance:.1g}",
            received=f"{name} of shape {tuple(found.shape)} that differs by {difference:.2g} at {n} rows",
            remedy="a network without branches on the values or sizes of its inputs, in float64 if the difference is "
            "round-off; or save and load with this library.",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out messages of torch about what it records."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch.fx.experimental")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
