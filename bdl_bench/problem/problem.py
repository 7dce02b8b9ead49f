"""A problem: one network, its likelihood and its data, checked once and shared by all methods."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bdl_bench.problem.decision import Decision, check_decision
from bdl_bench.problem.kept_rows import Budget, CheckedRows, KeptRows, description_of_order, kept_rows, kept_train
from bdl_bench.problem.loader_checks import LoaderChecks
from bdl_bench.problem.queries import Loader, moved, rows
from estimators.baselines.dropout_layers import dropout_names
from estimators.errors import DataError, ModelError, OptionError
from estimators.likelihoods import Likelihood, resolve_likelihood
from estimators.models.checks import check_model
from estimators.models.structural_copy import structural_copy
from estimators.numerics.pytrees import ALL_ROWS, PyTree, RowLayout
from estimators.training.retraining import check_architecture

if TYPE_CHECKING:
    from estimators.training.training import Recipe

__all__ = ["ENSEMBLE_SIZE", "Loader", "Members", "Problem", "rows"]

ENSEMBLE_SIZE = 5
"""Networks in a deep ensemble, `model` among them; five as in Lakshminarayanan et al. (2017)."""
Members = Sequence[nn.Module] | Callable[[int], nn.Module]
_SPLITS = ("train", "validation", "test")


class Problem:
    """A trained network, its likelihood, and the data on which methods are fitted and compared.

    The network minimises L(θ) = Σₙ −log p(yₙ | f(xₙ; θ)) + ½ Σ δ θ².

    Args:
        model: the network, outputs (B, C). It is trained and in eval mode, unless a `recipe` says how to train it.
        likelihood: "regression", "classification", "binary", or an object such as `Gaussian(sigma_noise=0.5)`.
        train: re-iterable loader of (x, y), or of dicts with "labels". Every batch of every loader is checked when the
            problem is made.
        validation: loader of the rows for tuning. Its labels and those of `test` are hard: class indices, or 0 and 1.
        test: loader of the rows that are scored.
        prior_precision: δ > 0, a number or a mapping {glob of parameter names: number}.
        recipe: how the network is trained (`estimators.training.Recipe`), from its initial weights; None if it is
            trained already.
        trained: True: `model` is not trained, and the `recipe` serves only methods that train their own networks. None
            or False, with a recipe: `model` is trained, and the report says so.
        make_model: function that builds an untrained network, for methods that train several.
        members: trained networks with the architecture of `model` for the deep ensemble, whose first member is `model`
            itself: a list, or a function of 1, 2, 3, 4 that returns one, such as from a seed to a checkpoint.
        dropout_model: a trained network with dropout layers, in eval mode, for MC dropout; of any architecture.
        ood: loaders of out-of-distribution inputs by name: of (x, y) if targets are known and fit the likelihood, or of
            x alone, as a tensor, a dict, or [x].
        shifts: loaders of shifted (x, y) by name. Sets of a family are named "<family>-<severity>", severity 1 to 5.
        plot_grid: a loader of ascending inputs x (M, 1), with or without the noiseless y, at which the report draws the
            mean and a band of two standard deviations. It is not scored.
        pool: loader of (x, y) from which a decision labels rows; x is one tensor.
        decision: what the method decides: `ActiveLearning`, `BayesianOptimisation` or `Interventions`, each a loop of
            trainings with `make_model` and `recipe`. None: the method is fitted once.

    Raises:
        ModelError: for a network that cannot be used.
        DataError: for a batch that cannot be used.
        OptionError: for options that do not fit together.

    Example:
        >>> import torch
        >>> from bdl_bench import Problem
        >>> model = torch.nn.Linear(2, 1).eval()
        >>> rows = [(torch.randn(8, 2), torch.randn(8, 1))]
        >>> problem = Problem(model, "regression", rows, rows, rows, prior_precision=1.0)
        >>> problem.n_parameters
        3
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
        plot_grid: Loader | None = None,
        pool: Loader | None = None,
        decision: Decision | None = None,
    ) -> None:
        self.model = model
        self.likelihood = resolve_likelihood(likelihood)
        self.train, self.validation, self.test = train, validation, test
        self.prior_precision = prior_precision
        self.recipe, self.trained, self.make_model = recipe, trained, make_model
        self.members = list(members) if isinstance(members, Iterable) else members
        self.dropout_model = dropout_model
        self.ood, self.shifts, self.plot_grid = dict(ood or {}), dict(shifts or {}), plot_grid
        self.pool, self.decision = pool, decision
        self._kept: dict[str, tuple[Loader, Loader]] = {}
        self._layout = ALL_ROWS
        self._check()

    @property
    def n_parameters(self) -> int:
        """The number of parameters that require a gradient."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def layout(self) -> RowLayout:
        """Which tensors of the inputs have rows, observed over all sets when the problem is made."""
        return self._layout

    @property
    def trains_model(self) -> bool:
        """Whether the recipe trains `model`."""
        return self.recipe is not None and not self.trained

    @cached_property
    def trained_members(self) -> list[nn.Module] | None:
        """The trained networks of the ensemble other than `model`; None if the problem has none."""
        if self.members is None or isinstance(self.members, list):
            return self.members
        return [self.members(number) for number in range(1, ENSEMBLE_SIZE)]

    def sets(self) -> dict[str, Loader]:
        """Return every loader by its name in records: train, validation, test, ood/…, shift/…, plot_grid, pool."""
        return {
            **{name: getattr(self, name) for name in _SPLITS},
            **{f"ood/{name}": loader for name, loader in self.ood.items()},
            **{f"shift/{name}": loader for name, loader in self.shifts.items()},
            **({} if self.plot_grid is None else {"plot_grid": self.plot_grid}),
            **({} if self.pool is None else {"pool": self.pool}),
        }

    def on(self, device: str | torch.device) -> Problem:
        """Return the problem with its network and every batch on a device.

        Args:
            device: such as "cuda". The network is moved in place, batches as they are read.

        Returns:
            The problem on that device.
        """
        kept = (KeptRows, CheckedRows)
        sets = {n: s.on(device) if isinstance(s, kept) else _OnDevice(s, device) for n, s in self.sets().items()}
        problem = self._with_sets(sets)
        problem.model = self.model.to(device)
        problem.dropout_model = None if self.dropout_model is None else self.dropout_model.to(device)
        return problem

    def kept(self) -> Problem:
        """Return the problem with every set read once and its rows stored, so that all passes have the same order.

        Training rows are stored if the recipe regroups them; with the loader's own batches (`batch_size=None`) they are
        not. Sets are read at the first call and then reused.

        Returns:
            The problem with stored rows.

        Raises:
            DataError: for an item that is not a batch; it names the set and the batch.
            NonDeterministicError: if two passes over a set that is not trained on differ in their rows.
        """
        budget = Budget()
        return self._with_sets({name: self._kept_set(name, loader, budget) for name, loader in self.sets().items()})

    def without_decision(self, model: nn.Module, train: Loader) -> Problem:
        """Return the problem with another trained network and other training rows, without pool and decision.

        Args:
            model: the network, trained on the rows, in eval mode.
            train: a loader of the rows.

        Returns:
            The problem. Its other rows are those of this problem.
        """
        changed = self._with_sets({**self.sets(), "train": train})
        changed.model, changed.pool, changed.decision = model, None, None
        return changed

    def order_descriptions(self) -> dict[str, str]:
        """Return the order of the rows in words, by set."""
        return {name: description_of_order(loader) for name, loader in self.sets().items()}

    def __getstate__(self) -> dict[str, object]:
        """Return the state without stored rows, which are read again."""
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
        """Return the problem with other loaders, by the names of `sets`."""
        changed = copy.copy(self)
        changed._kept = {}
        for name in _SPLITS:
            setattr(changed, name, sets[name])
        changed.ood = {name: sets[f"ood/{name}"] for name in self.ood}
        changed.shifts = {name: sets[f"shift/{name}"] for name in self.shifts}
        changed.plot_grid, changed.pool = sets.get("plot_grid"), sets.get("pool")
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
        if self.plot_grid is not None:
            check_plot_grid(checks.check_queries("plot_grid", self.plot_grid))
        if self.pool is not None:
            checks.check_split("pool", self.pool, scored=True)
        self._layout = checks.layout
        self._check_decision()

    def _check_decision(self) -> None:
        if self.decision is None:
            if self.pool is not None:
                raise OptionError("a decision for the pool", received="a pool alone", remedy="pass decision=, too.")
            return
        own = [name for name in ("members", "dropout_model") if getattr(self, name) is not None]
        if self.recipe is None or self.make_model is None or own:
            raise OptionError(
                "make_model and recipe for a decision, whose loop trains networks, and no members or dropout_model",
                received=f"a problem with {' and '.join(own)}" if own else "a problem without one of them",
                remedy="pass make_model= and recipe= to Problem, and no trained networks of your own.",
            )
        counts = [None if loader is None else count_rows(loader) for loader in (self.train, self.pool)]
        assert counts[0] is not None
        check_decision(self.decision, self.likelihood.kind, n_train=counts[0], n_pool=counts[1])


class _OnDevice:
    """A loader whose batches are moved to a device as they are read."""

    def __init__(self, loader: Loader, device: str | torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Any]:
        for item in self.loader:
            yield moved(item, self.device)


def count_rows(loader: Loader) -> int:
    """Return the number of rows of a loader. Raises DataError for inputs that are not one tensor."""
    n = 0
    for batch in rows(loader):
        if not isinstance(batch.x, Tensor):
            raise DataError(
                "inputs that are one tensor, since a decision selects rows",
                received=f"a {type(batch.x).__name__}",
                remedy="one tensor x (B, ...), or no decision.",
            )
        n += len(batch.x)
    return n


def check_precision(value: float | Mapping[str, float]) -> None:
    """Check that δ is finite, not negative, and positive for some parameters. Raises OptionError."""
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    plain = all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in numbers)
    if not numbers or not plain or not any(v > 0 for v in numbers):
        raise OptionError(
            "prior_precision > 0, a number or a mapping {glob of parameter names: number >= 0}",
            received=repr(value),
            remedy="δ of the sum convention; from weight decay wd on a mean cross-entropy over N rows it is N·wd.",
        )


def check_trained(model: nn.Module) -> None:
    """Check that a network without a recipe is in eval mode and finite. Raises ModelError."""
    if model.training:
        raise ModelError(
            "a trained network in eval mode, since no recipe trains it",
            received="a network in train mode",
            remedy="call model.eval(), or pass recipe=Recipe(...) (without trained=True) to have it trained.",
        )
    check_model(model)


def check_trained_option(trained: bool | None, *, has_recipe: bool) -> None:
    """Check that a network that is not trained has a recipe. Raises OptionError."""
    if trained is False and not has_recipe:
        raise OptionError(
            "a recipe for a network that is not trained",
            received="trained=False without one",
            remedy="recipe=Recipe(...), or omit trained.",
        )


def check_members(members: Sequence[nn.Module], model: nn.Module) -> None:
    """Check that members are trained networks with the architecture of the model. Raises ModelError."""
    for index, member in enumerate(members):
        if not isinstance(member, nn.Module):
            raise ModelError(
                "members that are torch.nn.Modules",
                received=f"a {type(member).__name__} as members[{index}]",
                remedy="load the networks first, or pass a function that does.",
            )
        check_trained(member)
        check_architecture(member, model, what=f"members[{index}] with")


def check_dropout_model(model: nn.Module) -> None:
    """Check that a network is trained and has dropout layers. Raises ModelError."""
    if not isinstance(model, nn.Module) or not dropout_names(model):
        raise ModelError(
            "a dropout_model with layers nn.Dropout of p > 0",
            received=f"a {type(model).__name__} without",
            remedy="omit dropout_model; with make_model and recipe a network with dropout is trained.",
        )
    check_trained(model)


def check_plot_grid(batches: list[PyTree]) -> None:
    """Check that the inputs of a plot grid have one column and ascend over all batches. Raises DataError."""
    one_column = all(isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == 1 for x in batches)
    if not one_column or bool((torch.cat(batches).diff(dim=0) < 0).any()):
        x = batches[0]
        raise DataError(
            "a plot_grid of ascending inputs, x (M, 1)",
            received=f"x of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}",
            remedy="torch.linspace(...).unsqueeze(1), or no plot_grid if inputs have several columns.",
        )
