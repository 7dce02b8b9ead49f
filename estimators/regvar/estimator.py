"""RegVar: a regularizer and a solver on an objective centred at θ̂."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from estimators.curvature.krylov.block_cg import products_are_accurate
from estimators.curvature.krylov.definiteness import positive_definite
from estimators.errors import IllConditionedError, OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods import Likelihood
from estimators.models.exclusive import exclusively
from estimators.models.functionals import Functional
from estimators.models.subsets import SubsetSpec
from estimators.numerics.dtype import to_algebra_dtype
from estimators.numerics.pytrees import PyTree, split_rows
from estimators.numerics.reductions import norms
from estimators.objective.float64 import network_in_float64, to_float64
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice, checked_flag, checked_instance
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.monte_carlo import ClippedMonteCarlo, InterpolatedBounds, MonteCarloVariance
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.regularizers import PosteriorDraws, Regularizer
from estimators.regvar.report import RegVarReport, relative_gradient
from estimators.regvar.solvers import FineTune, Solver
from estimators.regvar.solvers.base import Solution
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["RegVar", "check_combination", "refit_objective"]


class RegVar(UncertaintyEstimator):
    """Variation due to regularization (McInerney & Kallus, AISTATS 2025, Theorem 4.1).

        θ(λ) = argmin L(θ) − λ r(θ)          df(x)/dλ at λ = 0  is  J(x) A⁻¹ ∇r(θ̂)

    Args:
        curvature: A of the centred objective: "ggn" (the network trained on its own predictions; positive definite at
            any θ̂) or "hessian" (the loss less its slope at θ̂; needs a positive definite Hessian there).
        centred: False refits the trained loss itself, the paper's own form: with curvature="hessian" and a refit
            solver; exact only where θ̂ is stationary.
        regularizer: r and its readout: Pointwise, MeanAbsolute, SignedProbes, ParameterProbes, PosteriorDraws.
        solver: NewtonRefit, FineTune, LinearResponse.

    Fitted: `fit_report_` (with what was spent), `a_norm_error_`, `rao_blackwell_`, `relative_gradient_`.
    Warns: NotConvergedWarning where posterior draws that are read as they are were left far from their end
    (`a_norm_error_`).
    Errors: of `fit`, and IndefiniteHessianError, ConvergenceError, LambdaTooLargeError of the solvers; regularizers *at
    query* (Pointwise, SignedProbes) solve, and raise them, in `variance`.
    """

    fit_report_: RegVarReport

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: float | Mapping[str, float] = 1.0,
        prior_mean: float = 0.0,
        subset_of_weights: SubsetSpec = "all",
        curvature: str = "ggn",
        centred: bool = True,
        regularizer: Regularizer | None = None,
        solver: Solver | None = None,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            subset_of_weights=subset_of_weights,
        )
        self.curvature = checked_choice("curvature", curvature, ("ggn", "hessian"))
        self.centred = checked_flag("centred", centred)
        made = PosteriorDraws() if regularizer is None else regularizer
        self.regularizer = checked_instance("regularizer", made, Regularizer, remedy="PosteriorDraws(n_draws=32).")
        made_solver = FineTune() if solver is None else solver
        self.solver = checked_instance("solver", made_solver, Solver, remedy="LinearResponse().")
        check_combination(self.regularizer, self.solver, curvature=curvature, centred=centred)

    @property
    def batch_dependent(self) -> bool:  # type: ignore[override]
        """Whether `variance` speaks of the set of x passed to it (SignedProbes)."""
        return self.regularizer.batch_dependent

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        self.fit_report_ = RegVarReport(relative_gradient=relative_gradient(objective))
        self.refit_objective_ = refit_objective(objective, curvature=self.curvature, centred=self.centred)
        if self.centred and (self.curvature == "hessian" or not bool((objective.prior.precision > 0).all())):
            with objective.network.pass_counter.phase("definiteness"):
                self.refit_objective_ = positive_definite(self.refit_objective_, lambda posed: posed.product)
        self.readout_: VarianceEstimate | None = None
        if not self.regularizer.at_query:
            self.readout_ = self._solved(None, self.regularizer, progress_bar=progress_bar, checkpoint=self._checkpoint)
        solver = self.fit_report_.solver
        replicas = 1 if solver is None else solver.replicas
        passes = objective.network.pass_counter.passes(objective.batches.n_data, replicas)
        self.fit_report_ = replace(self.fit_report_, passes=passes)

    def _learned(self) -> Learned:
        tensors, learned = ({}, {}) if self.readout_ is None else self.readout_.state()
        return tensors, {"readout": learned, "report": asdict(self.fit_report_)}

    def _restore(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        self.fit_report_ = RegVarReport.restored(learned["report"])
        self.readout_ = None
        if not self.regularizer.at_query:
            network = network_in_float64(objective.network, tensors["displacement"].dtype)
            self.readout_ = self.regularizer.restored(network, tensors, learned["readout"])
        self._attached(objective)

    def _attached(self, objective: Objective) -> None:
        self.refit_objective_ = refit_objective(objective, curvature=self.curvature, centred=self.centred)

    def _solved(
        self, x: PyTree, regularizer: Regularizer, *, progress_bar: bool = False, checkpoint: Checkpoint | None = None
    ) -> VarianceEstimate:
        """Pose, solve, read: in the dtype of the network, or in float64 where that carries too much round-off."""
        try:
            return self._solved_once(x, regularizer, progress_bar=progress_bar, checkpoint=checkpoint)
        except IllConditionedError:
            wide = to_float64(self.refit_objective_)
            if wide is self.refit_objective_:
                raise
            self.refit_objective_ = wide
            return self._solved_once(x, regularizer, progress_bar=progress_bar, checkpoint=checkpoint)

    def _solved_once(
        self, x: PyTree, regularizer: Regularizer, *, progress_bar: bool, checkpoint: Checkpoint | None
    ) -> VarianceEstimate:
        objective = self.refit_objective_
        perturbation, read = regularizer.pose(objective, x)
        solution = self.solver.solve(objective, perturbation, progress_bar=progress_bar, checkpoint=checkpoint)
        energies = _energies(objective, perturbation, solution)
        del perturbation  # 2K numbers a parameter, which a readout need not have beside it
        with objective.network.pass_counter.phase("readout"):
            readout = read(solution)
        self.fit_report_ = replace(self.fit_report_, solver=solution.report)
        if isinstance(readout, MonteCarloVariance) and energies is not None:
            energy = energies.error
            self.fit_report_ = replace(self.fit_report_, energy=energy, rao_blackwell=readout.rao_blackwell)
            if solution.report.residual is None or isinstance(readout, ClippedMonteCarlo):  # the others know their end
                energy.warn_if_large()
        return readout

    def _variance(self, x: PyTree) -> Tensor:
        return torch.cat([readout.variance(part) for readout, part in self._readouts(x)])

    def _predictive_variance(self, x: PyTree) -> Tensor:
        variance = self.variance(x)
        return variance.clamp_min(0) if self.regularizer.signed else variance

    def _variance_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((shape[0], -1)) if getattr(self.regularizer, "of", None) else shape

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        regularizer = self.regularizer.reading(of)
        if regularizer is not self.regularizer:  # the functional is solved for
            return torch.cat([readout.variance(part) for readout, part in self._readouts(x, regularizer)])
        return torch.cat([readout.through(of).variance(part) for readout, part in self._readouts(x)])

    def _covariance(self, x: PyTree) -> Tensor:
        return torch.cat([readout.covariance(part) for readout, part in self._readouts(x)])

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        if self.readout_ is None:
            raise UnsupportedError(
                "a regularizer with function samples", received=repr(self.regularizer), remedy="PosteriorDraws()."
            )
        return self.network_.outputs(x) + self.readout_.sample(x, n_samples, generator)

    @exclusively
    def standard_error(self, x: PyTree) -> Tensor:
        """Monte-Carlo standard error of `variance`, (M, C); of SignedProbes, ParameterProbes and PosteriorDraws."""
        x = self._inputs(x)
        shape = self._variance_shape(self._check_query(x))
        errors = torch.cat([readout.standard_error(part) for readout, part in self._readouts(x)])
        return self._returned(errors).reshape(shape)

    @exclusively
    def variance_bounds(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """lower(x) ≤ J A⁻¹ Jᵀ ≤ upper(x), both (M, C): certain, from the Krylov space that the draws were solved in.

        Errors: UnsupportedError where the draws are read by their mean square or there are none.
        """
        x = self._inputs(x)
        shape = self._check_query(x)
        if not isinstance(self.readout_, InterpolatedBounds):
            raise UnsupportedError(
                "posterior draws read between the bounds of a Krylov space",
                received=f"{self.regularizer!r} by {self.solver!r}",
                remedy='regularizer=PosteriorDraws(readout="bounds"), solver=LinearResponse().',
            )
        lower, upper = self.readout_.bounds.variance(x)
        return self._returned(lower).reshape(shape), self._returned(upper).reshape(shape)

    def _readouts(self, x: PyTree, regularizer: Regularizer | None = None) -> list[tuple[VarianceEstimate, PyTree]]:
        """The fitted readout for x, or solves for pieces of x that fit into memory."""
        if self.readout_ is not None:
            return [(self.readout_, x)]
        objective, regularizer = self.refit_objective_, regularizer or self.regularizer
        rows = regularizer.rows_at_once(objective, self.network_.outputs(x).shape[-1])
        parts = [x] if rows is None else split_rows(x, rows)
        return [(self._solved(part, regularizer), part) for part in parts]

    @property
    def a_norm_error_(self) -> float:
        """Mean ‖u − A⁻¹ξ‖²_A per effective dimension of the posterior draws: how far the solver was from its end."""
        self._check_fitted()
        if self.fit_report_.energy is None:
            raise self._not_draws()
        return self.fit_report_.energy.clipped

    @property
    def rao_blackwell_(self) -> str:
        """Which exact block the posterior draws use, and why."""
        self._check_fitted()
        if self.fit_report_.rao_blackwell is None:
            raise self._not_draws()
        return self.fit_report_.rao_blackwell

    def _not_draws(self) -> UnsupportedError:
        return UnsupportedError(
            "PosteriorDraws, which alone has it",
            received=repr(self.regularizer),
            remedy="regularizer=PosteriorDraws().",
        )

    @property
    def relative_gradient_(self) -> float:
        """‖∇L(θ̂)‖ / ‖δ(θ̂ − θ₀)‖: 0 at a stationary θ̂; centred refits are right at any."""
        self._check_fitted()
        return self.fit_report_.relative_gradient


def _energies(objective: Objective, perturbation: Perturbation, solution: Solution) -> SampleANormErrors | None:
    """Of posterior draws: the solver's own, or by one product with A a draw."""
    if solution.energies is not None or perturbation.start is None:
        return solution.energies
    with objective.network.pass_counter.phase("energy error"):
        slope = _slope(objective, solution.displacement, perturbation.direction)
    return SampleANormErrors.of(perturbation, objective.prior.precision, solution.displacement, slope)


