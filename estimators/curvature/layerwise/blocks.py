"""The GGN layer by layer: kron (K-FAC), ekfac, diag. The rest (norms, embeddings, raw tensors) keeps its diagonal.

For a linear map with inputs a_nt and slopes b_nkt by its output, along the columns k of S_n (Λ = S Sᵀ), the block of
the GGN is Σ_nk (Σ_t b aᵀ)(Σ_t b aᵀ)ᵀ over the entries of W. It is replaced by

    kron     Σ_nt a aᵀ ⊗ Σ_nkt b bᵀ / (number of places nt): Martens & Grosse 2015, "expand" of Eschenhagen et al. 2023
    ekfac    the same basis U ⊗ V, with the eigenvalues Σ_nk (Uᵀ Σ_t b aᵀ V)² of the block itself: George et al. 2018
    diag     the basis of the weights, with those eigenvalues: the exact diagonal

and δ is added to the eigenvalues, exactly. Nothing of size P × P or C × P × batch is made.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from estimators.curvature.base import Precision
from estimators.curvature.dense.cholesky import smallest_allowed_ratio
from estimators.curvature.layerwise.kronecker_block import KroneckerBlock, by_rows
from estimators.curvature.layerwise.second_moment import SecondMoment
from estimators.curvature.layerwise.whitened_rows import layers_of, whitened_rows
from estimators.errors import DiagonalWeightsWarning, IndefiniteHessianError, OptionError
from estimators.models.layer_jacobians import JacobianFactors, LayerwiseJacobian, LayerwiseRows
from estimators.models.layer_layout import Layout
from estimators.models.linear_calls import LinearMap
from estimators.models.network import Network
from estimators.numerics.dtype import algebra_dtype, to_algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective

__all__ = ["BlockPrecision", "Blocks", "collect"]

_REST = "rest"


@dataclass(frozen=True)
class Blocks:
    """The data's part of A: a block by the name of a map's weight, and the diagonal (P_rest,) of the rest."""

    network: Network
    maps: dict[str, LinearMap]
    rest: list[str]
    blocks: dict[str, KroneckerBlock]
    rest_diagonal: Tensor

    def precision(self, prior_precision: Tensor) -> BlockPrecision:
        """A for a prior precision vector δ (P,); δ must be one number within a map that has a basis of its own."""
        layout, blocks = self._layout, {}
        for name, block in self.blocks.items():
            delta = layout.matrix(prior_precision, name)
            if block.input_basis is not None and float(delta.min()) != float(delta.max()):
                raise _several_deltas(self.maps[name], delta)
            blocks[name] = _with_prior(block, delta)
        rest = self.rest_diagonal + layout.rest_of(prior_precision)
        if not bool((prior_precision > 0).all()):
            outside = [block.outside for block in blocks.values() if block.outside is not None]
            _refuse_singular([block.eigenvalues for block in blocks.values()] + outside + [rest])
        return BlockPrecision(self.network, layout, blocks, rest)

    @property
    def _layout(self) -> Layout:
        return Layout(self.network.subset, self.maps, self.rest)

    def tensors(self) -> dict[str, Tensor]:
        found = {_REST: self.rest_diagonal}
        for name, block in self.blocks.items():
            parts = {"eigenvalues": block.eigenvalues, "output": block.output_basis, "input": block.input_basis}
            found |= {f"{name}/{part}": tensor for part, tensor in parts.items() if tensor is not None}
        return found

    def description(self) -> dict[str, Any]:
        """The maps and the rest, in JSON types."""
        return self._layout.description()

    def moved(self, objective: Objective, scale: float) -> Blocks:
        """`scale` times this one, for another fit at the same weights and rows."""
        blocks = {name: replace(block, eigenvalues=scale * block.eigenvalues) for name, block in self.blocks.items()}
        return replace(self, network=objective.network, blocks=blocks, rest_diagonal=scale * self.rest_diagonal)

    @classmethod
    def restored(cls, network: Network, tensors: dict[str, Tensor], description: dict[str, Any]) -> Blocks:
        """From `tensors()` and `description()`."""
        layout = Layout.described(network.subset, description)
        blocks = {
            name: KroneckerBlock(
                tensors[f"{name}/eigenvalues"], tensors.get(f"{name}/output"), tensors.get(f"{name}/input")
            )
            for name in layout.maps
        }
        return cls(network, layout.maps, layout.rest, blocks, tensors[_REST])


class BlockPrecision(Precision):
    """A, block by block."""

    def __init__(self, network: Network, layout: Layout, blocks: dict[str, KroneckerBlock], rest: Tensor) -> None:
        self.network, self.layout, self.blocks, self.rest = network, layout, blocks, rest

    def variance_at(self, network: Network, x: PyTree) -> Tensor:
        def read(rows: LayerwiseRows) -> Tensor:
            parts = [block.variance(rows.factors[name]) for name, block in self.blocks.items()]
            return sum(parts, (to_algebra_dtype(rows.rest).square() / self.rest).sum(-1)).to(network.theta.dtype)

        return torch.cat([read(rows) for rows in LayerwiseJacobian(network, x, self.layout.maps).at(x)])

    def covariance_at(self, network: Network, x: PyTree) -> Tensor:
        def read(rows: LayerwiseRows) -> Tensor:
            parts = [block.covariance(rows.factors[name]) for name, block in self.blocks.items()]
            rest = to_algebra_dtype(rows.rest)
            return sum(parts, (rest / self.rest) @ rest.transpose(1, 2)).to(network.theta.dtype)

        return torch.cat([read(rows) for rows in LayerwiseJacobian(network, x, self.layout.maps).at(x)])

    def solve(self, vectors: Tensor) -> Tensor:
        solved = torch.zeros_like(vectors, dtype=self.rest.dtype)
        for name, block in self.blocks.items():
            self.layout.put(solved, name, block.solve(self.layout.matrix(vectors, name)))
        solved[..., self.layout.rest_index] = self.layout.rest_of(vectors) / self.rest
        return solved.to(vectors.dtype)

    def covariance(self, jacobian: Tensor) -> Tensor:
        m, c, p = jacobian.shape
        wide = to_algebra_dtype(jacobian)
        solved = self.solve(wide.reshape(m * c, p)).reshape(m, c, p)
        return (wide @ solved.transpose(1, 2)).to(jacobian.dtype)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Displacements (n, P) ~ N(0, A⁻¹)."""
        rest, p = self.rest, self.layout.subset.n_parameters
        theta = rest.new_zeros(n_samples, p)
        for name, block in self.blocks.items():
            self.layout.put(theta, name, block.sample(n_samples, generator))
        z = torch.randn(n_samples, len(rest), generator=generator, dtype=rest.dtype, device=rest.device)
        theta[:, self.layout.rest_index] = z / rest.sqrt()
        return theta

    def log_det(self) -> Tensor:
        return torch.stack([self.rest.log().sum(), *(block.log_det() for block in self.blocks.values())]).sum()


