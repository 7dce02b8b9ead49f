"""The negative log-density that a sampler sees, U(z) = L(θ) at θ = θ₀ + z/√δ, with its gradient for several chains.

In the coordinates z the prior is N(0, I) for any prior precision, so that no step size or trajectory length depends on
its scale. U is the objective itself, the sum over all training rows and the prior; nothing is approximated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from estimators.data.batch import Batch
from estimators.errors import EstimatorError, ModelError
from estimators.models.failures import FAILURES, short
from estimators.models.kernels import differentiable
from estimators.numerics.pytrees import concatenate, difference
from estimators.objective.objective import Objective

__all__ = ["ChainGradient", "FullPotential", "Potential", "training_batches"]

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]
"""z (K, D) -> gradients (K, D) and energies U (K,)."""


class Potential(ABC):
    """The function U(z) of one chain's coordinates z (D,)."""

    n_dims: int
    """D, the number of coordinates that are sampled."""

    @abstractmethod
    def energy(self, z: Tensor) -> Tensor:
        """Return U(z), a scalar that is differentiable in z (D,); the function is safe inside vmap."""


@dataclass
class FullPotential(Potential):
    """U over all chosen weights: L(θ) exactly as the objective computes it.

    Args:
        objective: L, in the dtype of the sampling.
        batches: all training rows.
    """

    objective: Objective
    batches: list[Batch]

    @property
    def n_dims(self) -> int:  # type: ignore[override]
        """P, the number of chosen weights."""
        return self.objective.theta.numel()

    def energy(self, z: Tensor) -> Tensor:
        theta, objective = self.to_weights(z), self.objective
        parts = [objective.batch_loss(theta, batch.x, batch.y, objective.share(batch)) for batch in self.batches]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def to_weights(self, z: Tensor) -> Tensor:
        """Return θ₀ + z/√δ (..., P) of coordinates z (..., P)."""
        prior = self.objective.prior
        return prior.mean + z * prior.precision.rsqrt()


def training_batches(objective: Objective) -> list[Batch]:
    """Return the training rows as one batch, or as several if they differ in more than their rows."""
    batches = list(objective.batches)
    if difference([batch.x for batch in batches]) or difference([batch.y for batch in batches]):
        return batches
    return [Batch(concatenate([batch.x for batch in batches]), torch.cat([batch.y for batch in batches]))]


class ChainGradient:
    """U and ∇U of K chains in one call, by the fastest route that agrees with one chain at a time.

        recorded      the operations of vmap(grad(U)), recorded once and replayed without torch.func
        vectorised    vmap(grad(U))
        one by one    grad(U) of each chain

    Values are compared whenever `check` is called: torch's vmap rules are wrong for some operations, and a recorded
    forward does not branch.

    Args:
        potential: U.
        z: coordinates of the chains (K, D), at which the routes are compared first.

    Attributes:
        route: the name of the route.
        calls: the number of vectorised calls so far.

    Raises:
        ModelError: U or its gradient at z cannot be computed, or is not finite.
    """

    def __init__(self, potential: Potential, z: Tensor) -> None:
        self.potential, self.calls = potential, 0
        self._one = grad_and_value(potential.energy)
        self.route, self._gradient = self._fastest(z)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return U (K,) and ∇U (K, D) at z (K, D)."""
        self.calls += 1
        with torch.no_grad():
            gradient, energy = self._gradient(z)
        return energy, gradient

    def check(self, z: Tensor) -> None:
        """Compare the route with one chain at a time.

        Args:
            z: coordinates of the chains (K, D).

        Raises:
            ModelError: it differs.
        """
        error = self._error(self._gradient, z)
        if not error <= _tolerance(z):
            raise ModelError(
                "a network whose gradient at the sampled weights is the same in a vectorised call as alone",
                received=f"gradients that differ by {error:.2g} ({self.route})",
                remedy="a forward without branches on the values of weights; ReferencePosterior cannot sample this.",
            )

    def _fastest(self, z: Tensor) -> tuple[str, Gradient]:
        self._check_finite(z)
        makers = {"recorded": self._recorded, "vectorised": self._vectorised}
        for name, make in makers.items():
            try:
                gradient = make(z)
                # Also at other weights: what a recording took for constants agrees where it was recorded.
                if all(self._error(gradient, at) <= _tolerance(z) for at in (z, 0.7 * z.flip(0))):
                    return name, gradient
            except EstimatorError:
                raise
            except FAILURES:
                continue
        return "one by one", self._looped

    def _check_finite(self, z: Tensor) -> None:
        try:
            gradient, energy = self._looped(z[:1])
        except EstimatorError:
            raise
        except FAILURES as error:
            raise ModelError(
                "a network whose loss can be differentiated by torch.func at other weights",
                received=f"one for which torch raises: {short(error)}",
                remedy="register every weight as a parameter of a submodule, and use operations that torch.func has.",
            ) from error
        if not bool(gradient.isfinite().all() & energy.isfinite().all()):
            raise ModelError(
                "a finite loss and gradient at the starts of the chains",
                received=f"a loss of {float(energy[0]):.3g}",
                remedy='standardised inputs and targets, dtype=torch.float64, or starts="trained".',
            )

    def _looped(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with differentiable():
            found = [self._one(row) for row in z]
        return torch.stack([g.detach() for g, _ in found]), torch.stack([e.detach() for _, e in found])

    def _vectorised(self, z: Tensor) -> Gradient:  # noqa: ARG002
        function = vmap(self._one)

        def gradient(z: Tensor) -> tuple[Tensor, Tensor]:
            with differentiable():
                g, e = function(z)
            return g.detach(), e.detach()

        return gradient

    def _recorded(self, z: Tensor) -> Gradient:
        from torch.fx.experimental.proxy_tensor import make_fx  # importing it takes a second

        with differentiable():
            module = make_fx(lambda z: vmap(self._one)(z))(z)  # a function whose signature fx can read
        module.graph.eliminate_dead_code()
        module.recompile()

        def gradient(z: Tensor) -> tuple[Tensor, Tensor]:
            g, e = module(z)
            return g, e

        return gradient

    def _error(self, gradient: Gradient, z: Tensor) -> float:
        """Return the largest relative error of energies and gradients over the chains."""
        with torch.no_grad():
            found = gradient(z)
        errors = []
        for mine, expected in zip(found, self._looped(z), strict=True):
            mine, expected = mine.double().reshape(len(z), -1), expected.double().reshape(len(z), -1)
            scale = expected.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
            errors.append(float(((mine - expected).norm(dim=1) / scale).max()))
        return max(errors) if all(error == error for error in errors) else float("inf")


def _tolerance(z: Tensor) -> float:
    """Return the largest relative error that counts as round-off."""
    return 1e-8 if z.dtype == torch.float64 else 1e-3
