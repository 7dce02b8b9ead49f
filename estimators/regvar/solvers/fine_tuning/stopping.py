"""Early stopping of posterior draws: when the A-norm error of their averaged iterates is small."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.solvers.fine_tuning.sgd import SGDRefits
from estimators.training.recipe import Recipe

__all__ = ["MAX_EPOCHS_FACTOR", "Stopping"]

_SMALL = 1.2  # over √K, per dimension: the remaining error then adds a twentieth to the noise of K draws
_MAYBE_SMALL = 3.0  # over √K, for the iterates, whose error is above that of their average by minibatch noise
_ACCEPTABLE = 0.35  # A-norm error per dimension to stop at after the usual epochs
_CHECKED_AT = (1 / 4, 1 / 2, 1)  # of the usual epochs
MAX_EPOCHS_FACTOR = 2  # times the usual epochs


@dataclass
class Stopping:
    """Checks at a quarter, half and all of the usual epochs, and doubles the epochs if the draws need them.

    With more draws, `n_draws` in all, the remaining error must be smaller. The A-norm error of the average costs one
    product with A per copy. Before the usual end it is computed only if that of the iterates, which is free, is small.
    `a_norm_errors` are those of the average, of this process's draws, once it was small enough.
    """

    refits: SGDRefits
    n_draws: int
    a_norm_errors: SampleANormErrors | None = field(default=None, init=False)

    @property
    def longest(self) -> Recipe:
        """The recipe with the maximal number of epochs."""
        return replace(self.refits.recipe, epochs=MAX_EPOCHS_FACTOR * self._usual)

    @property
    def _usual(self) -> int:
        assert isinstance(self.refits.recipe.epochs, int)
        return self.refits.recipe.epochs

    def enough(self, displacements: Tensor, epochs: int) -> bool:
        """Stop criterion: return whether the averaged displacements (A, P) suffice after this many epochs."""
        early = epochs < self._usual
        if epochs not in {round(share * self._usual) for share in _CHECKED_AT} or (early and not self._may_stop):
            return False
        a_norm_errors = self._measured(displacements)
        error = a_norm_errors.gather(self.refits.copies.objective.process_group, self.n_draws).error.per_dimension
        done = error <= (self._over_root(_SMALL) if early else max(self._over_root(_SMALL), _ACCEPTABLE))
        self.a_norm_errors = a_norm_errors if done else None
        return done

    @property
    def _may_stop(self) -> bool:
        iterates = self.refits.a_norm_error
        return iterates is not None and iterates <= self._over_root(_MAYBE_SMALL)

    def _over_root(self, number: float) -> float:
        """Return `number` over √K."""
        return number / math.sqrt(self.n_draws)

    def _measured(self, displacements: Tensor) -> SampleANormErrors:
        copies = self.refits.copies
        objective, perturbation = copies.objective, copies.perturbation
        with objective.network.pass_counter.phase("A-norm error"):
            u = copies.difference_quotient(displacements)
            slope = objective.product(u).sub_(
                perturbation.gradient
            )  # of the limit λ → 0: nonlinearity counts as an error
        return SampleANormErrors.of(perturbation, objective.prior.precision, u, slope)