def collect(objective: Objective, structure: str) -> Blocks:
    """The data's part of A: one pass over the data ("kron", "diag") or two ("ekfac")."""
    layers = layers_of(objective)
    if structure == "diag":
        return _with_own_eigenvalues(objective, layers, {})
    kron, rest = _kron(objective, layers)
    _warn_of_diagonals(layers, structure)
    if structure == "ekfac":
        return _with_own_eigenvalues(objective, layers, kron)
    return Blocks(objective.network, layers.maps, layers.rest, kron, rest)


def _warn_of_diagonals(layers: LayerwiseJacobian, structure: str) -> None:
    """DiagonalWeightsWarning for weights of layers that have no Kronecker factors here."""
    names = layers.other_products
    if names:
        warnings.warn(
            f'hessian_structure="{structure}" has no Kronecker factors for {", ".join(names)}: it keeps the exact '
            "diagonal of their GGN. Known are linear layers, and convolutions without groups in 1 to 3 dimensions, "
            'transposed ones too. hessian_structure="full" keeps all correlations.',
            DiagonalWeightsWarning,
            stacklevel=2,
        )


def _kron(objective: Objective, layers: LayerwiseJacobian) -> tuple[dict[str, KroneckerBlock], Tensor]:
    """Blocks in the eigenbasis of both factors, and the diagonal of the rest."""
    dtype, device = algebra_dtype(objective.theta.device), objective.theta.device
    shapes = {name: linear.shape for name, linear in layers.maps.items()}
    outer = {name: torch.zeros(o, o, dtype=dtype, device=device) for name, (o, _) in shapes.items()}
    inner = {name: SecondMoment(e, dtype) for name, (_, e) in shapes.items()}
    rest = _zeros_of_rest(objective, layers)
    for rows in whitened_rows(objective, layers):
        rest += to_algebra_dtype(rows.rest).square().sum((0, 1))
        for name, factors in rows.factors.items():
            a, b = factors.inputs.flatten(0, 1), to_algebra_dtype(factors.slopes).flatten(0, 2)
            inner[name].add(a)  # Σ a aᵀ
            outer[name] += b.T @ b  # Σ b bᵀ
    return {name: _eigen(outer[name], inner[name]) for name in shapes}, rest


