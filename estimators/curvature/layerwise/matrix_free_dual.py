"""A = D + RᵀR in its dual form without stored rows R: each product recomputes them, a few at a time.

    R D⁻¹ Rᵀ    layer by layer, from J = Σ_t b_t a_tᵀ: (N·C)² numbers are stored
    R v         by a forward-mode product over the data, Sᵀ J v        Rᵀ w    by a backward one, Jᵀ S w

A solve costs one product with the GGN, whatever the conditioning. Everything is computed in float64
(`estimators.objective.float64`), since the posterior variance is a difference.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from estimators.curvature.dense.dual import FunctionSpace
from estimators.curvature.layerwise.whitened_rows import layers_of, whitened_rows
from estimators.errors import NonDeterministicError
from estimators.models.jacobian_factors import JacobianFactors
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.numerics.symmetric import add_gram, mirror
from estimators.objective.objective import Objective
from estimators.runtime.memory import rows_per_chunk

__all__ = ["MatrixFreeDual", "batch_checksums", "bytes_needed", "inner_matrix"]

_KEPT_BYTES = 2**31
"""Memory for the factors of some layers in one pass over the data, 2 GiB; further layers take further passes."""


class MatrixFreeDual(FunctionSpace):
    """A = D + RᵀR with rows that each product recomputes.

    Args:
        objective: gives products with R; in float64.
        prior_precision: δ (P,).
        inner: R D⁻¹ Rᵀ (N·C, N·C); it is overwritten.
        checksums: `batch_checksums` of the batches that `inner` was computed from, to check their order.
    """

    keeps_rows = False

    def __init__(self, objective: Objective, prior_precision: Tensor, inner: Tensor, checksums: Tensor) -> None:
        self.objective, self.checksums = objective, checksums
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
        """Inputs and S (B, C, C) of every batch.

        Raises:
            NonDeterministicError: the batches come in another order.
        """
        for i, batch in enumerate(self.objective.batches):
            f = self.objective.network.outputs(batch.x)
            _check_order(self.checksums[i : i + 1], _checksum(f)[None])
            yield batch.x, self.objective.likelihood.given(batch.y).hessian_sqrt(f)


def batch_checksums(objective: Objective) -> Tensor:
    """The sum of the outputs of each batch, (number of batches,), which identifies it."""
    return torch.stack([_checksum(objective.network.outputs(batch.x)) for batch in objective.batches])


def _checksum(f: Tensor) -> Tensor:
    """The sum of the outputs f of a batch, in float64."""
    return f.double().sum()


def _check_order(expected: Tensor, found: Tensor) -> None:
    """Raise NonDeterministicError if the checksums of the batches differ."""
    if expected.shape != found.shape or not torch.allclose(found, expected.to(found.device), rtol=1e-4, atol=1e-6):
        raise NonDeterministicError(
            "the rows in the same order in every pass over the loader",
            received="another order",
            remedy='a loader that does not shuffle, or inverse="cg".',
        )


def inner_matrix(objective: Objective, checksums: Tensor) -> Tensor:
    """R D⁻¹ Rᵀ (N·C, N·C) in `algebra_dtype`: a sum over the layers, some of them per pass over the data."""
    device = objective.theta.device
    layers = layers_of(objective)
    layout = layers.layout
    scale = objective.prior.precision.rsqrt()
    others = _SparseRows(layout.other_entries(scale))
    total: Tensor | None = None
    for names in _groups(layers, objective.batches.n_data):
        factors: dict[str, list[JacobianFactors]] = {name: [] for name in names}
        for rows in whitened_rows(objective, layers):
            for name, kept in factors.items():
                kept.append(rows.factors[name])
            if total is None:
                others.add(rows.other_rows.flatten(0, 1))
        if total is None:
            total = torch.zeros(others.n_rows, others.n_rows, dtype=algebra_dtype(device), device=device)
        for name, kept in factors.items():
            _add_layer(total, kept, layout.matrix(scale, name))
    assert total is not None
    _check_order(checksums, batch_checksums(objective))
    for columns in others.columns(rows_per_chunk(len(total) * total.element_size())):
        add_gram(total, columns.to(total.dtype))
    mirror(total)
    return total


def bytes_needed(n_rows: int, element_size: int) -> int:
    """Memory in bytes of the inner matrix, its copy, its factor, and the factors of some layers."""
    return 3 * n_rows**2 * element_size + 2 * _KEPT_BYTES


def _groups(layers: LayerwiseJacobian, n_data: int) -> list[list[str]]:
    """The maps in groups, each with as many as fit into memory in one pass; at least one group."""
    groups: list[list[str]] = [[]]
    room = _KEPT_BYTES
    for name, bytes_per_row in layers.bytes_per_row().items():
        if groups[-1] and bytes_per_row * n_data > room:
            groups.append([])
            room = _KEPT_BYTES
        groups[-1].append(name)
        room -= bytes_per_row * n_data
    return groups


def _add_layer(total: Tensor, kept: list[JacobianFactors], scale: Tensor) -> None:
    """Add J D⁻¹ Jᵀ of a layer, J = Σ_t b_t a_tᵀ, for some of its outputs at a time; scale is D^(−½) (O, E)."""
    chunk = rows_per_chunk(len(total) * scale.shape[1] * total.element_size(), budget=2**29)
    for first in range(0, len(scale), chunk):
        part = slice(first, first + chunk)
        rows = total.new_empty(len(total), scale[part].numel())
        start = 0
        for factors in kept:
            jacobian = JacobianFactors(factors.inputs, factors.gradients[..., part]).jacobians().mul_(scale[part])
            rows[start : start + jacobian.shape[0] * jacobian.shape[1]] = jacobian.flatten(2).flatten(0, 1)
            start += jacobian.shape[0] * jacobian.shape[1]
        add_gram(total, rows)


class _SparseRows:
    """Rows (n, P_other) times `scale`; each block stores its non-zero columns only, which are few in an embedding."""

    def __init__(self, scale: Tensor) -> None:
        self.scale, self.n_rows = scale, 0
        self._blocks: list[tuple[int, Tensor, Tensor]] = []
        self._nonzero = torch.zeros_like(scale, dtype=torch.bool)

    def add(self, rows: Tensor) -> None:
        """Add rows (n, P_other)."""
        columns = (rows != 0).any(0)
        self._nonzero |= columns
        self._blocks.append((self.n_rows, columns.nonzero()[:, 0], rows[:, columns] * self.scale[columns]))
        self.n_rows += len(rows)

    def columns(self, size: int) -> Iterator[Tensor]:
        """Yield all rows, dense (n, m), `size` of the non-zero columns at a time."""
        index = self._nonzero.cumsum(0) - 1
        for start in range(0, int(self._nonzero.sum()), size):
            dense = self.scale.new_zeros(self.n_rows, min(size, int(self._nonzero.sum()) - start))
            for first, columns, values in self._blocks:
                column = index[columns] - start
                inside = (column >= 0) & (column < dense.shape[1])
                dense[first : first + len(values), column[inside]] = values[:, inside]
            yield dense
