"""Cyclical stochastic gradient Hamiltonian Monte Carlo."""

from __future__ import annotations

import math
from typing import Unpack

from torch import nn

from estimators.errors import OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.option_checks import checked_integer, checked_number
from estimators.sampling.sgmcmc import SGMCMC

__all__ = ["CyclicalSGHMC"]

_STEP = 1.0
_ROUND_OFF = 1e-9
"""Steps by which a number of steps may differ from a whole one: (1 − 0.32) · 75 is 50.999…"""


class CyclicalSGHMC(SGMCMC):
    """Cyclical stochastic gradient Hamiltonian Monte Carlo (Zhang et al. 2020, Algorithm 1).

        η_k = η/2 · (cos(π k/K) + 1) for step k = 0 ... K − 1 of each cycle

    Every cycle starts with a large step size. In its first part, *exploration*, no noise is added, so that the chain
    moves like SGD to another mode. In the rest, *sampling*, the noise of `SGHMC` is added, and the samples are kept at
    equal distances, the last one at the end of the cycle.

    Args:
        model: the trained network, in eval mode, at which all chains start; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        step_size: the largest step size η > 0 in weight², or "auto": `step` divided by the largest curvature of L in a
            few batches.
        step: the numerator of step_size="auto"; the dynamics are stable below 2(2 − α).
        friction: α in (0, 1].
        n_cycles: the number of cycles.
        cycle_steps: K, the steps of a cycle.
        exploration: the fraction in [0, 1) of a cycle without noise.
        n_samples: samples that are kept per cycle and chain.
        n_chains: the number of chains, which are computed together.
        batch_size: the largest number of rows per step: rows are regrouped into batches whose sizes differ by at most
            1. None takes the batches of the loader.
        seed: the seed of the order of the rows and of the noise.

    Attributes:
        weight_samples_: the kept weights, (n_chains · n_cycles · n_samples, P).
        step_size_: η.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option, for fewer steps of sampling in a cycle than samples, and for a single
            sample of all cycles and chains. `fit` raises ConvergenceError if a chain diverges, and TooLargeError if the
            samples do not fit into memory.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> options = {"n_cycles": 2, "cycle_steps": 20, "n_samples": 3, "n_chains": 2}
        >>> sampler = CyclicalSGHMC(nn.Linear(3, 2), "regression", **options)
        >>> sampler.fit([(torch.randn(8, 3), torch.randn(8, 2))]).member_outputs(torch.randn(4, 3)).shape
        torch.Size([12, 4, 2])
    """

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        step_size: float | str = "auto",
        step: float = _STEP,
        friction: float = 0.1,
        n_cycles: int = 4,
        cycle_steps: int = 1000,
        exploration: float = 0.5,
        n_samples: int = 5,
        n_chains: int = 4,
        batch_size: int | None = 64,
        seed: int = 0,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            model,
            likelihood,
            step_size=step_size,
            step=step,
            batch_size=batch_size,
            n_chains=n_chains,
            seed=seed,
            **common,
        )
        self._check_step(_STEP)
        self.friction = checked_number("friction", friction, above=0, at_most=1, remedy="0.1.")
        self.n_cycles = checked_integer("n_cycles", n_cycles, at_least=1)
        self.exploration = checked_number("exploration", exploration, at_least=0, below=1, remedy="0.5.")
        self.n_samples = checked_integer("n_samples", n_samples, at_least=1)
        if self.n_cycles * self.n_samples * self.n_chains < 2:
            raise OptionError(
                "at least 2 samples of all cycles and chains, since a single one has no variance",
                received="n_cycles=1, n_samples=1, n_chains=1",
                remedy="n_samples=5.",
            )
        least = math.ceil(self.n_samples / (1 - self.exploration) - _ROUND_OFF)
        remedy = "more cycle_steps, or fewer n_samples."
        self.cycle_steps = checked_integer("cycle_steps", cycle_steps, at_least=max(2, least), remedy=remedy)

    @property
    def _n_steps(self) -> int:
        return self.n_cycles * self.cycle_steps

    @property
    def _friction(self) -> float:
        return self.friction

    def _step_factor(self, step: int) -> float:
        return 0.5 * (math.cos(math.pi * (step % self.cycle_steps) / self.cycle_steps) + 1)

    def _temperature(self, step: int) -> float:
        return float(step % self.cycle_steps >= self.exploration * self.cycle_steps)

    def _is_kept(self, step: int) -> bool:
        before_end = -step % self.cycle_steps  # steps until the end of the cycle
        sampling = int((1 - self.exploration) * self.cycle_steps + _ROUND_OFF)
        distance = max(1, sampling // self.n_samples)
        return before_end % distance == 0 and before_end // distance < self.n_samples
