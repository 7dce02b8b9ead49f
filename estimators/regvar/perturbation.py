"""The scalar functions r_k(θ) that RegVar adds to the training loss, with their gradients at θ̂."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from estimators.numerics.pytrees import PyTree, select_rows
from estimators.regvar.bounds import BoundsOf

__all__ = ["LinearPerturbation", "Perturbation"]


@dataclass(frozen=True)
class Perturbation(ABC):
    """K scalar functions r_k(θ), for which a solver computes the displacements A⁻¹∇r_k(θ̂).

    Args:
        gradient: ∇r_k(θ̂), (K, P).
        items: pytree of tensors with leading dimension K; item k distinguishes r_k from the other functions.
        initial_guess: first guess of A⁻¹∇r_k, (K, P), or None for zero.
        max_products: products with A per function that a solver without its own tolerance spends; None if the result
            must be exact.
        bounds_of: makes bounds of the variance from a Krylov space, for a solver that measures its error; or None.
    """

    gradient: Tensor
    items: PyTree
    initial_guess: Tensor | None = None
    max_products: int | None = None
    bounds_of: BoundsOf | None = None
    linear: ClassVar[bool] = False
    """Whether ∇r equals `gradient` at every θ."""

    def select(self, which: slice) -> Self:
        """Return the perturbation restricted to the functions `which`."""
        guess = None if self.initial_guess is None else self.initial_guess[which]
        return replace(self, gradient=self.gradient[which], items=select_rows(self.items, which), initial_guess=guess)

    @abstractmethod
    def value(self, theta: Tensor, item: PyTree, x: PyTree, share: float) -> Tensor:
        """Return the part of r_k(θ) that belongs to one batch; safe inside `torch.func.vmap`.

        Args:
            theta: parameters, (P,).
            item: entry k of `items`.
            x: inputs of the batch.
            share: B/N, the fraction of the training rows that are in the batch.
        """


@dataclass(frozen=True)
class LinearPerturbation(Perturbation):
    """Linear functions r_k(θ) = u_kᵀ(θ − centre); `items` are the gradients u_k themselves."""

    linear = True
    centre: Tensor | None = None

    @classmethod
    def along(
        cls,
        gradient: Tensor,
        centre: Tensor,
        *,
        initial_guess: Tensor | None = None,
        max_products: int | None = None,
        bounds_of: BoundsOf | None = None,
    ) -> LinearPerturbation:
        """Return the linear functions with gradients u (K, P) about `centre` (P,)."""
        return cls(gradient, gradient, initial_guess, max_products, bounds_of, centre)

    def value(self, theta: Tensor, item: PyTree, x: PyTree, share: float) -> Tensor:  # noqa: ARG002
        assert self.centre is not None
        return share * torch.dot(item, theta - self.centre)
