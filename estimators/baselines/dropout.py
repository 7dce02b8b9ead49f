"""MC dropout: the networks that dropout trains together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from estimators.baselines.dropout_layers import FixedDropout, dropout_names, with_dropout, with_fixed_dropout
from estimators.baselines.members import MembersEstimator
from estimators.baselines.retraining import MakeModel, Retraining, checked_make_model, tensors_by_name
from estimators.errors import OptionError
from estimators.estimator.fit_report import PassReport
from estimators.likelihoods import Likelihood
from estimators.models.network import Network, structural_copy
from estimators.numerics.pytrees import PyTree, n_rows
from estimators.objective.objective import Objective
from estimators.option_checks import checked_instance, checked_integer, checked_number, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.rng import member_seeds
from estimators.training.recipe import Recipe

__all__ = ["MCDropout"]


class MCDropout(MembersEstimator):
    """The network with its dropout layers switched on at prediction (Gal & Ghahramani 2016).

        f_s = the network at the s-th mask, s = 1 ... S

    The S masks are drawn once, by `seed`: a member has one mask a layer, the same for every row and every call, as a
    draw of weights from the paper's variational posterior has. So the variance of a row does not depend on the rows
    beside it.

    A model with dropout layers (nn.Dropout and its kin, p > 0) is used as it is, and nothing is trained. For one
    without, `rate`, `make_model` and `recipe` train a network of the same architecture with dropout before every
    nn.Linear, except where that is the first layer with weights, so that no input is dropped. Dropout that is no layer
    (within nn.MultiheadAttention, between the layers of nn.LSTM) stays off; batch statistics stay frozen.

    Args:
        rate: p of the layers to insert, in (0, 1); None for a model that has its own.
        make_model: builds a fresh network of the architecture of `model`, without dropout.
        recipe: how it is trained.
        n_samples: S >= 2.
        seed: of the masks, and of the training.

    Fitted: `trained_`, the tensors of the network that was trained, by name, or None; `fit_report_`.
    Errors: OptionError where the arguments and the model's layers do not go together; ModelError where there is no
    layer to insert dropout before; UnsupportedError at a query where rows are not in front of a layer's inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: float | Mapping[str, float] = 1.0,
        rate: float | None = None,
        make_model: MakeModel | None = None,
        recipe: Recipe | None = None,
        n_samples: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(model, likelihood, prior_precision=prior_precision)
        self.n_samples, self.seed = checked_integer("n_samples", n_samples, at_least=2), checked_seed(seed)
        self.rate = checked_number("rate", rate, above=0, below=1, words=(None,), remedy="0.1.")
        self.make_model = None if make_model is None else checked_make_model(make_model)
        self.recipe = recipe if recipe is None else checked_instance("recipe", recipe, Recipe, remedy="Recipe().")
        self._check_options()

    @property
    def retrains(self) -> bool:  # type: ignore[override]
        """Whether a fit trains a network."""
        return self.rate is not None

    def _check_options(self) -> None:
        found, given = dropout_names(self.model), (self.rate, self.make_model, self.recipe)
        if found and any(value is not None for value in given):
            raise OptionError(
                f"no rate, make_model or recipe for a model with dropout layers, {found[:4]}, which is used as it is",
                received=f"rate={self.rate}",
                remedy="leave them out, or pass a model without dropout layers.",
            )
        if not found and any(value is None for value in given):
            raise OptionError(
                "a model with dropout layers, or rate, make_model and recipe to train one with",
                received=f"none with p > 0, and rate={self.rate}, make_model={self.make_model}, recipe={self.recipe}",
                remedy="MCDropout(..., rate=0.1, make_model=lambda: MyNetwork(...), recipe=Recipe(...)).",
            )

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        trained = None if self.rate is None else tensors_by_name(self._train(objective, progress_bar=progress_bar))
        self._hold(objective, trained)
        self.fit_report_ = PassReport.of(objective)

    def _train(self, objective: Objective, *, progress_bar: bool) -> nn.Module:
        assert self.make_model is not None
        assert self.recipe is not None
        make = self.make_model
        retraining = Retraining(lambda: self._dropping(make()), self.recipe, self.prior_precision)
        (seed,) = member_seeds(self.seed, 1)
        return retraining.run(objective, seed, others=[], progress_bar=progress_bar)

    def _dropping(self, model: nn.Module) -> nn.Module:
        """The model itself, with dropout layers."""
        return model if self.rate is None else with_dropout(model, self.rate)

    def _hold(self, objective: Objective, trained: dict[str, Tensor] | None) -> None:
        self.trained_ = trained
        module = with_fixed_dropout(self._dropping(structural_copy(self.model)))
        self._fixed = Network(module, list(objective.network.subset.shapes))

    def _get_fit_state(self) -> Learned:
        return dict(self.trained_ or {}), super()._get_fit_state()[1]

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        super()._set_fit_state(objective, tensors, learned)
        self._hold(objective, tensors or None)

    def _members(self, x: PyTree) -> Tensor:
        network = self._fixed
        params = network.params if self.trained_ is None else self.trained_
        layers = [module for module in network.module.modules() if isinstance(module, FixedDropout)]
        outputs = []
        for seed in member_seeds(self.seed, self.n_samples):
            for layer, of_layer in zip(layers, member_seeds(seed, len(layers)), strict=True):
                layer.draw(of_layer, n_rows(x))
            with torch.no_grad():
                outputs.append(network.functional_outputs(params, x))
        return torch.stack(outputs)
