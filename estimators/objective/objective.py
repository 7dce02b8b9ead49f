"""The objective: what was minimised, and the objectives that RegVar refits.

    L(θ) = Σₙ data(θ; xₙ, yₙ) + ½ Σᵢ δᵢ (θᵢ − θ₀ᵢ)²

Sums over rows, never means. The data term is one of three, and it determines the second derivative A at θ̂:

    LabelLoss              −log p(y | f)                                    exact Hessian   gradient as trained
    GradientCorrectedLoss  −log p(y | f) − gₙᵀ(θ − θ̂), gₙ its slope at θ̂    exact Hessian   zero gradient per row at θ̂
    SelfTargetLoss         −E[log p(y | f)], y ~ p(· | f(x; θ̂))             GGN             zero gradient per row at θ̂
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
from estimators.models.function_checks import check_displaced_outputs
from estimators.models.kernels import differentiable
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.runtime.memory import available_bytes

__all__ = ["DataTerm", "GradientCorrectedLoss", "LabelLoss", "Objective", "Prior", "SelfTargetLoss"]


@dataclass(frozen=True)
class Prior:
    """Gaussian prior on θ with independent entries.

    Args:
        precision: δ >= 0, (P,).
        mean: θ₀, (P,).
    """

    precision: Tensor
    mean: Tensor

    def energy(self, theta: Tensor) -> Tensor:
        """Return the negative log-density of the prior without its constant, ½ Σᵢ δᵢ (θᵢ − θ₀ᵢ)².

        Args:
            theta: θ, (P,).

        Returns:
            A scalar.
        """
        return 0.5 * (self.precision * (theta - self.mean).square()).sum()


@dataclass(frozen=True)
class DataTerm(ABC):
    """The part of the objective that sees the data, one batch at a time.

    Args:
        likelihood: the likelihood p(y | f).
    """

    likelihood: Likelihood
    centred: ClassVar[bool] = True
    """Whether it has no slope at θ̂."""
    semidefinite: ClassVar[bool] = False
    """Whether its curvature at θ̂ is never negative."""

    @abstractmethod
    def targets(self, network: Network, batch: Batch) -> PyTree:
        """Return what the loss of the batch needs besides x: computed once per batch for all perturbed copies."""

    @abstractmethod
    def loss(self, network: Network, theta: Tensor, x: PyTree, targets: PyTree) -> Tensor:
        """Return the sum over the rows, a scalar; differentiable in θ (P,), and safe inside vmap."""

    @abstractmethod
    def curvature_product(self, network: Network, batch: Batch, vectors: Tensor, total: Tensor | None = None) -> Tensor:
        """Return the batch's second derivative at θ̂ times each of vectors (K, P), added to `total` if given."""


class LabelLoss(DataTerm):
    """The loss that was trained, −log p(y | f). The curvature is the exact Hessian.

    Args:
        likelihood: the likelihood p(y | f).
    """

    centred = False

    def targets(self, network: Network, batch: Batch) -> PyTree:  # noqa: ARG002
        return batch.y

    def loss(self, network: Network, theta: Tensor, x: PyTree, targets: PyTree) -> Tensor:
        return self.likelihood.nll(network(theta, x), targets).sum()

    def curvature_product(self, network: Network, batch: Batch, vectors: Tensor, total: Tensor | None = None) -> Tensor:
        images = network.hessian_product(batch.x, partial(_nll, self.likelihood, batch.y), vectors)
        return images if total is None else total.add_(images)


class GradientCorrectedLoss(LabelLoss):
    """The loss −log p(y | f) minus its linear part at θ̂: equal curvature, and zero gradient at θ̂ in every batch."""

    centred = True

    def targets(self, network: Network, batch: Batch) -> PyTree:
        with network.pass_counter.phase("targets"):
            return batch.y, network.gradient_of(batch.x, partial(_nll, self.likelihood, batch.y))

    def loss(self, network: Network, theta: Tensor, x: PyTree, targets: PyTree) -> Tensor:
        labels, slope = targets
        return super().loss(network, theta, x, labels) - torch.dot(slope, theta - network.theta)


