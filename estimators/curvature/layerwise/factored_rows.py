"""GGN rows R = SᵀJ in factors, for networks that use every weight once a row, and products with them.

Along column k of S (Λ = SSᵀ) the row of a linear map is b_nk ⊗ a_n. With δ by input e alone, as priors by name have it,

    (R D⁻¹ R'ᵀ)_nk,mj = Σ_maps (Σ_e a_ne a'_me / δ_e) (b_nk · b'_mj) + the rest

takes (N·C)²·(E + O) multiplications in place of (N·C)²·E·O, and no row of P numbers is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from estimators.errors import UnsupportedError
from estimators.models.layer_jacobians import LayerwiseRows
from estimators.models.layer_layout import Layout

__all__ = ["FactoredRows"]

_REST = "rest"


@dataclass(frozen=True)
class FactoredRows:
    """R (N·C, P): of each map, by its weight, inputs a (N, E) and slopes b (N, C, O); of the rest (N, C, P_rest)."""

    layout: Layout
    inputs: dict[str, Tensor]
    slopes: dict[str, Tensor]
    rest: Tensor

    @classmethod
    def joined(cls, layout: Layout, params: Iterable[LayerwiseRows], dtype: torch.dtype) -> FactoredRows:
        """The rows of all pieces. Errors: UnsupportedError where a map is not at one place a row, or C is not one."""
        found = list(params)
        if len({p.rest.shape[1] for p in found}) != 1:
            raise UnsupportedError("one number of outputs at every row", received="several", remedy='inverse="cg".')
        factors = {name: [p.factors[name].at_one_place() for p in found] for name in layout.maps}
        inputs = {name: torch.cat([one.inputs[:, 0] for one in every]).to(dtype) for name, every in factors.items()}
        slopes = {name: torch.cat([one.slopes[:, :, 0] for one in every]).to(dtype) for name, every in factors.items()}
        return cls(layout, inputs, slopes, torch.cat([p.rest for p in found]).to(dtype))

    @classmethod
    def restored(cls, layout: Layout, tensors: dict[str, Tensor]) -> FactoredRows:
        """From `tensors()`."""
        inputs, slopes = ({name: tensors[f"{name}/{part}"] for name in layout.maps} for part in ("inputs", "slopes"))
        return cls(layout, inputs, slopes, tensors[_REST])

    def tensors(self) -> dict[str, Tensor]:
        """By names that a file can have."""
        inputs = {f"{name}/inputs": tensor for name, tensor in self.inputs.items()}
        return {_REST: self.rest} | inputs | {f"{name}/slopes": tensor for name, tensor in self.slopes.items()}

    def scaled(self, scale: float) -> FactoredRows:
        """scale · R."""
        slopes = {name: scale * b for name, b in self.slopes.items()}
        return replace(self, slopes=slopes, rest=scale * self.rest)

    def split(self, size: int) -> Iterator[FactoredRows]:
        """Some rows at a time."""
        for start in range(0, len(self.rest), size):
            part = slice(start, start + size)
            inputs, slopes = ({name: t[part] for name, t in factors.items()} for factors in (self.inputs, self.slopes))
            yield replace(self, inputs=inputs, slopes=slopes, rest=self.rest[part])

    @property
    def shape(self) -> tuple[int, int]:
        """N and C."""
        return self.rest.shape[0], self.rest.shape[1]

    def deltas(self, delta: Tensor) -> dict[str, Tensor]:
        """Of δ (P,): by input, (E,), of each map, the same for all of its outputs; and of the rest, (P_rest,)."""
        matrices = {name: self.layout.matrix(delta, name) for name in self.layout.maps}
        assert all(bool((matrix == matrix[0]).all()) for matrix in matrices.values())
        return {_REST: self.layout.rest_of(delta)} | {name: matrix[0].clone() for name, matrix in matrices.items()}

    def inner(self, others: FactoredRows, deltas: dict[str, Tensor]) -> Tensor:
        """R D⁻¹ R'ᵀ, (N·C, N'·C')."""
        (n, c), (m, k) = self.shape, others.shape
        total = (self.rest / deltas[_REST]).flatten(0, 1) @ others.rest.flatten(0, 1).T
        for name, a in self.inputs.items():
            of_inputs = (a / deltas[name]) @ others.inputs[name].T
            of_slopes = self.slopes[name].flatten(0, 1) @ others.slopes[name].flatten(0, 1).T
            total += of_slopes.view(n, c, m, k).mul_(of_inputs[:, None, :, None]).view(n * c, m * k)
        return total

    def own(self, deltas: dict[str, Tensor]) -> Tensor:
        """The blocks of R D⁻¹ Rᵀ of each row with itself, (N, C, C)."""
        total = (self.rest / deltas[_REST]) @ self.rest.transpose(1, 2)
        for name, a in self.inputs.items():
            of_inputs = (a.square() / deltas[name]).sum(1)
            total += of_inputs[:, None, None] * (self.slopes[name] @ self.slopes[name].transpose(1, 2))
        return total

    def times(self, vectors: Tensor) -> Tensor:
        """R v of vectors (K, P): (K, N·C)."""
        total = torch.einsum("ncp,kp->knc", self.rest, self.layout.rest_of(vectors))
        for name, a in self.inputs.items():
            along = self.layout.matrix(vectors, name) @ a.T  # V a, (K, O, N)
            total += torch.einsum("kon,nco->knc", along, self.slopes[name])
        return total.flatten(1)

    def transposed_times(self, coefficients: Tensor) -> Tensor:
        """Rᵀ w of coefficients (K, N·C): (K, P)."""
        w = coefficients.unflatten(1, self.shape)
        total = coefficients.new_empty(len(w), self.layout.subset.n_parameters)
        total[:, self.layout.rest_index] = torch.einsum("knc,ncp->kp", w, self.rest)
        for name, a in self.inputs.items():
            along = torch.einsum("knc,nco->kon", w, self.slopes[name])
            self.layout.put(total, name, along @ a)
        return total