def _slope(objective: Objective, displacement: Tensor, direction: Tensor) -> Tensor:
    """A u − ξ, (K, P); in float64 where a product in the dtype of the objective carries too much round-off."""
    image = objective.product(displacement)
    largest, smallest = float((norms(image) / norms(displacement)).max()), float(objective.prior.precision.min())
    if not products_are_accurate(objective.theta.dtype, largest=largest, smallest=smallest):
        image = to_float64(objective).product(to_algebra_dtype(displacement))
    return image.sub_(direction)


def refit_objective(objective: Objective, *, curvature: str, centred: bool) -> Objective:
    """The centred objective of `curvature`, or L itself: exact only where θ̂ is stationary (docs/math.md, section 3)."""
    return objective.centred(curvature=curvature) if centred else objective


def check_combination(regularizer: Regularizer, solver: Solver, *, curvature: str, centred: bool) -> None:
    """OptionError or UnsupportedError for parts that do not go together."""
    if curvature not in ("ggn", "hessian"):
        raise OptionError('curvature "ggn" or "hessian"', received=repr(curvature), remedy='use "ggn".')
    if not isinstance(regularizer, Regularizer) or not isinstance(solver, Solver):
        raise OptionError(
            "a regularizer and a solver",
            received=f"{regularizer!r} and {solver!r}",
            remedy="for instance regularizer=PosteriorDraws(), solver=LinearResponse(): objects, not classes.",
        )
    if regularizer.needs_ggn and curvature == "hessian":
        raise UnsupportedError(
            f'curvature="ggn" with {type(regularizer).__name__}, whose noise has the GGN as its covariance',
            received='"hessian", which would give the sandwich H⁻¹GH⁻¹',
            remedy="Pointwise() or ParameterProbes(), right for any positive definite curvature.",
        )
    if not centred and (curvature == "ggn" or not solver.refits):
        raise OptionError(
            'curvature="hessian" and a solver that refits with centred=False: the trained loss itself is refitted',
            received=f'curvature="{curvature}" and {type(solver).__name__}',
            remedy='curvature="hessian" with NewtonRefit or FineTune, or centred=True.',
        )
