"""GGN rows R = SᵀJ in factors, and products with them, for networks that use every weight once per row.

Along column k of S (Λ = SSᵀ) the row of a linear map is b_nk ⊗ a_n. For δ that depends on the input e alone, as
prior precisions by name do,

    (R D⁻¹ R'ᵀ)_nk,mj = Σ_maps (Σ_e a_ne a'_me / δ_e) (b_nk · b'_mj) + other parameters

takes (N·C)²·(E + O) multiplications instead of (N·C)²·E·O, and no row of P numbers is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from estimators.errors import UnsupportedError
from estimators.models.jacobian_factors import LayerwiseRows
from estimators.models.layer_layout import Layout
from estimators.runtime.memory import check_fits_memory

__all__ = ["FactoredRows"]

_OTHERS = "other_params"
"""Name of the rows of the other parameters in a file."""


@dataclass(frozen=True)
class FactoredRows:
    """Rows R (N·C, P) in factors.

    Attributes:
        layout: where the maps and the other parameters lie in θ.
        inputs: a (N, E) of each map, by the name of its weight.
        gradients: b (N, C, O) of each map, by the name of its weight.
        other_rows: rows over the other parameters, (N, C, P_other).
    """

    layout: Layout
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    other_rows: Tensor

    @classmethod
    def joined(cls, layout: Layout, chunks: Iterable[LayerwiseRows], dtype: torch.dtype) -> FactoredRows:
        """Join the rows of all chunks.

        Raises:
            UnsupportedError: a map is applied to several positions of a row, or rows differ in C.
        """
        found = list(chunks)
        if len({rows.other_rows.shape[1] for rows in found}) != 1:
            raise UnsupportedError("one number of outputs at every row", received="several", remedy='inverse="cg".')
        factors = {name: [rows.factors[name].at_single_position() for rows in found] for name in layout.maps}
        inputs = {name: torch.cat([f.inputs[:, 0] for f in parts]).to(dtype) for name, parts in factors.items()}
        gradients = {
            name: torch.cat([f.gradients[:, :, 0] for f in parts]).to(dtype) for name, parts in factors.items()
        }
        return cls(layout, inputs, gradients, torch.cat([rows.other_rows for rows in found]).to(dtype))

    @classmethod
    def restored(cls, layout: Layout, tensors: dict[str, Tensor]) -> FactoredRows:
        """The rows of `tensors()`."""
        inputs, gradients = (
            {name: tensors[f"{name}/{part}"] for name in layout.maps} for part in ("inputs", "gradients")
        )
        return cls(layout, inputs, gradients, tensors[_OTHERS])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in a file, from which `restored` makes the rows."""
        inputs = {f"{name}/inputs": tensor for name, tensor in self.inputs.items()}
        gradients = {f"{name}/gradients": tensor for name, tensor in self.gradients.items()}
        return {_OTHERS: self.other_rows} | inputs | gradients

    def scaled(self, scale: float) -> FactoredRows:
        """scale · R."""
        gradients = {name: scale * b for name, b in self.gradients.items()}
        return replace(self, gradients=gradients, other_rows=scale * self.other_rows)

    def split(self, size: int) -> Iterator[FactoredRows]:
        """Yield chunks of `size` data."""
        for start in range(0, len(self.other_rows), size):
            part = slice(start, start + size)
            inputs = {name: a[part] for name, a in self.inputs.items()}
            gradients = {name: b[part] for name, b in self.gradients.items()}
            yield replace(self, inputs=inputs, gradients=gradients, other_rows=self.other_rows[part])

    @property
    def shape(self) -> tuple[int, int]:
        """N and C."""
        return self.other_rows.shape[0], self.other_rows.shape[1]

    def suits(self, delta: Tensor) -> bool:
        """Return whether δ (P,) is the same for all outputs of each map, so that products need no whole rows."""
        return all(bool((matrix == matrix[0]).all()) for matrix in self._matrices(delta).values())

    def dense(self) -> Tensor:
        """R (N·C, P) as whole rows.

        Raises:
            TooLargeError: they do not fit into memory.
        """
        (n, c), others = self.shape, self.other_rows
        check_fits_memory(
            f"{n * c} GGN rows of {self.layout.subset.n_parameters} parameters, as a δ for each weight needs them",
            4 * n * c * self.layout.subset.n_parameters * others.element_size(),
            device=others.device,
            remedy='one prior_precision per parameter tensor, inverse="cg", or RegVar.',
        )
        return self.transposed_times(torch.eye(n * c, dtype=others.dtype, device=others.device))

    def _matrices(self, delta: Tensor) -> dict[str, Tensor]:
        """The entries of δ (P,) of each map, (O, E)."""
        return {name: self.layout.matrix(delta, name) for name in self.layout.maps}

    def deltas(self, delta: Tensor) -> dict[str, Tensor]:
        """The entries of δ (P,): (E,) for each map, the same for all of its outputs, and (P_other,)."""
        assert self.suits(delta)
        matrices = self._matrices(delta)
        return {_OTHERS: self.layout.other_entries(delta)} | {
            name: matrix[0].clone() for name, matrix in matrices.items()
        }

    def inner(self, others: FactoredRows, deltas: dict[str, Tensor]) -> Tensor:
        """R D⁻¹ R'ᵀ (N·C, N'·C') with the rows R' of `others`."""
        (n, c), (m, k) = self.shape, others.shape
        total = (self.other_rows / deltas[_OTHERS]).flatten(0, 1) @ others.other_rows.flatten(0, 1).T
        for name, a in self.inputs.items():
            of_inputs = (a / deltas[name]) @ others.inputs[name].T
            of_gradients = self.gradients[name].flatten(0, 1) @ others.gradients[name].flatten(0, 1).T
            total += of_gradients.view(n, c, m, k).mul_(of_inputs[:, None, :, None]).view(n * c, m * k)
        return total

    def self_products(self, deltas: dict[str, Tensor]) -> Tensor:
        """The diagonal blocks (N, C, C) of R D⁻¹ Rᵀ, of each datum with itself."""
        total = (self.other_rows / deltas[_OTHERS]) @ self.other_rows.transpose(1, 2)
        for name, a in self.inputs.items():
            of_inputs = (a.square() / deltas[name]).sum(1)
            total += of_inputs[:, None, None] * (self.gradients[name] @ self.gradients[name].transpose(1, 2))
        return total

    def prior_variance(self, deltas: dict[str, Tensor]) -> Tensor:
        """The diagonal (N, C) of R D⁻¹ Rᵀ."""
        total = (self.other_rows.square() / deltas[_OTHERS]).sum(-1)
        for name, a in self.inputs.items():
            total += (a.square() / deltas[name]).sum(1)[:, None] * self.gradients[name].square().sum(-1)
        return total

    def times(self, vectors: Tensor) -> Tensor:
        """R v (K, N·C) for vectors v (K, P)."""
        total = torch.einsum("ncp,kp->knc", self.other_rows, self.layout.other_entries(vectors))
        for name, a in self.inputs.items():
            va = self.layout.matrix(vectors, name) @ a.T  # V a, (K, O, N)
            total += torch.einsum("kon,nco->knc", va, self.gradients[name])
        return total.flatten(1)

    def transposed_times(self, coefficients: Tensor) -> Tensor:
        """Rᵀ w (K, P) for coefficients w (K, N·C)."""
        w = coefficients.unflatten(1, self.shape)
        total = coefficients.new_empty(len(w), self.layout.subset.n_parameters)
        total[:, self.layout.other_index] = torch.einsum("knc,ncp->kp", w, self.other_rows)
        for name, a in self.inputs.items():
            weighted = torch.einsum("knc,nco->kon", w, self.gradients[name])
            self.layout.put(total, name, weighted @ a)
        return total