def _eigen(outer: Tensor, inner: SecondMoment) -> KroneckerBlock:
    values, output_basis = torch.linalg.eigh(outer)
    moments, input_basis = inner.eigen()
    eigenvalues = torch.outer(values.clamp_min(0), moments.clamp_min(0)) / inner.n_rows
    return KroneckerBlock(eigenvalues, output_basis, input_basis)


def _with_prior(block: KroneckerBlock, delta: Tensor) -> KroneckerBlock:
    """δ (O, E) added to the eigenvalues; it is all there is on inputs that were never seen."""
    basis = block.input_basis
    if basis is None:
        return replace(block, eigenvalues=block.eigenvalues + delta)
    outside = delta[0, 0] if basis.shape[0] > basis.shape[1] else None
    return replace(block, eigenvalues=block.eigenvalues + delta[0, 0], outside=outside)


def _with_own_eigenvalues(objective: Objective, layers: LayerwiseJacobian, bases: dict[str, KroneckerBlock]) -> Blocks:
    """Σ J̃² in the basis of each block, or in that of the weights."""
    rest = _zeros_of_rest(objective, layers)
    dtype = rest.dtype
    blank = KroneckerBlock(torch.zeros((), dtype=dtype, device=rest.device))
    sums: dict[str, Tensor] = dict.fromkeys(layers.maps, rest.new_zeros(()))
    for rows in whitened_rows(objective, layers):
        rest += to_algebra_dtype(rows.rest).square().sum((0, 1))
        for name, factors in rows.factors.items():
            sums[name] = sums[name] + _summed_squares(bases.get(name, blank), factors.to(dtype))
    blocks = {name: replace(bases.get(name, blank), eigenvalues=total) for name, total in sums.items()}
    return Blocks(objective.network, layers.maps, layers.rest, blocks, rest)


def _summed_squares(basis: KroneckerBlock, rows: JacobianFactors) -> Tensor:
    """Σ over rows and columns of J̃², (O, E)."""
    if rows.inputs.shape[1] == 1:
        rotated = basis.rotated(rows)
        outer: Tensor = rotated.slopes[:, :, 0].square().sum(1).T @ rotated.inputs[:, 0].square()
        return outer
    return by_rows(rows, lambda part: basis.jacobians(part).square_().sum((0, 1))[None]).sum(0)


def _zeros_of_rest(objective: Objective, layers: LayerwiseJacobian) -> Tensor:
    return to_algebra_dtype(objective.theta[:0]).new_zeros(objective.network.subset.n_entries(layers.rest))


def _several_deltas(linear: LinearMap, delta: Tensor) -> OptionError:
    return OptionError(
        f"one prior_precision for {' and '.join(linear.names)} together with a Kronecker structure",
        received=f"values from {float(delta.min()):g} to {float(delta.max()):g}",
        remedy='hessian_structure="diag" or "full", or one number for weight and bias of a layer.',
    )


def _refuse_singular(eigenvalues: list[Tensor]) -> None:
    values = torch.cat([part.flatten() for part in eigenvalues])
    smallest, largest = float(values.min()), float(values.max())
    if smallest <= smallest_allowed_ratio(values.dtype) * largest:
        raise IndefiniteHessianError(smallest=smallest, largest=largest)
