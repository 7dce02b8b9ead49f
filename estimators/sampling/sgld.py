"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

from typing import Unpack

from torch import nn

from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.option_checks import checked_integer
from estimators.sampling.sgmcmc import SGMCMC

__all__ = ["SGLD"]

_STEP = 0.05


class SGLD(SGMCMC):
    """Stochastic gradient Langevin dynamics (Welling and Teh 2011) with a constant step size.

        θ ← θ − η ∇L(θ) + √(2η) z,   z ~ N(0, I),   ∇L from a minibatch

    In the notation of the paper, η is ε/2. The samples have a bias of first order in η: for a Gaussian posterior with
    precision a and the full gradient, the variance is (1/a) / (1 − ηa/2). The noise of minibatch gradients adds to it.

    Args:
        model: the trained network, in eval mode, at which all chains start; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        step_size: η > 0 in weight², or "auto": `step` divided by the largest curvature of L in a few batches.
        step: the numerator of step_size="auto"; the dynamics are stable below 2.
        burn_in: steps before the first sample.
        n_samples: samples that are kept per chain.
        thinning: steps from one sample to the next.
        n_chains: the number of chains, which are computed together.
        batch_size: the largest number of rows per step: rows are regrouped into batches whose sizes differ by at most
            1. None takes the batches of the loader.
        seed: the seed of the order of the rows and of the noise.

    Attributes:
        weight_samples_: the kept weights, (n_chains · n_samples, P).
        step_size_: η.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option. `fit` raises ConvergenceError if a chain diverges, and TooLargeError if the
            samples do not fit into memory.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> sgld = SGLD(nn.Linear(3, 2), "regression", burn_in=20, n_samples=5, thinning=2, n_chains=2)
        >>> sgld.fit([(torch.randn(8, 3), torch.randn(8, 2))]).member_outputs(torch.randn(4, 3)).shape
        torch.Size([10, 4, 2])
    """

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        step_size: float | str = "auto",
        step: float = _STEP,
        burn_in: int = 1000,
        n_samples: int = 25,
        thinning: int = 100,
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
        self.burn_in = checked_integer("burn_in", burn_in, at_least=0)
        self.n_samples = checked_integer("n_samples", n_samples, at_least=2)
        self.thinning = checked_integer("thinning", thinning, at_least=1)

    @property
    def _n_steps(self) -> int:
        return self.burn_in + self.n_samples * self.thinning

    @property
    def _friction(self) -> float:
        return 1.0

    def _is_kept(self, step: int) -> bool:
        return step > self.burn_in and (step - self.burn_in) % self.thinning == 0
