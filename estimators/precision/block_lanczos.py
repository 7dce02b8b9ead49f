"""The Krylov space that block conjugate gradients search: an orthonormal basis that grows by a block an iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from estimators.errors import IndefiniteHessianError
from estimators.long_rows import inner
from estimators.memory import available_bytes
from estimators.precision.dtype import algebra_dtype

__all__ = ["BlockLanczos", "Product", "krylov_basis", "krylov_relation"]

Product = Callable[[Tensor], Tensor]
_BASIS_BYTES = 2**32
_COLUMNS = 2**16


class BlockLanczos:
    """The Krylov space of one residual block (K, P): basis W (r, P) by rows, T = W A Wᵀ, W r₀ and the next block Q.

    A Wᵀ = Wᵀ T + Qᵀ (Q A Wᵀ): what is left of a right-hand side after the Galerkin solve lies along Q.
    """

    def __init__(self, product: Product, residual: Tensor) -> None:
        self.product, self.products = product, 0
        self.floor = residual.norm(dim=1).max() * torch.finfo(residual.dtype).eps * 4
        self.storage, self.rank = residual.new_empty(8 * len(residual), residual.shape[1]), 0
        self.projected = torch.zeros(0, 0, dtype=algebra_dtype(residual.device), device=residual.device)
        self.block, self.coupling = _orthonormal_rows(residual, self.floor)  # residualᵀ = blockᵀ · coupling
        self.start, self.before = self.coupling, torch.zeros((), dtype=torch.long)  # W r₀: what is not zero, and where
        self.coefficients = self.projected.new_zeros(0, len(residual))

    _KEPT = ("floor", "projected", "block", "coupling", "start", "before", "coefficients")

    def tensors(self) -> dict[str, Tensor]:
        """All that it goes on from."""
        return {"basis": self.basis, **{name: getattr(self, name) for name in self._KEPT}}

    @classmethod
    def restored(cls, product: Product, tensors: dict[str, Tensor]) -> Self:
        """From `tensors()`."""
        cycle = cls.__new__(cls)
        cycle.product, cycle.products = product, 0
        for name in cls._KEPT:
            setattr(cycle, name, tensors[name])
        cycle.storage, cycle.rank = tensors["basis"], len(tensors["basis"])
        return cycle

    @property
    def basis(self) -> Tensor:
        """W (r, P), the filled part of the storage: large bases are not copied at every step."""
        return self.storage[: self.rank]

    def extended(self) -> Tensor:
        """W and the next block, (r + k, P)."""
        self._store()
        return self.storage[: self.rank + len(self.block)]

    def _store(self) -> None:
        """The next block behind W."""
        end = self.rank + len(self.block)
        if end > len(self.storage):
            grown = self.storage.new_empty(2 * end, self.storage.shape[1])
            grown[: self.rank] = self.basis
            self.storage = grown
        self.storage[self.rank : end] = self.block

    def done(self, tolerance: Tensor) -> bool:
        return len(self.block) == 0 or bool((self.residual_norms() <= tolerance).all())

    def full(self) -> bool:
        room = min(_BASIS_BYTES, available_bytes(self.block.device) // 3 + self.basis.nbytes)
        return self.basis.nbytes > room and self.rank >= 2 * len(self.block)

    def thin(self) -> None:
        """Go on from the present u with the leading half of the space: A V = V Θ + Qᵀ(…), Q the next block.

        Thick restart (Wu & Simon 2000): the Ritz vectors of the largest Ritz values stay solved for.
        """
        along = -self._along_next()
        values, vectors = torch.linalg.eigh(self.projected)
        keep = self.rank // 2
        chosen = vectors[:, -keep:].T.to(self.storage.dtype)
        for columns in self.storage[: self.rank].split(_COLUMNS, dim=1):  # in place, without a second basis
            columns[:keep] = chosen @ columns
        self.rank, self.projected = keep, values[-keep:].diag()
        self.start, self.before = along, torch.tensor(keep)
        self.coefficients = self.coefficients[:0]

    def residual_norms(self) -> Tensor:
        """‖b − A u‖ of each right-hand side, from the coupling of the space to the next block."""
        norms: Tensor = self._along_next().norm(dim=0)
        return norms

    def remainder(self) -> Tensor:
        """b − A u, (K, P): all of it lies along the next block."""
        along = self._along_next()
        return (-along if len(self.coefficients) else along).T.to(self.block.dtype) @ self.block

    def full_coupling(self) -> Tensor:
        """Q A Wᵀ (k, r): the next block couples to the last one only."""
        coupling = self.coupling.new_zeros(len(self.block), len(self.basis))
        if len(self.basis):
            coupling[:, len(self.basis) - self.coupling.shape[1] :] = self.coupling
        return coupling

    def _along_next(self) -> Tensor:
        if not len(self.coefficients):
            return self.start
        return self.coupling @ self.coefficients[len(self.coefficients) - self.coupling.shape[1] :]

    def extend(self) -> None:
        image = self.product(self.block)  # W_j → A W_j
        self.products += len(self.block)
        old, new = self.rank, len(self.block)
        self._store()
        self.rank += new
        along = inner(image, self.basis)
        self._grow_projected(along, old, new)
        rest = image - along.to(image.dtype) @ self.basis
        rest = self._outside(rest)  # a second time: round-off of the first
        block, _ = _orthonormal_rows(rest, self._image_floor(image))
        block = self._outside(block)  # a third: what was small has been scaled up
        self.block, _ = _orthonormal_rows(block, torch.full_like(self.floor, 0.5))  # mostly in the basis: round-off
        self.coupling = inner(self.block, rest)

    def _outside(self, rows: Tensor) -> Tensor:
        """What of the rows (k, P) is orthogonal to W."""
        return rows - inner(rows, self.basis).to(rows.dtype) @ self.basis

    def _grow_projected(self, along: Tensor, old: int, new: int) -> None:
        grown = along.new_zeros(old + new, old + new)
        grown[:old, :old] = self.projected
        grown[old:, :] = along
        grown[:old, old:] = along[:, :old].T
        grown[old:, old:] = 0.5 * (along[:, old:] + along[:, old:].T)
        self.projected = grown

    def _image_floor(self, image: Tensor) -> Tensor:
        room = self.basis.shape[1] - len(self.basis)
        floor = image.norm(dim=1).max() * torch.finfo(image.dtype).eps * 32
        return floor if room > 0 else torch.full_like(floor, torch.inf)

    def solve(self) -> None:
        """Coefficients T⁻¹ W r₀; T without a Cholesky factor proves A indefinite (Cauchy interlacing)."""
        rhs = self.projected.new_zeros(len(self.basis), self.start.shape[1])
        rhs[int(self.before) : int(self.before) + len(self.start)] = self.start
        factor, info = torch.linalg.cholesky_ex(self.projected)
        if int(info) != 0:
            ritz = torch.linalg.eigvalsh(self.projected)
            raise IndefiniteHessianError(smallest=float(ritz[0]), largest=float(ritz[-1]))
        self.coefficients = torch.cholesky_solve(rhs, factor)

    def correction(self) -> Tensor:
        return self.coefficients.T.to(self.storage.dtype) @ self.basis[: len(self.coefficients)]


def _orthonormal_rows(block: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """block (K, P) -> rows Q (k, P), k <= K, and R (k, K) with blockᵀ = Qᵀ R; directions below `floor` are dropped."""
    columns, factor = torch.linalg.qr(block.T)  # four times faster than the same singular values of a wide block itself
    left, singular, right = torch.linalg.svd(factor.T, full_matrices=False)
    keep = singular > floor
    rows, factor = right[keep] @ columns.T, (singular[keep, None] * left[:, keep].T).to(algebra_dtype(block.device))
    if not len(rows):
        return rows, factor
    lower = torch.linalg.cholesky(inner(rows, rows))  # LAPACK's norms of long vectors err by 1e-3 in float32
    return torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False).to(
        rows
    ) @ rows, lower.T @ factor


def krylov_basis(product: Product, start: Tensor, *, size: int) -> tuple[Tensor, Tensor]:
    """Orthonormal basis (r, P) of the Krylov space of `start` (K, P), and T (r, r); r ≥ size or the space is exhausted.

    Its eigenvalues (Ritz values) lie within the spectrum of A: the smallest bounds A's smallest from above.
    """
    cycle = _grown(product, start, size)
    return cycle.basis, cycle.projected


def krylov_relation(product: Product, start: Tensor, *, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the next block: W and Q (r + k, P), T, and `coupling` Q A Wᵀ (k, r)."""
    cycle = _grown(product, start, size)
    coupling = cycle.full_coupling()
    return cycle.extended(), cycle.projected, coupling


def _grown(product: Product, start: Tensor, size: int) -> BlockLanczos:
    cycle = BlockLanczos(product, start)
    while len(cycle.block) and len(cycle.basis) < size:
        cycle.extend()
    return cycle
