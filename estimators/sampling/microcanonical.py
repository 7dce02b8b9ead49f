"""Microcanonical Langevin Monte Carlo: chains with a unit velocity, started at trained networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from estimators.errors import ConvergenceError, OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.members import WeightMembersEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.numerics.reductions import is_finite
from estimators.objective.objective import Objective
from estimators.objective.recorded_gradients import BatchGradients, RecordingMismatchError
from estimators.option_checks import checked_instance, checked_integer, checked_number, checked_seed, shown
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory
from estimators.runtime.progress import track
from estimators.runtime.rng import member_seeds
from estimators.training.recipe import Recipe
from estimators.training.retraining import (
    MakeModel,
    Retraining,
    check_architecture,
    checked_make_model,
    tensors_by_name,
)

__all__ = ["Microcanonical", "MicrocanonicalLangevin"]

_ENERGY_VARIANCE = 5e-4
"""The variance of the Hamiltonian error of a step per weight, as in the tuning of blackjax: a few per cent of bias."""
_STEPS_PER_CHECK = 50
"""Steps between two checks for NaN, and chances to write a checkpoint."""
_MEMORY = 50.0
"""Steps after which a measured Hamiltonian error has lost most of its weight in the choice of the step size."""
_ROWS_PER_CALL = 1024
"""Rows in one call of the network, times the number of chains."""
_LONGEST = 1e3
"""Largest ratio of the decoherence length to the step size."""


@dataclass
class Microcanonical:
    """Positions and directions of K chains, and what their adaptation has measured.

    Attributes:
        theta: weights, (K, P).
        direction: unit velocities u, (K, P).
        energy: L(θ), (K,).
        gradient: ∇L(θ), (K, P).
        step_size: ε (K,), in units of weights.
        length: the decoherence length (K,), in units of weights.
        step: the number of steps so far.
        samples: the weights kept so far, (K, P) each.
        adaptation: sums of the adaptation of the step size, (2, K).
        moments: running mean and sum of squares of θ, (2, K, P).
    """

    theta: Tensor
    direction: Tensor
    energy: Tensor
    gradient: Tensor
    step_size: Tensor
    length: Tensor
    adaptation: Tensor
    moments: Tensor
    step: int = 0
    samples: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, thetas: Tensor, energy: Tensor, gradient: Tensor, noise: Tensor, scale: Tensor) -> Self:
        """Return chains at weights (K, P), directed along noise (K, P), for posterior widths `scale` (K,)."""
        k, p = thetas.shape
        return cls(
            thetas.clone(),
            noise / noise.norm(dim=1, keepdim=True),
            energy,
            gradient,
            step_size=0.25 * scale,  # the Hamiltonian error decides later
            length=math.sqrt(p) * scale,
            adaptation=thetas.new_zeros(2, k),
            moments=thetas.new_zeros(2, k, p),
        )

    def rotate(self, gradient: Tensor, time: Tensor) -> Tensor:
        """Turn the directions towards −∇L for some time, in place; return the change of the kinetic energy, (K,).

        With e = −∇L/‖∇L‖ and r = time ‖∇L‖/(P − 1), the exact solution of du/dt = (I − u uᵀ)(−∇L)/(P − 1) is
        u ← (u + e (sinh r + e·u (cosh r − 1)))/(cosh r + e·u sinh r). It is written with exp(−r), against overflow.
        """
        dimension = gradient.shape[1]
        norm = gradient.norm(dim=1)
        e = -gradient / norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, None]
        along = (e * self.direction).sum(1)
        r = time * norm / (dimension - 1)
        decay = (-r).exp()
        # All divided by e^r / 2: cosh r + e·u sinh r → (1 + e·u) + (1 − e·u) e^(−2r)
        divisor = (1 + along) + (1 - along) * decay.square()
        of_e = (1 - decay.square()) + along * (1 - decay).square()
        turned = 2 * decay[:, None] * self.direction + of_e[:, None] * e
        self.direction = turned / turned.norm(dim=1, keepdim=True)
        change: Tensor = (dimension - 1) * (r - math.log(2) + divisor.log())
        return change

    def refresh(self, noise: Tensor) -> None:
        """Mix the directions with noise (K, P), so that they decorrelate over the decoherence length."""
        p = noise.shape[1]
        nu = ((2 * self.step_size / self.length).exp() - 1).div(p).sqrt()
        mixed = self.direction + nu[:, None] * noise
        self.direction = mixed / mixed.norm(dim=1, keepdim=True)

    def adapt_step_size(self, hamiltonian_error: Tensor) -> None:
        """Move ε so that the squared Hamiltonian error per weight becomes 5e-4; it grows with ε⁶."""
        p = self.theta.shape[1]
        usable = torch.isfinite(hamiltonian_error)
        xi = torch.where(usable, hamiltonian_error.square() / (p * _ENERGY_VARIANCE), 1e6) + 1e-8
        weight = torch.exp(-0.5 * (xi.log() / 9).square())  # an error far from the wanted one says little
        decay = 1 - 1 / _MEMORY
        new = torch.stack([weight * xi / self.step_size**6, weight])
        self.adaptation = decay * self.adaptation + new
        self.step_size = (self.adaptation[0] / self.adaptation[1]).pow(-1 / 6)

    def add_moments(self, count: int) -> None:
        """Add the positions to mean and sum of squares (Welford); `count` includes them."""
        before = self.theta - self.moments[0]
        self.moments[0] += before / count
        self.moments[1] += before * (self.theta - self.moments[0])

    def stored(self, generator: torch.Generator) -> Learned:
        """Return tensors and JSON values for `restored`."""
        names = ("theta", "direction", "energy", "gradient", "step_size", "length", "adaptation", "moments")
        tensors = {name: getattr(self, name) for name in names} | {"generator": generator.get_state()}
        if self.samples:
            tensors["samples"] = torch.stack(self.samples)
        return tensors, {"step": self.step}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], values: dict[str, Any], device: torch.device) -> Self:
        """Return the state of `stored`."""
        moved = {name: t.to(device) for name, t in tensors.items() if name != "generator"}
        samples = list(moved.pop("samples")) if "samples" in moved else []
        return cls(**moved, step=values["step"], samples=samples)


class MicrocanonicalLangevin(WeightMembersEstimator):
    """Microcanonical Langevin Monte Carlo (Robnik and Seljak 2024) from trained networks, as MILE (Sommer et al. 2025).

        dθ = u dt,   du = (I − u uᵀ)(−∇L(θ) dt/(P − 1) + noise),   ‖u‖ = 1

    The marginal distribution of θ is the posterior. A step is a leapfrog step with the full gradient, followed by a
    partial refreshment of the direction u. In the warm-up, the step size of each chain is adapted so that the squared
    Hamiltonian error per weight is 5e-4. The decoherence length becomes the width of the chain in the second half of
    the warm-up, √(Σ variances of its weights). There is no accept–reject step, and the bias is of second order in the
    step size.

    The K chains are computed together. With `members`, or `make_model` and `recipe`, they start at different networks:
    an ensemble of chains. Without them, all start at the model. Buffers and frozen weights are those of the model.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        members: trained networks with the architecture of the model, at which the other chains start.
        make_model: builds a new network of this architecture, which `recipe` trains, for each of the other chains.
        recipe: how to train these networks; use the recipe of the model.
        n_chains: the number K >= 1 of chains. None: 1 plus the number of `members`, or 4.
        warm_up: steps of the adaptation, whose positions are not kept.
        n_samples: samples that are kept per chain.
        thinning: steps from one sample to the next.
        step_size: ε > 0 in units of the weights, or "auto" for the adaptation.
        seed: the seed of directions, and of initialisations and orders of the rows.

    Attributes:
        weight_samples_: the kept weights, (n_chains · n_samples, P), those of the first chain first.
        step_size_: ε of each chain, (K,).
        decoherence_length_: the decoherence length of each chain, (K,), in units of the weights.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option, or networks from two sources. `fit` raises ConvergenceError if a chain
            diverges, ModelError for a network of another architecture, and TooLargeError if the samples do not fit into
            memory.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> sampler = MicrocanonicalLangevin(nn.Linear(3, 2), "regression", warm_up=40, n_samples=5, thinning=4)
        >>> sampler.fit([(torch.randn(8, 3), torch.randn(8, 2))]).member_outputs(torch.randn(4, 3)).shape
        torch.Size([20, 4, 2])
    """

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        members: Sequence[nn.Module] | None = None,
        make_model: MakeModel | None = None,
        recipe: Recipe | None = None,
        n_chains: int | None = None,
        warm_up: int = 1000,
        n_samples: int = 25,
        thinning: int = 40,
        step_size: float | str = "auto",
        seed: int = 0,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **common)
        _check_sources(members, make_model, recipe)
        self.members, self.make_model = members, checked_make_model(make_model)
        self.recipe = None if recipe is None else checked_instance("recipe", recipe, Recipe, remedy="Recipe().")
        self.n_chains = _number_of_chains(n_chains, members)
        self.warm_up = checked_integer("warm_up", warm_up, at_least=4)
        self.n_samples = checked_integer("n_samples", n_samples, at_least=2)
        self.thinning = checked_integer("thinning", thinning, at_least=1)
        self.step_size = checked_number("step_size", step_size, above=0, words=("auto",), remedy='"auto".')
        self.seed = checked_seed(seed)

    @property
    def retrains(self) -> bool:  # type: ignore[override]
        """Whether a fit trains networks."""
        return self.make_model is not None

    @classmethod
    def _option_names(cls) -> list[str]:
        return [name for name in super()._option_names() if name != "members"]  # the checkpoint compares its gradients

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        theta, n_kept = objective.theta, self.n_chains * self.n_samples
        if len(theta) < 2:
            raise OptionError("at least two uncertain weights", received="one", remedy="another subset_of_weights.")
        check_fits_memory(
            f"{n_kept} samples of {len(theta)} weights",
            2 * n_kept * len(theta) * theta.element_size(),
            device=theta.device,
            remedy="fewer samples or chains, or a smaller subset_of_weights.",
        )
        objective.check_displaced()
        starts = self._starts(objective, progress_bar=progress_bar)
        with objective.network.pass_counter.phase("sampling"):
            try:
                state = self._run(FullGradient(objective), starts, progress_bar=progress_bar)
            except RecordingMismatchError:
                state = self._run(FullGradient(objective, replays=False), starts, progress_bar=progress_bar)
        self.weight_samples_ = torch.stack(state.samples, dim=1).flatten(0, 1)  # chain by chain
        self.step_size_, self.decoherence_length_ = state.step_size, state.length

    def _starts(self, objective: Objective, *, progress_bar: bool) -> Tensor:
        """Return the weights at which the chains start, (K, P)."""
        networks: list[nn.Module] = list(self.members or [])
        if self.make_model is not None:
            assert self.recipe is not None
            retraining = Retraining(self.make_model, self.recipe, self.prior_precision, prior_mean=self.prior_mean)
            for seed in track(member_seeds(self.seed, self.n_chains - 1), "networks", shown=progress_bar):
                networks.append(retraining.run(objective, seed, others=networks, progress_bar=False))
        if not networks:
            return objective.theta.expand(self.n_chains, -1).clone()
        for index, network in enumerate(self.members or []):
            check_architecture(network, objective.network.module, what=f"members[{index}] with")
        subset, like = objective.network.subset, objective.theta
        thetas = [subset.flatten({name: t.to(like) for name, t in tensors_by_name(n).items()}) for n in networks]
        return torch.stack([objective.theta, *thetas])

    def _run(self, full: FullGradient, starts: Tensor, *, progress_bar: bool) -> Microcanonical:
        generator = torch.Generator().manual_seed(self.seed)
        energy, gradient = full(starts)
        checkpoint = self._checkpoint.for_problem(gradient.norm(dim=1))
        loaded = checkpoint.load()
        if loaded is None:
            noise = _noise(starts, generator)
            state = Microcanonical.start(starts, energy, gradient, noise, _scale(full.objective, gradient))
            if self.step_size != "auto":
                state.step_size = torch.full_like(energy, self.step_size)
        else:
            state = Microcanonical.restored(*loaded, starts.device)
            generator.set_state(loaded[0]["generator"].cpu())
        total = self.warm_up + self.n_samples * self.thinning
        blocks = range(state.step, total, _STEPS_PER_CHECK)
        for first in track(blocks, f"blocks of {_STEPS_PER_CHECK} steps", shown=progress_bar):
            for _ in range(first, min(first + _STEPS_PER_CHECK, total)):
                self._step(state, full, generator)
            self._check_finite(state)
            checkpoint.save(lambda: state.stored(generator))
        return state

    def _step(self, state: Microcanonical, full: FullGradient, generator: torch.Generator) -> None:
        """Take a leapfrog step of every chain and refresh the directions."""
        before = state.theta, state.direction, state.energy, state.gradient
        kinetic = state.rotate(state.gradient, state.step_size / 2)
        state.theta = state.theta + state.step_size[:, None] * state.direction
        energy, state.gradient = full(state.theta)
        kinetic = kinetic + state.rotate(state.gradient, state.step_size / 2)
        error = kinetic + energy - state.energy
        state.energy = energy
        state.refresh(_noise(state.theta, generator))
        state.step += 1
        if state.step <= self.warm_up:
            self._adapt(state, error, before)
        elif (state.step - self.warm_up) % self.thinning == 0:
            state.samples.append(state.theta.clone())

    def _adapt(self, state: Microcanonical, error: Tensor, before: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        if self.step_size == "auto":
            bad = ~torch.isfinite(error)
            if bool(bad.any()):  # a step that was too large for this chain is taken back
                now = state.theta, state.direction, state.energy, state.gradient
                mixed = [torch.where(bad.view(-1, *[1] * (n.ndim - 1)), b, n) for n, b in zip(now, before, strict=True)]
                state.theta, state.direction, state.energy, state.gradient = mixed
            state.adapt_step_size(error)
        half = self.warm_up // 2
        if state.step > half:
            state.add_moments(state.step - half)
        if state.step == self.warm_up:
            variance = state.moments[1] / (self.warm_up - half)
            width = variance.sum(1).sqrt()
            state.length = width.clamp(min=state.step_size, max=_LONGEST * state.step_size)

    def _check_finite(self, state: Microcanonical) -> None:
        if not (is_finite(state.theta) and is_finite(state.step_size)):
            raise ConvergenceError(
                "chains that stay finite",
                received=f"NaN or Inf after {state.step} steps",
                remedy='step_size="auto", or a smaller number.',
            )

    def _member_weights(self) -> Iterator[Tensor]:
        return iter(self.weight_samples_)

    def _get_fit_state(self) -> Learned:
        tensors = {"samples": self.weight_samples_, "step_size": self.step_size_, "length": self.decoherence_length_}
        return tensors, {"swap": self.network_.routes.swap}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        objective.network.routes.swap = learned["swap"]
        self.weight_samples_ = tensors["samples"]
        self.step_size_, self.decoherence_length_ = tensors["step_size"], tensors["length"]


class FullGradient:
    """L(θ) and ∇L(θ) at several weights, over all rows, which are regrouped into few batches if they are stored.

    Args:
        objective: the objective, L.
        replays: whether gradients may be replayed from a recording.
    """

    def __init__(self, objective: Objective, *, replays: bool = True) -> None:
        self.objective, self._gradients = objective, BatchGradients(objective, replays=replays)
        order = torch.Generator().manual_seed(0)
        stored = objective.batches.stored is not None
        self._batches = list(objective.batches.shuffled(_ROWS_PER_CALL, order)) if stored else objective.batches

    def __call__(self, thetas: Tensor) -> tuple[Tensor, Tensor]:
        """Return L(θ) (K,) and ∇L(θ) (K, P) at weights (K, P)."""
        prior = self.objective.prior
        away = thetas - prior.mean
        gradient = prior.precision * away
        energy = 0.5 * (gradient * away).sum(1)
        for batch in self._batches:
            values, slopes = self._gradients(thetas, batch)
            energy, gradient = energy + values, gradient + slopes
        return energy, gradient


def _scale(objective: Objective, gradient: Tensor) -> Tensor:
    """Return a first guess of the posterior width of a weight, (K,): 1/√(δ + mean curvature guessed from ‖∇L‖²)."""
    delta = objective.prior.precision.mean()
    p = gradient.shape[1]
    return (delta + gradient.square().sum(1) / p + objective.batches.n_data / p).rsqrt()


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _number_of_chains(n_chains: int | None, members: Sequence[nn.Module] | None) -> int:
    given = None if members is None else 1 + len(members)
    n = checked_integer("n_chains", (given or 4) if n_chains is None else n_chains, at_least=1)
    if given is not None and n != given:
        raise OptionError(
            f"n_chains={given}, for the model and its {given - 1} members", received=str(n), remedy="leave it out."
        )
    return n


def _check_sources(members: Sequence[nn.Module] | None, make_model: MakeModel | None, recipe: Recipe | None) -> None:
    listed = isinstance(members, (Sequence, nn.ModuleList))
    if members is not None and not (listed and all(isinstance(member, nn.Module) for member in members)):
        raise OptionError(
            "members, a list of networks", received=shown(members), remedy="members=[network_2, network_3]."
        )
    if (make_model is None) != (recipe is None) or (members is not None and make_model is not None):
        raise OptionError(
            "members, or make_model and recipe, or none of them",
            received=f"members={'None' if members is None else f'a list of {len(members)}'}, "
            f"make_model={make_model}, recipe={recipe}",
            remedy="members=[...], or make_model=lambda: MyNetwork(...) and recipe=Recipe(...).",
        )
