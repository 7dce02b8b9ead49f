"""When a descent of posterior draws may stop: where the energy error of its averaged iterates is small."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from estimators.recipe import Recipe
from estimators.regvar.energy import energy_error
from estimators.regvar.solvers.descent import Descent

__all__ = ["Stopping"]

_SMALL = 0.3  # per effective dimension: a mean variance within two or three percent on digits
_PERHAPS = 0.5  # of the iterates, which the noise of batches keeps above their average
_SHARES = (1 / 4, 1 / 2, 1)
_LONGEST = 2  # times the usual epochs


@dataclass
class Stopping:
    """Looks at a quarter, half and all of the usual epochs, and gives the draws twice as many where they need it.

    The energy of their average costs one gradient of each replica; before the usual end it is measured only where that
    of the iterates, which comes without a pass, is small. `image` is A u at the average where it was enough.
    """

    descent: Descent
    image: Tensor | None = field(default=None, init=False)

    @property
    def longest(self) -> Recipe:
        """The recipe with the most epochs that it may have."""
        return replace(self.descent.recipe, epochs=_LONGEST * self._usual)

    @property
    def _usual(self) -> int:
        assert isinstance(self.descent.recipe.epochs, int)
        return self.descent.recipe.epochs

    def enough(self, arms: Tensor, epochs: int) -> bool:
        """Whether the averaged arms (A, P) will do after this many epochs."""
        if epochs not in {round(share * self._usual) for share in _SHARES}:
            return False
        iterates = self.descent.energy
        if epochs < self._usual and (iterates is None or iterates > _PERHAPS):
            return False
        error, image = self._measured(arms)
        done = error <= _SMALL
        self.image = image if done else None
        return done

    def _measured(self, arms: Tensor) -> tuple[float, Tensor]:
        """Energy error per dimension, and A u."""
        replicas = self.descent.replicas
        penalty, objective = replicas.penalty, replicas.objective
        with objective.network.ledger.part("energy error"):
            image = replicas.displacement(replicas.gradient(arms)) + penalty.direction  # A u − ξ → A u
        error = energy_error(penalty, objective.prior.precision, replicas.displacement(arms), image)
        return error.per_dimension, image
