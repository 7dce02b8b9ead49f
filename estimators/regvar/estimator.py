"""RegVar: a regularizer and a solver on an objective centred at θ̂."""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import asdict, replace
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from estimators.curvature.krylov.block_cg import products_are_accurate
from estimators.curvature.krylov.extreme_eigenvalues import with_definite_products
from estimators.errors import IllConditionedError, NotConvergedWarning, OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.models.exclusive import exclusively
from estimators.models.functionals import Functional
from estimators.numerics.dtype import to_algebra_dtype
from estimators.numerics.pytrees import PyTree, split_rows
from estimators.numerics.reductions import norms
from estimators.objective.float64 import network_in_float64, to_float64
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice, checked_flag, checked_instance, checked_number
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.exact_draws import ExactDraws
from estimators.regvar.measured_bounds import MeasuredBounds
from estimators.regvar.monte_carlo import ClippedMonteCarlo, InterpolatedBounds, MonteCarloVariance
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.refinement import refined_space
from estimators.regvar.regularizers import PosteriorDraws, Regularizer
from estimators.regvar.relative_error import relative_error
from estimators.regvar.report import RegVarReport, relative_gradient
from estimators.regvar.solver_selection import select_solver
from estimators.regvar.solvers import Solver
from estimators.regvar.solvers.base import Solution
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["RegVar"]

_RTOL = 0.05


