"""A problem: one network, its likelihood and its data, checked once and then handed to every method alike."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from estimators.batch import Batch, empty_loader, split_batch
from estimators.errors import DataError, ModelError, OptionError
from estimators.likelihoods import Likelihood, resolve_likelihood
from estimators.model_checks import check_model
from estimators.network import output_tensor, structural_copy
from estimators.pytrees import PyTree, n_rows, split_rows
from estimators.rng import preserved_random_state

if TYPE_CHECKING:
    from estimators.training import Recipe

__all__ = ["Loader", "Problem", "Query", "queries", "rows"]

Loader = Iterable[Any]
_SPLITS = ("train", "validation", "test")


class Problem:
    """What a method is compared on: L(θ) = Σₙ −log p(yₙ | f(xₙ; θ)) + ½ Σ δ θ², and the data to judge it by.

    Args:
        model: the network, outputs (B, C). Trained and in eval mode, unless a `recipe` says how to train it.
        likelihood: "regression", "classification", "binary", or an object such as `Gaussian(sigma_noise=0.5)`.
        train, validation, test: re-iterable loaders of (x, y), or of dicts with "labels".
        prior_precision: δ > 0, a number or a mapping {glob of parameter names: number}.
        recipe: how the network is trained (`estimators.training.Recipe`); None where it is trained already.
        make_model: builds a fresh, untrained network, for methods that train several.
        ood: named loaders of out-of-distribution inputs: of (x, y) where targets are known, or of x alone.
        shifts: named loaders of shifted (x, y); the sets of a family are named "<family>-<severity>", severity 1 to 5.
        band: a loader of points along a line, x (M, 1) ascending, with or without the noiseless y: where the report
            draws the mean and a band of two standard deviations. Nothing is scored there.

    Errors: ModelError, DataError, OptionError, each with what was received and what to try.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        train: Loader,
        validation: Loader,
        test: Loader,
        *,
        prior_precision: float | Mapping[str, float],
        recipe: Recipe | None = None,
        make_model: Callable[[], nn.Module] | None = None,
        ood: Mapping[str, Loader] | None = None,
        shifts: Mapping[str, Loader] | None = None,
        band: Loader | None = None,
    ) -> None:
        self.model = model
        self.likelihood = resolve_likelihood(likelihood)
        self.train, self.validation, self.test = train, validation, test
        self.prior_precision = prior_precision
        self.recipe, self.make_model = recipe, make_model
        self.ood, self.shifts, self.band = dict(ood or {}), dict(shifts or {}), band
        self._check()

    @property
    def n_parameters(self) -> int:
        """The number of parameters that require a gradient."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def on(self, device: str | torch.device) -> Problem:
        """The same problem with its network (moved in place) and every batch on `device`."""
        moved = copy.copy(self)
        moved.model = self.model.to(device)
        for name in _SPLITS:
            setattr(moved, name, _OnDevice(getattr(self, name), device))
        moved.ood = {name: _OnDevice(loader, device) for name, loader in self.ood.items()}
        moved.shifts = {name: _OnDevice(loader, device) for name, loader in self.shifts.items()}
        moved.band = None if self.band is None else _OnDevice(self.band, device)
        return moved

    def _check(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ModelError(
                "a torch.nn.Module", received=type(self.model).__name__, remedy="pass the network itself, not a path."
            )
        _check_precision(self.prior_precision)
        if self.recipe is None:
            _check_trained(self.model)
        network = structural_copy(self.model).eval()
        for name in _SPLITS:
            _check_split(name, getattr(self, name), network, self.likelihood)
        for name, loader in self.shifts.items():
            _check_shift(f"shift {name}", loader, network, self.likelihood)
        for name, loader in self.ood.items():
            _check_query(f"out-of-distribution {name}", loader, network)
        if self.band is not None:
            _check_band(self.band, network)


class _OnDevice:
    """A loader whose batches are moved to a device as they come."""

    def __init__(self, loader: Loader, device: str | torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Any]:
        for item in self.loader:
            yield pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self.device), item)


def _check_precision(value: float | Mapping[str, float]) -> None:
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    plain = all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in numbers)
    if not numbers or not plain or not any(v > 0 for v in numbers):
        raise OptionError(
            "prior_precision > 0, a number or a mapping {glob of parameter names: number >= 0}",
            received=repr(value),
            remedy="δ of the sum convention; from weight decay wd on a mean cross-entropy over N rows it is N·wd.",
        )


def _check_trained(model: nn.Module) -> None:
    if model.training:
        raise ModelError(
            "a trained network in eval mode, since there is no recipe to train it by",
            received="a network in train mode",
            remedy="call model.eval(), or pass recipe=Recipe(...) to have it trained.",
        )
    check_model(model)


def _check_split(name: str, loader: Loader, network: nn.Module, likelihood: Likelihood) -> None:
    """The first batch goes through the network and fits the likelihood."""
    batch = split_batch(_first_item(name, loader))
    _check_targets(name, batch, _outputs(name, batch.x, network), likelihood)


def _check_shift(name: str, loader: Loader, network: nn.Module, likelihood: Likelihood) -> None:
    """The first row alone, since there may be many sets."""
    whole = split_batch(_first_item(name, loader))
    row = whole.parts(1)[0] if len(whole) == len(whole.y) else whole
    _check_targets(name, row, _outputs(name, row.x, network), likelihood)


def _check_targets(name: str, batch: Batch, f: Tensor, likelihood: Likelihood) -> None:
    if batch.y.shape[:1] != f.shape[:1]:
        raise DataError(
            f"one target for each of the {f.shape[0]} rows of the {name} loader",
            received=f"targets of shape {tuple(batch.y.shape)}",
            remedy="check how the loader pairs x and y.",
        )
    likelihood.check_targets(f, batch.y)


def _check_query(name: str, loader: Loader, network: nn.Module) -> Query:
    """One row of the first batch goes through the network."""
    query = _query(_first_item(name, loader))
    _outputs(name, split_rows(query.x, 1)[0], network)
    return query


def _check_band(loader: Loader, network: nn.Module) -> None:
    x = _check_query("band", loader, network).x
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
    arguments, keywords = ((), x) if isinstance(x, dict) else ((x,), {})
    try:
        with torch.no_grad():
            return output_tensor(network(*arguments, **keywords))
    except (RuntimeError, IndexError, TypeError) as error:
        raise DataError(
            f"batches of the {name} loader that the network accepts",
            received=f"one for which its forward says: {error}",
            remedy="compare feature size, dtype and device with what the network was built for.",
        ) from error


def rows(loader: Loader) -> Iterator[Batch]:
    """The batches of a loader, each as (x, y)."""
    return (split_batch(item) for item in loader)


@dataclass(frozen=True)
class Query:
    """Inputs to be predicted, and their targets where there are any."""

    x: PyTree
    y: Tensor | None

    def __len__(self) -> int:
        return n_rows(self.x)


def queries(loader: Loader) -> Iterator[Query]:
    """The batches of a loader of (x, y), of x alone, or of dicts with or without "labels"."""
    return (_query(item) for item in loader)


def _query(item: object) -> Query:
    if isinstance(item, Tensor) or (isinstance(item, dict) and "labels" not in item):
        return Query(item, None)
    batch = split_batch(item)
    return Query(batch.x, batch.y)
