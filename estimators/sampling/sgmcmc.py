"""Stochastic-gradient Markov chain Monte Carlo: chains over the weights driven by minibatch gradients and noise."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from estimators.data.batch import Batch
from estimators.errors import ConvergenceError, OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.members import WeightMembersEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.numerics.reductions import is_finite
from estimators.objective.objective import Objective
from estimators.objective.over_copies import data_gradients
from estimators.objective.recorded_gradients import BatchGradients, RecordingMismatchError
from estimators.option_checks import checked_integer, checked_number, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory
from estimators.runtime.progress import track
from estimators.training.epoch_sizes import EpochSizes
from estimators.training.learning_rate import auto_learning_rate
from estimators.training.recipe import Recipe
from estimators.training.training import epoch

__all__ = ["SGMCMC", "ChainState", "sgmcmc_step"]


@dataclass
class ChainState:
    """Positions of K chains between two epochs, with what the next step needs.

    Attributes:
        theta: weights, (K, P).
        velocity: their last steps, (K, P).
        order: the generator of the order of the rows.
        noise: the generator of the injected noise.
        step: the number of steps so far.
        samples: the weights kept so far, (K, P) each.
    """

    theta: Tensor
    velocity: Tensor
    order: torch.Generator
    noise: torch.Generator
    step: int = 0
    samples: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, theta: Tensor, n_chains: int, seed: int) -> Self:
        """Return K chains that start at θ (P,) at rest."""
        thetas = theta.expand(n_chains, -1).clone()
        noise = torch.Generator().manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        return cls(thetas, torch.zeros_like(thetas), order, noise)

    def stored(self) -> Learned:
        """Return tensors and JSON values for `restored`."""
        tensors = {"theta": self.theta, "velocity": self.velocity}
        tensors |= {"order": self.order.get_state(), "noise": self.noise.get_state()}
        if self.samples:
            tensors["samples"] = torch.stack(self.samples)
        return tensors, {"step": self.step}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], values: dict[str, Any], like: Tensor) -> Self:
        """Return the state of `stored` on the device of `like`."""
        order, noise = torch.Generator(), torch.Generator()
        order.set_state(tensors["order"].cpu())
        noise.set_state(tensors["noise"].cpu())
        samples = list(tensors["samples"].to(like)) if "samples" in tensors else []
        return cls(tensors["theta"].to(like), tensors["velocity"].to(like), order, noise, values["step"], samples)


def sgmcmc_step(
    state: ChainState, gradient: Tensor, *, step_size: float, friction: float, temperature: float = 1.0
) -> None:
    """Take one step of every chain, in place.

        v ← (1 − α) v − η ∇L(θ) + √(2αητ) z,   θ ← θ + v,   z ~ N(0, I)

    This is SGHMC in the form of Chen, Fox and Guestrin (2014, equation 15), and with α = 1 SGLD. For a Gaussian
    posterior with precision a and the full gradient, the stationary variance is (1/a) / (1 − ηa / (2(2 − α))).

    Args:
        state: the chains.
        gradient: an unbiased estimate of ∇L(θ), (K, P), for the sum L over all rows.
        step_size: η, in weight².
        friction: α in (0, 1].
        temperature: τ >= 0; 0 leaves out the noise.
    """
    noise = torch.randn(state.theta.shape, generator=state.noise, dtype=state.theta.dtype).to(state.theta.device)
    state.velocity.mul_(1 - friction).add_(gradient, alpha=-step_size)
    state.velocity.add_(noise, alpha=math.sqrt(2 * friction * step_size * temperature))
    state.theta.add_(state.velocity)
    state.step += 1


class SGMCMC(WeightMembersEstimator):
    """Base class of samplers with minibatch gradients: K chains from the trained weights, of which S samples are kept.

    Subclasses choose the friction, the number of steps, which steps are kept, and how the step size changes.

    Args:
        model: the trained network, in eval mode, at which all chains start; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        step_size: η > 0 in weight², or "auto": `step` divided by the largest curvature of L in a few batches.
        step: the numerator of step_size="auto".
        batch_size: the largest number of rows per step: rows are regrouped into batches whose sizes differ by at most
            1. None takes the batches of the loader.
        n_chains: the number of chains, which are computed together.
        seed: the seed of the order of the rows and of the noise.

    Attributes:
        weight_samples_: the kept weights, (S, P), those of the first chain first.
        step_size_: η in weight².
    """

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        step_size: float | str,
        step: float,
        batch_size: int | None,
        n_chains: int,
        seed: int,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **common)
        self.step_size = checked_number("step_size", step_size, above=0, words=("auto",), remedy='"auto".')
        self.step = checked_number("step", step, above=0)
        self.batch_size = checked_integer("batch_size", batch_size, at_least=1, words=(None,))
        self.n_chains = checked_integer("n_chains", n_chains, at_least=1)
        self.seed = checked_seed(seed)

    def _check_step(self, default: float) -> None:
        """Raise OptionError if `step` is changed and not used."""
        if self.step != default and self.step_size != "auto":
            raise OptionError(
                f"step={default} with a number as step_size", received=repr(self.step), remedy='step_size="auto".'
            )

    @property
    @abstractmethod
    def _n_steps(self) -> int:
        """The number of steps of a chain."""

    @property
    @abstractmethod
    def _friction(self) -> float:
        """α in (0, 1]."""

    @abstractmethod
    def _is_kept(self, step: int) -> bool:
        """Whether the weights after this number of steps are kept."""

    def _step_factor(self, step: int) -> float:  # noqa: ARG002
        """Return the factor of the step size after this number of steps."""
        return 1.0

    def _temperature(self, step: int) -> float:  # noqa: ARG002
        """Return τ after this number of steps."""
        return 1.0

    @property
    def _n_kept(self) -> int:
        return sum(self._is_kept(step) for step in range(1, self._n_steps + 1))

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        n_kept = self.n_chains * self._n_kept
        check_fits_memory(
            f"{n_kept} samples of {objective.theta.numel()} weights",
            2 * n_kept * objective.theta.numel() * objective.theta.element_size(),
            device=objective.theta.device,
            remedy="fewer samples or chains, or a smaller subset_of_weights.",
        )
        objective.check_displaced()
        with objective.network.pass_counter.phase("sampling"):
            self.step_size_ = self._resolved_step_size(objective)
            try:
                state = self._run(BatchGradients(objective), progress_bar=progress_bar)
            except RecordingMismatchError:
                state = self._run(BatchGradients(objective, replays=False), progress_bar=progress_bar)
        self.weight_samples_ = torch.stack(state.samples, dim=1).flatten(0, 1)  # chain by chain

    def _resolved_step_size(self, objective: Objective) -> float:
        """Return η: `step` over the largest curvature of L in a few batches, unless it is given.

        A batch with more than N/K rows has a larger curvature in the sum over its rows, times K, than L.
        """
        if self.step_size != "auto":
            return float(self.step_size)
        rate = auto_learning_rate(objective.centred(curvature="ggn"), self._batching, seed=self.seed)  # of L/N
        sizes = EpochSizes.of(objective.batches, self._batching)
        return self.step * rate / (objective.batches.n_data * sizes.largest_ratio)

    @property
    def _batching(self) -> Recipe:
        return Recipe(epochs=1, batch_size=self.batch_size)

    def _run(self, gradients: BatchGradients, *, progress_bar: bool) -> ChainState:
        objective = gradients.objective
        checkpoint = self._checkpoint.for_problem(_marks(objective)) if self._checkpoint.keeps else self._checkpoint
        loaded = checkpoint.load()
        if loaded is None:
            state = ChainState.start(objective.theta, self.n_chains, self.seed)
        else:
            state = ChainState.restored(*loaded, objective.theta)
        n_batches = EpochSizes.of(objective.batches, self._batching).n_batches
        n_epochs = math.ceil((self._n_steps - state.step) / n_batches)
        for _ in track(range(n_epochs), "epochs of the chains", shown=progress_bar):
            self._run_epoch(state, gradients, n_batches)
            self._check_finite(state)
            checkpoint.save(state.stored)
        return state

    def _run_epoch(self, state: ChainState, gradients: BatchGradients, n_batches: int) -> None:
        for batch in epoch(gradients.objective.batches, self._batching, state.order, even=True):
            if state.step >= self._n_steps:
                return
            eta = self.step_size_ * self._step_factor(state.step)
            options = {"friction": self._friction, "temperature": self._temperature(state.step)}
            gradient = stochastic_gradient(gradients, state.theta, batch, n_batches)
            sgmcmc_step(state, gradient, step_size=eta, **options)
            if self._is_kept(state.step):
                state.samples.append(state.theta.clone())

    def _check_finite(self, state: ChainState) -> None:
        if not is_finite(state.theta):
            raise ConvergenceError(
                "chains that stay finite",
                received=f"NaN or Inf after {state.step} steps of step_size={self.step_size_:.3g}",
                remedy='a smaller step_size, or a smaller step with step_size="auto".',
            )

    def _member_weights(self) -> Iterator[Tensor]:
        return iter(self.weight_samples_)

    def _get_fit_state(self) -> Learned:
        learned = {"step_size": self.step_size_, "swap": self.network_.routes.swap}
        return {"samples": self.weight_samples_}, learned

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        objective.network.routes.swap = learned["swap"]
        self.weight_samples_, self.step_size_ = tensors["samples"], learned["step_size"]


def stochastic_gradient(gradients: BatchGradients, thetas: Tensor, batch: Batch, n_batches: int) -> Tensor:
    """Return K ∇(data term of the batch) + δ(θ − θ₀) for each θ, whose mean over the K batches of an epoch is ∇L.

    The factor is K for every batch, not N/B: each batch is used once per epoch, so that N/B would weight the rows of a
    short last batch more than others.

    Args:
        gradients: the gradients of the data term.
        thetas: θ of each chain, (A, P).
        batch: one of the batches of an epoch.
        n_batches: K.

    Returns:
        The estimates of ∇L, (A, P).
    """
    slopes, prior = gradients(thetas, batch)[1], gradients.objective.prior
    return n_batches * slopes + prior.precision * (thetas - prior.mean)


def _marks(objective: Objective) -> Tensor:
    """Return numbers that depend on the rows of each batch and on their order."""
    theta = objective.theta
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype).to(theta.device)
    slopes = [data_gradients(objective, theta[None], batch)[1][0] @ direction for batch in objective.batches]
    return torch.stack(slopes)
