"""The GGN layer by layer: kron (K-FAC), ekfac, diag. Other parameters (norms, embeddings) keep its diagonal.

A linear map has inputs a_nt, and gradients b_nkt with respect to its output along the columns k of G_n, with G Gᵀ = Λ
or its estimate (`curvature.fisher`). Its block of the GGN is Σ_nk vec(Σ_t b aᵀ) vec(Σ_t b aᵀ)ᵀ, with vec by rows of W.
It is replaced by one of these; "expand" and "reduce" differ if a weight is used at several positions t of a row:

    kron     Σ_nkt b bᵀ ⊗ Σ_nt a aᵀ / (positions nt): Martens & Grosse 2015, "expand" in Eschenhagen et al. 2023
             Σ_nk b̄ b̄ᵀ ⊗ Σ_n ā āᵀ / N with b̄ = Σ_t b and ā = the mean of a over t: "reduce" in Eschenhagen et al. 2023
    ekfac    eigenvectors U of Σ b bᵀ and V of Σ a aᵀ, with the eigenvalues Σ_nk (Uᵀ Σ_t b aᵀ V)² of the block itself:
             George et al. 2018
    diag     the basis of the weights, with those eigenvalues: the exact diagonal

δ is added to the eigenvalues exactly. Nothing of size P × P or C × P × batch is made. With a sampled or empirical
Fisher, nothing of size C × C per row is made either. "ekfac" then takes its eigenvalues from other sampled labels than
its basis, so that they are unbiased given the basis.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from estimators.curvature.base import Precision, standard_normal
from estimators.curvature.definiteness import check_eigenvalues
from estimators.curvature.fisher import Fisher
from estimators.curvature.layerwise.kronecker_block import KroneckerBlock, by_rows
from estimators.curvature.layerwise.second_moment import SecondMoment
from estimators.curvature.layerwise.whitened_rows import layers_of, whitened_rows
from estimators.errors import DiagonalWeightsWarning, OptionError
from estimators.models.jacobian_factors import JacobianFactors, LayerwiseRows
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.models.layer_layout import Layout
from estimators.models.linear_calls import LinearMap
from estimators.models.network import Network
from estimators.numerics.dtype import algebra_dtype, to_algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.runtime.memory import check_fits_memory

__all__ = ["KFAC_APPROXIMATIONS", "BlockPrecision", "Blocks", "collect"]

KFAC_APPROXIMATIONS = ("expand", "reduce")
"""Values of the option `kfac_approx`."""
_MOST_DENSE_OUTPUTS = 4096
"""Outputs of a map up to which their second moment is always a matrix, and has all eigenvectors."""

_OTHERS = "other_params"
"""Name of the tensor of the other parameters in a file."""


@dataclass(frozen=True)
class Blocks:
    """The data's part of A in blocks.

    Attributes:
        network: the network.
        maps: the linear maps, by the name of their weight.
        other_params: the names of all other parameters.
        blocks: the block of each map, by the name of its weight.
        other_diagonal: the diagonal (P_other,) of the other parameters.
    """

    network: Network
    maps: dict[str, LinearMap]
    other_params: list[str]
    blocks: dict[str, KroneckerBlock]
    other_diagonal: Tensor

    def precision(self, prior_precision: Tensor) -> BlockPrecision:
        """The posterior precision for a prior precision δ (P,).

        Raises:
            OptionError: δ has several values within a map in a Kronecker basis.
            IndefiniteHessianError: some δ are 0, and A is singular.
        """
        layout, blocks = self.layout, {}
        for name, block in self.blocks.items():
            delta = layout.matrix(prior_precision, name)
            if block.input_basis is not None and float(delta.min()) != float(delta.max()):
                raise _several_deltas(self.maps[name], delta)
            blocks[name] = _with_prior(block, delta)
        others = self.other_diagonal + layout.other_entries(prior_precision)
        if not bool((prior_precision > 0).all()):
            outside = [block.outside for block in blocks.values() if block.outside is not None]
            check_eigenvalues(others, *(block.eigenvalues for block in blocks.values()), *outside)
        return BlockPrecision(layout, blocks, others)

    @property
    def layout(self) -> Layout:
        """Where the maps and the other parameters lie in θ."""
        return Layout(self.network.subset, self.maps, self.other_params)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors from which `restored` makes the blocks, with `description()`."""
        found = {_OTHERS: self.other_diagonal}
        for name, block in self.blocks.items():
            parts = {"eigenvalues": block.eigenvalues, "output": block.output_basis, "input": block.input_basis}
            found |= {f"{name}/{part}": tensor for part, tensor in parts.items() if tensor is not None}
        return found

    def description(self) -> dict[str, Any]:
        """The maps and the other parameters, in JSON types."""
        return self.layout.description()

    def rescaled(self, objective: Objective, scale: float) -> Blocks:
        """`scale` times these blocks, for a new objective at the same weights and rows."""
        blocks = {name: replace(block, eigenvalues=scale * block.eigenvalues) for name, block in self.blocks.items()}
        return replace(self, network=objective.network, blocks=blocks, other_diagonal=scale * self.other_diagonal)

    @classmethod
    def restored(cls, network: Network, tensors: dict[str, Tensor], description: dict[str, Any]) -> Blocks:
        """The blocks of `tensors()` and `description()`."""
        layout = Layout.from_description(network.subset, description)
        blocks = {
            name: KroneckerBlock(
                tensors[f"{name}/eigenvalues"], tensors.get(f"{name}/output"), tensors.get(f"{name}/input")
            )
            for name in layout.maps
        }
        return cls(network, layout.maps, layout.other_params, blocks, tensors[_OTHERS])


