"""Gradients and Hessian products of the objective of a refit over all training rows, per perturbed copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from estimators.data.batch import Batch
from estimators.numerics.pytrees import PyTree
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies, Value

__all__ = ["NewtonCopies"]


class NewtonCopies(PerturbedCopies):
    """Perturbed copies of the network with what Newton steps need: ∇F and products with ∇²F over all rows."""

    def gradient(self, displacements: Tensor) -> Tensor:
        """Return ∇F at the displacements, (n_copies, P), over all training rows."""
        total = torch.zeros_like(displacements)
        for batch, targets in self.objective.with_targets():
            total += self.batch_gradient(displacements, batch, targets)
        return self.objective.process_group.sum_over_rows(total)

    def product(self, displacements: Tensor, vectors: Tensor) -> Tensor:
        """Return ∇²F at the displacements times vectors, both (n_copies, P), per copy."""
        total = torch.zeros_like(vectors)
        for batch, targets in self.objective.with_targets():
            product, a = self._batch_product(self._batch_value(batch, targets)), len(displacements)
            rows = (displacements, self.items, self.signs, vectors)
            total += self._over_copies(product, batch, *rows, forward=a, tangent=a, backward=2 * a).detach()
        return self.objective.process_group.sum_over_rows(total)

    @staticmethod
    def _batch_product(value: Value) -> Callable[[Tensor, PyTree, Tensor, Tensor], Tensor]:
        """Return the product of the Hessian of `value` with a vector."""

        def one(d: Tensor, item: PyTree, sign: Tensor, v: Tensor) -> Tensor:  # v → H v, forward over reverse
            slope = partial(grad(value), item=item, sign=sign)
            try:
                image: Tensor = jvp(slope, (d,), (v,))[1]
            except NotImplementedError:  # no forward mode: reverse over reverse, since H is symmetric
                image = vjp(slope, d)[1](v)[0]
            return image

        return one

    def _batch_value(self, batch: Batch, targets: PyTree) -> Value:
        """Return the batch's part of F, as a function of the displacement."""
        objective, perturbation, lam = self.objective, self.perturbation, self.lam
        share = objective.share(batch)

        def value(d: Tensor, item: PyTree, sign: Tensor) -> Tensor:
            theta = objective.theta + lam * d
            loss = objective.batch_loss(theta, batch.x, targets, share)
            return (loss - lam * sign * perturbation.value(theta, item, batch.x, share)) / lam**2

        return value
