"""A = D + RᵀR in its dual form where the rows R themselves are too large to keep: made anew, a few at a time.

    R D⁻¹ Rᵀ    layer by layer, from J = Σ_t b_t a_tᵀ: (N·C)² numbers are kept
    R v         by a forward-mode product over the data, Sᵀ J v        Rᵀ w    by a backward one, Jᵀ S w

so that a solve costs one product with the GGN, whatever the conditioning. All of it in float64
(`estimators.objective.float64`): what is left of the prior's variance is a difference.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from estimators.curvature.dense.dual import FunctionSpace
from estimators.curvature.layerwise.whitened_rows import layers_of, whitened_rows
from estimators.errors import NonDeterministicError
from estimators.models.layer_jacobians import JacobianFactors, LayerwiseJacobian
from estimators.models.layer_layout import Layout
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.numerics.symmetric import add_gram, mirror
from estimators.objective.objective import Objective
from estimators.runtime.memory import rows_per_chunk

__all__ = ["MatrixFreeDual", "bytes_needed", "inner_matrix", "marks_of"]

_KEPT_BYTES = 2**31


class MatrixFreeDual(FunctionSpace):
    """The rows are made anew for each product; `inner` R D⁻¹ Rᵀ (N·C, N·C) is overwritten.

    `marks` are those of the batches that `inner` was made of: products take them in the same order.
    """

    keeps_rows = False

    def __init__(self, objective: Objective, prior_precision: Tensor, inner: Tensor, marks: Tensor) -> None:
        self.objective, self.marks = objective, marks
        super().__init__(prior_precision, inner)

    def rows_times(self, vectors: Tensor) -> Tensor:
        network = self.objective.network
        with network.check.on_training_rows():
            products = ((root, network.jvp(x, vectors)) for x, root in self._roots())
            return torch.cat([torch.einsum("bck,nbc->nbk", root, jv).flatten(1) for root, jv in products], dim=1)

    def transposed_times(self, coefficients: Tensor) -> Tensor:
        total, start = coefficients.new_zeros(len(coefficients), self.objective.theta.numel()), 0
        for x, root in self._roots():
            b, c, _ = root.shape
            w = coefficients[:, start : start + b * c].reshape(-1, b, c)
            with self.objective.network.check.on_training_rows():
                total += self.objective.network.vjp(x, torch.einsum("bck,nbk->nbc", root, w))
            start += b * c
        return total

    def _roots(self) -> Iterator[tuple[PyTree, Tensor]]:
        """Inputs and S (B, C, C) of every batch. Errors: NonDeterministicError for another order."""
        for i, batch in enumerate(self.objective.batches):
            f = self.objective.network.outputs(batch.x)
            _refuse_another_order(self.marks[i : i + 1], _mark(f)[None])
            yield batch.x, self.objective.likelihood.given(batch.y).hessian_sqrt(f)


def marks_of(objective: Objective) -> Tensor:
    """A number for each batch that tells it from the others, its sum of outputs, (number of batches,)."""
    return torch.stack([_mark(objective.network.outputs(batch.x)) for batch in objective.batches])


def _mark(f: Tensor) -> Tensor:
    return f.double().sum()


def _refuse_another_order(expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape or not torch.allclose(found, expected.to(found.device), rtol=1e-4, atol=1e-6):
        raise NonDeterministicError(
            "the rows in the same order in every pass over the loader",
            received="another order",
            remedy='a loader that does not shuffle, or inverse="cg".',
        )


def inner_matrix(objective: Objective, marks: Tensor) -> Tensor:
    """R D⁻¹ Rᵀ (N·C, N·C) in `algebra_dtype`: a sum over the layers, of which some are looked at in each pass."""
    device = objective.theta.device
    layers = layers_of(objective)
    layout = Layout(layers.network.subset, layers.maps, layers.rest)
    scale = objective.prior.precision.rsqrt()
    rest = SparseRows(layout.rest_of(scale))
    total: Tensor | None = None
    for names in _groups(layers, objective.batches.n_data):
        factors: dict[str, list[JacobianFactors]] = {name: [] for name in names}
        for rows in whitened_rows(objective, layers):
            for name, kept in factors.items():
                kept.append(rows.factors[name])
            if total is None:
                rest.add(rows.rest.flatten(0, 1))
        if total is None:
            total = torch.zeros(rest.n_rows, rest.n_rows, dtype=algebra_dtype(device), device=device)
        for name, kept in factors.items():
            _add_layer(total, kept, layout.matrix(scale, name))
    assert total is not None
    _refuse_another_order(marks, marks_of(objective))
    for columns in rest.columns(rows_per_chunk(len(total) * total.element_size())):
        add_gram(total, columns.to(total.dtype))
    mirror(total)
    return total


def bytes_needed(n_rows: int, element_size: int) -> int:
    """The inner matrix, its copy and its factor, and what is kept of some layers."""
    return 3 * n_rows**2 * element_size + 2 * _KEPT_BYTES


def _groups(layers: LayerwiseJacobian, n_data: int) -> list[list[str]]:
    """The maps, as many together as may be kept in one pass; at least one group."""
    groups: list[list[str]] = [[]]
    room = _KEPT_BYTES
    for name, bytes_a_row in layers.bytes_a_row().items():
        if groups[-1] and bytes_a_row * n_data > room:
            groups.append([])
            room = _KEPT_BYTES
        groups[-1].append(name)
        room -= bytes_a_row * n_data
    return groups


def _add_layer(total: Tensor, kept: list[JacobianFactors], scale: Tensor) -> None:
    """Add J D⁻¹ Jᵀ of a layer, J = Σ_t b_t a_tᵀ, some of its outputs at a time; scale is D^(−½) (O, E)."""
    at_once = rows_per_chunk(len(total) * scale.shape[1] * total.element_size(), budget=2**29)
    for first in range(0, len(scale), at_once):
        part = slice(first, first + at_once)
        rows = total.new_empty(len(total), scale[part].numel())
        start = 0
        for factors in kept:
            jacobian = JacobianFactors(factors.inputs, factors.slopes[..., part]).jacobians().mul_(scale[part])
            rows[start : start + jacobian.shape[0] * jacobian.shape[1]] = jacobian.flatten(2).flatten(0, 1)
            start += jacobian.shape[0] * jacobian.shape[1]
        add_gram(total, rows)


class SparseRows:
    """Rows (n, P_rest) times `scale`, each block of them by the columns that are not zero: few in an embedding."""

    def __init__(self, scale: Tensor) -> None:
        self.scale, self.n_rows = scale, 0
        self._blocks: list[tuple[int, Tensor, Tensor]] = []
        self._seen = torch.zeros_like(scale, dtype=torch.bool)

    def add(self, rows: Tensor) -> None:
        """Some more rows."""
        columns = (rows != 0).any(0)
        self._seen |= columns
        self._blocks.append((self.n_rows, columns.nonzero()[:, 0], rows[:, columns] * self.scale[columns]))
        self.n_rows += len(rows)

    def columns(self, at_once: int) -> Iterator[Tensor]:
        """All rows, (n, m), some of the columns at a time."""
        place = self._seen.cumsum(0) - 1
        for start in range(0, int(self._seen.sum()), at_once):
            dense = self.scale.new_zeros(self.n_rows, min(at_once, int(self._seen.sum()) - start))
            for first, columns, values in self._blocks:
                where = place[columns] - start
                inside = (where >= 0) & (where < dense.shape[1])
                dense[first : first + len(values), where[inside]] = values[:, inside]
            yield dense
