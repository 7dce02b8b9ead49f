"""Hamiltonian Monte Carlo of several chains at a time.

Source: Neal (2011), "MCMC using Hamiltonian dynamics". All chains have the number of leapfrog steps of a trajectory in
common, and after the warm-up the step size ε, so that a step of all chains is one vectorised gradient. In the
coordinates of `Potential` the prior is N(0, I), and the mass matrix is the identity.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from estimators.errors import ConvergenceError
from estimators.persistence.state import Learned
from estimators.sampling.step_size import DualAveraging

__all__ = ["HMC", "Trajectory"]

EnergyAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]
"""z (K, D) -> U (K,) and ∇U (K, D)."""

_LENGTH, _JITTER = 1.2, (0.5, 1.5)
"""Trajectory length in prior standard deviations, and the factor that varies it. Shorter and longer trajectories had a
smaller effective sample size per gradient on the tasks of docs/benchmarks/reference.md."""
_MAX_STEPS = 1000
"""Leapfrog steps of one trajectory: more would need ε below a thousandth of the prior's scale."""
_DIVERGENCE = 1000.0
"""Change of the Hamiltonian in a divergent trajectory, as in Stan."""
_SMALLEST_STEP = 1e-6
"""ε at which the adaptation gives up."""


@dataclass(frozen=True)
class Trajectory:
    """What one trajectory of every chain did.

    Attributes:
        energy: the Hamiltonian at the start, (K,).
        acceptance: min(1, exp(−ΔH)), (K,).
        divergent: whether ΔH exceeded 1000 or was not finite, (K,).
        n_steps: leapfrog steps, and so gradients, of each chain.
    """

    energy: Tensor
    acceptance: Tensor
    divergent: Tensor
    n_steps: int


