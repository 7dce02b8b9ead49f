"""Mean-field variational inference: a Gaussian with independent weights that maximises the ELBO."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from estimators.data.batch import Batch
from estimators.errors import ConvergenceError, NotConvergedWarning, OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.members import WeightMembersEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.numerics.reductions import is_finite
from estimators.objective.objective import Objective, Prior
from estimators.objective.over_copies import data_gradients
from estimators.objective.recorded_gradients import BatchGradients, RecordingMismatchError
from estimators.option_checks import checked_instance, checked_integer, checked_number, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.rng import member_seeds
from estimators.training.epoch_sizes import EpochSizes
from estimators.training.recipe import Recipe
from estimators.training.training import fit_weights

__all__ = ["MeanFieldEstimator", "MeanFieldVI", "kl_divergence"]

DEFAULT_RECIPE = Recipe(epochs="auto", batch_size=64, lr=1e-2)
"""Adam with a cosine schedule. Its rate takes a standard deviation from 0.01 to 1 in about 1000 steps."""
_MIN_EPOCHS, _MIN_STEPS = 200, 2000
"""Lower bounds of epochs="auto". After 1000 steps, the variances of networks of 50 units were still 30 to 40 % below
their optimum on average."""
_ELBO_SAMPLES = 20
"""Posterior samples of the expected log-likelihood in the ELBO: a third of a pass each."""
_CHECK_PAIRS = 8
"""Pairs of samples of the gradient in log s after training: two passes each."""
_LARGEST_GRADIENT = 0.5
"""|mean ∂(−ELBO)/∂log s| above which a fit has not converged: −½ is the gradient at half the optimal variance of every
weight. Fits with the default recipe, on data sets of 64 rows and more, are below by at least two standard errors."""


class MeanFieldEstimator(WeightMembersEstimator):
    """A Gaussian posterior q(θ) = N(m, diag s²) with independent weights; predictions average networks θ_s ~ q.

    Subclasses implement `_optimise`.

    Attributes:
        mean_: m (P,), in the order of `weight_names_`.
        std_: s (P,).
        elbo_: the evidence lower bound E_q[log p(D | θ)] − KL(q ‖ p) in nats, a lower bound of log p(D).
        elbo_standard_error_: the Monte-Carlo standard error of `elbo_`.
    """

    n_samples: int
    seed: int

    @abstractmethod
    def _optimise(self, gradients: BatchGradients, *, progress_bar: bool) -> tuple[Tensor, Tensor]:
        """Return m (P,) and s (P,)."""

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        _check_proper(objective.prior)
        objective.check_displaced()
        with objective.network.pass_counter.phase("training"):
            try:
                mean, std = self._optimise(BatchGradients(objective), progress_bar=progress_bar)
            except RecordingMismatchError:
                mean, std = self._optimise(BatchGradients(objective, replays=False), progress_bar=progress_bar)
        if not (is_finite(mean) and is_finite(std)):
            raise ConvergenceError(
                "a variational posterior with finite mean and standard deviations",
                received="NaN or Inf after training",
                remedy="a smaller lr of the recipe.",
            )
        self.mean_, self.std_ = mean, std
        with objective.network.pass_counter.phase("ELBO"):
            self.elbo_, self.elbo_standard_error_ = self._elbo(objective)

    def _elbo(self, objective: Objective) -> tuple[float, float]:
        """Return the ELBO with its standard error, by samples other than those of predictions."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(_ELBO_SAMPLES, len(self.mean_), generator=generator, dtype=self.mean_.dtype)
        log_p = []
        for theta in self.mean_ + self.std_ * noise.to(self.mean_.device):
            nll = objective.loss(theta) - objective.prior.energy(theta)  # −log p(D | θ)
            log_p.append(-float(nll))
        values = torch.tensor(log_p, dtype=torch.float64)
        kl = float(kl_divergence(self.mean_, self.std_, objective.prior))
        return float(values.mean()) - kl, float(values.std()) / math.sqrt(len(values))

    def _member_weights(self) -> Iterator[Tensor]:
        for seed in member_seeds(self.seed, self.n_samples):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(len(self.mean_), generator=generator, dtype=self.mean_.dtype)
            yield self.mean_ + self.std_ * noise.to(self.mean_.device)

    def _get_fit_state(self) -> Learned:
        learned = {"elbo": self.elbo_, "error": self.elbo_standard_error_, "swap": self.network_.routes.swap}
        return {"mean": self.mean_, "std": self.std_}, learned

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        objective.network.routes.swap = learned["swap"]
        self.mean_, self.std_ = tensors["mean"], tensors["std"]
        self.elbo_, self.elbo_standard_error_ = learned["elbo"], learned["error"]


