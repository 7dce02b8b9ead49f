"""The step size of Hamiltonian Monte Carlo, adapted to an acceptance rate by dual averaging."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["DualAveraging"]

_GAMMA, _T0, _KAPPA = 0.05, 10, 0.75
"""Constants of Hoffman and Gelman (2014), section 3.2.1."""


@dataclass
class DualAveraging:
    """Dual averaging of log ε towards an acceptance rate (Hoffman & Gelman 2014, "The No-U-Turn Sampler", eq. 6).

    Args:
        step_size: ε of the next trajectory.
        target: the acceptance rate.
        count: the number of trajectories so far.
        shortfall: the running mean of target − acceptance.
        log_average: the average of log ε with weights that favour later trajectories.
        centre: the log ε towards which the iteration shrinks, log 10 ε₀.
    """

    step_size: float
    target: float = 0.8
    count: int = 0
    shortfall: float = 0.0
    log_average: float = 0.0
    centre: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.centre):
            self.centre = math.log(10 * self.step_size)

    def update(self, acceptance: float) -> None:
        """Adapt ε to the acceptance rate of a trajectory with the present ε.

        Args:
            acceptance: the mean over the chains of min(1, exp(−ΔH)).
        """
        self.count += 1
        t = self.count
        self.shortfall += (self.target - acceptance - self.shortfall) / (t + _T0)
        log_step = self.centre - math.sqrt(t) / _GAMMA * self.shortfall
        self.log_average += t**-_KAPPA * (log_step - self.log_average)
        self.step_size = math.exp(log_step)

    @property
    def average(self) -> float:
        """The averaged ε, with which sampling continues after the warm-up."""
        return math.exp(self.log_average)
