"""What is checked of a problem when it is made, and what is said where it cannot work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bdl_bench.loaders import Loader, as_query
from estimators.batch import Batch, empty_loader, split_batch
from estimators.errors import DataError, ModelError, OptionError
from estimators.likelihoods import Likelihood
from estimators.model_checks import check_model
from estimators.network import output_tensor
from estimators.pytrees import ALL_ROWS, PyTree, forward_arguments, n_rows, row_tensors, split_rows, tensors_of
from estimators.rng import preserved_random_state

__all__ = ["FirstRows", "check_band", "check_precision", "check_split", "check_trained"]


def check_precision(value: float | Mapping[str, float]) -> None:
    """δ is finite and not negative, and positive for some parameters. Errors: OptionError."""
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    plain = all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in numbers)
    if not numbers or not plain or not any(v > 0 for v in numbers):
        raise OptionError(
            "prior_precision > 0, a number or a mapping {glob of parameter names: number >= 0}",
            received=repr(value),
            remedy="δ of the sum convention; from weight decay wd on a mean cross-entropy over N rows it is N·wd.",
        )


def check_trained(model: nn.Module) -> None:
    """A network without a recipe is in eval mode and finite. Errors: ModelError."""
    if model.training:
        raise ModelError(
            "a trained network in eval mode, since there is no recipe to train it by",
            received="a network in train mode",
            remedy="call model.eval(), or pass recipe=Recipe(...) to have it trained.",
        )
    check_model(model)


def check_split(name: str, loader: Loader, network: nn.Module, likelihood: Likelihood) -> None:
    """The first batch goes through the network and fits the likelihood."""
    batch = split_batch(_first_item(name, loader))
    _check_targets(name, batch, _outputs(name, batch.x, network), likelihood)


def _check_targets(name: str, batch: Batch, f: Tensor, likelihood: Likelihood) -> None:
    _check_length(name, batch.y, f.shape[0])
    likelihood.check_targets(f, batch.y)


def _check_length(name: str, y: Tensor, n: int) -> None:
    if y.shape[:1] != (n,):
        raise DataError(
            f"one target for each of the {n} rows of the {name} loader",
            received=f"targets of shape {tuple(y.shape)}",
            remedy="check how the loader pairs x and y.",
        )


class FirstRows:
    """The first row of further sets: through the network once for each form of a row, since there may be many sets."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.outputs: dict[object, Tensor] = {}

    def check(self, name: str, loader: Loader) -> PyTree:
        """The inputs of the first batch, which the network accepts."""
        x = as_query(_first_item(name, loader)).x
        self._output(name, x)
        return x

    def check_labelled(self, name: str, loader: Loader, likelihood: Likelihood) -> None:
        """The network accepts the first row, and the likelihood its target."""
        whole = split_batch(_first_item(name, loader))
        if len(whole) not in map(len, row_tensors(whole.x)):
            _check_length(name, whole.y, n_rows(whole.x))
        row = whole.marked(ALL_ROWS).parts(1)[0]
        _check_targets(name, row, self._output(name, row.x), likelihood)

    def _output(self, name: str, x: PyTree) -> Tensor:
        row = split_rows(x, 1)[0]
        form = tuple((tensor.shape, tensor.dtype) for tensor in tensors_of(row))
        if form not in self.outputs:
            self.outputs[form] = _outputs(name, row, self.network)
        return self.outputs[form]


def check_band(x: PyTree) -> None:
    """The inputs of a band have one column and ascend. Errors: DataError."""
    one_column = isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == 1
    if not one_column or bool((x.diff(dim=0) < 0).any()):
        raise DataError(
            "a band along a line, x (M, 1) ascending",
            received=f"x of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}",
            remedy="torch.linspace(...).unsqueeze(1), or leave band out where inputs have several columns.",
        )


def _first_item(name: str, loader: Loader) -> object:
    """The loader can be iterated again, and the random state is left as it was."""
    if isinstance(loader, Iterator):
        raise DataError(
            f"a {name} loader that can be iterated more than once",
            received=f"a one-shot {type(loader).__name__}",
            remedy="pass a DataLoader or a list of batches.",
        )
    with preserved_random_state():
        for item in loader:
            return item
    raise empty_loader()


def _outputs(name: str, x: PyTree, network: nn.Module) -> Tensor:
    arguments, keywords = forward_arguments(x)
    try:
        with torch.no_grad():
            return output_tensor(network(*arguments, **keywords))
    except (RuntimeError, IndexError, TypeError) as error:
        raise DataError(
            f"batches of the {name} loader that the network accepts",
            received=f"one for which its forward says: {error}",
            remedy="compare feature size, dtype and device with what the network was built for.",
        ) from error
