"""The dense GGN of networks that use every weight once a row, from factors: the sum over outputs comes first.

Along the columns k of S (Λ = SSᵀ) the rows of two linear maps are b_nk a_nᵀ and b'_nk a'_nᵀ. Their block of the GGN is

    Σ_nk (b_nk ⊗ a_n)(b'_nk ⊗ a'_n)ᵀ = Σ_n (Σ_k b_nk b'_nkᵀ) ⊗ (a_n a'_nᵀ)

a product of matrices over n alone: N·P² multiplications for N·C·P².
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.curvature.layerwise.whitened_rows import whitened_rows
from estimators.models.layer_jacobians import LayerwiseJacobian, LayerwiseRows
from estimators.models.layer_layout import Layout
from estimators.numerics.dtype import algebra_dtype
from estimators.objective.objective import Objective
from estimators.runtime.memory import rows_per_chunk

__all__ = ["layered_ggn", "worthwhile"]

_LEAST_OUTPUTS, _LEAST_PARAMETERS = 3, 500


def worthwhile(layers: LayerwiseJacobian) -> bool:
    """Whether it saves something: many parameters, and outputs to sum over first."""
    many = layers.network.n_parameters >= _LEAST_PARAMETERS
    return many and layers.n_outputs >= _LEAST_OUTPUTS and layers.no_weight_sharing


def layered_ggn(objective: Objective, layers: LayerwiseJacobian) -> Tensor:
    """Σₙ Jₙᵀ Λₙ Jₙ, (P, P), without the prior, in `algebra_dtype`."""
    theta = objective.theta
    dtype, p = algebra_dtype(theta.device), theta.numel()
    shapes, places = _order(layers)
    blocks: dict[tuple[int, int], Tensor] = {}
    for rows in whitened_rows(objective, layers):
        for piece in _split(_factors(rows, layers, dtype)):
            for i, left in enumerate(piece):
                for j, right in enumerate(piece[: i + 1]):
                    block = left.block(right)
                    blocks[i, j] = block if (i, j) not in blocks else blocks[i, j].add_(block)
    total, place = theta.new_empty(p, p, dtype=dtype), torch.cat(places)
    starts = torch.tensor([0, *(o * e for o, e in shapes)]).cumsum(0).tolist()
    for (i, j), block in blocks.items():
        here, there = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
        total[here, there] = _as_matrix(block, shapes[i], shapes[j], symmetric=i == j)
        if i != j:
            total[there, here] = total[here, there].T
    back = place.argsort()
    return total.index_select(0, back).index_select(1, back)


@dataclass(frozen=True)
class _Factor:
    """Rows b_nk ⊗ a_n of one part: slopes b (n, K, O) and inputs a (n, E)."""

    slopes: Tensor
    inputs: Tensor

    def block(self, other: _Factor) -> Tensor:
        """Σ_n (Σ_k b bʹᵀ) ⊗ (a aʹᵀ), (pairs of O and Oʹ, E·Eʹ): all pairs, or the lower ones of a part with itself."""
        n = len(self.slopes)
        b = self.slopes.transpose(1, 2) @ other.slopes  # Σ_k b bʹᵀ
        if other is self:
            lower = torch.tril_indices(b.shape[1], b.shape[2], device=b.device)
            pairs = b[:, lower[0], lower[1]]
        else:
            pairs = b.reshape(n, -1)
        return pairs.T @ (self.inputs[:, :, None] * other.inputs[:, None]).reshape(n, -1)


def _order(layers: LayerwiseJacobian) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """The shapes (O, E) of the parts, the rest as (P_rest, 1) in the end, and the places of their entries in θ."""
    layout = Layout(layers.network.subset, layers.maps, layers.rest)
    theta = torch.arange(layers.network.n_parameters, device=layers.network.theta.device)
    shapes = [linear.shape for linear in layers.maps.values()]
    places = [layout.matrix(theta, name).flatten() for name in layers.maps]
    rest = layout.rest_of(theta)
    return [*shapes, (len(rest), 1)], [*places, rest]


def _factors(rows: LayerwiseRows, layers: LayerwiseJacobian, dtype: torch.dtype) -> list[_Factor]:
    """Of the parts, in their order. Errors: UnsupportedError where one is not applied to one place."""
    maps = [rows.factors[name].at_one_place() for name in layers.maps]
    found = [_Factor(one.slopes[:, :, 0].to(dtype), one.inputs[:, 0].to(dtype)) for one in maps]
    rest = rows.rest.to(dtype)
    return [*found, _Factor(rest, rest.new_ones(len(rest), 1))]


def _split(factors: list[_Factor]) -> Iterator[list[_Factor]]:
    """Rows whose outer products fit."""
    widest = max(factor.slopes.shape[2] ** 2 + factor.inputs.shape[1] ** 2 for factor in factors)
    chunk = rows_per_chunk(2 * widest * factors[0].slopes.element_size())
    for part in torch.arange(len(factors[0].slopes)).split(chunk):
        yield [_Factor(factor.slopes[part], factor.inputs[part]) for factor in factors]


def _as_matrix(block: Tensor, left: tuple[int, int], right: tuple[int, int], *, symmetric: bool) -> Tensor:
    """Pairs of outputs by pairs of inputs -> (O·E, Oʹ·Eʹ)."""
    (o, e), (other_o, other_e) = left, right
    if symmetric:
        lower = torch.tril_indices(o, o, device=block.device)
        full = block.new_empty(o, o, e * e)
        full[lower[1], lower[0]] = block  # a aᵀ is symmetric: so is every block of E×E
        full[lower[0], lower[1]] = block
        block = full
    return block.reshape(o, other_o, e, other_e).transpose(1, 2).reshape(o * e, other_o * other_e)
