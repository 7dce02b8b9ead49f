"""A run of several chains: starts, warm-up, and sampling until a criterion holds or a budget of gradients is spent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from estimators.errors import ReferenceNotReachedError
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned
from estimators.runtime.progress import track
from estimators.sampling.convergence import e_bfmi
from estimators.sampling.hmc import HMC, Trajectory
from estimators.sampling.potential import ChainGradient

__all__ = ["STARTS", "ChainRun", "chain_starts"]

STARTS = {
    "prior": "draws from the prior",
    "trained": "networks trained from draws of the prior",
    "both": "draws from the prior in even chains, trained networks in odd ones",
}

_WARM_UP = 60
"""Trajectories of the warm-up, in the first half of which each chain has a step size of its own."""
_GROWTH = 1.25
"""The factor of draws from one judgement of convergence to the next."""
_TRAINING_STEPS, _TRAINING_RATE = 300, 0.05
"""Steps and rate of Adam in prior standard deviations, for trained starts."""

Judge = Callable[[Tensor], bool]
"""Kept draws z (K, S, D) -> whether they are enough."""


def chain_starts(gradient: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor, starts: str) -> Tensor:
    """Return the starts of the chains from draws of the prior.

    Args:
        gradient: z (K, D) -> U (K,) and ∇U (K, D).
        z: draws from the prior, (K, D).
        starts: a key of `STARTS`.

    Returns:
        (K, D): the draws, or what Adam makes of them, in all chains or in odd ones.
    """
    if starts == "prior":
        return z
    moved, (first, second) = z, (torch.zeros_like(z), torch.zeros_like(z))
    for step in range(1, _TRAINING_STEPS + 1):  # Kingma & Ba (2015), algorithm 1, with a cosine rate
        slope = gradient(moved)[1]
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope.square()
        rate = _TRAINING_RATE * 0.5 * (1 + math.cos(math.pi * step / _TRAINING_STEPS))
        moved = moved - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    trained = torch.arange(len(z), device=z.device) % 2 == 1 if starts == "both" else z.new_ones(len(z)).bool()
    usable = trained & moved.isfinite().all(1)
    return torch.where(usable[:, None], moved, z)


@dataclass
class ChainRun:
    """K chains that are sampled together, with the draws that are kept.

    At most `max_draws` draws are kept, over all chains. When they are reached, every second one is dropped, and from
    then on every second trajectory is kept.

    Args:
        gradient: U and ∇U of all chains.
        hmc: the chains, at draws from the prior.
        starts: a key of `STARTS`.
        first_judgement: the number of draws, over all chains, at which convergence is judged first.
        max_draws: the largest number of kept draws.
        max_gradients: the budget of gradients over all training rows, summed over chains.

    Attributes:
        divergences: divergent trajectories after the warm-up.
    """

    gradient: ChainGradient
    hmc: HMC
    starts: str
    first_judgement: int
    max_draws: int
    max_gradients: int
    divergences: int = 0
    _warmed_up: int = 0
    _moves: int = 0
    _thinning: int = 1
    _acceptance: float = 0.0
    _next_judgement: int = 0
    _spent_before: int = 0
    _draws: list[Tensor] = field(default_factory=list)
    _energies: list[Tensor] = field(default_factory=list)

    @property
    def n_chains(self) -> int:
        """K."""
        return len(self.hmc.z)

    @property
    def n_gradients(self) -> int:
        """Gradients over all training rows so far, summed over chains."""
        return self._spent_before + self.gradient.calls * self.n_chains

    def statistics(self) -> dict[str, Any]:
        """Return divergences, mean acceptance rate, smallest E-BFMI and gradients so far, in JSON types."""
        enough = len(self._energies) > 1
        return {
            "divergences": self.divergences,
            "acceptance": self._acceptance / self._moves if self._moves else math.nan,
            "e_bfmi": float(e_bfmi(torch.stack(self._energies, dim=1)).min()) if enough else math.nan,
            "n_gradients": self.n_gradients,
        }

    @property
    def draws(self) -> Tensor:
        """The kept draws z, (K, S, D)."""
        return torch.stack(self._draws, dim=1)

    def run(self, judge: Judge, checkpoint: Checkpoint, *, progress_bar: bool, at_least: int | None) -> bool:
        """Sample until the draws are enough, or the budget is spent.

        Args:
            judge: whether the kept draws are enough.
            checkpoint: is written between trajectories, and the run continues from what it has.
            progress_bar: whether to show progress.
            at_least: the number of draws, over all chains, without which the run is not begun, once the step size and
                so the cost of a trajectory is known; None for those of the first judgement.

        Returns:
            Whether the draws are enough.

        Raises:
            ReferenceNotReachedError: the budget does not suffice for that number of draws.
            ConvergenceError: the step size became too small.
        """
        saved = checkpoint.load()
        if saved is None:
            self._check_minimum()
            self.hmc.z = chain_starts(self.gradient, self.hmc.z, self.starts)
            self.hmc.begin()
            self._next_judgement = math.ceil(self.first_judgement / self.n_chains)
        else:
            self._set_state(*saved)
        for _ in track(range(_WARM_UP - self._warmed_up), "warm-up", shown=progress_bar):
            self._warm_up()
            checkpoint.save(self._get_state)
            self._check_budget(1)
        if not self._moves:
            self._check_budget(self._next_judgement if at_least is None else math.ceil(at_least / self.n_chains))
        left = (self.max_gradients - self.n_gradients) / (self.n_chains * self.hmc.steps_of_a_trajectory())
        for _ in track(range(2 * math.ceil(max(1, left))), "sampling", shown=progress_bar):
            if self._moves >= self._next_judgement:
                self._next_judgement = math.ceil(_GROWTH * self._moves)
                if judge(self.draws):
                    return True
            if self.n_gradients >= self.max_gradients:
                break
            self._move()
            checkpoint.save(self._get_state)
        return judge(self.draws)

    def _warm_up(self) -> None:
        self.hmc.warm_up()
        self._warmed_up += 1
        if self._warmed_up == _WARM_UP // 2:
            self.hmc.share_step_size()
        if self._warmed_up == _WARM_UP:
            self.hmc.end_warm_up()

    def _move(self) -> Trajectory:
        done = self.hmc.move()
        self._moves += 1
        self._acceptance += float(done.acceptance.mean())
        self.divergences += int(done.divergent.sum())
        self._energies.append(done.energy)
        if self._moves % self._thinning == 0:
            self._draws.append(self.hmc.z)
        if len(self._draws) * self.n_chains > self.max_draws:
            self._draws, self._thinning = self._draws[1::2], 2 * self._thinning
        return done

    def _check_minimum(self) -> None:
        """Raise ReferenceNotReachedError if the budget does not suffice for the starts and the warm-up."""
        steps = _WARM_UP + (0 if self.starts == "prior" else _TRAINING_STEPS)
        if self.max_gradients < steps * self.n_chains:
            raise ReferenceNotReachedError(
                f"a budget of more than {steps * self.n_chains:,} gradients, for starts and warm-up alone",
                received=f"max_gradients={self.max_gradients:,}",
                remedy='max_gradients=1_000_000, or starts="prior".',
            )

    def _check_budget(self, n_trajectories: int) -> None:
        """Raise ReferenceNotReachedError if the budget does not suffice for some more trajectories."""
        needed = self.n_gradients + math.ceil(n_trajectories * self.n_chains * self.hmc.steps_of_a_trajectory())
        if needed > self.max_gradients:
            raise ReferenceNotReachedError(
                f"a budget of at least {needed:,} gradients: {self.n_gradients:,} so far, and {n_trajectories} more "
                f"trajectories of about {self.hmc.steps_of_a_trajectory():.0f} steps in {self.n_chains} chains",
                received=f"max_gradients={self.max_gradients:,}",
                remedy=f"max_gradients={4 * needed:,}, fewer chains, or float32.",
            )

    def _get_state(self) -> Learned:
        tensors, values = self.hmc.get_state()
        if self._energies:
            tensors = {**tensors, "energies": torch.stack(self._energies)}
        if self._draws:
            tensors = {**tensors, "draws": torch.stack(self._draws)}
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return tensors, {"hmc": values, "numbers": numbers, "n_gradients": self.n_gradients}

    def _set_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        tensors = {name: tensor.to(self.hmc.z.device) for name, tensor in tensors.items()}
        self.hmc.set_state(tensors, values["hmc"])
        for name, value in values["numbers"].items():
            setattr(self, name, value)
        self._spent_before = values["n_gradients"] - self.gradient.calls * self.n_chains
        self._energies = list(tensors.get("energies", torch.empty(0)))
        self._draws = list(tensors.get("draws", torch.empty(0)))


_NUMBERS = ("divergences", "_warmed_up", "_moves", "_thinning", "_acceptance", "_next_judgement")
"""The attributes of a run that a checkpoint keeps, besides its tensors."""
