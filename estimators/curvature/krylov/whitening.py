"""Coordinates in which the prior precision is a multiple of the identity, if no δ is 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from estimators.curvature.krylov.block_lanczos import Product

__all__ = ["PriorWhitening"]


@dataclass(frozen=True)
class PriorWhitening:
    """Coordinates θ = s θ̃, in which A becomes s A s = G̃ + `unit`·I, with G̃ ⪰ 0 for a GGN.

    A u = b becomes (s A s) ũ = s b with u = s ũ.

    A single δ needs no change of coordinates: s = 1, and the unit is δ. For several δ, s = 1/√δ is a preconditioner,
    and the unit is 1. If some δ are 0, nothing is scaled: s = 1, the unit is 0, and G̃ = A contains the other δ.

    Attributes:
        scale: s (P,); None for 1, so that nothing of the size of θ is copied.
        unit: the prior precision in these coordinates.
    """

    scale: Tensor | None
    unit: float

    @classmethod
    def of(cls, delta: Tensor) -> Self:
        """The coordinates for prior precisions δ (P,)."""
        smallest, largest = float(delta.min()), float(delta.max())
        if smallest in (0.0, largest):
            return cls(None, smallest)
        return cls(delta.rsqrt(), 1.0)

    def product(self, product: Product) -> Product:
        """The product ṽ → s A s ṽ from the product v → A v."""
        scale = self.scale
        if scale is None:
            return product
        return lambda v: product(scale * v).mul_(scale)

    def whiten_rhs(self, b: Tensor) -> Tensor:
        """A right-hand side s b for b (K, P)."""
        return b if self.scale is None else self.scale * b

    def whiten(self, u: Tensor | None) -> Tensor | None:
        """ũ = u/s for u (K, P)."""
        return u if self.scale is None or u is None else u / self.scale

    def unwhiten_(self, u: Tensor) -> Tensor:
        """u = s ũ for ũ (K, P), in place."""
        return u if self.scale is None else u.mul_(self.scale)