class SelfTargetLoss(DataTerm):
    """The loss −E[log p(y | f)] over y ~ p(· | f(x; θ̂)). The curvature at θ̂ is exactly the GGN.

    Args:
        likelihood: the likelihood p(y | f).
    """

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
    """Objective L(θ) over the chosen parameters of a network, with its second derivative A at θ̂.

    Args:
        network: the network at θ̂.
        data_term: the loss of a batch.
        prior: the prior on θ.
        batches: the training data.
        process_group: processes that share the rows; sums go over all of them.
    """

    network: Network
    data_term: DataTerm
    prior: Prior
    batches: TrainingData
    process_group: ProcessGroup = field(default_factory=ProcessGroup)

    @property
    def theta(self) -> Tensor:
        """Trained weights θ̂, (P,)."""
        return self.network.theta

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood of the data term."""
        return self.data_term.likelihood

    def available_bytes(self) -> int:
        """Return the free memory in bytes; if processes share rows, the smallest of all processes."""
        return self.process_group.minimum(available_bytes(self.theta.device), self.theta.device)

    def with_targets(self) -> Iterator[tuple[Batch, PyTree]]:
        """Yield each batch, restricted to the rows of this process, with its targets."""
        for batch in self.process_group.shards(self.batches):
            with self.network.check.on_training_rows():
                targets = self.data_term.targets(self.network, batch)
            yield batch, targets

    def batch_loss(self, theta: Tensor, x: PyTree, targets: PyTree, share: float) -> Tensor:
        """Return the batch's part of L: the loss of its rows plus its share of the prior.

        The result is differentiable, and the function is safe inside vmap.

        Args:
            theta: θ, (P,).
            x: inputs of the batch.
            targets: what the data term needs besides x.
            share: B/N, the fraction of the prior.

        Returns:
            A scalar.
        """
        return self.data_term.loss(self.network, theta, x, targets) + share * self.prior.energy(theta)

    def share(self, batch: Batch) -> float:
        """Return B/N.

        Args:
            batch: a batch of B rows.

        Returns:
            The fraction of the training rows in the batch.
        """
        return len(batch) / self.batches.n_data

    def loss(self, theta: Tensor) -> Tensor:
        """Return L(θ).

        Args:
            theta: θ, (P,).

        Returns:
            A scalar, without a graph.
        """
        with torch.no_grad():
            parts = [self.batch_loss(theta, b.x, t, self.share(b)) for b, t in self.with_targets()]
        return self.process_group.sum_over_rows(torch.stack([theta.new_zeros(()), *parts]).sum())

    def gradient(self, theta: Tensor) -> Tensor:
        """Return ∇L(θ).

        Args:
            theta: θ, (P,).

        Returns:
            The gradient, (P,).
        """
        total = torch.zeros_like(theta)
        if type(self.data_term) is LabelLoss and theta is self.theta:
            with self.network.check.on_training_rows():
                for batch in self.process_group.shards(self.batches):
                    total += self.network.gradient_of(batch.x, partial(_nll, self.likelihood, batch.y))
            return self.process_group.sum_over_rows(total).addcmul_(self.prior.precision, theta - self.prior.mean)
        for batch, targets in self.with_targets():
            with differentiable(), self.network.pass_counter.transformed(backward=1):
                total += grad(self.batch_loss)(theta, batch.x, targets, self.share(batch)).detach()
        return self.process_group.sum_over_rows(total)

    def check_displaced(self, *, refits: bool = False) -> None:
        """Check that outputs at displaced weights follow the gradient of the user's module.

        Args:
            refits: whether the caller refits the network from the trained weights. Then many rows at a kink of the
                network there, such as that of a ReLU, raise, too.

        Raises:
            ModelError: the outputs do not follow the gradient, so that no method may displace the weights.
        """
        with self.network.check.on_training_rows():
            for batch in self.process_group.shards(self.batches):
                check_displaced_outputs(self.network, batch.x, refits=refits)

    def product(self, vectors: Tensor) -> Tensor:
        """Return A v for several vectors in one shared pass over the data.

        Args:
            vectors: v, (K, P).

        Returns:
            A v, (K, P).
        """
        total = torch.zeros_like(vectors)
        with self.network.check.on_training_rows():
            for batch in self.process_group.shards(self.batches):
                self.data_term.curvature_product(self.network, batch, vectors, total)
        return self.process_group.sum_over_rows(total).addcmul_(vectors, self.prior.precision)

    def centred(self, *, curvature: str) -> Objective:
        """Return an objective with zero gradient at θ̂ and with the given curvature there.

        In both cases the prior without its slope is ½ Σ δ (θ − θ̂)².

        Args:
            curvature: "ggn", the loss on the network's own predictions, whose Hessian at θ̂ is exactly the GGN + δ; or
                "hessian", L(θ) − ∇L(θ̂)ᵀ(θ − θ̂).

        Returns:
            The centred objective over the same data.
        """
        terms = {"ggn": SelfTargetLoss, "hessian": GradientCorrectedLoss}
        prior = replace(self.prior, mean=self.theta)
        return replace(self, data_term=terms[curvature](self.likelihood), prior=prior)
