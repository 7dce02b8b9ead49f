"""Spectral-normalised neural Gaussian process: a distance-preserving body and a last layer of random features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from estimators.baselines.sngp_layers import RandomFeatures, bound_layers, replace_layer, unbound_layers
from estimators.curvature.last_layer.features import LastLayer
from estimators.errors import OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods import Likelihood
from estimators.models.functionals import ComposedNetwork, Functional, variance_by_covariance
from estimators.models.outputs import output_tensor
from estimators.models.structural_copy import structural_copy
from estimators.numerics.dtype import to_algebra_dtype
from estimators.numerics.pytrees import PyTree, copied, forward_arguments, n_rows
from estimators.objective.objective import Objective
from estimators.option_checks import checked_instance, checked_integer, checked_number, checked_seed, shown
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory
from estimators.runtime.rng import member_seeds
from estimators.training.recipe import Recipe
from estimators.training.retraining import MakeModel, Retraining, checked_make_model, tensors_by_name
from estimators.variational.vbll import LastLayerGaussian

__all__ = ["SNGP"]


class SNGP(UncertaintyEstimator):
    """Spectral-normalised neural Gaussian process (Liu et al. 2020), trained anew.

        f_c(x) = β_cᵀ Φ(h(x)),   Φ(h) = √(2/D) cos(Ω h + b),   ‖W_l‖ <= norm_bound in every layer of h
        β_c ~ N(β̂_c, P_c⁻¹),   P_c = δ + Σₙ Λₙ,cc Φₙ Φₙᵀ        variance(x) = Φᵀ P_c⁻¹ Φ

    h is a network of the architecture of `model` without its last linear layer, whose norm is bounded so that distances
    are kept (section 3.2). The last layer becomes a Gaussian process approximated by D random features (section 3.1).
    All is trained by the recipe to the maximum a posteriori at δ; then the Laplace approximation of β is computed with
    one pass over the rows (algorithm 1; in regression Λ = 1/σ²). Far from the data the variance returns to that
    of the prior, 1/δ.

    Three things differ from the paper: β has the prior of all weights, N(0, 1/δ), and not N(0, 1); P is the sum over
    all rows instead of a moving average; and a convolution is bounded as a matrix of output channels by all else. The
    last layer has no bias, as in the paper. The bound makes h distance-preserving only in networks with residual
    connections; in others it bounds how fast the outputs change.

    Args:
        model: the trained network, in eval mode, which says how the new one is built; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0, in 1/weight²: a number.
        make_model: builds a new network of the architecture of `model`.
        recipe: how to train it.
        n_features: D.
        lengthscale: ℓ of the kernel of h, in units of h; "auto": √E for E inputs of the last layer, which are of
            order 1.
        norm_bound: the largest norm of a layer of h; None for no bound.
        seed: the seed of the random features, the initialisation and the order of rows.

    Attributes:
        posterior_: the Gaussian over β: its mean (C, D) and precisions P (C, D, D).
        trained_: the tensors of h and of its random features by name.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option. `fit` raises NoLastLayerError if the network does not end in a linear layer,
            UnsupportedError if the layer is used at several positions of a row, and ModelError if `make_model` builds
            another architecture.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators.training import Recipe
        >>> def network():
        ...     return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> sngp = SNGP(network(), "classification", make_model=network, recipe=Recipe(epochs=2), n_features=64)
        >>> sngp = sngp.fit([(torch.randn(20, 3), torch.randint(0, 2, (20,)))])
        >>> sngp.variance(torch.randn(4, 3)).shape
        torch.Size([4, 2])
    """

    retrains = True
    uses_prior_precision = True

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        make_model: MakeModel,
        recipe: Recipe,
        prior_precision: float = 1.0,
        n_features: int = 512,
        lengthscale: float | str = "auto",
        norm_bound: float | None = 0.95,
        seed: int = 0,
    ) -> None:
        super().__init__(model, likelihood, prior_precision=prior_precision)
        if not isinstance(self.prior_precision, (int, float)) or self.prior_precision <= 0:
            raise OptionError(
                "prior_precision, one positive number: the new network has other parameters than the model",
                received=shown(prior_precision),
                remedy="a number > 0.",
            )
        self.make_model = checked_make_model(make_model)
        self.recipe = checked_instance("recipe", recipe, Recipe, remedy="Recipe().")
        self.n_features = checked_integer("n_features", n_features, at_least=1)
        remedy = '"auto", or a positive number.'
        self.lengthscale = checked_number("lengthscale", lengthscale, above=0, words=("auto",), remedy=remedy)
        self.norm_bound = checked_number("norm_bound", norm_bound, above=0, words=(None,), remedy="0.95, or None.")
        self.seed = checked_seed(seed)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        first = next(iter(objective.batches)).x
        name = LastLayer.of(objective.network, first).layer.name
        outputs, d = objective.network.outputs(first).shape[1], self.n_features
        check_fits_memory(
            f"the precisions of {outputs} outputs with {d} features",
            4 * 8 * outputs * d**2,
            device=objective.theta.device,
            remedy="a smaller n_features.",
        )
        assert self.make_model is not None
        retraining = Retraining(
            self.make_model, self.recipe, self.prior_precision, lambda model: self._converted(model, name)
        )
        trained = retraining.run(objective, member_seeds(self.seed, 1)[0], others=[], progress_bar=progress_bar)
        head = trained.get_submodule(name)
        assert isinstance(head, nn.Sequential)
        features, last = head
        assert isinstance(last, nn.Linear)
        trained = replace_layer(trained, name, features)
        unbound_layers(trained)
        self._set_network(objective, name, tensors_by_name(trained))
        beta = to_algebra_dtype(last.weight.detach())
        self.posterior_ = LastLayerGaussian(beta, self._precision(objective, beta))

    def _converted(self, model: nn.Module, name: str) -> nn.Module:
        """Return a new network with bounded layers and random features before its last layer."""
        last = model.get_submodule(name)
        assert isinstance(last, nn.Linear)
        like, seed = last.weight, member_seeds(self.seed, 2)[1]
        output = nn.Linear(self.n_features, last.out_features, bias=False)
        features = self._features_of(last, seed)
        model = replace_layer(model, name, nn.Identity())
        if self.norm_bound is not None:
            bound_layers(model, self.norm_bound)
        return replace_layer(model, name, nn.Sequential(features, output).to(like))

    def _features_of(self, last: nn.Linear, seed: int) -> RandomFeatures:
        n = last.in_features
        lengthscale = math.sqrt(n) if isinstance(self.lengthscale, str) else self.lengthscale
        return RandomFeatures(n, self.n_features, lengthscale=lengthscale, seed=seed)

    def _set_network(self, objective: Objective, name: str, trained: dict[str, Tensor]) -> None:
        module = structural_copy(objective.network.module)
        last = module.get_submodule(name)
        assert isinstance(last, nn.Linear)
        self._module = replace_layer(module, name, self._features_of(last, 0)).eval()
        self._name, self.trained_, self._pass_counter = name, trained, objective.network.pass_counter

    def _precision(self, objective: Objective, beta: Tensor) -> Tensor:
        """Return P (C, D, D)."""
        c, d = beta.shape
        assert isinstance(self.prior_precision, (int, float))
        total = self.prior_precision * torch.eye(d, dtype=beta.dtype, device=beta.device).repeat(c, 1, 1)
        for batch in objective.batches:
            features = self._features(batch.x)
            curvature = objective.likelihood.given(batch.y).hessian_diagonal(features @ beta.T)
            for k in range(c):
                total[k] += features.T @ (curvature[:, k, None] * features)
        return total

    def _features(self, x: PyTree) -> Tensor:
        """Return Φ (M, D) in float64."""
        arguments, keywords = forward_arguments(copied(x))
        self._pass_counter.forward(n_rows(x))
        with torch.no_grad():
            made = torch.func.functional_call(self._module, self.trained_, arguments, keywords)
        features = output_tensor(made)
        if features.ndim != 2:
            raise UnsupportedError(
                "features of shape (B, D) before the last layer",
                received=f"{features.ndim} dimensions",
                remedy="a network whose last layer is used once per row.",
            )
        return to_algebra_dtype(features)

    def _get_fit_state(self) -> Learned:
        gaussian = {"beta": self.posterior_.mean, "precision": self.posterior_.precision}
        return {**gaussian, **{f"trained/{name}": t for name, t in self.trained_.items()}}, {"last_layer": self._name}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        prefix = "trained/"
        trained = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        self._set_network(objective, learned["last_layer"], trained)
        self.posterior_ = LastLayerGaussian(tensors["beta"], tensors["precision"])

    def _mean(self, x: PyTree) -> Tensor:
        return self._to_output_dtype(self._features(x) @ self.posterior_.mean.T)

    def _variance(self, x: PyTree) -> Tensor:
        return self.posterior_.variance(self._features(x))

    def _covariance(self, x: PyTree) -> Tensor:
        return torch.diag_embed(self._variance(x))  # independent outputs

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        slopes = ComposedNetwork(self.network_, of).function_jacobian(x, at=self._mean(x))
        return variance_by_covariance(slopes, self._covariance(x))

    def _joint_covariance(self, x: PyTree, f: Tensor) -> Tensor:  # noqa: ARG002
        blocks = self.posterior_.between_rows(self._features(x))  # (C, M, M)
        return torch.diag_embed(blocks.permute(1, 2, 0)).permute(0, 2, 1, 3)

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        weights = self.posterior_.mean + self.posterior_.noise(n_samples, generator)
        return torch.einsum("scd,md->smc", weights, self._features(x))
