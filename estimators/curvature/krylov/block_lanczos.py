"""Block Lanczos: an orthonormal basis of a Krylov space that grows by one block per iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Self

import torch
from torch import Tensor

from estimators.errors import IndefiniteHessianError
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.reductions import combine_, inner, orthonormalise_
from estimators.runtime.memory import available_bytes

__all__ = ["BlockLanczos", "FreeBytes", "Product", "krylov_basis", "krylov_relation"]

Product = Callable[[Tensor], Tensor]
"""v → A v for each of vectors (k, P), in a tensor that the caller may overwrite."""
FreeBytes = Callable[[], int]
"""The free memory in bytes; processes that share a fit receive the same number."""
_BASIS_BYTES = 2**32
"""Largest size of a basis with the next block, 4 GiB."""
_SOLVE_BYTES = 13 * 2**29
"""Largest size of these with five further blocks, 6.5 GiB: right-hand sides, guesses, solutions, images, and a copy."""
_FEWEST_BLOCKS = 4
"""Blocks that the basis may have nevertheless: the leading half of fewer loses most of what has been found."""
_BLOCKS = 8
"""Blocks that the storage has room for at first."""
_ROUND_OFF = 0.5
"""Smallest norm outside the space of a new unit vector; below it, the vector is round-off."""


class BlockLanczos:
    """The Krylov space of a block of residuals r₀: basis W (r, P) by rows, T = W A Wᵀ, and the next block Q (k, P).

    A Wᵀ = Wᵀ T + Qᵀ (Q A Wᵀ). Therefore the residual after the Galerkin solve lies in the span of Q. Only W and Q have
    the size of θ, in one storage, besides the new block in `extend`.

    Args:
        product: v (k, P) -> A v (k, P).
        residual: r₀ (K, P).
        blocks: how many blocks the storage has room for at first.
        free_bytes: the free memory; None for that of this process.
    """

    def __init__(
        self, product: Product, residual: Tensor, *, blocks: int = _BLOCKS, free_bytes: FreeBytes | None = None
    ) -> None:
        self.product, self.products, self.free_bytes = (
            product,
            0,
            free_bytes or partial(available_bytes, residual.device),
        )
        self.floor = residual.norm(dim=1).max() * torch.finfo(residual.dtype).eps * 4
        self.projected = torch.zeros(0, 0, dtype=algebra_dtype(residual.device), device=residual.device)
        most = _room(residual, self.free_bytes())
        room = max(2, min(blocks, most // max(1, residual.nbytes) + 1))  # it grows to `most` before a restart
        self.storage = residual.new_empty(room * len(residual), residual.shape[1])
        self.storage[: len(residual)] = residual
        self.block, self.coupling = orthonormalise_(self.storage[: len(residual)], self.floor)
        self.start = self.coupling  # the non-zero rows of W r₀, from row `before` on
        self.before = torch.zeros((), dtype=torch.long)
        self.coefficients = self.projected.new_zeros(0, len(residual))

    _STATE = ("floor", "projected", "coupling", "start", "before", "coefficients")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors from which `restored` continues."""
        return {"basis": self.extended, **{name: getattr(self, name) for name in self._STATE}}

    @classmethod
    def restored(cls, product: Product, tensors: dict[str, Tensor], *, free_bytes: FreeBytes | None = None) -> Self:
        """The space of `tensors()`."""
        cycle = cls.__new__(cls)
        cycle.product, cycle.products, cycle.free_bytes = (
            product,
            0,
            free_bytes or partial(available_bytes, tensors["basis"].device),
        )
        for name in cls._STATE:
            setattr(cycle, name, tensors[name])
        cycle.storage = tensors["basis"]
        cycle.block = cycle.storage[cycle.rank :]
        return cycle

    @classmethod
    def continued(
        cls, product: Product, extended: Tensor, projected: Tensor, coupling: Tensor, *, free_bytes: FreeBytes
    ) -> Self:
        """The space of W and Q (r + k, P), T (r, r) and Q A Wᵀ (k, r), without right-hand sides."""
        nothing = projected.new_zeros(0, 0)
        tensors = {"projected": projected.clone(), "coupling": coupling, "basis": extended.clone()}
        unused = {"floor": nothing, "start": nothing, "before": torch.zeros((), dtype=torch.long)}
        return cls.restored(product, {**tensors, **unused, "coefficients": nothing}, free_bytes=free_bytes)

    @property
    def rank(self) -> int:
        """r, the number of vectors in W."""
        return len(self.projected)

    @property
    def basis(self) -> Tensor:
        """W (r, P), a view of the storage: large bases are not copied at every step."""
        return self.storage[: self.rank]

    @property
    def extended(self) -> Tensor:
        """W and the next block Q, (r + k, P)."""
        return self.storage[: self.rank + len(self.block)]

    def _store(self, block: Tensor) -> None:
        """Store the next block Q after W."""
        end = self.rank + len(block)
        if end > len(self.storage):
            row_bytes = self.storage.shape[1] * self.storage.element_size()
            most = _room(block, self.free_bytes() + self.storage.nbytes) // row_bytes + len(block)
            grown = self.storage.new_empty(max(end, min(end + end // 2, most)), self.storage.shape[1])
            grown[: self.rank] = self.basis
            self.storage = grown
        self.storage[self.rank : end] = block
        self.block = self.storage[self.rank : end]

    def done(self, tolerance: Tensor) -> bool:
        """Whether the space is exhausted, or all residual norms are at most `tolerance` (K,)."""
        return len(self.block) == 0 or bool((self.residual_norms() <= tolerance).all())

    def full(self) -> bool:
        """Whether the basis and the next block have reached the memory they may take."""
        room = _room(self.block, self.free_bytes() + self.extended.nbytes)
        return self.extended.nbytes > room and self.rank >= 2 * len(self.block)

    def thick_restart(self) -> None:
        """Continue from the present u with the leading half of the space (thick restart, Wu & Simon 2000).

        The Ritz vectors V of the largest Ritz values Θ stay: A Vᵀ = Vᵀ Θ + Qᵀ(…), with the same next block Q.
        """
        residual, keep, block = self.residual_coefficients, self.rank // 2, self.block
        values, vectors = torch.linalg.eigh(self.projected)
        combine_(self.basis, vectors[:, -keep:].T)  # in place, without a second basis
        self.projected = values[-keep:].diag()
        self._store(block)
        self.start, self.before = residual, torch.tensor(keep)
        self.coefficients = self.coefficients[:0]

    @property
    def residual_coefficients(self) -> Tensor:
        """R (k, K) with b − A u = Rᵀ Q."""
        if not len(self.coefficients):
            return self.start
        return -self.coupling @ self.coefficients[len(self.coefficients) - self.coupling.shape[1] :]

    def residual_norms(self) -> Tensor:
        """‖b − A u‖ per right-hand side, (K,)."""
        norms: Tensor = self.residual_coefficients.norm(dim=0)
        return norms

    def full_coupling(self) -> Tensor:
        """Q A Wᵀ (k, r), non-zero at the last block only."""
        coupling = self.coupling.new_zeros(len(self.block), self.rank)
        if self.rank:
            coupling[:, self.rank - self.coupling.shape[1] :] = self.coupling
        return coupling

    def extend(self) -> None:
        """Add the next block to W, and compute the block after it by one product with A."""
        image = self.product(self.block)  # W_j → A W_j
        self.products += len(image)
        outside = self.storage[: self.rank + len(image)]  # W with W_j
        floor = self._image_floor(image, len(outside))
        self._grow_projected(_orthogonalise_(image, outside), self.rank)
        _orthogonalise_(image, outside)  # a second time, against round-off of the first
        rows, first = orthonormalise_(image, floor)
        _orthogonalise_(rows, outside)  # a third time: small rows have been scaled up
        rows, second = orthonormalise_(
            rows, torch.full_like(floor, _ROUND_OFF)
        )  # drop rows that lie mostly in the basis
        self._store(rows)
        self.coupling = second @ first

    def augment(self, vectors: Tensor) -> None:
        """Add the part of `vectors` (m, P) outside W and Q to the next block Q: the space grows from them, too."""
        rows = _outside(vectors, self.extended)
        self.coupling = torch.cat([self.coupling, self.coupling.new_zeros(len(rows), self.coupling.shape[1])])
        self._store(torch.cat([self.block, rows]))

    @contextmanager
    def branch(self, vectors: Tensor) -> Iterator[Self]:
        """Yield the space W with the part of `vectors` (m, P) outside W as its next block, to grow from these.

        The two share the storage of W. At the end the next block Q of this space is put back.
        """
        kept, before = self.block.clone(), self.products
        other = copy(self)
        other._store(_outside(vectors, self.basis))
        try:
            yield other
        finally:
            self.products += other.products - before
            self._store(kept)

    def _grow_projected(self, along: Tensor, old: int) -> None:
        """Extend T by the inner products (k, r + k) of the new image with W, symmetrised against round-off."""
        grown = along.new_zeros(along.shape[1], along.shape[1])
        grown[:old, :old] = self.projected
        grown[old:, :] = along
        grown[:old, old:] = along[:, :old].T
        grown[old:, old:] = 0.5 * (along[:, old:] + along[:, old:].T)
        self.projected = grown

    def _image_floor(self, image: Tensor, used: int) -> Tensor:
        """The norm below which a row of A W is round-off; infinite if W spans the whole space."""
        room = image.shape[1] - used
        floor = image.norm(dim=1).max() * torch.finfo(image.dtype).eps * 32
        return floor if room > 0 else torch.full_like(floor, torch.inf)

    def solve(self) -> None:
        """Compute the coefficients T⁻¹ W r₀.

        Raises:
            IndefiniteHessianError: T has no Cholesky factor; by Cauchy interlacing A is then not positive definite.
        """
        rhs = self.projected.new_zeros(self.rank, self.start.shape[1])
        rhs[int(self.before) : int(self.before) + len(self.start)] = self.start
        factor, info = torch.linalg.cholesky_ex(self.projected)
        if int(info) != 0:
            ritz = torch.linalg.eigvalsh(self.projected)
            raise IndefiniteHessianError(smallest=float(ritz[0]), largest=float(ritz[-1]))
        self.coefficients = torch.cholesky_solve(rhs, factor)

    def correction(self) -> Tensor:
        """The difference (K, P) between u and its value at the start of the cycle."""
        return self.coefficients.T.to(self.storage.dtype) @ self.basis[: len(self.coefficients)]


def _room(block: Tensor, free_bytes: int) -> int:
    """Return how many bytes a basis with blocks of this size may take."""
    wanted = max(_SOLVE_BYTES - 5 * block.nbytes, _FEWEST_BLOCKS * block.nbytes)
    return min(_BASIS_BYTES, wanted, free_bytes // 3)


def _orthogonalise_(rows: Tensor, basis: Tensor) -> Tensor:
    """Make rows (k, P) orthogonal to the basis (r, P) in place, and return their inner products (k, r) with it."""
    along = inner(rows, basis)
    rows.addmm_(along.to(rows.dtype), basis, alpha=-1)
    return along


def _outside(vectors: Tensor, basis: Tensor) -> Tensor:
    """Return an orthonormal basis of the part of `vectors` (m, P) outside the basis (r, P); without round-off."""
    if len(basis) == basis.shape[1]:
        return vectors[:0]
    rows = vectors.clone()
    floor = rows.norm(dim=1).max() * torch.finfo(rows.dtype).eps * 32
    for _ in range(2):
        _orthogonalise_(rows, basis)
    rows, _ = orthonormalise_(rows, floor)
    _orthogonalise_(rows, basis)  # again: small rows have been scaled up
    rows, _ = orthonormalise_(rows, torch.full_like(floor, _ROUND_OFF))
    return rows[: basis.shape[1] - len(basis)]


def krylov_basis(product: Product, start: Tensor, *, size: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (r, P) of the Krylov space of `start` (K, P), and T (r, r).

    r is at least `size`, unless the space is exhausted. Eigenvalues of T (Ritz values) lie within the spectrum of A.
    """
    cycle = _grown(product, start, size)
    return cycle.basis, cycle.projected


def krylov_relation(product: Product, start: Tensor, *, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The Krylov space of `start` with its next block: W and Q (r + k, P), T (r, r), and Q A Wᵀ (k, r)."""
    cycle = _grown(product, start, size)
    return cycle.extended, cycle.projected, cycle.full_coupling()


def _grown(product: Product, start: Tensor, size: int) -> BlockLanczos:
    """Block Lanczos with at least `size` vectors, unless the space is exhausted."""
    cycle = BlockLanczos(product, start)
    while len(cycle.block) and len(cycle.basis) < size:
        cycle.extend()
    return cycle
