"""True block conjugate gradients: one Krylov space shared by all right-hand sides, re-orthogonalised.

Written as block Lanczos with a Galerkin solve (O'Leary 1980; Golub & Underwood 1977), which is what block CG computes
in exact arithmetic. With W the orthonormal basis and T = WᵀAW:

    u = u₀ + W T⁻¹ Wᵀ(b − A u₀)

One iteration is one product with A for each of at most K columns, one shared pass over the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from estimators.checkpoint import Checkpoint
from estimators.errors import ConvergenceError, IndefiniteHessianError
from estimators.memory import available_bytes
from estimators.state import Learned

__all__ = ["BlockSolution", "block_cg", "krylov_basis", "krylov_relation"]

Product = Callable[[Tensor], Tensor]
_BASIS_BYTES = 2**32


@dataclass(frozen=True)
class BlockSolution:
    """`solution` (K, P) of A u = b, `remainder` b − A u (K, P), and its relative norms `residuals` (K,).

    The last Krylov space: W (r, P), T = W A Wᵀ (r, r), and the block Q (k, P) that would have come next, with
    `coupling` Q A Wᵀ (k, r): A Wᵀ = Wᵀ T + Qᵀ coupling. `basis` is W and Q, one after the other.
    """

    solution: Tensor
    remainder: Tensor
    residuals: Tensor
    iterations: int
    products: int
    basis: Tensor
    projected: Tensor
    coupling: Tensor


def block_cg(
    product: Product,
    right_hand_sides: Tensor,
    *,
    start: Tensor | None = None,
    tol: float = 1e-6,
    energy_tol: float = 0.0,
    max_iter: int = 1000,
    must_converge: bool = True,
    checkpoint: Checkpoint | None = None,
) -> BlockSolution:
    """Solve A u = b for right_hand_sides (K, P), from `start` (K, P) or zero, to ‖b − A u‖ ≤ tol ‖b‖.

    With energy_tol > 0, for A ⪰ I, ‖b − A u‖² ≤ energy_tol·bᵀu is enough, too: then bᵀu is that near to bᵀA⁻¹b.
    The basis is bounded by 4 GiB and a third of the memory: beyond it, its leading half is kept. With a `checkpoint` it
    goes on from the last iteration kept.
    Errors: IndefiniteHessianError where T has a negative eigenvalue; ConvergenceError after `max_iter` iterations,
    unless what is reached by then is good enough (`must_converge` False).
    """
    b, tiny = right_hand_sides, torch.finfo(right_hand_sides.dtype).tiny
    scale = b.norm(dim=1).clamp_min(tiny)
    u = torch.zeros_like(b) if start is None else start.clone()
    iterations = products = 0
    checkpoint = checkpoint or Checkpoint()
    saved = checkpoint.load()
    if saved is not None:
        cycle, u, iterations, products = _resumed(product, saved, u.device)
    else:
        cycle = _Cycle(product, b.clone() if start is None else b - product(u))
        products += len(u) * (start is not None)

    def within() -> Tensor:
        """The residuals that will do, (K,)."""
        if not energy_tol:
            return tol * scale
        linear = (b * (u + cycle.correction())).sum(1)
        return torch.maximum(tol * scale, (energy_tol * linear.clamp_min(0)).sqrt())

    while not cycle.done(within()) and iterations < max_iter:
        if cycle.full():
            u = u + cycle.correction()
            cycle.thin()
        cycle.extend()
        cycle.solve()
        iterations += 1
        checkpoint.save(partial(_state, cycle, u, iterations, products))
    relative = cycle.residual_norms() / scale
    if must_converge and not cycle.done(within()):
        raise ConvergenceError(
            f"a relative residual of at most {tol:g} within {max_iter} iterations",
            received=f"{float(relative.max()):.3g} after {iterations}",
            remedy="raise max_iter, loosen tol, or use a larger prior_precision (a better conditioned A).",
        )
    u, products = u + cycle.correction(), products + cycle.products
    remainder, coupling = cycle.remainder(), cycle.full_coupling()
    return BlockSolution(u, remainder, relative, iterations, products, cycle.extended(), cycle.projected, coupling)


def _state(cycle: _Cycle, u: Tensor, iterations: int, products: int) -> Learned:
    counters = {"iterations": iterations, "products": products, "in_cycle": cycle.products}
    return {"u": u, **cycle.tensors()}, counters


def _resumed(product: Product, saved: Learned, device: torch.device) -> tuple[_Cycle, Tensor, int, int]:
    """The cycle, u and the counters of `_state`."""
    tensors = {name: tensor.to(device) for name, tensor in saved[0].items()}
    cycle = _Cycle.restored(product, tensors)
    iterations, products, cycle.products = (saved[1][name] for name in ("iterations", "products", "in_cycle"))
    return cycle, tensors["u"], iterations, products


class _Cycle:
    """The Krylov space of one residual block (K, P): basis W (r, P) by rows, T = W A Wᵀ, Wr₀ and the next block."""

    def __init__(self, product: Product, residual: Tensor) -> None:
        self.product, self.products = product, 0
        self.floor = residual.norm(dim=1).max() * torch.finfo(residual.dtype).eps * 4
        self.storage, self.rank = residual.new_empty(8 * len(residual), residual.shape[1]), 0
        self.projected = residual.new_zeros(0, 0)
        self.block, self.coupling = _orthonormal_rows(residual, self.floor)  # residualᵀ = blockᵀ · coupling
        self.start, self.before = self.coupling, torch.zeros((), dtype=torch.long)  # W r₀: what is not zero, and where
        self.coefficients = residual.new_zeros(0, residual.shape[0])

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
        return self.basis.nbytes > room and self.rank > 4 * len(self.block)

    def thin(self) -> None:
        """Go on from the present u with the leading half of the space: A V = V Θ + Qᵀ(…), Q the next block.

        Thick restart (Wu & Simon 2000): the Ritz vectors of the largest Ritz values stay solved for.
        """
        along = -self._along_next()
        values, vectors = torch.linalg.eigh(self.projected)
        keep = self.rank // 2
        self.storage[:keep] = vectors[:, -keep:].T @ self.basis
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
        return (-along if len(self.coefficients) else along).T @ self.block

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
        along = image @ self.basis.T
        self._grow_projected(along, old, new)
        rest = image - along @ self.basis
        rest = rest - (rest @ self.basis.T) @ self.basis  # a second time: round-off of the first
        block, _ = _orthonormal_rows(rest, self._image_floor(image))
        block = block - (block @ self.basis.T) @ self.basis  # a third: what was small has been scaled up
        self.block, _ = _orthonormal_rows(block, torch.full_like(self.floor, 0.5))  # mostly in the basis: round-off
        self.coupling = self.block @ rest.T

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
        return self.coefficients.T @ self.basis[: len(self.coefficients)]


def _orthonormal_rows(block: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """block (K, P) -> rows Q (k, P), k <= K, and R (k, K) with blockᵀ = Qᵀ R; directions below `floor` are dropped."""
    basis, factor = torch.linalg.qr(block.T)  # four times faster than the same singular values of a wide block itself
    left, singular, right = torch.linalg.svd(factor.T, full_matrices=False)
    keep = singular > floor
    return right[keep] @ basis.T, singular[keep, None] * left[:, keep].T


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


def _grown(product: Product, start: Tensor, size: int) -> _Cycle:
    cycle = _Cycle(product, start)
    while len(cycle.block) and len(cycle.basis) < size:
        cycle.extend()
    return cycle