class MeanFieldVI(MeanFieldEstimator):
    """Mean-field variational inference by the reparametrisation gradient (Blundell et al. 2015, "Bayes by Backprop").

        ELBO(m, s) = E_q[log p(D | θ)] − KL(N(m, s²) ‖ N(θ₀, 1/δ)),   θ = m + s ε,   ε ~ N(0, I)

    Stochastic gradients use minibatches and pairs of samples (ε, −ε), which cancel the part of the noise that is odd in
    ε. The Kullback–Leibler divergence enters in closed form. The optimisation is over m and log s, and starts at the
    trained weights with a small standard deviation. For a linear network with Gaussian noise, the optimum is the
    posterior mean, with the precisions diag A: smaller variances than the marginal ones of the posterior.

    A sample of the weights is shared by the rows of a batch. This works for any module, unlike the local
    reparametrisation of Kingma et al. (2015), which needs linear layers whose weights are used once per row.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        recipe: how to maximise the ELBO; learning rates apply to ELBO/N. epochs="auto" is at least 200 epochs and 2000
            steps: the steps of Adam have about the size of the learning rate, so that few of them cannot take s from
            `initial_std` to its optimum.
        initial_std: s > 0 of every weight at the start, in units of the weights.
        n_gradient_samples: samples ε per step, an even number.
        n_samples: the number S >= 2 of networks in predictions.
        seed: the seed of the order of the rows and of all samples.

    Attributes:
        mean_: m (P,), in the order of `weight_names_`.
        std_: s (P,).
        elbo_: the evidence lower bound in nats.
        elbo_standard_error_: its Monte-Carlo standard error.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option; `fit` raises it for a δ of 0. `fit` raises ConvergenceError if the
            optimisation diverges.

    Warns:
        NotConvergedWarning: in `fit`, if the gradient of the ELBO in log s, averaged over the weights, is far from 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators.training import Recipe
        >>> vi = MeanFieldVI(nn.Linear(3, 2), "regression", recipe=Recipe(epochs=300, lr=0.05), n_samples=10)
        >>> vi = vi.fit([(torch.randn(8, 3), torch.randn(8, 2))])
        >>> vi.std_.shape, vi.variance(torch.randn(4, 3)).shape
        (torch.Size([8]), torch.Size([4, 2]))
    """

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        recipe: Recipe = DEFAULT_RECIPE,
        initial_std: float = 1e-2,
        n_gradient_samples: int = 2,
        n_samples: int = 100,
        seed: int = 0,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **common)
        self.recipe = checked_recipe(recipe, DEFAULT_RECIPE)
        self.initial_std = checked_number("initial_std", initial_std, above=0, remedy="0.01.")
        self.n_gradient_samples = checked_integer("n_gradient_samples", n_gradient_samples, at_least=2)
        if self.n_gradient_samples % 2:
            raise OptionError("an even n_gradient_samples", received=str(n_gradient_samples), remedy="2.")
        self.n_samples, self.seed = checked_integer("n_samples", n_samples, at_least=2), checked_seed(seed)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        super()._fit(objective, progress_bar=progress_bar)
        with objective.network.pass_counter.phase("convergence"):
            self._warn_unless_converged(objective)

    def _optimise(self, gradients: BatchGradients, *, progress_bar: bool) -> tuple[Tensor, Tensor]:
        objective = gradients.objective
        start = torch.stack([objective.theta, torch.full_like(objective.theta, math.log(self.initial_std))])
        generator = torch.Generator().manual_seed(self.seed)
        fitted = fit_weights(
            start,
            self._gradient(gradients, generator),
            objective.batches,
            recipe=self._resolved_recipe(objective),
            generator=generator,
            progress_bar=progress_bar,
        )
        return fitted[0], fitted[1].exp()

    def _resolved_recipe(self, objective: Objective) -> Recipe:
        if self.recipe.epochs != "auto":
            return self.recipe
        steps = EpochSizes.of(objective.batches, self.recipe).n_batches
        return replace(self.recipe, epochs=max(_MIN_EPOCHS, math.ceil(_MIN_STEPS / steps)))

    def _warn_unless_converged(self, objective: Objective) -> None:
        """Warn with NotConvergedWarning if the mean gradient in log s is beyond its limit by three standard errors."""
        generator = torch.Generator().manual_seed(self.seed)
        gradients = torch.stack([self._mean_gradient(objective, generator) for _ in range(_CHECK_PAIRS)])
        mean, error = float(gradients.mean()), float(gradients.std()) / math.sqrt(_CHECK_PAIRS)
        if abs(mean) - 3 * error > _LARGEST_GRADIENT:
            size = "small" if mean < 0 else "large"
            warnings.warn(
                f"Expected a maximum of the ELBO, where its gradient in log s is 0. Received a mean gradient of "
                f"{-mean:.2g} ± {error:.1g} over the weights: standard deviations are too {size}. Try: more epochs, a "
                'larger lr, epochs="auto", or an initial_std nearer to them.',
                NotConvergedWarning,
                stacklevel=2,
            )

    def _mean_gradient(self, objective: Objective, generator: torch.Generator) -> Tensor:
        """Return an estimate of ∂(−ELBO)/∂log s, averaged over the weights, from one pair (ε, −ε): a scalar."""
        mean, std, precision = self.mean_, self.std_, objective.prior.precision
        half = torch.randn(len(mean), generator=generator, dtype=mean.dtype).to(mean.device)
        noise = torch.stack([half, -half])
        batches = objective.batches
        slopes = sum((data_gradients(objective, mean + std * noise, b)[1] for b in batches), torch.zeros_like(noise))
        return ((slopes * noise).mean(0) * std + precision * std.square() - 1).mean()

    def _gradient(self, gradients: BatchGradients, generator: torch.Generator) -> Any:  # noqa: ANN401
        """Return the function of (m, log s) (2, P) and a batch to the gradient of its part of −ELBO."""
        objective, prior = gradients.objective, gradients.objective.prior

        def gradient(weights: Tensor, batch: Batch) -> Tensor:
            mean, std = weights[0], weights[1].exp()
            half = torch.randn(self.n_gradient_samples // 2, len(mean), generator=generator, dtype=mean.dtype)
            noise = torch.cat([half, -half]).to(mean.device)
            slopes = gradients(mean + std * noise, batch)[1]
            share = objective.share(batch)
            # KL = ½ Σ δ(s² + (m − θ₀)²) − log s + constant
            of_mean = slopes.mean(0) + share * prior.precision * (mean - prior.mean)
            of_log_std = (slopes * noise).mean(0) * std + share * (prior.precision * std.square() - 1)
            return torch.stack([of_mean, of_log_std])

        return gradient


def kl_divergence(mean: Tensor, std: Tensor, prior: Prior) -> Tensor:
    """Return KL(N(m, s²) ‖ N(θ₀, 1/δ)) in nats, a scalar.

    Args:
        mean: m (P,).
        std: s (P,).
        prior: the prior, with δ > 0.
    """
    ratio = prior.precision * std.square()  # s²δ
    return 0.5 * (ratio + prior.precision * (mean - prior.mean).square() - 1 - ratio.log()).sum()


def checked_recipe(recipe: Recipe, default: Recipe) -> Recipe:
    """Return a recipe with numbers for epochs and learning rate. Raises OptionError for another object."""
    checked_instance("recipe", recipe, Recipe, remedy=f"{default}.")
    if recipe.lr == "auto":
        raise OptionError("a recipe with a number as lr", received='lr="auto"', remedy=f"{default}.")
    return recipe


def _check_proper(prior: Prior) -> None:
    """Raise OptionError for an improper prior, from which the divergence is infinite."""
    if not bool((prior.precision > 0).all()):
        raise OptionError(
            "prior_precision > 0 for every weight, since a variational posterior needs a proper prior",
            received=f"{int((prior.precision == 0).sum())} weights with δ = 0",
            remedy="a small positive δ for them, or leave them out of subset_of_weights.",
        )
