"""The objective: what was minimised, and the objectives that RegVar refits.

    L(θ) = Σₙ data(θ; xₙ, yₙ) + ½ Σᵢ δᵢ (θᵢ − θ₀ᵢ)²

Sums over rows, never means. The data term is one of three, and with it goes the second derivative A at θ̂:

    Labels         −log p(y | f)                                  exact Hessian      gradient as trained
    TiltedLabels   −log p(y | f) − gₙᵀ(θ − θ̂), gₙ its slope at θ̂  exact Hessian      zero gradient at θ̂, row by row
    SelfTargets    −E[log p(y | f)], y ~ p(· | f(x; θ̂))           GGN                zero gradient at θ̂, row by row
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad

from estimators.data.batch import Batch
from estimators.data.distributed import ProcessGroup
from estimators.data.training_data import TrainingData
from estimators.likelihoods import Likelihood
from estimators.models.network import Network, differentiable
from estimators.numerics.pytrees import PyTree
from estimators.runtime.memory import available_bytes

__all__ = ["DataTerm", "GradientCorrectedLoss", "LabelLoss", "Objective", "Prior", "SelfTargetLoss"]


@dataclass(frozen=True)
class Prior:
    """Gaussian prior on θ with independent entries: precision δ (P,) and mean θ₀ (P,)."""

    precision: Tensor
    mean: Tensor

    def energy(self, theta: Tensor) -> Tensor:
        """½ Σ δ (θ − θ₀)²."""
        return 0.5 * (self.precision * (theta - self.mean).square()).sum()


@dataclass(frozen=True)
class DataTerm(ABC):
    """The part of the objective that sees the data, a batch at a time."""

    likelihood: Likelihood
    centred: ClassVar[bool] = True
    """Whether it has no slope at θ̂."""
    semidefinite: ClassVar[bool] = False
    """Whether its curvature at θ̂ is never negative."""

    @abstractmethod
    def targets(self, network: Network, batch: Batch) -> PyTree:
        """What the loss of the batch needs beside x: computed once a batch, shared by all replicas."""

    @abstractmethod
    def loss(self, network: Network, theta: Tensor, x: PyTree, targets: PyTree) -> Tensor:
        """Sum over the rows, a scalar; differentiable in θ (P,), and safe inside vmap."""

    @abstractmethod
    def curvature_product(self, network: Network, batch: Batch, vectors: Tensor, total: Tensor | None = None) -> Tensor:
        """(K, P) -> (K, P): the batch's second derivative at θ̂ times each vector; added to `total`, where given."""


class LabelLoss(DataTerm):
    """−log p(y | f): the loss that was trained. Its curvature is the exact Hessian."""

    centred = False

    def targets(self, network: Network, batch: Batch) -> PyTree:  # noqa: ARG002
        return batch.y

    def loss(self, network: Network, theta: Tensor, x: PyTree, targets: PyTree) -> Tensor:
        return self.likelihood.nll(network(theta, x), targets).sum()

    def curvature_product(self, network: Network, batch: Batch, vectors: Tensor, total: Tensor | None = None) -> Tensor:
        images = network.hessian_product(batch.x, partial(_nll, self.likelihood, batch.y), vectors)
        return images if total is None else total.add_(images)


class GradientCorrectedLoss(LabelLoss):
    """−log p(y | f) less its slope at θ̂, batch by batch: the same curvature, and no gradient at θ̂ in any batch."""

    centred = True

    def targets(self, network: Network, batch: Batch) -> PyTree:
        with network.pass_counter.phase("targets"):
            return batch.y, network.slope_of(batch.x, partial(_nll, self.likelihood, batch.y))

    def loss(self, network: Network, theta: Tensor, x: PyTree, targets: PyTree) -> Tensor:
        labels, slope = targets
        return super().loss(network, theta, x, labels) - torch.dot(slope, theta - network.theta)


class SelfTargetLoss(DataTerm):
    """−E[log p(y | f)] over y from the network's own prediction at θ̂. Its curvature at θ̂ is exactly the GGN."""

    semidefinite = True

    def targets(self, network: Network, batch: Batch) -> PyTree:
        with network.pass_counter.phase("targets"):
            return network.outputs(batch.x), batch.y

    def loss(self, network: Network, theta: Tensor, x: PyTree, targets: PyTree) -> Tensor:
        f_ref, y = targets
        return self.likelihood.given(y).expected_nll(network(theta, x), f_ref).sum()

    def curvature_product(self, network: Network, batch: Batch, vectors: Tensor, total: Tensor | None = None) -> Tensor:
        jv = network.jvp(batch.x, vectors)  # v → J v
        likelihood = self.likelihood.given(batch.y)

        def h_jv(f: Tensor) -> Tensor:  # J v → Λ J v
            return likelihood.hessian_product(f, jv)

        return network.outputs_and_vjp(batch.x, h_jv, total)[1]  # Λ J v → Jᵀ Λ J v


