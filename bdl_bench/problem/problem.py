"""A problem: one network, its likelihood and its data, checked once and then handed to every method alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bdl_bench.problem.checks import (
    check_band,
    check_dropout_model,
    check_members,
    check_precision,
    check_trained,
    check_trained_option,
)
from bdl_bench.problem.kept_rows import Budget, CheckedRows, KeptRows, kept_rows, kept_train, row_order
from bdl_bench.problem.loader_checks import LoaderChecks
from bdl_bench.problem.queries import Loader, moved, rows
from estimators.errors import ModelError
from estimators.likelihoods import Likelihood, resolve_likelihood
from estimators.models.network import structural_copy
from estimators.numerics.pytrees import ALL_ROWS, RowLayout

if TYPE_CHECKING:
    from estimators.training.training import Recipe

__all__ = ["ENSEMBLE_SIZE", "Loader", "Members", "Problem", "rows"]

ENSEMBLE_SIZE = 5
"""Networks in a deep ensemble, `model` among them; five as in Lakshminarayanan et al. (2017)."""

Members = Sequence[nn.Module] | Callable[[int], nn.Module]

_SPLITS = ("train", "validation", "test")


class Problem:
    """What a method is compared on: L(θ) = Σₙ −log p(yₙ | f(xₙ; θ)) + ½ Σ δ θ², and the data to judge it by.

    Args:
        model: the network, outputs (B, C). Trained and in eval mode, unless a `recipe` says how to train it.
        likelihood: "regression", "classification", "binary", or an object such as `Gaussian(sigma_noise=0.5)`.
        train: a re-iterable loader of (x, y), or of dicts with "labels". Every batch is checked.
        validation: a loader of rows for tuning, with hard labels: class indices, or 0 and 1.
        test: a loader of rows that are scored, with hard labels.
        prior_precision: δ > 0, a number or a mapping {glob of parameter names: number}.
        recipe: how the network is trained (`estimators.training.Recipe`), from the weights that it comes with; None if
            it is trained already.
        trained: True: `model` is used as it is, also with a `recipe`, which then serves only methods that train
            networks of their own. None or False, with a recipe: `model` is trained by it, and the report says so.
        make_model: builds a fresh, untrained network, for methods that train several.
        members: trained networks of the architecture of `model` for the deep ensemble, whose first member is `model`
            itself: a list, or a function from 1, 2, 3, 4 to one, for instance from a seed to a checkpoint.
        dropout_model: a trained network with dropout layers, in eval mode, for MC dropout; of any architecture.
        ood: named loaders of out-of-distribution inputs: of (x, y) where targets are known, which then fit the
            likelihood, or of x alone, as a tensor, a dict, or [x].
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
        trained: bool | None = None,
        make_model: Callable[[], nn.Module] | None = None,
        members: Members | None = None,
        dropout_model: nn.Module | None = None,
        ood: Mapping[str, Loader] | None = None,
        shifts: Mapping[str, Loader] | None = None,
        band: Loader | None = None,
    ) -> None:
        self.model = model
        self.likelihood = resolve_likelihood(likelihood)
        self.train, self.validation, self.test = train, validation, test
        self.prior_precision = prior_precision
        self.recipe, self.trained, self.make_model = recipe, trained, make_model
        self.members = list(members) if isinstance(members, Iterable) else members
        self.dropout_model = dropout_model
        self.ood, self.shifts, self.band = dict(ood or {}), dict(shifts or {}), band
        self._kept: dict[str, tuple[Loader, Loader]] = {}
        self._layout = ALL_ROWS
        self._check()

    @property
    def n_parameters(self) -> int:
        """The number of parameters that require a gradient."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def layout(self) -> RowLayout:
        """Which tensors of the inputs have rows, found over all sets when the problem is made."""
        return self._layout

    @property
    def trains_model(self) -> bool:
        """Whether the recipe trains `model`."""
        return self.recipe is not None and not self.trained

    @cached_property
    def trained_members(self) -> list[nn.Module] | None:
        """The trained networks of the ensemble beside `model`; None if there are none."""
        if self.members is None or isinstance(self.members, list):
            return self.members
        return [self.members(number) for number in range(1, ENSEMBLE_SIZE)]

    def sets(self) -> dict[str, Loader]:
        """Every loader by the name that records have for its rows: train, validation, test, ood/…, shift/…, band."""
        return {
            **{name: getattr(self, name) for name in _SPLITS},
            **{f"ood/{name}": loader for name, loader in self.ood.items()},
            **{f"shift/{name}": loader for name, loader in self.shifts.items()},
            **({} if self.band is None else {"band": self.band}),
        }

    def on(self, device: str | torch.device) -> Problem:
        """The same problem with its network (moved in place) and every batch on `device`."""
        moved = self._with_sets({name: _on_device(loader, device) for name, loader in self.sets().items()})
        moved.model = self.model.to(device)
        moved.dropout_model = None if self.dropout_model is None else self.dropout_model.to(device)
        return moved

    def kept(self) -> Problem:
        """Return the same problem with every set read once and its rows kept, so that no two passes differ in order.

        Training rows are put in one order if the recipe regroups them; if it takes the loader's own batches
        (`batch_size=None`), they stay with the loader. Sets are read at the first call and then reused.

        Raises:
            DataError: for a batch that is none; it names the set and the batch.
            NonDeterministicError: if two passes over a set that is not trained on give other rows.
        """
        budget = Budget()
        return self._with_sets({name: self._kept_set(name, loader, budget) for name, loader in self.sets().items()})

    def row_orders(self) -> dict[str, str]:
        """Return in which order the rows of each set come, in words."""
        return {name: row_order(loader) for name, loader in self.sets().items()}

    def __getstate__(self) -> dict[str, object]:
        """What a problem is; rows that were read are read again."""
        return {**vars(self), "_kept": {}}

    def _kept_set(self, name: str, loader: Loader, budget: Budget) -> Loader:
        given, kept = self._kept.get(name, (None, loader))
        if given is not loader:
            own_batches = self.recipe is not None and self.recipe.batch_size is None
            if name == "train":
                kept = loader if own_batches else kept_train(loader, self.layout)
            else:
                kept = kept_rows(name, loader, budget, self.layout)
            self._kept[name] = loader, kept
        return kept

    def _with_sets(self, sets: Mapping[str, Loader]) -> Problem:
        """The same problem with other loaders, by the names of `sets`."""
        changed = copy.copy(self)
        changed._kept = {}
        for name in _SPLITS:
            setattr(changed, name, sets[name])
        changed.ood = {name: sets[f"ood/{name}"] for name in self.ood}
        changed.shifts = {name: sets[f"shift/{name}"] for name in self.shifts}
        changed.band = sets.get("band")
        return changed

    def _check(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ModelError(
                "a torch.nn.Module", received=type(self.model).__name__, remedy="pass the network itself, not a path."
            )
        check_precision(self.prior_precision)
        check_trained_option(self.trained, has_recipe=self.recipe is not None)
        if not self.trains_model:
            check_trained(self.model)
        if isinstance(self.members, list):
            check_members(self.members, self.model)
        if self.dropout_model is not None:
            check_dropout_model(self.dropout_model)
        checks = LoaderChecks(structural_copy(self.model).eval(), self.likelihood)
        for name in _SPLITS:
            checks.check_split(name, getattr(self, name), scored=name != "train")
        checks.check_link()
        for name, loader in self.shifts.items():
            checks.check_shift(f"shift {name}", loader)
        for name, loader in self.ood.items():
            checks.check_queries(f"ood {name}", loader)
        if self.band is not None:
            check_band(checks.check_queries("band", self.band))
        self._layout = checks.layout


def _on_device(loader: Loader, device: str | torch.device) -> Loader:
    return loader.on(device) if isinstance(loader, (KeptRows, CheckedRows)) else _OnDevice(loader, device)


class _OnDevice:
    """A loader whose batches are moved to a device as they come."""

    def __init__(self, loader: Loader, device: str | torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Any]:
        for item in self.loader:
            yield moved(item, self.device)