class RegVar(UncertaintyEstimator):
    """Variation due to regularization: the epistemic variance as the response of predictions to a regularizer.

        θ(λ) = argmin L(θ) − λ r(θ)          df(x)/dλ at λ = 0 is J(x) A⁻¹ ∇r(θ̂)

    L is the training loss, r the regularizer, A the curvature of the centred objective at θ̂, and J = ∂f/∂θ. With
    r = f_c(x) the response of f(x) is column c of the linearized-Laplace covariance J A⁻¹ Jᵀ.

    Source: McInerney & Kallus, AISTATS 2025, Theorem 4.1; the centred objectives are in docs/math.md, section 3.

    Args:
        model: trained module that returns outputs f(x), (batch, C).
        likelihood: "regression", "classification", "binary", or a Likelihood.
        prior_precision: δ, a number, or a dict from glob patterns of parameter names to numbers.
        prior_mean: θ₀, the mean of the prior.
        subset_of_weights: parameters θ that are varied, "all", "last_layer" or a selection by names.
        curvature: A. "ggn": the objective is the network trained on its own predictions, with a positive definite A at
            any θ̂. "hessian": the loss minus its linear part at θ̂; needs a positive definite Hessian there.
        centred: whether the objective has a zero gradient at θ̂. False refits the trained loss itself, as the paper
            does; needs curvature="hessian" and NewtonRefit or FineTune, and is exact only if θ̂ is stationary.
        regularizer: r and its variance estimate: Pointwise, MeanAbsolute, SignedProbes, ParameterProbes, or
            PosteriorDraws; None for PosteriorDraws().
        solver: NewtonRefit, FineTune, LinearResponse, or "auto". With posterior draws, "auto" is LinearResponse with a
            Krylov space that grows until the variance is accurate to `rtol`; a space that spans all weights of a small
            network gives the exact variance, and so does a Cholesky factor of A for up to 6,144 parameters and few
            outputs, where it takes less time. If no such space fits into memory, it is LinearResponse(), whose error is
            estimated without probes; if that does not fit either, FineTune(). `solver_` says which one was selected
            and why.
        rtol: relative root-mean-square error of the variance, over rows and outputs, to reach with solver="auto". The
            error is measured at training rows and at rows unlike them; `relative_error_` is the result.

    Attributes:
        fit_report_: RegVarReport, with the solver's report and the cost of the fit.
        solver_, relative_error_, a_norm_error_, rao_blackwell_, relative_gradient_: see these properties.

    Raises:
        OptionError, UnsupportedError: at construction, for arguments that are wrong or do not go together.
        IndefiniteHessianError: in `fit`, if A is not positive definite.
        ConvergenceError, LambdaTooLargeError: in `fit`, if the solver does not converge or λ is too large. Regularizers
            at query (Pointwise, SignedProbes) solve in `variance`, and raise these errors there.

    Warns:
        NotConvergedWarning: if posterior draws have not converged (`a_norm_error_`) and the variance depends on it, and
            if solver="auto" cannot reach `rtol`.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from estimators import RegVar
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = DataLoader(TensorDataset(x, x.sin()), batch_size=10)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> regvar = RegVar(model, "regression", rtol=0.01).fit(loader)
        >>> regvar.variance(x[:3]).shape
        torch.Size([3, 1])
        >>> regvar.relative_error_ <= 0.01
        True
    """

    export_route = "rows"
    uses_prior_precision = True

    fit_report_: RegVarReport
    refit_objective_: Objective

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        curvature: str = "ggn",
        centred: bool = True,
        regularizer: Regularizer | None = None,
        solver: Solver | str = "auto",
        rtol: float = _RTOL,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **options)
        self.curvature = checked_choice("curvature", curvature, ("ggn", "hessian"))
        self.centred = checked_flag("centred", centred)
        made = PosteriorDraws() if regularizer is None else regularizer
        self.regularizer = checked_instance("regularizer", made, Regularizer, remedy="PosteriorDraws(n_draws=32).")
        auto = isinstance(solver, str) and solver == "auto"
        self.solver = "auto" if auto else checked_instance("solver", solver, Solver, remedy='"auto".')
        self.rtol = checked_number("rtol", rtol, above=0, remedy="0.05.")
        if isinstance(self.solver, Solver) and self.rtol != _RTOL:
            raise OptionError(
                'rtol with solver="auto" only',
                received=f"rtol={rtol:g} and {self.solver!r}",
                remedy='solver="auto", or the tolerance of the solver itself.',
            )
        _check_combination(self.regularizer, self.solver, curvature=curvature, centred=centred)

    @property
    def batch_dependent(self) -> bool:  # type: ignore[override]
        """Whether the variance at a row depends on the other rows passed with it (SignedProbes)."""
        return self.regularizer.batch_dependent

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        self.fit_report_ = RegVarReport(relative_gradient=relative_gradient(objective))
        self.variance_estimate_: VarianceEstimate | None = None
        self._on_data_attached(objective)
        if self.centred and (self.curvature == "hessian" or not bool((objective.prior.precision > 0).all())):
            with objective.network.pass_counter.phase("definiteness"):
                self.refit_objective_ = with_definite_products(
                    self.refit_objective_, lambda objective: objective.product
                )
        if not self.regularizer.at_query:
            self.variance_estimate_ = self._solve(
                None, self.regularizer, progress_bar=progress_bar, checkpoint=self._checkpoint
            )
            self._warn_above_rtol()
        solver = self.fit_report_.solver
        n_perturbations = 1 if solver is None else solver.n_perturbations
        passes = objective.network.pass_counter.passes(objective.batches.n_data, n_perturbations)
        self.fit_report_ = replace(self.fit_report_, passes=passes)

    def _refit(self, fitted: Self, objective: Objective, changed: frozenset[str]) -> None:
        """Keep a measured space if no option changes, since `refine` may have extended it; else fit anew."""
        if changed or not isinstance(fitted.variance_estimate_, MeasuredBounds):
            super()._refit(fitted, objective, changed)
        else:
            self._set_fit_state(objective, *fitted._get_fit_state())

    def _get_fit_state(self) -> Learned:
        tensors, learned = ({}, {}) if self.variance_estimate_ is None else self.variance_estimate_.state()
        return tensors, {"variance_estimate": learned, "report": asdict(self.fit_report_)}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        self.fit_report_ = RegVarReport.restored(learned["report"])
        self.variance_estimate_ = None
        if not self.regularizer.at_query:
            network = network_in_float64(objective.network, tensors["displacement"].dtype)
            self.variance_estimate_ = self.regularizer.restore_estimate(network, tensors, learned["variance_estimate"])
        self._on_data_attached(objective)

    def _on_data_attached(self, objective: Objective) -> None:
        centred = objective.centred(curvature=self.curvature) if self.centred else objective
        estimate = self.variance_estimate_
        solved_in_float64 = (
            isinstance(estimate, MonteCarloVariance) and estimate.displacement.dtype != centred.theta.dtype
        )
        self.refit_objective_ = to_float64(centred) if solved_in_float64 else centred

    def _solve(
        self, x: PyTree, regularizer: Regularizer, *, progress_bar: bool = False, checkpoint: Checkpoint | None = None
    ) -> VarianceEstimate:
        """Solve for `regularizer` at x; in float64 if the dtype of the network causes too much round-off."""
        saved = None if checkpoint is None else checkpoint.dtype()
        if saved is not None and saved != str(self.refit_objective_.theta.dtype):
            self.refit_objective_ = to_float64(self.refit_objective_)  # as the fit that was interrupted
        try:
            return self._solve_once(x, regularizer, progress_bar=progress_bar, checkpoint=checkpoint)
        except IllConditionedError:
            in_float64 = to_float64(self.refit_objective_)
            if in_float64 is self.refit_objective_:
                raise
            self.refit_objective_ = in_float64
            return self._solve_once(x, regularizer, progress_bar=progress_bar, checkpoint=checkpoint)

    def _solve_once(
        self, x: PyTree, regularizer: Regularizer, *, progress_bar: bool, checkpoint: Checkpoint | None
    ) -> VarianceEstimate:
        """Build the problem, solve it, make the variance estimate, and report on all three."""
        objective = self.refit_objective_
        solver, reason = self._solver_for(objective, regularizer)
        perturbation, make_estimate = regularizer.build_problem(objective, x)
        solution = solver.solve(objective, perturbation, progress_bar=progress_bar, checkpoint=checkpoint)
        a_norm_errors = _a_norm_errors(objective, perturbation, solution)
        del perturbation  # free its 2K vectors of θ's size before the variance estimate is made
        with objective.network.pass_counter.phase("variance estimate"):
            estimate = make_estimate(solution)
        self.fit_report_ = replace(self.fit_report_, solver=solution.report, selection=reason)
        if isinstance(estimate, MonteCarloVariance) and a_norm_errors is not None:
            error = a_norm_errors.error
            with objective.network.pass_counter.phase("variance estimate"):
                relative = relative_error(estimate, objective, error)
            self.fit_report_ = replace(
                self.fit_report_,
                a_norm_error=error,
                rao_blackwell=estimate.rao_blackwell,
                relative_error=relative,
            )
            # Other estimates do not depend on it: they have a solver's residual, or the bounds of a Krylov space.
            if solution.report.residual is None or isinstance(estimate, ClippedMonteCarlo):
                error.warn_if_large()
        return estimate

    def _solver_for(self, objective: Objective, regularizer: Regularizer) -> tuple[Solver, str]:
        """Return the solver, and why it was selected."""
        if isinstance(self.solver, Solver):
            return self.solver, "given as solver="
        return select_solver(objective, regularizer, rtol=self.rtol, centred=self.centred)

    def _warn_above_rtol(self) -> None:
        error = self.fit_report_.relative_error
        if self.solver == "auto" and error is not None and error > self.rtol:
            estimate = self.variance_estimate_
            round_off = estimate.round_off if isinstance(estimate, (MeasuredBounds, ExactDraws)) else 0.0
            remedy = (
                "PosteriorDraws with more draws, refine(x) for the rows that matter, a subset_of_weights, or a larger "
                "rtol."
            )
            if 2 * round_off**2 > error**2:
                remedy = (
                    f"standardised inputs and outputs or a larger prior_precision: {round_off:.2g} is round-off in "
                    "float64, since A is ill-conditioned."
                )
            warnings.warn(
                f"expected a relative error of the variance of at most rtol={self.rtol:g}, received an estimate of "
                f"{error:.2g} by {self._selected_solver()}. Try {remedy}",
                NotConvergedWarning,
                stacklevel=5,
            )

    def _variance(self, x: PyTree) -> Tensor:
        return torch.cat([estimate.variance(part) for estimate, part in self._estimates(x)])

    def _check_exportable(self) -> None:
        if self.variance_estimate_ is None:
            raise self._not_exportable(f"RegVar with {self.regularizer!r}")

    def _export_moments(self, x: PyTree) -> tuple[Tensor, Tensor]:
        mean, variance = super()._export_moments(x)
        return mean, variance.clamp_min(0) if self.regularizer.signed else variance

    def _predictive_variance(self, x: PyTree) -> Tensor:
        variance = self.variance(x)
        return variance.clamp_min(0) if self.regularizer.signed else variance

    def _variance_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((shape[0], -1)) if getattr(self.regularizer, "of", None) else shape

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        regularizer = self.regularizer.for_functional(of)
        if regularizer is not self.regularizer:  # one solve per functional
            return torch.cat([estimate.variance(part) for estimate, part in self._estimates(x, regularizer)])
        return torch.cat([estimate.compose(of).variance(part) for estimate, part in self._estimates(x)])

    def _covariance(self, x: PyTree) -> Tensor:
        return torch.cat([estimate.covariance(part) for estimate, part in self._estimates(x)])

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        if self.variance_estimate_ is None:
            raise UnsupportedError(
                "a regularizer with function samples", received=repr(self.regularizer), remedy="PosteriorDraws()."
            )
        return self.network_.outputs(x) + self.variance_estimate_.sample(x, n_samples, generator)

    def _weight_displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        return self._draws().sample_weights(n_samples, generator)

    def _covariance_along(self, jacobian: Tensor) -> Tensor:
        return self._draws().covariance_along(jacobian)

    def _check_differentiable(self) -> None:
        self._draws()

    def _joint_covariance(self, x: PyTree, f: Tensor) -> Tensor:
        draws = self._draws()
        bounded = isinstance(draws, (InterpolatedBounds, MeasuredBounds))
        return super()._joint_covariance(x, f) if bounded else draws.joint_covariance(x)

    def _draws(self) -> MonteCarloVariance:
        """Return the posterior draws. Raises UnsupportedError for other regularizers."""
        if not isinstance(self.variance_estimate_, MonteCarloVariance):
            raise self._not_draws()
        return self.variance_estimate_

    @exclusively
    def standard_error(self, x: PyTree) -> Tensor:
        """Return an estimate of the standard error of `variance`.

        For solver="auto" with a measured space or a Cholesky factor it is `relative_error_` times the variance. For
        `LinearResponse` it is the error of the interpolation weight from a finite number of draws, if the variance is
        interpolated between bounds. Otherwise it is the Monte Carlo error of the draws.

        Args:
            x: M query rows.

        Returns:
            Standard errors, (M, C), in squared units of f.

        Raises:
            UnsupportedError: for Pointwise and MeanAbsolute, whose estimates are not random, and for a single probe.
        """
        x = self._prepare_query(x)
        self._check_no_graph(x, "standard_error")
        shape = self._variance_shape(self._check_query(x))
        errors = torch.cat([estimate.standard_error(part) for estimate, part in self._estimates(x)])
        return self._to_output_dtype(errors).reshape(shape)

    @exclusively
    def variance_bounds(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """Return bounds of the exact variance J A⁻¹ Jᵀ, from the Krylov space in which the draws were solved.

        If A was factored (`solver_`), both are the exact variance.

        Args:
            x: M query rows.

        Returns:
            Lower and upper bound, (M, C) each, in squared units of f. Both hold for certain, up to round-off: at most
            3e-3 of the variance with products in float32, and 100 eps κ in float64, with κ the condition number of A,
            for instance 0.02 at κ = 1e12 (measured; see docs/math.md, section 5). A fit chooses float64 if it must.

        Raises:
            UnsupportedError: if the variance is not estimated from bounds: without PosteriorDraws or LinearResponse, or
                with variance_estimate="monte_carlo".

        Example:
            >>> x = torch.linspace(-1, 1, 20)[:, None]
            >>> model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
            >>> regvar = RegVar(model, "regression", prior_precision=2.0).fit([(x, x.sin())])
            >>> lower, upper = regvar.variance_bounds(x)
            >>> bool((0 <= lower).all()), bool((lower <= upper).all())
            (True, True)
        """
        x = self._prepare_query(x)
        self._check_no_graph(x, "variance_bounds")
        shape = self._check_query(x)
        if not isinstance(self.variance_estimate_, (InterpolatedBounds, MeasuredBounds, ExactDraws)):
            raise UnsupportedError(
                "posterior draws with the bounds of a Krylov space",
                received=f"{self.regularizer!r} by {self.solver!r}",
                remedy='regularizer=PosteriorDraws(variance_estimate="bounds"), solver=LinearResponse().',
            )
        lower, upper = self.variance_estimate_.variance_bounds(x)
        return self._to_output_dtype(lower).reshape(shape), self._to_output_dtype(upper).reshape(shape)

    @exclusively
    def refine(self, x: PyTree, *, rtol: float | None = None) -> Self:
        """Return a fit whose variance at the rows of x is accurate to rtol for certain.

        A fit by a Cholesky factor of A is exact already, and returned as it is.

        Outputs whose bounds are further apart are added to the Krylov space as right-hand sides. The space is recycled,
        so that each needs few products. Other rows profit, too; this fit does not change. A calibration is kept.

        The larger space is part of the new fit: `save`, `load` and `clone_with()` keep it. With changed options
        `clone_with` computes a new fit, which is not refined.

        Args:
            x: M query rows.
            rtol: relative distance of the bounds to reach at each of them; None for `rtol` of the constructor.

        Returns:
            A new fitted estimator.

        Raises:
            UnsupportedError: if the fit has no measured Krylov space: without PosteriorDraws and solver="auto".
            NotFittedError: for a loaded fit without its training data; see `attach_data`.

        Example:
            >>> x = torch.linspace(-1, 1, 20)[:, None]
            >>> model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
            >>> regvar = RegVar(model, "regression", rtol=0.2).fit([(x, x.sin())]).refine(2 * x, rtol=1e-3)
            >>> lower, upper = regvar.variance_bounds(2 * x)
            >>> bool((upper - lower <= 1e-3 * upper).all())
            True
        """
        x = self._prepare_query(x)
        self._check_query(x)
        estimate = self.variance_estimate_
        if not isinstance(estimate, (MeasuredBounds, ExactDraws)):
            raise UnsupportedError(
                'a fit with a measured Krylov space: PosteriorDraws by solver="auto"',
                received=f"{self.regularizer!r} by {self.solver_}",
                remedy='solver="auto"; a network for which no space fits needs a subset_of_weights.',
            )
        rtol = self.rtol if rtol is None else checked_number("rtol", rtol, above=0, remedy="0.01.")
        if isinstance(estimate, ExactDraws):  # nothing to refine
            return copy(self)
        objective, accuracy = self.refit_objective_, estimate.accuracy
        with objective.network.pass_counter.phase("refine"):
            space = refined_space(objective, estimate.bounds, x, rtol)
        bounds = estimate.bounds.on(space, accuracy.leading(space.rank))
        refined = copy(self)
        refined.variance_estimate_ = MeasuredBounds(estimate, bounds, accuracy)
        return refined

    def _estimates(self, x: PyTree, regularizer: Regularizer | None = None) -> list[tuple[VarianceEstimate, PyTree]]:
        """Return the fitted variance estimate with x, or solve for parts of x that fit into memory."""
        if self.variance_estimate_ is not None:
            return [(self.variance_estimate_, x)]
        objective, regularizer = self.refit_objective_, regularizer or self.regularizer
        rows = regularizer.rows_per_solve(objective, self.network_.outputs(x).shape[-1])
        parts = [x] if rows is None else split_rows(x, rows)
        return [(self._solve(part, regularizer), part) for part in parts]

    @property
    def solver_(self) -> str:
        """The solver that computed the fit, and why it was selected.

        Returns:
            A text for people: the solver, and the reason in parentheses.

        Raises:
            NotFittedError: before `fit`.

        Example:
            >>> x = torch.linspace(-1, 1, 20)[:, None]
            >>> model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
            >>> RegVar(model, "regression", prior_precision=2.0, rtol=0.05).fit([(x, x.sin())]).solver_
            'LinearResponse to rtol=0.05 (a Krylov space that can be measured fits into memory)'
        """
        self._check_fitted()
        return self._selected_solver()

    def _selected_solver(self) -> str:
        report = self.fit_report_.solver
        name = self.solver if report is None else report.solver
        return f"{name} ({self.fit_report_.selection})" if self.fit_report_.selection else str(name)

    @property
    def relative_error_(self) -> float:
        """Estimate of the relative root-mean-square error of the variance, over rows and outputs.

        With solver="auto" it is measured at training rows and at rows unlike them, whose variance is solved for, if a
        space for this fits into memory (`solver_`); each output counts equally, whatever its scale. If A is
        ill-conditioned, it contains an estimate of the round-off, which is all of it if A has been factored.
        It is the error of single outputs. That of their differences, and of `variance(x, of=...)`, can be larger;
        `refine(x)` makes both accurate at x. With other solvers it is the Monte Carlo standard error together with the
        A-norm error of the draws.

        Raises:
            UnsupportedError: for other regularizers than PosteriorDraws.
        """
        self._check_fitted()
        if self.fit_report_.relative_error is None:
            raise self._not_draws()
        return self.fit_report_.relative_error

    @property
    def a_norm_error_(self) -> float:
        """A-norm error ‖u − A⁻¹ξ‖²_A of posterior draws per effective dimension; below 0.5 they count as converged.

        Raises:
            UnsupportedError: for other regularizers than PosteriorDraws.
        """
        self._check_fitted()
        if self.fit_report_.a_norm_error is None:
            raise self._not_draws()
        return self.fit_report_.a_norm_error.clipped

    @property
    def rao_blackwell_(self) -> str:
        """Which layer posterior draws are Rao-Blackwellised over, or why over none.

        Raises:
            UnsupportedError: for other regularizers than PosteriorDraws.
        """
        self._check_fitted()
        if self.fit_report_.rao_blackwell is None:
            raise self._not_draws()
        return self.fit_report_.rao_blackwell

    def _not_draws(self) -> UnsupportedError:
        return UnsupportedError(
            "PosteriorDraws, the only regularizer with posterior draws",
            received=repr(self.regularizer),
            remedy="regularizer=PosteriorDraws().",
        )

    @property
    def relative_gradient_(self) -> float:
        """‖∇L(θ̂)‖ / ‖δ(θ̂ − θ₀)‖: 0 if θ̂ is stationary. Centred objectives are right at any value."""
        self._check_fitted()
        return self.fit_report_.relative_gradient


def _a_norm_errors(objective: Objective, perturbation: Perturbation, solution: Solution) -> SampleANormErrors | None:
    """Return the A-norm errors of posterior draws: the solver's own, or by one product with A per draw."""
    if solution.a_norm_errors is not None or perturbation.initial_guess is None:
        return solution.a_norm_errors
    with objective.network.pass_counter.phase("A-norm error"):
        slope = _slope(objective, solution.displacement, perturbation.gradient)
    return SampleANormErrors.of(perturbation, objective.prior.precision, solution.displacement, slope)


def _slope(objective: Objective, displacement: Tensor, gradient: Tensor) -> Tensor:
    """Return A u − ξ, (K, P); in float64 if a product in the dtype of the objective has too much round-off."""
    image = objective.product(displacement)
    largest, smallest = float((norms(image) / norms(displacement)).max()), float(objective.prior.precision.min())
    if not products_are_accurate(objective.theta.dtype, largest=largest, smallest=smallest):
        image = to_float64(objective).product(to_algebra_dtype(displacement))
    return image.sub_(gradient)


def _check_combination(regularizer: Regularizer, solver: Solver | str, *, curvature: str, centred: bool) -> None:
    """Raise OptionError or UnsupportedError if regularizer, solver and curvature do not go together."""
    if regularizer.needs_ggn and curvature == "hessian":
        raise UnsupportedError(
            f'curvature="ggn" with {type(regularizer).__name__}, whose noise has the GGN as its covariance',
            received='"hessian", which would give the sandwich H⁻¹GH⁻¹',
            remedy="Pointwise() or ParameterProbes(), right for any positive definite curvature.",
        )
    refits = not isinstance(solver, Solver) or solver.refits
    if not centred and (curvature == "ggn" or not refits):
        raise OptionError(
            'curvature="hessian" and a solver that refits with centred=False: the trained loss itself is refitted',
            received=f'curvature="{curvature}" and {solver!r}',
            remedy='curvature="hessian" with NewtonRefit or FineTune, or centred=True.',
        )
