"""When a descent of posterior draws may stop: where the energy error of its averaged iterates is small."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.solvers.fine_tuning.sgd import Descent
from estimators.training.recipe import Recipe

__all__ = ["LONGEST", "Stopping"]

_SMALL = 1.2  # over √K, per dimension: what is left undone adds a twentieth to the noise of K draws
_PERHAPS = 3.0  # over √K: of the iterates, which the noise of batches keeps above their average
_FAIR = 0.35  # good enough to end
_SHARES = (1 / 4, 1 / 2, 1)
LONGEST = 2  # times the usual epochs


@dataclass
class Stopping:
    """Looks at a quarter, half and all of the usual epochs, and gives the draws twice as many where they need it.

    The more draws, `n_draws` in all, the less there is to be left undone. The energy of the average costs one product
    with A a replica; before the usual end it is measured only where that of the iterates, which comes without a pass,
    is small. `energies` are those of the average, of this process's draws, where it was enough.
    """

    descent: Descent
    n_draws: int
    energies: SampleANormErrors | None = field(default=None, init=False)

    @property
    def longest(self) -> Recipe:
        """The recipe with the most epochs that it may have."""
        return replace(self.descent.recipe, epochs=LONGEST * self._usual)

    @property
    def _usual(self) -> int:
        assert isinstance(self.descent.recipe.epochs, int)
        return self.descent.recipe.epochs

    def enough(self, arms: Tensor, epochs: int) -> bool:
        """Whether the averaged arms (A, P) will do after this many epochs."""
        early = epochs < self._usual
        if epochs not in {round(share * self._usual) for share in _SHARES} or (early and not self._perhaps):
            return False
        energies = self._measured(arms)
        error = energies.together(self.descent.replicas.objective.process_group, self.n_draws).error.per_dimension
        done = error <= (self._over_root(_SMALL) if early else max(self._over_root(_SMALL), _FAIR))
        self.energies = energies if done else None
        return done

    @property
    def _perhaps(self) -> bool:
        iterates = self.descent.energy
        return iterates is not None and iterates <= self._over_root(_PERHAPS)

    def _over_root(self, number: float) -> float:
        """Over √K."""
        return number / math.sqrt(self.n_draws)

    def _measured(self, arms: Tensor) -> SampleANormErrors:
        replicas = self.descent.replicas
        objective, perturbation = replicas.objective, replicas.perturbation
        with objective.network.pass_counter.phase("energy error"):
            u = replicas.displacement(arms)
            slope = objective.product(u).sub_(perturbation.direction)  # of the limit: what λ bends counts as an error
        return SampleANormErrors.of(perturbation, objective.prior.precision, u, slope)
