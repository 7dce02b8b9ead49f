"""MC dropout: a posterior of networks with fixed dropout masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from estimators.baselines.dropout_layers import FixedDropout, dropout_names, with_dropout, with_fixed_dropout
from estimators.baselines.other_randomness import check_other_randomness
from estimators.errors import OptionError
from estimators.estimator.members import MembersEstimator
from estimators.likelihoods import Likelihood
from estimators.models.network import Network
from estimators.models.structural_copy import structural_copy
from estimators.numerics.pytrees import PyTree, n_rows
from estimators.objective.objective import Objective
from estimators.option_checks import PriorOption, checked_instance, checked_integer, checked_number, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.rng import member_seeds
from estimators.training.recipe import Recipe
from estimators.training.retraining import MakeModel, Retraining, checked_make_model, tensors_by_name

__all__ = ["MCDropout"]


class MCDropout(MembersEstimator):
    """The network with its dropout layers active at prediction (Gal and Ghahramani 2016, section 4).

        f_s = the network with the s-th mask, s = 1 ... S

    The S masks are drawn once from `seed`. A member has one mask per layer, the same for every row and every call, like
    a sample of the weights from the paper's variational posterior. The variance of a row therefore does not depend on
    the other rows.

    A model with dropout layers (nn.Dropout and its variants, p > 0) is used without training. For a model without them,
    `rate`, `make_model` and `recipe` train a network of the same architecture. It has dropout before every nn.Linear
    but the first layer with weights, so that no input is dropped. Dropout inside nn.MultiheadAttention,
    F.scaled_dot_product_attention and nn.LSTM stays off; batch statistics stay frozen. `fit` rejects a model that is
    random in train mode by other means, such as F.dropout in its forward or stochastic depth, since these would stay
    off too. For Hugging Face models it needs `attn_implementation="sdpa"`: "eager" attention calls F.dropout. `fit`
    warns with RandomnessNotCheckedWarning if the forward fails in train mode, also with the labels.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        rate: p of the inserted layers, in (0, 1); None for a model with dropout layers.
        make_model: builds a new network of the architecture of `model`, without dropout.
        recipe: how to train the new network.
        n_samples: the number S >= 2 of masks.
        seed: the seed of the masks and of the training.

    Attributes:
        trained_: the tensors of the trained network by name, or None.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: if the options do not suit the model's layers. `fit` raises UnsupportedError if there is no layer
            to insert dropout before, or if the model is random in train mode outside of its dropout layers; a query
            raises it if a layer's inputs do not have the rows first.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 2)).eval()
        >>> dropout = MCDropout(model, "regression", n_samples=10)
        >>> dropout.fit([(torch.randn(8, 3), torch.randn(8, 2))]).member_outputs(torch.randn(4, 3)).shape
        torch.Size([10, 4, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: PriorOption = 1.0,
        rate: float | None = None,
        make_model: MakeModel | None = None,
        recipe: Recipe | None = None,
        n_samples: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(model, likelihood, prior_precision=prior_precision)
        self.n_samples, self.seed = checked_integer("n_samples", n_samples, at_least=2), checked_seed(seed)
        self.rate = checked_number("rate", rate, above=0, below=1, words=(None,), remedy="0.1.")
        self.make_model = checked_make_model(make_model)
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
        network = Network(self.model, list(objective.network.subset.shapes))
        network = network.counted_by(objective.network.pass_counter)
        check_other_randomness(network, next(iter(objective.batches)))
        trained = None if self.rate is None else tensors_by_name(self._train(objective, progress_bar=progress_bar))
        self._set_network(objective, trained)

    def _train(self, objective: Objective, *, progress_bar: bool) -> nn.Module:
        assert self.make_model is not None
        assert self.recipe is not None
        make = self.make_model
        retraining = Retraining(lambda: self._with_dropout(make()), self.recipe, self.prior_precision)
        (seed,) = member_seeds(self.seed, 1)
        return retraining.run(objective, seed, others=[], progress_bar=progress_bar)

    def _with_dropout(self, model: nn.Module) -> nn.Module:
        """Return the model itself, with dropout layers inserted if it needs them."""
        return model if self.rate is None else with_dropout(model, self.rate)

    def _set_network(self, objective: Objective, trained: dict[str, Tensor] | None) -> None:
        self.trained_ = trained
        module = with_fixed_dropout(self._with_dropout(structural_copy(self.model)))
        self._fixed = Network(module, list(objective.network.subset.shapes))

    def _get_fit_state(self) -> Learned:
        return dict(self.trained_ or {}), {}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        self._set_network(objective, tensors or None)

    def _members(self, x: PyTree) -> Tensor:
        network = self._fixed
        params = network.params if self.trained_ is None else self.trained_
        layers = [module for module in network.module.modules() if isinstance(module, FixedDropout)]
        outputs = []
        for seed in member_seeds(self.seed, self.n_samples):
            for layer, layer_seed in zip(layers, member_seeds(seed, len(layers)), strict=True):
                layer.draw(layer_seed, n_rows(x))
            with torch.no_grad():
                outputs.append(network.functional_outputs(params, x))
        return torch.stack(outputs)
