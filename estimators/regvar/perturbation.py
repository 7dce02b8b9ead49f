"""What RegVar regularises by: scalar functions r_k(θ), one a replica, with their slopes at θ̂."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from estimators.numerics.pytrees import PyTree, select_rows

__all__ = ["LinearPerturbation", "Perturbation"]


@dataclass(frozen=True)
class Perturbation(ABC):
    """K scalars r_k(θ).

    direction (K, P) = ∇r_k(θ̂);  start (K, P) or None: a first guess of A⁻¹∇r_k;  items: a pytree of tensors with
    leading dimension K, what tells one r_k from the next;  budget: how many products with A a replica are worth
    spending by a solver without a tolerance of its own, None where the answer is to be exact.
    """

    direction: Tensor
    items: PyTree
    start: Tensor | None = None
    budget: int | None = None
    linear: ClassVar[bool] = False
    """Whether ∇r is `direction` everywhere."""

    def part(self, which: slice) -> Self:
        """Some of the replicas."""
        start = None if self.start is None else self.start[which]
        return replace(self, direction=self.direction[which], items=select_rows(self.items, which), start=start)

    @abstractmethod
    def value(self, theta: Tensor, item: PyTree, x: PyTree, share: float) -> Tensor:
        """The part of r(θ) of the replica with `item` that belongs to a batch x, `share` = B/N; safe inside vmap."""


@dataclass(frozen=True)
class LinearPerturbation(Perturbation):
    """r_k(θ) = u_kᵀ(θ − θ̂): linear, the items being the directions u themselves."""

    linear = True
    centre: Tensor | None = None

    @classmethod
    def along(
        cls, direction: Tensor, centre: Tensor, *, start: Tensor | None = None, budget: int | None = None
    ) -> LinearPerturbation:
        """Tilts by direction (K, P) about centre (P,)."""
        return cls(direction, direction, start, budget, centre)

    def value(self, theta: Tensor, item: PyTree, x: PyTree, share: float) -> Tensor:  # noqa: ARG002
        assert self.centre is not None
        return share * torch.dot(item, theta - self.centre)
