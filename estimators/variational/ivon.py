"""IVON: mean-field variational inference as an adaptive optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from estimators.errors import ConvergenceError, OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.numerics.reductions import is_finite
from estimators.objective.objective import Objective
from estimators.objective.recorded_gradients import BatchGradients
from estimators.option_checks import checked_integer, checked_number, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.progress import track
from estimators.training.epoch_sizes import EpochSizes
from estimators.training.recipe import Recipe
from estimators.training.training import epoch
from estimators.variational.mean_field import MeanFieldEstimator, checked_recipe

__all__ = ["IVON", "IVONState", "ivon_step"]

DEFAULT_RECIPE = Recipe(epochs=200, batch_size=64, optimizer="sgd", lr=0.1)
"""The learning rate is that of the paper's experiments."""
_MOST_REDUCTIONS, _REDUCTION = 4, 0.25
"""How often the learning rate is reduced, and by which factor, if the optimisation diverges.

The variances of IVON are those of single weights. If weights are strongly correlated, as in small regressions with
little noise, the curvature in these units exceeds 2/lr, and the mean leaves the data without becoming infinite.
"""
_EXCESS_PER_WEIGHT = 1.0
"""Nats per weight by which L at the mean may exceed L at the trained weights. A sample of the posterior itself is half
a nat per weight above the minimum."""


@dataclass
class IVONState:
    """The state of the optimizer, all (P,), in units of the sum L over the N rows.

    Attributes:
        mean: m.
        hessian: h, an estimate of the diagonal Hessian of the data term, averaged over q.
        momentum: g, the moving average of gradients.
        step: t, the number of steps so far.
    """

    mean: Tensor
    hessian: Tensor
    momentum: Tensor
    step: int = 0

    def variance(self, precision: Tensor) -> Tensor:
        """Return σ² = 1/(h + δ)."""
        return 1 / (self.hessian + precision)


def ivon_step(
    state: IVONState,
    slopes: Tensor,
    noise: Tensor,
    precision: Tensor,
    prior_mean: Tensor,
    *,
    lr: float,
    momentum: float,
    hessian_momentum: float,
) -> None:
    """Take one step of IVON in place (Shen et al. 2024, Algorithm 1, lines 4 to 10).

    The paper's h, g and δ are those of the mean loss L/N; here they are of the sum, N times as large, and so is the
    prior precision. The steps of m are equal: (N g)/(N h + N δ).

    Args:
        state: the state.
        slopes: gradients of the data term of the sum at θ_k = m + σ ε_k, (K, P), unbiased.
        noise: ε_k, (K, P).
        precision: δ, (P,).
        prior_mean: θ₀, (P,).
        lr: the learning rate α.
        momentum: β₁ in [0, 1).
        hessian_momentum: β₂ in (0, 1).
    """
    h, b2 = state.hessian, hessian_momentum
    std = state.variance(precision).sqrt()
    found = (slopes * noise).mean(0) / std  # ĥ = ĝ (θ − m)/σ², whose mean is the diagonal of E_q[∇²] (Stein)
    state.step += 1
    state.momentum = momentum * state.momentum + (1 - momentum) * slopes.mean(0)
    # The quadratic term makes the step a retraction: h + δ stays positive (Lin et al. 2020).
    state.hessian = b2 * h + (1 - b2) * found + 0.5 * (1 - b2) ** 2 * (h - found).square() / (h + precision)
    unbiased = state.momentum / (1 - momentum**state.step)
    pull = precision * (state.mean - prior_mean)
    state.mean = state.mean - lr * (unbiased + pull) / (state.hessian + precision)


