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

import torch
from torch import Tensor

from estimators.checkpoint import Checkpoint
from estimators.errors import ConvergenceError
from estimators.precision.block_lanczos import BlockLanczos, Product
from estimators.state import Learned

__all__ = ["BlockSolution", "GoOn", "block_cg"]

GoOn = Callable[[Tensor, Tensor, int], bool]
"""u and b − A u, both (K, P), and the iterations behind them -> whether there should be another."""


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
    go_on: GoOn | None = None,
    checkpoint: Checkpoint | None = None,
) -> BlockSolution:
    """Solve A u = b for right_hand_sides (K, P), from `start` (K, P) or zero, to ‖b − A u‖ ≤ tol ‖b‖.

    With energy_tol > 0, for A ⪰ I, ‖b − A u‖² ≤ energy_tol·bᵀu is enough, too: then bᵀu is that near to bᵀA⁻¹b.
    The basis is bounded by 4 GiB and a third of the memory: beyond it, its leading half is kept. With a `checkpoint` it
    goes on from the last iteration kept.
    After `max_iter` iterations `go_on` is asked before each further one.
    Errors: IndefiniteHessianError where T has a negative eigenvalue; ConvergenceError after the last iteration,
    unless what is reached by then is good enough (`must_converge` False).
    """
    b, tiny = right_hand_sides, torch.finfo(right_hand_sides.dtype).tiny
    scale: Tensor = b.norm(dim=1).clamp_min(tiny)
    u = torch.zeros_like(b) if start is None else start.clone()
    iterations = products = 0
    checkpoint = checkpoint or Checkpoint()
    saved = checkpoint.load()
    if saved is not None:
        cycle, u, iterations, products = _resumed(product, saved, u.device)
    else:
        cycle = BlockLanczos(product, b.clone() if start is None else b - product(u))
        products += len(u) * (start is not None)

    def within() -> Tensor:
        """The residuals that will do, (K,)."""
        if not energy_tol:
            return tol * scale
        linear = (b * (u + cycle.correction())).sum(1)
        enough: Tensor = (energy_tol * linear.clamp_min(0)).sqrt()
        return torch.maximum(tol * scale, enough)

    def more() -> bool:
        if iterations < max_iter or go_on is None:
            return iterations < max_iter
        return go_on(u + cycle.correction(), cycle.remainder(), iterations)

    while not cycle.done(within()) and more():
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


def _state(cycle: BlockLanczos, u: Tensor, iterations: int, products: int) -> Learned:
    counters = {"iterations": iterations, "products": products, "in_cycle": cycle.products}
    return {"u": u, **cycle.tensors()}, counters


def _resumed(product: Product, saved: Learned, device: torch.device) -> tuple[BlockLanczos, Tensor, int, int]:
    """The cycle, u and the counters of `_state`."""
    tensors = {name: tensor.to(device) for name, tensor in saved[0].items()}
    cycle = BlockLanczos.restored(product, tensors)
    iterations, products, cycle.products = (saved[1][name] for name in ("iterations", "products", "in_cycle"))
    return cycle, tensors["u"], iterations, products
