"""The Krylov space that block conjugate gradients search: an orthonormal basis that grows by a block an iteration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor

from estimators.errors import IndefiniteHessianError
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.reductions import combine_, inner, orthonormalise_
from estimators.runtime.memory import available_bytes

__all__ = ["BlockLanczos", "Free", "Product", "krylov_basis", "krylov_relation"]

Product = Callable[[Tensor], Tensor]
"""v → A v for each of vectors (k, P), in a tensor that the caller may overwrite."""
Free = Callable[[], int]
"""Bytes of memory that are free; in a team, the same number in all processes."""
_BASIS_BYTES = 2**32
_BLOCKS = 8  # to begin with
_ROUND_OFF = 0.5  # of a unit vector: with less left of it outside the space, it was round-off


class BlockLanczos:
    """The Krylov space of one residual block (K, P): basis W (r, P) by rows, T = W A Wᵀ, W r₀ and the next block Q.

    A Wᵀ = Wᵀ T + Qᵀ (Q A Wᵀ): what is left of a right-hand side after the Galerkin solve lies along Q, and is Qᵀ left.
    Of the size of θ it has W and Q alone, in one storage with room for `blocks` of them, and in `extend` the block that
    it makes.
    """

    def __init__(self, product: Product, residual: Tensor, *, blocks: int = _BLOCKS, free: Free | None = None) -> None:
        self.product, self.products, self.free = product, 0, _own(free, residual)
        self.floor = residual.norm(dim=1).max() * torch.finfo(residual.dtype).eps * 4
        self.projected = torch.zeros(0, 0, dtype=algebra_dtype(residual.device), device=residual.device)
        most = min(_BASIS_BYTES, self.free() // 3)
        room = max(2, min(blocks, most // max(1, residual.nbytes) + 2))  # so far it goes before it is thinned
        self.storage = residual.new_empty(room * len(residual), residual.shape[1])
        self.storage[: len(residual)] = residual
        self.block, self.coupling = orthonormalise_(self.storage[: len(residual)], self.floor)
        self.start = self.coupling  # W r₀: what is not zero of it, and where
        self.before = torch.zeros((), dtype=torch.long)
        self.coefficients = self.projected.new_zeros(0, len(residual))

    _KEPT = ("floor", "projected", "coupling", "start", "before", "coefficients")

    def tensors(self) -> dict[str, Tensor]:
        """All that it goes on from."""
        return {"basis": self.extended, **{name: getattr(self, name) for name in self._KEPT}}

    @classmethod
    def restored(cls, product: Product, tensors: dict[str, Tensor], *, free: Free | None = None) -> Self:
        """From `tensors()`."""
        cycle = cls.__new__(cls)
        cycle.product, cycle.products, cycle.free = product, 0, _own(free, tensors["basis"])
        for name in cls._KEPT:
            setattr(cycle, name, tensors[name])
        cycle.storage = tensors["basis"]
        cycle.block = cycle.storage[cycle.rank :]
        return cycle

    @property
    def rank(self) -> int:
        """r."""
        return len(self.projected)

    @property
    def basis(self) -> Tensor:
        """W (r, P), the filled part of the storage: large bases are not copied at every step."""
        return self.storage[: self.rank]

    @property
    def extended(self) -> Tensor:
        """W and the next block, (r + k, P)."""
        return self.storage[: self.rank + len(self.block)]

    def _store(self, block: Tensor) -> None:
        """The next block behind W."""
        end = self.rank + len(block)
        if end > len(self.storage):
            grown = self.storage.new_empty(end + max(len(block), end // 2), self.storage.shape[1])
            grown[: self.rank] = self.basis
            self.storage = grown
        self.storage[self.rank : end] = block
        self.block = self.storage[self.rank : end]

    def done(self, tolerance: Tensor) -> bool:
        return len(self.block) == 0 or bool((self.residual_norms() <= tolerance).all())

    def full(self) -> bool:
        room = min(_BASIS_BYTES, (self.free() + self.basis.nbytes) // 3)
        return self.basis.nbytes > room and self.rank >= 2 * len(self.block)

    def thin(self) -> None:
        """Go on from the present u with the leading half of the space: A V = V Θ + Qᵀ(…), Q the next block.

        Thick restart (Wu & Simon 2000): the Ritz vectors of the largest Ritz values stay solved for.
        """
        left, keep, block = self.left, self.rank // 2, self.block
        values, vectors = torch.linalg.eigh(self.projected)
        combine_(self.basis, vectors[:, -keep:].T)  # in place, without a second basis
        self.projected = values[-keep:].diag()
        self._store(block)
        self.start, self.before = left, torch.tensor(keep)
        self.coefficients = self.coefficients[:0]

    @property
    def left(self) -> Tensor:
        """(k, K): b − A u = leftᵀ Q."""
        if not len(self.coefficients):
            return self.start
        return -self.coupling @ self.coefficients[len(self.coefficients) - self.coupling.shape[1] :]

    def residual_norms(self) -> Tensor:
        """‖b − A u‖ of each right-hand side."""
        norms: Tensor = self.left.norm(dim=0)
        return norms

    def full_coupling(self) -> Tensor:
        """Q A Wᵀ (k, r): the next block couples to the last one only."""
        coupling = self.coupling.new_zeros(len(self.block), self.rank)
        if self.rank:
            coupling[:, self.rank - self.coupling.shape[1] :] = self.coupling
        return coupling

    def extend(self) -> None:
        image = self.product(self.block)  # W_j → A W_j
        self.products += len(image)
        outside = self.storage[: self.rank + len(image)]  # W with W_j
        floor = self._image_floor(image, len(outside))
        self._grow_projected(_taken_out(image, outside), self.rank)
        _taken_out(image, outside)  # a second time: round-off of the first
        rows, first = orthonormalise_(image, floor)
        _taken_out(rows, outside)  # a third: what was small has been scaled up
        rows, second = orthonormalise_(rows, torch.full_like(floor, _ROUND_OFF))  # mostly in the basis: round-off
        self._store(rows)
        self.coupling = second @ first

    def _grow_projected(self, along: Tensor, old: int) -> None:
        grown = along.new_zeros(along.shape[1], along.shape[1])
        grown[:old, :old] = self.projected
        grown[old:, :] = along
        grown[:old, old:] = along[:, :old].T
        grown[old:, old:] = 0.5 * (along[:, old:] + along[:, old:].T)
        self.projected = grown

    def _image_floor(self, image: Tensor, used: int) -> Tensor:
        room = image.shape[1] - used
        floor = image.norm(dim=1).max() * torch.finfo(image.dtype).eps * 32
        return floor if room > 0 else torch.full_like(floor, torch.inf)

    def solve(self) -> None:
        """Coefficients T⁻¹ W r₀; T without a Cholesky factor proves A indefinite (Cauchy interlacing)."""
        rhs = self.projected.new_zeros(self.rank, self.start.shape[1])
        rhs[int(self.before) : int(self.before) + len(self.start)] = self.start
        factor, info = torch.linalg.cholesky_ex(self.projected)
        if int(info) != 0:
            ritz = torch.linalg.eigvalsh(self.projected)
            raise IndefiniteHessianError(smallest=float(ritz[0]), largest=float(ritz[-1]))
        self.coefficients = torch.cholesky_solve(rhs, factor)

    def correction(self) -> Tensor:
        """u less where the cycle began, (K, P)."""
        return self.coefficients.T.to(self.storage.dtype) @ self.basis[: len(self.coefficients)]


def _taken_out(rows: Tensor, basis: Tensor) -> Tensor:
    """Leave of the rows (k, P), in place, what is orthogonal to the basis (r, P): what they had along it, (k, r)."""
    along = inner(rows, basis)
    rows.addmm_(along.to(rows.dtype), basis, alpha=-1)
    return along


def krylov_basis(product: Product, start: Tensor, *, size: int) -> tuple[Tensor, Tensor]:
    """Orthonormal basis (r, P) of the Krylov space of `start` (K, P), and T (r, r); r ≥ size or the space is exhausted.

    Its eigenvalues (Ritz values) lie within the spectrum of A: the smallest bounds A's smallest from above.
    """
    cycle = _grown(product, start, size)
    return cycle.basis, cycle.projected


def krylov_relation(product: Product, start: Tensor, *, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the next block: W and Q (r + k, P), T, and `coupling` Q A Wᵀ (k, r)."""
    cycle = _grown(product, start, size)
    return cycle.extended, cycle.projected, cycle.full_coupling()


def _grown(product: Product, start: Tensor, size: int) -> BlockLanczos:
    cycle = BlockLanczos(product, start)
    while len(cycle.block) and len(cycle.basis) < size:
        cycle.extend()
    return cycle


def _own(free: Free | None, tensor: Tensor) -> Free:
    """`free`, or that of this process."""
    return free or partial(available_bytes, tensor.device)
