"""Linearized Laplace: covariance(x) = J A⁻¹ Jᵀ, with A the GGN or the exact Hessian plus δ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from estimators.curvature.builders import BUILDERS, LOW_RANK, Built, GGNOptions
from estimators.curvature.dense.cholesky import DensePrecision
from estimators.curvature.dense.dual import FunctionSpace
from estimators.curvature.fisher import FISHERS, Fisher
from estimators.curvature.forms import (
    DataCurvature,
    JacobianCurvature,
    MatrixFreeCurvature,
    ProductCurvature,
    centre_of,
    restored,
)
from estimators.curvature.joining import joined_curvature, not_a_sum
from estimators.curvature.layerwise.blocks import KFAC_APPROXIMATIONS, BlockPrecision, Blocks
from estimators.curvature.sizes import choose_inverse
from estimators.data.training_data import AbsentTrainingData, TrainingData
from estimators.errors import NotFittedError, OptionError, TooLargeError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.laplace.evidence import EMPIRICAL_EXPONENT, LAMBDA_EXPONENT, EvidenceFunction, log_det_of
from estimators.laplace.evidence_mixin import EvidenceMixin
from estimators.laplace.posterior import LinearizedPosterior
from estimators.laplace.updating import UpdateMixin
from estimators.likelihoods import Likelihood
from estimators.numerics.dtype import to_algebra_dtype
from estimators.objective.objective import Objective
from estimators.objective.prior_noise import precision_noise
from estimators.option_checks import checked_choice, checked_integer, checked_seed, shown
from estimators.persistence.state import Learned

__all__ = ["LinearizedLaplace"]

_RATIO_ROUND_OFF = 1e-6
"""Largest relative difference of ratios between prior precisions that counts as round-off in float32."""


class LinearizedLaplace(UpdateMixin, EvidenceMixin, LinearizedPosterior):
    """Linearized Laplace (MacKay 1992; Immer et al. 2021, equations 9 and 12), exact for the chosen parameters.

        A = Σₙ Jₙᵀ Λₙ Jₙ + δ  ("ggn")   or   ∇²L(θ̂)  ("hessian")        covariance(x) = J(x) A⁻¹ J(x)ᵀ, (C, C)

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        curvature: "ggn" (positive definite at any θ̂) or "hessian" (exact; it must be positive definite at θ̂).
        hessian_structure: "full", or for the GGN an approximation. Layer by layer: "kron" (K-FAC; Martens and Grosse
            2015), "ekfac" (its eigenbasis with exact eigenvalues, one more pass; George et al. 2018) or "diag".
            "lowrank" keeps the `rank` largest eigenvalues of the prior-whitened GGN (docs/math.md, section 2).
        inverse: the form of A⁻¹ with the full structure. "cholesky" is dense and needs P² numbers. "dual" works in
            function space (GGN only) and needs (N·C)² numbers and the Jacobian rows: N·C·P numbers, or factors if every
            weight is used once per row. "matrix_free_dual" is the same without stored rows: they are recomputed, and
            queries need the data. "cg" needs only products. "auto" chooses by size and stores the choice in `inverse_`.
            With another structure the form is "eigen".
        rank: the number r of eigenvalues with "lowrank".
        fisher: how the GGN is computed. "exact" takes C backward passes per row. "mc" is an unbiased estimate from
            sampled labels, with `mc_samples` backward passes per row (Martens 2020, section 5). "empirical" uses the
            training labels and takes one; it is biased (Kunstner et al. 2019). Both exist for "kron", "ekfac", "diag",
            and "full" with "cholesky" or "dual".
        mc_samples: sampled labels per row with `fisher="mc"`.
        seed: determines the sampled labels, together with the inputs of each row. They do not depend on the order or
            the batches of the rows. After `update` they are those of a fit on all rows: rows with equal inputs have
            labels of their own. Therefore `update` of a fit that was loaded needs `attach_data` before.
        kfac_approx: for "kron" and "ekfac" if a weight is used at several positions of a row, such as tokens or pixels:
            "expand" treats positions as rows; "reduce" averages the inputs over them (Eschenhagen et al. 2023).

    Attributes:
        inverse_: the form in use.
        jacobian_backend_: how Jacobian rows are computed: "torch.func", "autograd", "layers" (factors, layer by layer),
            or "products" if no rows are computed.

    Raises:
        OptionError: for a combination of options that does not exist.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> laplace = LinearizedLaplace(model, "regression", prior_precision=0.1)
        >>> laplace = laplace.fit([(torch.randn(20, 3), torch.randn(20, 2))])
        >>> laplace.covariance(torch.randn(4, 3)).shape
        torch.Size([4, 2, 2])
    """

    export_route = "rows"
    uses_prior_precision = True

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        curvature: str = "ggn",
        hessian_structure: str = "full",
        inverse: str = "auto",
        rank: int = LOW_RANK,
        fisher: str = "exact",
        mc_samples: int = 1,
        seed: int = 0,
        kfac_approx: str = "expand",
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **options)
        self.curvature, self.hessian_structure, self.inverse = curvature, hessian_structure, inverse
        self.rank = checked_integer("rank", rank, at_least=1, remedy=f"a whole number, such as {LOW_RANK}.")
        _check_key(curvature, hessian_structure, inverse)
        self.fisher = checked_choice("fisher", fisher, FISHERS)
        self.mc_samples = checked_integer("mc_samples", mc_samples, at_least=1, remedy="mc_samples=1.")
        self.seed = checked_seed(seed)
        self.kfac_approx = checked_choice("kfac_approx", kfac_approx, KFAC_APPROXIMATIONS)
        self._check_fisher()

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        centre = centre_of(objective, self.curvature)
        inverses = self._inverse_candidates(centre) if self.inverse == "auto" else [self.inverse]
        if inverses[0] in ("dual", "matrix_free_dual") and not bool((objective.prior.precision > 0).all()):
            raise OptionError(
                "a positive prior_precision for every parameter in the dual form",
                received="0 for some",
                remedy='inverse="cholesky" or "cg".',
            )
        for inverse in inverses:
            try:
                data_curvature, self.jacobian_backend_ = self._build(centre, inverse)
            except (TooLargeError, UnsupportedError) as error:  # found in later batches, after the choice
                if inverse == inverses[-1]:
                    raise
                reason = f'inverse="{inverse}" of inverse="auto": expected {error.expected}, received {error.received}'
                centre.network.check.report.disagreements.append(reason)
                continue
            self._set_curvature(objective, data_curvature)
            self.inverse_ = inverse
            return

    def _build(self, centre: Objective, inverse: str, earlier: TrainingData | None = None) -> Built:
        """Return the curvature of the rows of an objective; sampled labels count equal inputs after `earlier` rows."""
        options = GGNOptions(replace(self._fisher, earlier=earlier), self.kfac_approx, self.rank)
        return BUILDERS[self.curvature, self.hessian_structure, inverse](centre, options)

    @property
    def _fisher(self) -> Fisher:
        """The options of the Fisher information."""
        return Fisher(self.fisher, self.mc_samples, self.seed)

    def _check_fisher(self) -> None:
        """Raise OptionError for options of the Fisher information that have no effect, or no form."""
        structured = self.hessian_structure in ("kron", "ekfac", "diag")
        rows = self.hessian_structure == "full" and self.inverse in ("auto", "cholesky", "dual")
        if self.fisher != "exact" and not (self.curvature == "ggn" and (structured or rows)):
            raise OptionError(
                f'curvature="ggn" with hessian_structure "kron", "ekfac", "diag", or "full" with inverse "cholesky" or '
                f'"dual", for fisher={self.fisher!r}',
                received=shown((self.curvature, self.hessian_structure, self.inverse)),
                remedy='fisher="exact": a product with the exact curvature costs one backward pass, too.',
            )
        if self.fisher != "mc" and (self.mc_samples, self.seed) != (1, 0):
            raise OptionError(
                'fisher="mc" for mc_samples and seed',
                received=f"fisher={self.fisher!r}, mc_samples={self.mc_samples}, seed={self.seed}",
                remedy='fisher="mc", or leave them out: nothing is sampled.',
            )
        if self.kfac_approx != "expand" and self.hessian_structure not in ("kron", "ekfac"):
            raise OptionError(
                f'hessian_structure "kron" or "ekfac" for kfac_approx={self.kfac_approx!r}',
                received=repr(self.hessian_structure),
                remedy="leave kfac_approx out.",
            )

    def _inverse_candidates(self, centre: Objective) -> list[str]:
        """Return the forms that "auto" tries in turn: the choice by size, then those with fewer requirements."""
        if self.hessian_structure != "full":
            return ["dual" if self.hessian_structure == "lowrank" else "eigen"]
        available = centre.available_bytes()
        chosen = choose_inverse(centre, curvature=self.curvature, available=available, fisher=self._fisher)
        if self.fisher != "exact":
            return list(dict.fromkeys([chosen, "cholesky"]))
        others = [inverse for inverse in ("cholesky", "cg") if inverse != chosen]
        return [chosen] if chosen == "cg" else [chosen, *others]

    def _get_fit_state(self) -> Learned:
        learned = {"inverse": self.inverse_, "jacobian_backend": self.jacobian_backend_}
        return self.data_curvature_.tensors(), {**learned, "curvature": self.data_curvature_.description()}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        self.inverse_, self.jacobian_backend_ = learned["inverse"], learned["jacobian_backend"]
        self._set_curvature(objective, restored(objective, tensors, learned["curvature"], curvature=self.curvature))

    @property
    def keeps_curvature(self) -> bool:
        """Whether the fit has the data's curvature. Products by "cg" are solved again for each prior precision."""
        return self.inverse_ != "cg"

    def _refit(self, fitted: Self, objective: Objective, changed: frozenset[str]) -> None:
        ratio = fitted._curvature_ratio(self, changed)
        if self.fisher == "empirical" and "likelihood" in changed:
            ratio = None  # its curvature is quadratic in the gradient of the likelihood, not linear in Λ
        if ratio is None or not self._can_reuse(fitted, objective):
            self._fit(objective, progress_bar=False)
            return
        self.inverse_, self.jacobian_backend_ = fitted.inverse_, fitted.jacobian_backend_
        self._set_curvature(objective, fitted.data_curvature_.rescaled(centre_of(objective, self.curvature), ratio))

    def _can_reuse(self, fitted: Self, objective: Objective) -> bool:
        """Return whether the stored curvature suits the new prior: "dual" needs δ > 0, "lowrank" a single δ."""
        before, after = fitted.objective_.prior.precision, objective.prior.precision
        if self.hessian_structure == "lowrank":
            return _same_ratios(before, after)
        return fitted.inverse_ not in ("dual", "matrix_free_dual") or bool((after > 0).all())

    def _check_updatable(self) -> None:
        unsupported = self.hessian_structure not in ("full", "diag") or self.inverse_ in ("cg", "matrix_free_dual")
        if unsupported:
            raise not_a_sum(f'hessian_structure="{self.hessian_structure}" with inverse="{self.inverse_}"')
        if self.fisher == "mc" and isinstance(self.objective_.batches, AbsentTrainingData):
            raise NotFittedError(
                'the earlier training rows for an update with fisher="mc": a new row with the inputs of an earlier one '
                "has another sampled label",
                received="a fitted state that was loaded without them",
                remedy="estimator.attach_data(train_loader) before update.",
            )

    def _add_rows(self, new: Objective, combined: Objective) -> None:
        added, _ = self._build(centre_of(new, self.curvature), self.inverse_, self.objective_.batches)
        self._set_curvature(combined, joined_curvature(self.data_curvature_, added))

    def _on_data_attached(self, objective: Objective) -> None:
        if isinstance(self.data_curvature_, (ProductCurvature, MatrixFreeCurvature)):
            self._set_curvature(
                objective, restored(objective, self.data_curvature_.tensors(), {}, curvature=self.curvature)
            )

    def _set_curvature(self, objective: Objective, data_curvature: DataCurvature) -> None:
        precision = data_curvature.precision(objective.prior.precision)  # first: it raises for an indefinite Hessian
        self.data_curvature_, self.precision_ = data_curvature, precision

    def _check_exportable(self) -> None:
        if self.inverse_ in ("cg", "matrix_free_dual"):  # queries need passes over the data
            raise self._not_exportable(f'LinearizedLaplace with inverse="{self.inverse_}"')

    def _weight_displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return samples θ − θ̂ ~ N(0, A⁻¹), (n, P): from a factor of A, or as A⁻¹ξ with ξ ~ N(0, A)."""
        if isinstance(self.precision_, (DensePrecision, BlockPrecision)):
            return self.precision_.sample(n_samples, generator).to(self.theta_.dtype)
        if self.curvature == "hessian":
            raise OptionError(
                "a factored Hessian to sample from", received='inverse="cg"', remedy='inverse="cholesky".'
            )
        return self.precision_.solve(self._noise(n_samples, generator))

    @property
    def diagonal_weights_(self) -> list[str]:
        """The names of the parameters for which a layer-by-layer structure uses the diagonal of the GGN.

        With "kron" and "ekfac" these are norms, embeddings, raw tensors and layers without Kronecker factors.

        Raises:
            OptionError: for a structure that is not layer by layer.
        """
        self._check_fitted()
        if not isinstance(self.data_curvature_, Blocks):
            raise OptionError(
                'hessian_structure "kron", "ekfac" or "diag"',
                received=repr(self.hessian_structure),
                remedy="construct the estimator with one of these structures.",
            )
        names = self.network_.subset.shapes
        if self.hessian_structure == "diag":
            return list(names)
        return [name for name in names if name in self.data_curvature_.other_params]

    @property
    def eigenvalues_(self) -> Tensor:
        """The eigenvalues of the low-rank prior-whitened GGN, δ^(−½) RᵀR δ^(−½), (r,), descending.

        Eigenvalues below the last are left out. Leaving out an eigenvalue μ multiplies the variance in its direction by
        1 + μ.

        Raises:
            OptionError: for another structure.
        """
        self._check_fitted()
        if self.hessian_structure != "lowrank" or not isinstance(self.data_curvature_, JacobianCurvature):
            raise OptionError(
                'hessian_structure="lowrank"',
                received=repr(self.hessian_structure),
                remedy='construct it with "lowrank".',
            )
        rows = self.data_curvature_.rows
        inner = (rows / self.objective_.prior.precision.to(rows.dtype)) @ rows.T
        eigenvalues: Tensor = torch.linalg.eigvalsh(inner).flip(0)
        return eigenvalues

    def _noise(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return ξ ~ N(0, A), (n, P): Rᵀg + √δ z if the rows R are stored, else by a pass over the data."""
        precision = self.precision_
        if not isinstance(precision, FunctionSpace) or not precision.keeps_rows:
            return precision_noise(self.objective_, n_samples, generator)[0]
        theta, dtype = self.theta_, precision.cholesky.dtype
        g, z = (
            torch.randn(n_samples, size, generator=generator, dtype=dtype, device=theta.device)
            for size in (len(precision.cholesky), len(theta))
        )
        return (precision.transposed_times(g) + precision.prior_precision.sqrt() * z).to(theta.dtype)

    def _log_det_at(self, delta: Tensor) -> Tensor:
        self._check_ratios(delta)
        is_fitted = delta is self.objective_.prior.precision
        return (self.precision_ if is_fitted else self.data_curvature_.precision(delta)).log_det()

    def evidence_function(self) -> EvidenceFunction:
        self._check_fitted()
        exponent = EMPIRICAL_EXPONENT if self.fisher == "empirical" else LAMBDA_EXPONENT
        return EvidenceFunction.of(self.objective_, self._log_det_of, sigma_exponent=exponent)

    def _log_det_of(self, delta: Tensor, scale: Tensor) -> Tensor:
        """Return log |scale · G + diag δ| of the data's curvature G, differentiable."""
        self._check_ratios(delta.detach())
        return log_det_of(self.data_curvature_, delta, scale)

    def _check_ratios(self, delta: Tensor) -> None:
        """Raise OptionError for a δ (P,) for which the low-rank curvature would have other eigenvectors."""
        if self.hessian_structure == "lowrank" and not _same_ratios(self.objective_.prior.precision, delta):
            raise OptionError(
                'prior precisions in the ratios of the fit for the evidence with hessian_structure="lowrank", whose '
                "eigenvectors depend on these ratios",
                received="other ratios between weights",
                remedy="the fitted prior_precision times a number; clone_with(prior_precision=...), which computes the "
                'eigenvectors again; or hessian_structure="full", "kron" or "diag".',
            )


def _same_ratios(before: Tensor, after: Tensor) -> bool:
    """Return whether one prior precision (P,) is the other times a number, up to round-off."""
    found, expected = to_algebra_dtype(after) * float(before[0]), to_algebra_dtype(before) * float(after[0])
    return bool(torch.allclose(found, expected, rtol=_RATIO_ROUND_OFF, atol=0))


def _check_key(curvature: str, structure: str, inverse: str) -> None:
    strings = all(isinstance(name, str) for name in (curvature, structure, inverse))
    keys = [key for key in BUILDERS if strings and (curvature, structure) == key[:2] and inverse in ("auto", key[2])]
    if not keys:
        listed = "; ".join(", ".join(key) for key in BUILDERS)
        raise OptionError(
            "curvature, hessian_structure and inverse among those that exist",
            received=shown((curvature, structure, inverse)),
            remedy=f'one of: {listed}; or inverse="auto". The exact Hessian has no dual form.',
        )