class BlockPrecision(Precision):
    """A in blocks: one per linear map, and a diagonal `others` (P_other,) over the other parameters."""

    def __init__(self, layout: Layout, blocks: dict[str, KroneckerBlock], others: Tensor) -> None:
        self.layout, self.blocks, self.others = layout, blocks, others

    def variance_at(self, network: Network, x: PyTree) -> Tensor:
        def variance(rows: LayerwiseRows) -> Tensor:
            parts = [block.variance(rows.factors[name]) for name, block in self.blocks.items()]
            return sum(parts, (to_algebra_dtype(rows.other_rows).square() / self.others).sum(-1))

        return self._by_rows(network, x, variance)

    def covariance_at(self, network: Network, x: PyTree) -> Tensor:
        def covariance(rows: LayerwiseRows) -> Tensor:
            parts = [block.covariance(rows.factors[name]) for name, block in self.blocks.items()]
            others = to_algebra_dtype(rows.other_rows)
            return sum(parts, (others / self.others) @ others.transpose(1, 2))

        return self._by_rows(network, x, covariance)

    def joint_covariance_at(self, network: Network, x: PyTree) -> Tensor:
        # Blocks whose rows are outer products stay in factors. The others give rows J A^(−½), of which the Gram matrix
        # is the covariance; bases are applied to factors, not to whole rows.
        layers, factors, white = LayerwiseJacobian(network, x, self.layout.maps), defaultdict(list), []
        for rows in layers.rows_at(x):
            parts = []
            for name, block in self.blocks.items():
                of_map = rows.factors[name]
                if block.has_joint_form(of_map):
                    factors[name].append(of_map)
                else:
                    parts.append(block.whitened(of_map))
            white.append(torch.cat([*parts, to_algebra_dtype(rows.other_rows) * self.others.rsqrt()], dim=-1))
        joined = torch.cat(white)
        m, c, _ = joined.shape
        covariance = torch.einsum("mcp,ndp->mcnd", joined, joined)
        for name, chunks in factors.items():
            covariance += self.blocks[name].joint_covariance(JacobianFactors.joined(chunks))
        flat = covariance.reshape(m * c, m * c)
        return (0.5 * (flat + flat.T)).reshape(m, c, m, c).to(network.theta.dtype)

    def _by_rows(self, network: Network, x: PyTree, read: Callable[[LayerwiseRows], Tensor]) -> Tensor:
        """Apply `read` to the Jacobian rows at x, a chunk at a time, and join the results."""
        layers = LayerwiseJacobian(network, x, self.layout.maps)
        return torch.cat([read(rows).to(network.theta.dtype) for rows in layers.rows_at(x)])

    def solve(self, vectors: Tensor) -> Tensor:
        solved = torch.zeros_like(vectors, dtype=self.others.dtype)
        for name, block in self.blocks.items():
            self.layout.put(solved, name, block.solve(self.layout.matrix(vectors, name)))
        solved[..., self.layout.other_index] = self.layout.other_entries(vectors) / self.others
        return solved.to(vectors.dtype)

    def multiply(self, vectors: Tensor) -> Tensor:
        inverse = {name: block.inverse for name, block in self.blocks.items()}
        return BlockPrecision(self.layout, inverse, self.others.reciprocal()).solve(vectors)

    def marginal_variance(self, theta: Tensor) -> Tensor:
        variance = torch.zeros_like(theta, dtype=self.others.dtype)
        for name, block in self.blocks.items():
            self.layout.put(variance, name, block.marginal_variance())
        variance[self.layout.other_index] = self.others.reciprocal()
        return variance.to(theta.dtype)

    def covariance(self, jacobian: Tensor) -> Tensor:
        m, c, p = jacobian.shape
        rows = to_algebra_dtype(jacobian)
        solved = self.solve(rows.reshape(m * c, p)).reshape(m, c, p)
        return (rows @ solved.transpose(1, 2)).to(jacobian.dtype)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Displacements (n_samples, P) ~ N(0, A⁻¹)."""
        theta = self.others.new_zeros(n_samples, self.layout.subset.n_parameters)
        for name, block in self.blocks.items():
            self.layout.put(theta, name, block.sample(n_samples, generator))
        z = standard_normal((n_samples, len(self.others)), self.others, generator)
        theta[:, self.layout.other_index] = z / self.others.sqrt()
        return theta

    def log_det(self) -> Tensor:
        return torch.stack([self.others.log().sum(), *(block.log_det() for block in self.blocks.values())]).sum()


def collect(objective: Objective, structure: str, *, fisher: Fisher, kfac_approx: str) -> Blocks:
    """Compute the blocks in one pass over the data ("kron", "diag") or two ("ekfac").

    Raises:
        TooLargeError: the factor of a map with very many outputs does not fit into memory.
    """
    layers = layers_of(objective)
    if structure == "diag":
        return _with_own_eigenvalues(objective, layers, {}, fisher)
    _check_output_factors(objective, layers, fisher)
    kron, others = _kron(objective, layers, fisher, reduced=kfac_approx == "reduce")
    _warn_of_diagonals(layers, structure)
    if structure == "ekfac":
        return _with_own_eigenvalues(objective, layers, kron, fisher.with_other_samples())
    return Blocks(objective.network, layers.maps, layers.other_params, kron, others)


def _warn_of_diagonals(layers: LayerwiseJacobian, structure: str) -> None:
    """Warn with DiagonalWeightsWarning if some layers have no Kronecker factors."""
    names = layers.other_products
    if names:
        warnings.warn(
            f'hessian_structure="{structure}" has no Kronecker factors for {", ".join(names)}: it keeps the exact '
            "diagonal of their GGN. Supported are linear layers, and convolutions without groups in 1 to 3 dimensions, "
            'transposed ones too. hessian_structure="full" keeps all correlations.',
            DiagonalWeightsWarning,
            stacklevel=2,
        )


def _check_output_factors(objective: Objective, layers: LayerwiseJacobian, fisher: Fisher) -> None:
    """Raise TooLargeError if Σ b bᵀ of a map with very many outputs does not fit into memory."""
    n_rows = objective.batches.n_data * fisher.n_cotangents(layers.n_outputs)
    positions = layers.n_positions()
    device = objective.theta.device
    for name, linear in layers.maps.items():
        o, rows = linear.n_outputs, n_rows * positions[name]
        if o <= _MOST_DENSE_OUTPUTS:
            continue
        columns = rows if 2 * rows <= o else o
        check_fits_memory(
            f"a factor of {o} × {columns} numbers for the {o} outputs of {name}",
            4 * o * columns * algebra_dtype(device).itemsize,
            device=device,
            remedy='fisher="mc" with fewer rows, hessian_structure="diag", or subset_of_weights without this layer.',
        )


def _kron(
    objective: Objective, layers: LayerwiseJacobian, fisher: Fisher, *, reduced: bool
) -> tuple[dict[str, KroneckerBlock], Tensor]:
    """Blocks in the eigenbasis of both factors, and the diagonal of the other parameters."""
    dtype = algebra_dtype(objective.theta.device)
    shapes = {name: linear.shape for name, linear in layers.maps.items()}
    outer = {name: SecondMoment(o, dtype, keep_rows=o > _MOST_DENSE_OUTPUTS) for name, (o, _) in shapes.items()}
    inner = {name: SecondMoment(e, dtype) for name, (_, e) in shapes.items()}
    others = _zeros_of_others(objective, layers)
    for rows in whitened_rows(objective, layers, fisher, pooled=reduced):
        others += to_algebra_dtype(rows.other_rows).square().sum((0, 1))
        for name, factors in rows.factors.items():
            a, b = factors.inputs, factors.gradients
            inner[name].add(a.flatten(0, 1))  # Σ a aᵀ
            outer[name].add(b.flatten(0, 2))  # Σ b bᵀ
    return {name: _eigen(outer[name], inner[name]) for name in shapes}, others


def _eigen(outer: SecondMoment, inner: SecondMoment) -> KroneckerBlock:
    """The block Σ b bᵀ ⊗ Σ a aᵀ / (number of positions) in its eigenbasis."""
    values, output_basis = outer.eigen()
    moments, input_basis = inner.eigen()
    eigenvalues = torch.outer(values.clamp_min(0), moments.clamp_min(0)) / inner.n_rows
    return KroneckerBlock(eigenvalues, output_basis, input_basis)


def _with_prior(block: KroneckerBlock, delta: Tensor) -> KroneckerBlock:
    """The block with δ (O, E) added to its eigenvalues; δ alone is the eigenvalue outside both bases."""
    bases = [basis for basis in (block.output_basis, block.input_basis) if basis is not None]
    if not bases:
        return replace(block, eigenvalues=block.eigenvalues + delta)
    outside = delta[0, 0] if any(basis.shape[0] > basis.shape[1] for basis in bases) else None
    return replace(block, eigenvalues=block.eigenvalues + delta[0, 0], outside=outside)


def _with_own_eigenvalues(
    objective: Objective, layers: LayerwiseJacobian, bases: dict[str, KroneckerBlock], fisher: Fisher
) -> Blocks:
    """Blocks with eigenvalues Σ J̃² in the basis of each of `bases`, or in that of the weights."""
    others = _zeros_of_others(objective, layers)
    dtype = others.dtype
    blank = KroneckerBlock(torch.zeros((), dtype=dtype, device=others.device))
    sums: dict[str, Tensor] = dict.fromkeys(layers.maps, others.new_zeros(()))
    for rows in whitened_rows(objective, layers, fisher):
        others += to_algebra_dtype(rows.other_rows).square().sum((0, 1))
        for name, factors in rows.factors.items():
            sums[name] = sums[name] + _summed_squares(bases.get(name, blank), factors.to(dtype))
    blocks = {name: replace(bases.get(name, blank), eigenvalues=total) for name, total in sums.items()}
    return Blocks(objective.network, layers.maps, layers.other_params, blocks, others)


def _summed_squares(basis: KroneckerBlock, rows: JacobianFactors) -> Tensor:
    """Σ J̃² (O, E) over rows and cotangents."""
    if rows.inputs.shape[1] == 1:
        rotated = basis.rotated(rows)
        outer: Tensor = rotated.gradients[:, :, 0].square().sum(1).T @ rotated.inputs[:, 0].square()
        return outer
    return by_rows(rows, lambda part: basis.jacobians(part).square_().sum((0, 1))[None]).sum(0)


def _zeros_of_others(objective: Objective, layers: LayerwiseJacobian) -> Tensor:
    """Zeros (P_other,) in `algebra_dtype`."""
    return to_algebra_dtype(objective.theta[:0]).new_zeros(objective.network.subset.n_entries(layers.other_params))


def _several_deltas(linear: LinearMap, delta: Tensor) -> OptionError:
    """The error for several δ within a map in a Kronecker basis."""
    return OptionError(
        f"one prior_precision for {' and '.join(linear.names)} together with a Kronecker structure",
        received=f"values from {float(delta.min()):g} to {float(delta.max()):g}",
        remedy='hessian_structure="diag" or "full", or one number for weight and bias of a layer.',
    )