class IVON(MeanFieldEstimator):
    """Improved variational online Newton (Shen et al. 2024, Algorithm 1): mean-field VI at the cost of Adam.

        q(θ) = N(m, 1/(h + δ)),   h ← moving average of ĝ ε √(h + δ),   m ← m − α (g + δ(m − θ₀))/(h + δ)

    The gradient ĝ is taken at a sample θ = m + σ ε, and ĝ ε/σ estimates the diagonal Hessian without second
    derivatives. On a quadratic loss, q converges to the mean-field optimum, with the precision diag(H) + δ. The ELBO is
    that of `MeanFieldVI`; only the optimizer differs. h starts at `initial_hessian`, and m at the trained weights.
    There is no clipping of the gradient, and the effective sample size of the paper is N. If L at the mean ends more
    than one nat per weight above L at the trained weights, or is not finite, the optimisation has diverged, and starts
    again with a quarter of the learning rate, four times at most.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        recipe: epochs, batch size, learning rate, its schedule, and β₁ as the momentum. Its optimizer must be "sgd",
            and its average 0.
        hessian_momentum: β₂ in (0, 1), near 1.
        initial_hessian: h₀ > 0 of the mean loss L/N, in 1/weight²; small values begin with a wide posterior.
        n_gradient_samples: samples ε per step.
        n_samples: the number S >= 2 of networks in predictions.
        seed: the seed of the order of the rows and of all samples.

    Attributes:
        mean_: m (P,), in the order of `weight_names_`.
        std_: σ (P,).
        elbo_: the evidence lower bound in nats.
        elbo_standard_error_: its Monte-Carlo standard error.
        lr_: the learning rate with which the optimisation converged.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option; `fit` raises it for a δ of 0. `fit` raises ConvergenceError if the
            optimisation diverges at every learning rate.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators.training import Recipe
        >>> ivon = IVON(nn.Linear(3, 2), "regression", recipe=Recipe(epochs=50, optimizer="sgd", lr=0.1), n_samples=10)
        >>> ivon = ivon.fit([(torch.randn(8, 3), torch.randn(8, 2))])
        >>> ivon.std_.shape, ivon.variance(torch.randn(4, 3)).shape
        (torch.Size([8]), torch.Size([4, 2]))
    """

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        recipe: Recipe = DEFAULT_RECIPE,
        hessian_momentum: float = 0.995,
        initial_hessian: float = 1.0,
        n_gradient_samples: int = 1,
        n_samples: int = 100,
        seed: int = 0,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **common)
        self.recipe = _checked_recipe(recipe)
        remedy = "0.995."
        self.hessian_momentum = checked_number("hessian_momentum", hessian_momentum, above=0, below=1, remedy=remedy)
        self.initial_hessian = checked_number("initial_hessian", initial_hessian, above=0, remedy="1.0.")
        self.n_gradient_samples = checked_integer("n_gradient_samples", n_gradient_samples, at_least=1)
        self.n_samples, self.seed = checked_integer("n_samples", n_samples, at_least=2), checked_seed(seed)

    def _optimise(self, gradients: BatchGradients, *, progress_bar: bool) -> tuple[Tensor, Tensor]:
        objective = gradients.objective
        recipe = self.recipe.resolve(objective.batches.n_data)
        lr = float(recipe.lr)
        limit = float(objective.loss(objective.theta)) + _EXCESS_PER_WEIGHT * objective.theta.numel()
        for _ in range(_MOST_REDUCTIONS + 1):
            state = self._run(gradients, replace(recipe, lr=lr), progress_bar=progress_bar)
            if state is not None and float(objective.loss(state.mean)) <= limit:
                self.lr_ = lr
                return state.mean, state.variance(objective.prior.precision).sqrt()
            lr *= _REDUCTION
        raise ConvergenceError(
            "an optimisation whose mean predicts the training rows about as well as the trained weights",
            received=f"one that diverges with lr={self.recipe.lr:g} and down to {lr / _REDUCTION:.2g}",
            remedy="a smaller lr, a larger initial_hessian, or MeanFieldVI.",
        )

    def _run(self, gradients: BatchGradients, recipe: Recipe, *, progress_bar: bool) -> IVONState | None:
        """Return the state after all epochs, or None once it is not finite."""
        objective = gradients.objective
        theta, prior, n_data = objective.theta, objective.prior, objective.batches.n_data
        assert not isinstance(recipe.epochs, str)
        initial = torch.full_like(theta, self.initial_hessian * n_data)
        state = IVONState(theta.clone(), initial, torch.zeros_like(theta))
        generator = torch.Generator().manual_seed(self.seed)
        betas = {"momentum": recipe.momentum, "hessian_momentum": self.hessian_momentum}
        n_batches = EpochSizes.of(objective.batches, recipe).n_batches
        rows = 0
        for _ in track(range(recipe.epochs), "epochs", shown=progress_bar):
            for batch in epoch(objective.batches, recipe, generator, even=True):
                noise = torch.randn(self.n_gradient_samples, len(theta), generator=generator, dtype=theta.dtype)
                noise = noise.to(theta.device)
                thetas = state.mean + state.variance(prior.precision).sqrt() * noise
                slopes = n_batches * gradients(thetas, batch)[1]  # not N/B: rows of a short batch weigh as others do
                lr = recipe.learning_rate(rows / (recipe.epochs * n_data))
                ivon_step(state, slopes, noise, prior.precision, prior.mean, lr=lr, **betas)
                rows += len(batch)
            if not (is_finite(state.mean) and is_finite(state.hessian)):
                return None
        return state

    def _get_fit_state(self) -> Learned:
        tensors, learned = super()._get_fit_state()
        return tensors, {**learned, "lr": self.lr_}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        super()._set_fit_state(objective, tensors, learned)
        self.lr_ = learned["lr"]


def _checked_recipe(recipe: Recipe) -> Recipe:
    checked_recipe(recipe, DEFAULT_RECIPE)
    if recipe.optimizer != "sgd" or recipe.average or recipe.micro_batch_size is not None:
        raise OptionError(
            'a recipe with optimizer="sgd", average=0 and micro_batch_size=None, since IVON is the optimizer',
            received=repr(recipe),
            remedy=f"{DEFAULT_RECIPE}.",
        )
    return recipe