@dataclass
class HMC:
    """The chains, and the step size that is adapted during the warm-up.

    Args:
        gradient: U and ∇U of all chains.
        z: coordinates of the chains, (K, D).
        generator: of momenta, jitter and acceptance, on the CPU, so that the numbers are those of every device.
        target: the acceptance rate of the warm-up.

    Attributes:
        energy: U (K,) at z.
        slope: ∇U (K, D) at z.
        step_sizes: ε of each chain, in prior standard deviations.
    """

    gradient: EnergyAndGradient
    z: Tensor
    generator: torch.Generator
    target: float = 0.8
    energy: Tensor = field(init=False)
    slope: Tensor = field(init=False)
    step_sizes: list[float] = field(init=False)

    def begin(self) -> None:
        """Compute U at the starts, and find a first step size."""
        self.energy, self.slope = self.gradient(self.z)
        first = self._first_step_size()
        self._adaptations = [DualAveraging(first, self.target) for _ in self.z]
        self.step_sizes = [first] * len(self.z)

    def warm_up(self) -> Trajectory:
        """Move all chains by a trajectory, and adapt step sizes to its acceptance.

        Until `share_step_size` each chain has a step size of its own: where a trained network starts, curvature can be
        so large that a step size that suits the other chains is never accepted.

        Raises:
            ConvergenceError: a step size has become too small.
        """
        done = self.move()
        acceptance = done.acceptance.tolist() if len(self._adaptations) > 1 else [float(done.acceptance.mean())]
        for adaptation, rate in zip(self._adaptations, acceptance, strict=True):
            adaptation.update(rate)
        self._set_step_sizes([adaptation.step_size for adaptation in self._adaptations])
        if min(self.step_sizes) < _SMALLEST_STEP:
            raise _collapsed(min(self.step_sizes))
        return done

    def share_step_size(self) -> None:
        """Continue with one step size for all chains, the median, adapted to their mean acceptance."""
        median = statistics.median(adaptation.average for adaptation in self._adaptations)
        self._adaptations = [DualAveraging(median, self.target)]
        self._set_step_sizes([median])

    def end_warm_up(self) -> None:
        """Fix the step size at its average over the warm-up."""
        self._set_step_sizes([adaptation.average for adaptation in self._adaptations])

    @property
    def step_size(self) -> float:
        """ε, the median of the chains' step sizes."""
        return statistics.median(self.step_sizes)

    def _set_step_sizes(self, sizes: list[float]) -> None:
        self.step_sizes = sizes * (len(self.z) // len(sizes))

    def move(self) -> Trajectory:
        """Move all chains by a trajectory of random length, and accept or reject its end in each chain."""
        length = _LENGTH * (_JITTER[0] + (_JITTER[1] - _JITTER[0]) * float(self._uniform(1)))
        n_steps = min(_MAX_STEPS, max(1, math.ceil(length / self.step_size)))
        momentum = self._normal()
        start = self.energy + _kinetic(momentum)
        step = torch.tensor(self.step_sizes, dtype=torch.float64).to(self.z)[:, None]
        z, energy, slope, momentum = self._leapfrog(momentum, step, n_steps)
        error = energy + _kinetic(momentum) - start  # ΔH
        error = error.where(error.isfinite(), math.inf)
        acceptance = (-error).exp().clamp(max=1)
        accepted = self._uniform(len(z)).to(acceptance) < acceptance
        self.z = torch.where(accepted[:, None], z, self.z)
        self.energy = torch.where(accepted, energy, self.energy)
        self.slope = torch.where(accepted[:, None], slope, self.slope)
        return Trajectory(start, acceptance, error > _DIVERGENCE, n_steps)

    def steps_of_a_trajectory(self) -> float:
        """Return the mean number of leapfrog steps of a trajectory at the present step size."""
        return min(_MAX_STEPS, max(1.0, _LENGTH / self.step_size + 0.5))

    def get_state(self) -> Learned:
        """Return the chains, the adaptation and the state of the generator as plain data."""
        tensors = {"z": self.z, "energy": self.energy, "slope": self.slope, "generator": self.generator.get_state()}
        return tensors, {"step_sizes": self.step_sizes, "adaptations": list(map(vars, self._adaptations))}

    def set_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from the result of `get_state`.

        Args:
            tensors: the tensors.
            values: the JSON values.
        """
        self.z, self.energy, self.slope = tensors["z"], tensors["energy"], tensors["slope"]
        self.generator.set_state(tensors["generator"].cpu())
        self.step_sizes = values["step_sizes"]
        self._adaptations = [DualAveraging(**adaptation) for adaptation in values["adaptations"]]

    def _leapfrog(self, momentum: Tensor, step: Tensor | float, n_steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return z, U, ∇U and the momentum after n steps of the leapfrog integrator."""
        z, energy, slope = self.z, self.energy, self.slope
        momentum = momentum - 0.5 * step * slope
        for i in range(n_steps):
            z = z + step * momentum
            energy, slope = self.gradient(z)
            momentum = momentum - (step if i + 1 < n_steps else 0.5 * step) * slope
        return z, energy, slope, momentum

    def _first_step_size(self) -> float:
        """Return an ε whose single step is accepted about half of the time, by doubling or halving."""
        momentum = self._normal()

        def acceptance(step: float) -> float:
            _, energy, _, moved = self._leapfrog(momentum, step, 1)
            error = energy + _kinetic(moved) - self.energy - _kinetic(momentum)
            error = error.where(error.isfinite(), math.inf)
            return float((-error).exp().clamp(max=1).mean())

        step = 0.1
        factor = 2.0 if acceptance(step) > 0.5 else 0.5
        while (acceptance(step * factor) > 0.5) == (factor > 1) and _SMALLEST_STEP < step < 1:
            step *= factor
        if step <= _SMALLEST_STEP:
            raise _collapsed(step)
        return step

    def _normal(self) -> Tensor:
        return torch.randn(self.z.shape, generator=self.generator, dtype=torch.float64).to(self.z)

    def _uniform(self, n: int) -> Tensor:
        return torch.rand(n, generator=self.generator, dtype=torch.float64)


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(1)


def _collapsed(step: float) -> ConvergenceError:
    return ConvergenceError(
        "a step size above a millionth of the prior's standard deviation",
        received=f"{step:.2g}, at which trajectories are still rejected",
        remedy="standardised inputs and targets, dtype=torch.float64, a larger prior_precision or noise.",
    )
