"""The dense GGN from factors, with the sum over outputs first, for networks that use every weight once per row.

Λ_n = S_n S_nᵀ is the Hessian of −log p in the outputs of row n. For a linear layer with the input a_n, backpropagating
column k of S_n gives b_nk at the layer's output, and the row k of S_nᵀJ_n in its weights is b_nk a_nᵀ. With a'_n and
b'_nk those of a second layer, the block of both layers in the GGN is

    Σ_nk (b_nk ⊗ a_n)(b'_nk ⊗ a'_n)ᵀ = Σ_n (Σ_k b_nk b'_nkᵀ) ⊗ (a_n a'_nᵀ)

This is a product of matrices over n alone, with N·P² multiplications instead of N·C·P².
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.curvature.fisher import EXACT, Fisher
from estimators.curvature.layerwise.whitened_rows import whitened_rows
from estimators.models.jacobian_factors import LayerwiseRows
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.numerics.dtype import algebra_dtype
from estimators.objective.objective import Objective
from estimators.runtime.memory import rows_per_chunk

__all__ = ["layered_ggn", "worthwhile"]

_LEAST_OUTPUTS, _LEAST_PARAMETERS = 3, 500
"""Below these, whole rows are faster."""


def worthwhile(layers: LayerwiseJacobian, fisher: Fisher = EXACT) -> bool:
    """Whether factors are faster than whole rows: there are many parameters, and cotangents to sum over first."""
    many = layers.network.n_parameters >= _LEAST_PARAMETERS
    return many and fisher.n_cotangents(layers.n_outputs) >= _LEAST_OUTPUTS and layers.no_weight_sharing


def layered_ggn(objective: Objective, layers: LayerwiseJacobian, fisher: Fisher = EXACT) -> Tensor:
    """Σₙ Jₙᵀ Λₙ Jₙ (P, P), or its estimate with another S (`fisher`), without the prior, in `algebra_dtype`."""
    theta = objective.theta
    dtype, p = algebra_dtype(theta.device), theta.numel()
    shapes, indices = _order(layers)
    blocks: dict[tuple[int, int], Tensor] = {}
    for rows in whitened_rows(objective, layers, fisher):
        for chunk in _split(_factors(rows, layers, dtype)):
            for i, left in enumerate(chunk):
                for j, right in enumerate(chunk[: i + 1]):
                    block = left.block(right)
                    blocks[i, j] = block if (i, j) not in blocks else blocks[i, j].add_(block)
    total, index = theta.new_empty(p, p, dtype=dtype), torch.cat(indices)
    starts = torch.tensor([0, *(o * e for o, e in shapes)]).cumsum(0).tolist()
    for (i, j), block in blocks.items():
        rows_i, columns_j = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
        total[rows_i, columns_j] = _as_matrix(block, shapes[i], shapes[j], symmetric=i == j)
        if i != j:
            total[columns_j, rows_i] = total[rows_i, columns_j].T
    order = index.argsort()  # from the order of the linear maps and the other parameters to that of θ
    return total.index_select(0, order).index_select(1, order)


@dataclass(frozen=True)
class _Factor:
    """Rows b_nk ⊗ a_n of one part of θ: a linear map, or all other parameters together.

    Attributes:
        gradients: b (n, K, O) at n rows, along the K columns of S. Of the other parameters: whole rows, O = P_other.
        inputs: a (n, E). Of the other parameters: ones, E = 1.
    """

    gradients: Tensor
    inputs: Tensor

    def block(self, other: _Factor) -> Tensor:
        """Σ_n (Σ_k b bʹᵀ) ⊗ (a aʹᵀ), (pairs of O and Oʹ, E·Eʹ): all pairs, or the lower ones for the same part."""
        n = len(self.gradients)
        b = self.gradients.transpose(1, 2) @ other.gradients  # Σ_k b bʹᵀ
        if other is self:
            lower = torch.tril_indices(b.shape[1], b.shape[2], device=b.device)
            pairs = b[:, lower[0], lower[1]]
        else:
            pairs = b.reshape(n, -1)
        return pairs.T @ (self.inputs[:, :, None] * other.inputs[:, None]).reshape(n, -1)


def _order(layers: LayerwiseJacobian) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """The shapes (O, E) of the parts of θ, and the indices of their entries.

    Each linear map is a part. The other parameters are the last part, with the shape (P_other, 1).
    """
    layout = layers.layout
    theta = torch.arange(layers.network.n_parameters, device=layers.network.theta.device)
    shapes = [linear.shape for linear in layers.maps.values()]
    indices = [layout.matrix(theta, name).flatten() for name in layers.maps]
    others = layout.other_entries(theta)
    return [*shapes, (len(others), 1)], [*indices, others]


def _factors(rows: LayerwiseRows, layers: LayerwiseJacobian, dtype: torch.dtype) -> list[_Factor]:
    """The factors of the parts of θ, in the order of `_order`.

    Raises:
        UnsupportedError: a map is not applied to a single position.
    """
    maps = [rows.factors[name].at_single_position() for name in layers.maps]
    found = [_Factor(part.gradients[:, :, 0].to(dtype), part.inputs[:, 0].to(dtype)) for part in maps]
    others = rows.other_rows.to(dtype)
    return [*found, _Factor(others, others.new_ones(len(others), 1))]


def _split(factors: list[_Factor]) -> Iterator[list[_Factor]]:
    """The factors in chunks of rows whose outer products fit into memory."""
    widest = max(factor.gradients.shape[2] ** 2 + factor.inputs.shape[1] ** 2 for factor in factors)
    chunk = rows_per_chunk(2 * widest * factors[0].gradients.element_size())
    for part in torch.arange(len(factors[0].gradients)).split(chunk):
        yield [_Factor(factor.gradients[part], factor.inputs[part]) for factor in factors]


def _as_matrix(block: Tensor, left: tuple[int, int], right: tuple[int, int], *, symmetric: bool) -> Tensor:
    """A block by pairs of outputs and pairs of inputs as a matrix (O·E, Oʹ·Eʹ)."""
    (o, e), (other_o, other_e) = left, right
    if symmetric:
        lower = torch.tril_indices(o, o, device=block.device)
        full = block.new_empty(o, o, e * e)
        full[lower[1], lower[0]] = block  # a aᵀ is symmetric, and so is every block (E, E)
        full[lower[0], lower[1]] = block
        block = full
    return block.reshape(o, other_o, e, other_e).transpose(1, 2).reshape(o * e, other_o * other_e)
