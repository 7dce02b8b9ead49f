"""True block conjugate gradients: one Krylov space shared by all right-hand sides, re-orthogonalised.

Written as block Lanczos with a Galerkin solve (O'Leary 1980; Golub & Underwood 1977), which is what block CG computes
in exact arithmetic. With W the orthonormal basis and T = WᵀAW:

    u = u₀ + W T⁻¹ Wᵀ(b − A u₀)

One iteration is one product with A for each of at most K columns, one shared pass over the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from estimators.curvature.krylov.block_lanczos import BlockLanczos, Free, Product
from estimators.errors import ConvergenceError, IllConditionedError
from estimators.numerics.reductions import dots, norms
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned

__all__ = ["BlockSolution", "GoOn", "block_cg", "check_condition", "products_are_accurate"]

_MOST_CONDITIONED = 5e4
"""‖T‖ over the smallest eigenvalue up to which products in float32 are accurate enough.

Seen with wine and breast cancer, inputs as they are, 6 networks, δ from .01 to 100: an error of the variance of up to
6e-8 times this ratio, so up to 3e-3. Networks on standardised inputs, trained until they fit, lie below 1e4 at δ = 1.
"""


@dataclass(frozen=True)
class BlockSolution:
    """`solution` (K, P) of A u = b, and the relative norms `residuals` (K,) of b − A u = leftᵀ Q, left (k, K).

    The last Krylov space: W (r, P), T = W A Wᵀ (r, r), and the block Q (k, P) that would have come next, with
    `coupling` Q A Wᵀ (k, r): A Wᵀ = Wᵀ T + Qᵀ coupling. `basis` is W and Q, one after the other.
    """

    solution: Tensor
    left: Tensor
    residuals: Tensor
    iterations: int
    products: int
    basis: Tensor
    projected: Tensor
    coupling: Tensor

    @property
    def next_block(self) -> Tensor:
        """Q."""
        return self.basis[len(self.projected) :]

    @property
    def remainder(self) -> Tensor:
        """b − A u, (K, P)."""
        return self.left.T.to(self.basis.dtype) @ self.next_block


GoOn = Callable[[BlockSolution], bool]
"""What there is -> whether there should be another iteration."""


def block_cg(
    product: Product,
    right_hand_sides: Tensor,
    *,
    start: Tensor | None = None,
    tol: float = 1e-6,
    energy_tol: float = 0.0,
    max_iter: int = 1000,
    must_converge: bool = True,
    go_on: GoOn | None = None,
    checkpoint: Checkpoint | None = None,
    free: Free | None = None,
    smallest: float | None = None,
) -> BlockSolution:
    """Solve A u = b for right_hand_sides (K, P), from `start` (K, P) or zero, to ‖b − A u‖ ≤ tol ‖b‖.

    With energy_tol > 0, ‖b − A u‖² ≤ energy_tol·bᵀu is enough, too: where A ⪰ m, then bᵀu is within energy_tol/m of
    bᵀA⁻¹b. The basis is bounded by 4 GiB and a third of the memory that is `free`: beyond it, its leading half is
    kept. With a `checkpoint` it goes on from the last iteration kept.
    After `max_iter` iterations `go_on` is asked before each further one.
    With `smallest`, a number that no eigenvalue of A is below (0 where none is known), products in another dtype than
    float64 are checked to be accurate enough for A.
    Errors: IndefiniteHessianError where T has a negative eigenvalue; IllConditionedError; ConvergenceError after the
    last iteration, unless what is reached by then is good enough (`must_converge` False).
    """
    checkpoint = checkpoint or Checkpoint()
    saved = checkpoint.load()
    if saved is not None:
        solve = _Solve.resumed(product, right_hand_sides, tol, energy_tol, saved, free)
    else:  # room for what will be needed, where that is known
        blocks = {} if must_converge else {"blocks": max_iter + 1}
        solve = _Solve.begun(product, right_hand_sides, tol, energy_tol, start, free, **blocks)
    while not solve.done and (solve.iterations < max_iter or (go_on is not None and go_on(solve.solved))):
        solve.step(smallest)
        checkpoint.save(solve.state)
    solved = solve.solved
    if must_converge and not solve.done:
        raise ConvergenceError(
            f"a relative residual of at most {tol:g} within {max_iter} iterations",
            received=f"{float(solved.residuals.max()):.3g} after {solved.iterations}",
            remedy="raise max_iter, loosen tol, or use a larger prior_precision (a better conditioned A).",
        )
    return solved


@dataclass
class _Solve:
    """A solve on its way; `begin` (K, P) is u where the present cycle began, None for zero."""

    b: Tensor
    tol: float
    energy_tol: float
    begin: Tensor | None
    cycle: BlockLanczos
    iterations: int = 0
    products: int = 0  # of cycles and checkpoints before

    @classmethod
    def begun(
        cls,
        product: Product,
        b: Tensor,
        tol: float,
        energy_tol: float,
        start: Tensor | None,
        free: Free | None,
        **room: int,
    ) -> Self:
        """At `start`."""
        residual = b if start is None else product(start).neg_().add_(b)
        cycle = BlockLanczos(product, residual, free=free, **room)
        return cls(b, tol, energy_tol, start, cycle, products=0 if start is None else len(start))

    @classmethod
    def resumed(
        cls, product: Product, b: Tensor, tol: float, energy_tol: float, saved: Learned, free: Free | None
    ) -> Self:
        """From `state()`."""
        tensors = {name: tensor.to(b.device) for name, tensor in saved[0].items()}
        cycle = BlockLanczos.restored(product, tensors, free=free)
        return cls(b, tol, energy_tol, tensors.get("u"), cycle, saved[1]["iterations"], saved[1]["products"])

    def state(self) -> Learned:
        begin = {} if self.begin is None else {"u": self.begin}
        counters = {"iterations": self.iterations, "products": self.products + self.cycle.products}
        return {**begin, **self.cycle.tensors()}, counters

    def step(self, smallest: float | None = None) -> None:
        """One iteration; `smallest` as `block_cg` takes it."""
        if self.cycle.full():
            self.begin = self.solution
            self.cycle.thin()
        self.cycle.extend()
        if smallest is not None:
            check_condition(self.cycle.projected, smallest, self.b.dtype)
        self.cycle.solve()
        self.iterations += 1

    @property
    def done(self) -> bool:
        """Whether every residual will do."""
        return self.cycle.done(self._within())

    @property
    def solution(self) -> Tensor:
        """u (K, P), a new tensor."""
        correction = self.cycle.correction()
        return correction if self.begin is None else correction.add_(self.begin)

    @property
    def solved(self) -> BlockSolution:
        """What there is by now."""
        cycle = self.cycle
        residuals, products = cycle.residual_norms() / norms(self.b), self.products + cycle.products
        space = (cycle.extended, cycle.projected, cycle.full_coupling())
        return BlockSolution(self.solution, cycle.left, residuals, self.iterations, products, *space)

    def _within(self) -> Tensor:
        """The residuals that will do, (K,)."""
        relative = self.tol * norms(self.b)
        if not self.energy_tol:
            return relative
        return torch.maximum(relative, (self.energy_tol * dots(self.b, self.solution).clamp_min(0)).sqrt())


def products_are_accurate(dtype: torch.dtype, *, largest: float, smallest: float) -> bool:
    """Whether products in `dtype` leave digits to the variance, for an A with such ends of its spectrum."""
    return dtype == torch.float64 or largest <= _MOST_CONDITIONED * smallest


def check_condition(projected: Tensor, smallest: float, dtype: torch.dtype) -> None:
    """Raise IllConditionedError where products in `dtype` are not accurate enough for T = W A Wᵀ (r, r).

    ‖T‖ is at most √r times the largest eigenvalue of A, and near it where few eigenvalues lead. Without a bound of the
    smallest eigenvalue of A (0), that of T is taken, which is not below it.
    """
    if dtype == torch.float64:
        return
    largest = float(projected.norm())
    if smallest <= 0:
        smallest = max(float(torch.linalg.eigvalsh(projected)[0]), torch.finfo(dtype).eps * largest)
    if not products_are_accurate(dtype, largest=largest, smallest=smallest):
        raise IllConditionedError(condition=largest / smallest, dtype=dtype)
