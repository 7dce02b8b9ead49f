"""Exact linearized Laplace: covariance(x) = J A⁻¹ Jᵀ, with A the GGN or the exact Hessian plus δ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from estimators.curvature.builders import (
    BUILDERS,
    LOW_RANK,
    Built,
    DataCurvature,
    JacobianCurvature,
    MatrixFreeCurvature,
    ProductCurvature,
    build_low_rank,
    centre_of,
    restored,
)
from estimators.curvature.dense.cholesky import DensePrecision
from estimators.curvature.dense.dual import FunctionSpace
from estimators.curvature.layerwise.blocks import BlockPrecision, Blocks
from estimators.curvature.sizes import choose_inverse
from estimators.errors import OptionError, TooLargeError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator, precision_vector
from estimators.laplace.evidence import log_marginal_likelihood
from estimators.likelihoods import Likelihood
from estimators.models.exclusive import exclusively
from estimators.models.functionals import ComposedNetwork, Functional
from estimators.models.subsets import SubsetSpec
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.objective.prior_noise import precision_noise
from estimators.option_checks import checked_integer, shown
from estimators.persistence.state import Learned

__all__ = ["LinearizedLaplace"]


class LinearizedLaplace(UncertaintyEstimator):
    """Linearized Laplace (MacKay 1992; Immer et al. 2021), exact for the chosen parameters.

        A = Σₙ Jₙᵀ Λₙ Jₙ + δ  ("ggn")   or   ∇²L(θ̂)  ("hessian")        covariance(x) = J(x) A⁻¹ J(x)ᵀ, (C, C)

    Args:
        curvature: "ggn" (positive definite at any θ̂) or "hessian" (exact; needs a positive definite one at θ̂).
        hessian_structure: "full"; or, of the GGN, layer by layer: "kron" (K-FAC), "ekfac" (its basis with exact
            eigenvalues: one pass more, sharper), "diag"; or "lowrank", the `rank` directions of which the data say most
            beside the prior, by products with the GGN (docs/math.md, section 2).
        inverse: of the full structure "cholesky" (dense, P² memory), "dual" (function space, GGN only, (N·C)² memory
            and the rows: N·C·P, or in factors where every weight is used once a row), "streamed" (the same without the
            rows: they are made anew, and queries need the data), "cg" (products only), or "auto", which picks by size
            and says which in `inverse_`; of the others "eigen".

    Fitted: `inverse_`; `jacobian_backend_`: "backpack", "torch.func", "layers" (factors, layer by layer), or "products"
    where no rows are made; `diagonal_weights_` of "kron" and "ekfac"; `eigenvalues_` of "lowrank", in units of the
    prior precision.
    Errors: OptionError for a combination that does not exist; TooLargeError before any allocation;
    IndefiniteHessianError for a singular or indefinite Hessian.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: float | Mapping[str, float] = 1.0,
        prior_mean: float = 0.0,
        subset_of_weights: SubsetSpec = "all",
        curvature: str = "ggn",
        hessian_structure: str = "full",
        inverse: str = "auto",
        rank: int = LOW_RANK,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            subset_of_weights=subset_of_weights,
        )
        self.curvature, self.hessian_structure, self.inverse = curvature, hessian_structure, inverse
        self.rank = checked_integer("rank", rank, at_least=1, remedy=f"a whole number, such as {LOW_RANK}.")
        _check_key(curvature, hessian_structure, inverse)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        centre = centre_of(objective, self.curvature)
        inverses = self._inverses(centre) if self.inverse == "auto" else [self.inverse]
        if inverses[0] in ("dual", "streamed") and not bool((objective.prior.precision > 0).all()):
            raise OptionError(
                "a positive prior_precision for every parameter in the dual form",
                received="0 for some",
                remedy='inverse="cholesky" or "cg".',
            )
        for inverse in inverses:
            try:
                data_curvature, self.jacobian_backend_ = self._built(centre, inverse)
            except (TooLargeError, UnsupportedError) as error:  # what later batches show, the choice could not know
                if inverse == inverses[-1]:
                    raise
                reason = f'inverse="{inverse}" of inverse="auto": expected {error.expected}, received {error.received}'
                centre.network.check.report.disagreements.append(reason)
                continue
            self._hold(objective, data_curvature)
            self.inverse_ = inverse
            return

    def _built(self, centre: Objective, inverse: str) -> Built:
        if self.hessian_structure == "lowrank":
            return build_low_rank(self.rank)(centre)
        return BUILDERS[self.curvature, self.hessian_structure, inverse](centre)

    def _inverses(self, centre: Objective) -> list[str]:
        """What "auto" tries, one after the other: the choice by size, then those that need less of the network."""
        if self.hessian_structure != "full":
            return ["dual" if self.hessian_structure == "lowrank" else "eigen"]
        chosen = choose_inverse(centre, curvature=self.curvature, available=centre.available_bytes())
        others = [inverse for inverse in ("cholesky", "cg") if inverse != chosen]
        return [chosen] if chosen == "cg" else [chosen, *others]

    def _get_fit_state(self) -> Learned:
        learned = {"inverse": self.inverse_, "jacobian_backend": self.jacobian_backend_}
        return self.data_curvature_.tensors(), {**learned, "curvature": self.data_curvature_.description()}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        self.inverse_, self.jacobian_backend_ = learned["inverse"], learned["jacobian_backend"]
        self._hold(objective, restored(objective, tensors, learned["curvature"], curvature=self.curvature))

    def _refit(self, fitted: Self, objective: Objective, changed: frozenset[str]) -> None:
        ratio = fitted._curvature_ratio(self, changed)
        if ratio is None or not self._allows(fitted, objective):
            self._fit(objective, progress_bar=False)
            return
        self.inverse_, self.jacobian_backend_ = fitted.inverse_, fitted.jacobian_backend_
        self._hold(objective, fitted.data_curvature_.moved(centre_of(objective, self.curvature), ratio))

    def _allows(self, fitted: Self, objective: Objective) -> bool:
        """Whether the form that was kept serves this prior: the dual one is of a proper prior, low rank of one δ."""
        before, after = fitted.objective_.prior.precision, objective.prior.precision
        if self.hessian_structure == "lowrank":
            return bool((after * before[0] == before * after[0]).all())
        return fitted.inverse_ not in ("dual", "streamed") or bool((after > 0).all())

    def _on_data_attached(self, objective: Objective) -> None:
        if isinstance(self.data_curvature_, (ProductCurvature, MatrixFreeCurvature)):
            self._hold(objective, restored(objective, self.data_curvature_.tensors(), {}, curvature=self.curvature))

    def _hold(self, objective: Objective, data_curvature: DataCurvature) -> None:
        self.data_curvature_ = data_curvature
        self.precision_ = data_curvature.precision(objective.prior.precision)

    def _variance(self, x: PyTree) -> Tensor:
        return self.precision_.variance_at(self.network_, x)

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        return self.precision_.variance_at(ComposedNetwork(self.network_, of), x)

    def _covariance(self, x: PyTree) -> Tensor:
        return self.precision_.covariance_at(self.network_, x)

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        return self.network_.outputs(x) + self.network_.jvp(x, self._displacements(n_samples, generator))

    def _displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """θ − θ̂ ~ N(0, A⁻¹), (n, P): from the factor where there is one, else A⁻¹ξ with ξ ~ N(0, A)."""
        if isinstance(self.precision_, (DensePrecision, BlockPrecision)):
            return self.precision_.sample(n_samples, generator).to(self.theta_.dtype)
        if self.curvature == "hessian":
            raise OptionError(
                "a factored Hessian to sample from", received='inverse="cg"', remedy='inverse="cholesky".'
            )
        return self.precision_.solve(self._noise(n_samples, generator))

    @property
    def diagonal_weights_(self) -> list[str]:
        """Names of the parameters of which a layer-by-layer structure keeps the exact diagonal of the GGN alone.

        Of "kron" and "ekfac" these are norms, embeddings, raw tensors and layers without Kronecker factors.
        Errors: OptionError for a structure that is not layer by layer.
        """
        self._check_fitted()
        if not isinstance(self.data_curvature_, Blocks):
            raise OptionError(
                'hessian_structure "kron", "ekfac" or "diag"',
                received=repr(self.hessian_structure),
                remedy="construct it so.",
            )
        names = self.network_.subset.shapes
        return list(names) if self.hessian_structure == "diag" else [n for n in names if n in self.data_curvature_.rest]

    @property
    def eigenvalues_(self) -> Tensor:
        """Of the low-rank GGN beside the prior, δ^(−½) RᵀR δ^(−½), (r,), descending.

        What is left out is below the last. A direction of eigenvalue μ that is left out has (1 + μ) times its variance.
        """
        self._check_fitted()
        if self.hessian_structure != "lowrank" or not isinstance(self.data_curvature_, JacobianCurvature):
            raise OptionError(
                'hessian_structure="lowrank"', received=repr(self.hessian_structure), remedy="construct it so."
            )
        rows = self.data_curvature_.rows
        inner = (rows / self.objective_.prior.precision.to(rows.dtype)) @ rows.T
        eigenvalues: Tensor = torch.linalg.eigvalsh(inner).flip(0)
        return eigenvalues

    def _noise(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """ξ ~ N(0, A), (n, P): by the kept rows R where there are any, Rᵀg + √δ z, else by a pass over the data."""
        precision = self.precision_
        if not isinstance(precision, FunctionSpace) or not precision.keeps_rows:
            return precision_noise(self.objective_, n_samples, generator)[0]
        theta, dtype = self.theta_, precision.cholesky.dtype
        g, z = (
            torch.randn(n_samples, size, generator=generator, dtype=dtype, device=theta.device)
            for size in (len(precision.cholesky), len(theta))
        )
        return (precision.transposed_times(g) + precision.prior_precision.sqrt() * z).to(theta.dtype)

    @exclusively
    def log_marginal_likelihood(self, prior_precision: float | Mapping[str, float] | None = None) -> Tensor:
        """Laplace approximation of log p(D), in nats; for another δ at the same θ̂ without a pass over the data.

        log p(D) ≈ −L(θ̂) + ½ log|δ| − ½ log|A|
        """
        self._check_fitted()
        if prior_precision is None:
            return log_marginal_likelihood(self.objective_, self.objective_.prior.precision, self.precision_.log_det())
        vector = precision_vector(prior_precision, self.network_)
        return log_marginal_likelihood(self.objective_, vector, self.data_curvature_.precision(vector).log_det())


def _check_key(curvature: str, structure: str, inverse: str) -> None:
    words = all(isinstance(word, str) for word in (curvature, structure, inverse))
    keys = [key for key in BUILDERS if words and (curvature, structure) == key[:2] and inverse in ("auto", key[2])]
    if not keys:
        listed = "; ".join(", ".join(key) for key in BUILDERS)
        raise OptionError(
            "curvature, hessian_structure and inverse among those that exist",
            received=shown((curvature, structure, inverse)),
            remedy=f'one of: {listed}; or inverse="auto". The exact Hessian has no dual form.',
        )
