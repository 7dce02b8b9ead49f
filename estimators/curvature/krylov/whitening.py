"""Coordinates in which the prior is a multiple of the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from estimators.curvature.krylov.block_lanczos import Product

__all__ = ["PriorWhitening"]


@dataclass(frozen=True)
class PriorWhitening:
    """θ = s θ̃, where A becomes s A s = G̃ + `unit`·1, with G̃ ⪰ 0 for a GGN.

    For a single δ they are those of θ itself, with δ as the unit, and nothing of θ's size is copied; for several,
    s = 1/√δ, a preconditioner, and the unit is 1. Where some δ are 0 they are θ's own, and the unit is 0.
    """

    scale: Tensor | None
    unit: float

    @classmethod
    def of(cls, delta: Tensor) -> Self:
        """For prior precisions (P,)."""
        smallest, largest = float(delta.min()), float(delta.max())
        if smallest in (0.0, largest):
            return cls(None, smallest)
        return cls(delta.rsqrt(), 1.0)

    def product(self, product: Product) -> Product:
        """v → A v  becomes  ṽ → s A s ṽ."""
        scale = self.scale
        if scale is None:
            return product
        return lambda v: product(scale * v).mul_(scale)

    def right(self, b: Tensor) -> Tensor:
        """A right-hand side b (K, P): s b."""
        return b if self.scale is None else self.scale * b

    def into(self, u: Tensor | None) -> Tensor | None:
        """ũ = u/s, (K, P)."""
        return u if self.scale is None or u is None else u / self.scale

    def back_(self, u: Tensor) -> Tensor:
        """u = s ũ, in its place."""
        return u if self.scale is None else u.mul_(self.scale)

    @property
    def whitener(self) -> Tensor | float:
        """What takes orthonormal vectors of these coordinates to θ's, with the identity as the prior's precision."""
        assert self.unit > 0
        return self.unit**-0.5 if self.scale is None else self.scale