def _nll(likelihood: Likelihood, y: Tensor, f: Tensor) -> Tensor:
    return likelihood.nll(f, y).sum()


@dataclass(frozen=True)
class Objective:
    """L(θ) over the chosen parameters of a network; A is its second derivative at θ̂.

    Of the data each process of the `process_group` takes its rows; sums are those over all.
    """

    network: Network
    data_term: DataTerm
    prior: Prior
    batches: TrainingData
    process_group: ProcessGroup = field(default_factory=ProcessGroup)

    @property
    def theta(self) -> Tensor:
        """θ̂ (P,)."""
        return self.network.theta

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood of the data term."""
        return self.data_term.likelihood

    def available_bytes(self) -> int:
        """Free memory; where processes share rows, that of the one that has least, in which what all do must fit."""
        return self.process_group.least(available_bytes(self.theta.device), self.theta.device)

    def with_targets(self) -> Iterator[tuple[Batch, PyTree]]:
        """Each batch, as far as it is this process's, with its targets."""
        for batch in self.process_group.parts(self.batches):
            with self.network.check.on_training_rows():
                targets = self.data_term.targets(self.network, batch)
            yield batch, targets

    def batch_loss(self, theta: Tensor, x: PyTree, targets: PyTree, share: float) -> Tensor:
        """The batch's part of L: its rows, and `share` = B/N of the prior. Differentiable, and safe inside vmap."""
        return self.data_term.loss(self.network, theta, x, targets) + share * self.prior.energy(theta)

    def share(self, batch: Batch) -> float:
        """B/N."""
        return len(batch) / self.batches.n_data

    def loss(self, theta: Tensor) -> Tensor:
        """L(θ)."""
        with torch.no_grad():
            parts = [self.batch_loss(theta, b.x, t, self.share(b)) for b, t in self.with_targets()]
        return self.process_group.total(torch.stack([theta.new_zeros(()), *parts]).sum())

    def gradient(self, theta: Tensor) -> Tensor:
        """∇L(θ), (P,)."""
        total = torch.zeros_like(theta)
        if type(self.data_term) is LabelLoss and theta is self.theta:
            with self.network.check.on_training_rows():
                for batch in self.process_group.parts(self.batches):
                    total += self.network.slope_of(batch.x, partial(_nll, self.likelihood, batch.y))
            return self.process_group.total(total).addcmul_(self.prior.precision, theta - self.prior.mean)
        for batch, targets in self.with_targets():
            with differentiable(), self.network.pass_counter.transformed(backward=1):
                total += grad(self.batch_loss)(theta, batch.x, targets, self.share(batch)).detach()
        return self.process_group.total(total)

    def check_displaced(self) -> None:
        """Check that outputs follow the gradient of the user's module where weights are displaced.

        Raises:
            ModelError: they do not, so that no refit can be read.
        """
        with self.network.check.on_training_rows():
            for batch in self.process_group.parts(self.batches):
                self.network.check_displaced(batch.x)

    def product(self, vectors: Tensor) -> Tensor:
        """A v for each of vectors (K, P): one shared pass over the data."""
        total = torch.zeros_like(vectors)
        with self.network.check.on_training_rows():
            for batch in self.process_group.parts(self.batches):
                self.data_term.curvature_product(self.network, batch, vectors, total)
        return self.process_group.total(total).addcmul_(vectors, self.prior.precision)

    def centred(self, *, curvature: str) -> Objective:
        """An objective whose gradient vanishes at θ̂ and whose second derivative there is the curvature asked for.

        "ggn": the network trained on its own predictions. Its Hessian at θ̂ is exactly the GGN + δ.
        "hessian": L(θ) − ∇L(θ̂)ᵀ(θ − θ̂). Either way the prior, less its slope, is ½ Σ δ (θ − θ̂)².
        """
        terms = {"ggn": SelfTargetLoss, "hessian": GradientCorrectedLoss}
        prior = replace(self.prior, mean=self.theta)
        return replace(self, data_term=terms[curvature](self.likelihood), prior=prior)
