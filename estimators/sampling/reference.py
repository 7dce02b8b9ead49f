"""The posterior itself, by Hamiltonian Monte Carlo, as a reference for every approximation of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from estimators.curvature.last_layer.features import LastLayer
from estimators.data.batch import Batch
from estimators.data.checks import check_inputs
from estimators.data.inputs import as_inputs
from estimators.errors import DataError, NotConvergedWarning, OptionError, ReferenceNotReachedError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.likelihoods.prediction import Prediction
from estimators.models.derivative_routes import BY_IDENTITY
from estimators.models.functionals import ComposedNetwork, Functional, variance_by_covariance
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree, n_rows, select_rows, tensors_of, without_graph
from estimators.objective.float64 import network_in_float64, to_dtype
from estimators.objective.objective import Objective
from estimators.option_checks import (
    checked_choice,
    checked_flag,
    checked_instance,
    checked_integer,
    checked_seed,
    shown,
)
from estimators.persistence.checksums import digest
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory
from estimators.runtime.pass_counter import PassCounter
from estimators.sampling.collapsed import CollapsedPotential, find_collapsible_layer
from estimators.sampling.convergence import e_bfmi
from estimators.sampling.diagnostics import (
    ConvergenceCriteria,
    NoiseFloor,
    RowDiagnostics,
    SamplerDiagnostics,
    diagnose_rows,
    joined,
)
from estimators.sampling.function_draws import FunctionDraws, WeightDraws
from estimators.sampling.hmc import HMC
from estimators.sampling.nuts import sample_nuts
from estimators.sampling.potential import ChainGradient, FullPotential, training_batches
from estimators.sampling.sampler import STARTS, ChainRun, chain_starts

__all__ = ["ReferencePosterior"]

T = TypeVar("T")

ENGINES = {
    "hmc": "Hamiltonian Monte Carlo with all chains vectorised",
    "nutpie": "the No-U-Turn sampler of nutpie, one chain after another, for comparison",
}
_CHECK_ROWS, _FIRST_ROWS = 256, 8
"""Training rows at which convergence is judged by default, and those that are looked at first."""
_FIRST_JUDGEMENT = 1.6
"""Draws at the first judgement, in multiples of the effective sample size that is required. The R-hat of K chains that
have converged is about 1 + K/ESS: 1.01 needs an ESS of more than 1,600 for 16 chains."""
_LEAST_DRAWS = 8
"""Draws of each chain that R-hat and effective sample sizes need, after half of them have been dropped."""
_MANY_WEIGHTS, _CHAINS = 1000, (16, 8)
"""Number of weights above which 8 chains are run, not 16: the warm-up of each chain costs the same."""
_SAMPLES = 1000
"""The largest number of draws that a prediction keeps as `samples`."""
_REMEMBERED = 1024
"""Parts of queries whose diagnostics are kept: a prediction, its variance and its samples are judged by the same."""
_PREDICTED = ("mean", "epistemic_variance", "aleatoric_variance", "total_variance", "probs", "entropy")
_LOGS = ("log_probs", "log_odds")


class ReferencePosterior(UncertaintyEstimator):
    """The posterior p(θ | data) ∝ exp(−L(θ)) of the network itself, by Hamiltonian Monte Carlo.

    Nothing is linearized and nothing is fitted: the draws are of the posterior that other estimators approximate, so
    that distances to it measure their error. Mean and variance are those over the draws; `predict` averages the
    likelihood over them. For a Gaussian likelihood and a linear last layer, that layer is integrated out in closed
    form (`collapse`), and moments are Rao–Blackwellised over it.

    A run is a reference only if it meets `criteria`, at the check rows of the fit and at the rows of every query:
    otherwise `fit` or the query raises ReferenceNotReachedError, with what was reached. R-hat and effective sample
    sizes are those of the outputs, not of the weights, whose symmetries no chain needs to visit. The half-split
    distance between even and odd chains, `noise_floor`, is the error bar of every distance to this reference.

    It is meant for networks of up to a few thousand weights and rows. A gradient is one pass over all training rows; a
    run takes 50,000 to 300,000 of them, and `max_gradients` is its budget.

    Args:
        model: the trained network, in eval mode; it is not changed. Its weights are not used: the posterior is that of
            the architecture, the data and the prior.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        n_chains: the number K of chains, even. None: 16, or 8 for more than 1,000 weights.
        n_draws: the largest number of draws that are kept, over all chains; between half of it and all of it are. They
            take n_draws · P numbers of memory, and with a collapsed layer of E features about n_draws · E²/2 more.
        starts: where chains start: "prior", draws from the prior; "trained", networks trained from such draws; "both",
            the first kind in even chains and the second in odd ones.
        collapse: "auto" integrates the last layer out if the likelihood is Gaussian and the layer is linear and not
            alone; "last_layer" raises if that is impossible; None samples all weights.
        max_gradients: the budget: gradients over all training rows, summed over chains.
        criteria: what must be reached.
        check_rows: inputs at which the run is judged, as for `variance`, such as test and out-of-distribution rows.
            None: up to 256 training rows, drawn by the seed.
        ood_check_rows: further sets of inputs at which the run is judged, each alone and by the looser criterion
            of queries, such as shifted rows: [x_shifted, x_ood].
        accept_unconverged: whether a run or query that does not meet the criteria warns instead of raising.
            `diagnostics_` and `reached_` then tell that it does not.
        dtype: torch.float64 or torch.float32, of the sampling. None: float64.
        engine: "hmc", or "nutpie" for an independent No-U-Turn sampler (extra `reference`), some ten times as slow.
            It takes n_draws / K draws in each chain, does not stop earlier, and cannot resume.
        seed: the seed of starts, momenta and draws.

    Attributes:
        diagnostics_: the diagnostics at the check rows.
        reached_: whether the criteria are met there.
        weight_draws_: the draws of the weights, `weight_draws_.weights` (K, S, P).
        collapsed_: whether the last layer was integrated out.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option, or a prior precision that is not positive. `fit` raises
            ReferenceNotReachedError if the budget does not suffice, ConvergenceError if trajectories are always
            rejected, TooLargeError if the draws do not fit into memory, and UnsupportedError for several processes.

    Warns:
        NotConvergedWarning: with accept_unconverged, if the criteria are not met.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators import ReferencePosterior
        >>> from estimators.sampling import ConvergenceCriteria
        >>> quick = ConvergenceCriteria(max_r_hat=1.2, min_bulk_ess=100, min_squares_ess=50, max_total_variation=0.1)
        >>> posterior = ReferencePosterior(nn.Linear(2, 1), "regression", criteria=quick, starts="prior")
        >>> posterior.fit([(torch.randn(8, 2), torch.randn(8, 1))]).reached_
        True
        >>> posterior.variance(posterior.model.weight.new_ones(4, 2)).shape
        torch.Size([4, 1])
    """

    retrains = True
    diagnostics_: SamplerDiagnostics
    weight_draws_: WeightDraws
    reached_: bool

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        n_chains: int | None = None,
        n_draws: int = 8000,
        starts: str = "both",
        collapse: str | None = "auto",
        max_gradients: int = 1_000_000,
        criteria: ConvergenceCriteria = ConvergenceCriteria(),  # noqa: B008
        check_rows: PyTree | None = None,
        ood_check_rows: Sequence[PyTree] = (),
        accept_unconverged: bool = False,
        dtype: torch.dtype | None = None,
        engine: str = "hmc",
        seed: int = 0,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **options)
        self.n_chains = _checked_chains(n_chains)
        self.n_draws = checked_integer("n_draws", n_draws, at_least=1)
        self.starts = checked_choice("starts", starts, tuple(STARTS))
        self.collapse = checked_choice("collapse", collapse, ("auto", "last_layer", None))
        self.max_gradients = checked_integer("max_gradients", max_gradients, at_least=1)
        self.criteria = checked_instance(
            "criteria", criteria, ConvergenceCriteria, remedy="ConvergenceCriteria(max_r_hat=1.01)."
        )
        self.check_rows = _checked_rows("check_rows", check_rows)
        self.ood_check_rows = _checked_sets(ood_check_rows)
        self.accept_unconverged = checked_flag("accept_unconverged", accept_unconverged)
        self.dtype = _checked_dtype(dtype)
        self.engine, self.seed = checked_choice("engine", engine, tuple(ENGINES)), checked_seed(seed)
        self._diagnosed: dict[bytes, RowDiagnostics] = {}

    @property
    def collapsed_(self) -> bool:
        """Whether the last layer was integrated out in closed form."""
        self._check_fitted()
        return self.weight_draws_.layer is not None

    def diagnose(self, x: PyTree) -> SamplerDiagnostics:
        """Return the diagnostics of the chains and of their outputs at some rows; nothing is raised for their values.

        Args:
            x: M query rows.

        Returns:
            R-hat, effective sample sizes and half-split distances at x, with what `fit` recorded of the chains.

        Raises:
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        x = self._prepare_query(x)
        shape = self._check_query(x)
        return self._with_chains(joined(self._row_diagnostics(x, shape[1:])))

    def noise_floor(self, x: PyTree) -> NoiseFloor:
        """Return half of the distance between even and odd chains at some rows, the error bar of the reference there.

        Args:
            x: M query rows.

        Returns:
            The relative difference of variances, the total variation of predictions, and W2 of the outputs, halved.

        Raises:
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        return self.diagnose(x).rows.noise_floor

    def half_predictions(self, x: PyTree) -> tuple[Prediction, Prediction]:
        """Return the predictive distributions by the even and by the odd chains, whose distance gives `noise_floor`.

        Args:
            x: M query rows.

        Returns:
            Both predictions, without calibration, as `predict_uncalibrated` makes them of all chains.

        Raises:
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        x = self._prepare_query(x)
        shape = self._check_query(x)[1:]
        halves: tuple[list[Prediction], list[Prediction]] = ([], [])
        for _, found in self.weight_draws_.chunks(without_graph(x), shape.numel()):
            for chains, parts in zip((slice(0, None, 2), slice(1, None, 2)), halves, strict=True):
                mean, variance = (self._to_output_dtype(part).reshape(-1, *shape) for part in found.moments(chains))
                samples = self._to_output_dtype(found.f[chains].flatten(0, 1)).reshape(-1, *mean.shape)
                averaged = None if self.likelihood.kind == "regression" else samples
                parts.append(replace(self.likelihood.predict(mean, variance, averaged), samples=None))
        even, odd = map(_concatenated, halves)
        return even, odd

    def draws(self, x: PyTree, *, max_draws: int | None = None) -> Tensor:
        """Return the draws of the outputs at some rows, those of a chain in a row.

        Args:
            x: M query rows.
            max_draws: return at most that many, evenly spaced; None: all.

        Returns:
            (S, M, C) or (S, M, ...), in units of the output.

        Raises:
            ReferenceNotReachedError: the criteria are not met at x.
            TooLargeError: if the draws do not fit into memory.
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        x = self._prepare_query(x)
        shape = self._check_query(x)
        step = 1 if max_draws is None else _spacing(len(self.weight_draws_), checked_integer("max_draws", max_draws))
        self._check_memory(shape, -(-len(self.weight_draws_) // step))
        parts = self._by_rows(x, lambda found, _: found.f.flatten(0, 1)[::step])
        return self._to_output_dtype(torch.cat(parts, dim=1)).reshape(-1, *shape)

    def predict(self, x: PyTree, *, link_approx: str | None = None, n_samples: int | None = None) -> Prediction:
        """Return the posterior predictive distribution.

        Args:
            x: M query rows.
            link_approx: for classification and binary, "mc" (the default) averages probabilities over the draws, and
                "probit" uses mean and variance.
            n_samples: the number of draws, evenly spaced, that are averaged. None: all.

        Returns:
            The prediction, whose `samples` are up to 1,000 of the draws. In regression it has the posterior mean, and
            the posterior variance plus σ².

        Raises:
            OptionError: for an unknown `link_approx`.
            ReferenceNotReachedError: the criteria are not met at x.
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        return self._finish_prediction(self.predict_uncalibrated(x, link_approx=link_approx, n_samples=n_samples))

    def predict_uncalibrated(
        self, x: PyTree, *, link_approx: str | None = None, n_samples: int | None = None
    ) -> Prediction:
        checked_choice("link_approx", link_approx, ("probit", "mc", None), remedy="leave it out.")
        x = self._prepare_query(x)
        shape = self._check_query(x)[1:]
        n_draws = len(self.weight_draws_)
        step = 1 if n_samples is None else _spacing(n_draws, checked_integer("n_samples", n_samples, at_least=1))
        averaged = link_approx == "mc" or (link_approx is None and self.likelihood.kind != "regression")

        def predicted(found: FunctionDraws, _: PyTree) -> Prediction:
            mean, variance = (self._to_output_dtype(part).reshape(-1, *shape) for part in found.moments())
            samples = self._to_output_dtype(found.f.flatten(0, 1)[::step]).reshape(-1, *mean.shape)
            made = self.likelihood.predict(mean, variance, samples if averaged else None)
            return replace(made, samples=samples[:: _spacing(len(samples), _SAMPLES)])

        return _concatenated(self._by_rows(x, predicted))

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        _check_objective(objective)
        objective.network.routes.swap = BY_IDENTITY  # replaces every use of a weight, for all inputs
        objective.check_displaced()
        network = objective.network.counted_by(PassCounter())  # the gradients are counted below
        sampled = to_dtype(replace(objective, network=network), self._sampling_dtype(objective))
        batches = training_batches(sampled)
        layer = find_collapsible_layer(sampled, batches, self.collapse)
        self._check_draws_fit(objective, layer)
        potential: FullPotential | CollapsedPotential = FullPotential(sampled, batches)
        if layer is not None:
            potential = CollapsedPotential(sampled, batches, layer)
        n_chains = self.n_chains or _CHAINS[objective.theta.numel() > _MANY_WEIGHTS]
        if self.n_draws < _LEAST_DRAWS * n_chains:
            raise OptionError(
                f"n_draws >= {_LEAST_DRAWS * n_chains}, {_LEAST_DRAWS} for each of {n_chains} chains",
                received=str(self.n_draws),
                remedy="n_draws=8000.",
            )
        generator = torch.Generator().manual_seed(self.seed)
        z = torch.randn(n_chains, potential.n_dims, generator=generator, dtype=torch.float64).to(sampled.theta)
        rows, shape = self._rows_to_check(sampled, batches)
        ood = [self._rows_of(sampled, one)[0] for one in self.ood_check_rows]
        if self.engine == "nutpie":
            self._run_nuts(potential, z, progress_bar=progress_bar)
        else:
            self._run_chains(potential, z, generator, (rows, shape), ood, progress_bar=progress_bar)
        found = [self._row_diagnostics_of(draws, shape) for _, draws in self.weight_draws_.chunks(rows, shape.numel())]
        self.diagnostics_ = self._with_chains(joined(found))
        self.reached_ = not self._judge(self.diagnostics_, query=False)
        passed = self._chains["n_gradients"] * objective.batches.n_data
        with objective.network.pass_counter.phase("sampling"):
            objective.network.pass_counter.forward(passed)
            objective.network.pass_counter.backward(passed)

    def _run_chains(
        self,
        potential: FullPotential | CollapsedPotential,
        z: Tensor,
        generator: torch.Generator,
        check_rows: tuple[PyTree, torch.Size],
        ood: Sequence[PyTree],
        *,
        progress_bar: bool,
    ) -> None:
        """Sample by HMC from prior draws z (K, D), and set the draws."""
        gradient = ChainGradient(potential, z)
        first_judgement = math.ceil(_FIRST_JUDGEMENT * max(4 * len(z), self.criteria.min_bulk_ess))
        hmc = HMC(gradient, z, generator)
        run = ChainRun(gradient, hmc, self.starts, first_judgement, self.n_draws, self.max_gradients)
        checkpoint = self._checkpoint.for_problem(gradient(z)[0])
        first = select_rows(check_rows[0], slice(0, _FIRST_ROWS))

        def judge(kept: Tensor) -> bool:
            self._chains = run.statistics()
            draws = _weight_draws(potential, kept, seed=self.seed)
            return all(self._is_reached(draws, rows, check_rows[1]) for rows in (first, check_rows[0])) and all(
                self._is_reached(draws, rows, check_rows[1], query=True) for rows in ood
            )

        at_least = 4 * len(z) if self.accept_unconverged else None
        run.run(judge, checkpoint, progress_bar=progress_bar, at_least=at_least)
        gradient.check(run.hmc.z)
        self._chains, self.weight_draws_ = run.statistics(), _weight_draws(potential, run.draws, seed=self.seed)

    def _run_nuts(self, potential: FullPotential | CollapsedPotential, z: Tensor, *, progress_bar: bool) -> None:
        """Sample by NUTS from prior draws z (K, D), and set the draws."""
        gradient = ChainGradient(potential, z[:1])
        starts = torch.cat([chain_starts(gradient, row, "trained") for row in z.split(1)])
        starts = {"prior": z, "trained": starts, "both": torch.cat([z[:1], starts[1:]])}[self.starts]
        found = sample_nuts(
            gradient,
            starts,
            self.n_draws // len(z),
            max_gradients=self.max_gradients - gradient.calls,
            seed=self.seed,
            progress_bar=progress_bar,
        )
        self.weight_draws_ = _weight_draws(potential, found.z, seed=self.seed)
        self._chains = {
            "divergences": found.divergences,
            "acceptance": found.acceptance,
            "e_bfmi": float(e_bfmi(found.energies).min()),
            "n_gradients": gradient.calls,
        }

    def _is_reached(self, draws: WeightDraws, rows: PyTree, shape: torch.Size, *, query: bool = False) -> bool:
        found = [self._row_diagnostics_of(part, shape) for _, part in draws.chunks(rows, shape.numel())]
        return not self._with_chains(joined(found), len(draws)).failures(self.criteria.with_margin(), query=query)

    def _with_chains(self, rows: RowDiagnostics, n_draws: int | None = None) -> SamplerDiagnostics:
        return SamplerDiagnostics(rows, n_draws=n_draws or len(self.weight_draws_), **self._chains)

    def _row_diagnostics_of(self, draws: FunctionDraws, shape: torch.Size) -> RowDiagnostics:
        """Return the diagnostics of the outputs at some rows, which take longer than the outputs: once for each."""
        key = digest(draws.f, str(shape))
        if key not in self._diagnosed:
            if len(self._diagnosed) == _REMEMBERED:
                del self._diagnosed[next(iter(self._diagnosed))]
            self._diagnosed[key] = diagnose_rows(draws, self.likelihood, shape)
        return self._diagnosed[key]

    def _row_diagnostics(self, x: PyTree, shape: torch.Size) -> list[RowDiagnostics]:
        chunks = self.weight_draws_.chunks(without_graph(x), shape.numel())
        return [self._row_diagnostics_of(draws, shape) for _, draws in chunks]

    def _by_rows(self, x: PyTree, compute: Callable[[FunctionDraws, PyTree], T]) -> list[T]:
        """Return what a function makes of the draws at parts of the rows, which are judged as a whole."""
        shape = self.network_.shaped_outputs(select_rows(x, slice(0, 1))).shape[1:]
        results, found = [], []
        for rows, draws in self.weight_draws_.chunks(x, shape.numel()):
            found.append(self._row_diagnostics_of(draws, shape))
            results.append(compute(draws, rows))
        self._judge(self._with_chains(joined(found)), query=True)
        return results

    def _judge(self, found: SamplerDiagnostics, *, query: bool) -> list[str]:
        """Raise or warn if the criteria are not met; return what is not reached."""
        failures = found.failures(self.criteria, query=query)
        if not failures:
            return failures
        remedy = (
            "pass these rows as check_rows or in ood_check_rows, so that fit samples until they are reached too, or "
            "accept_unconverged=True."
            if query
            else f"max_gradients={4 * self.max_gradients:,}, a larger prior_precision, a smaller network, looser "
            "criteria, or accept_unconverged=True."
        )
        error = ReferenceNotReachedError(
            f"chains that have reached the posterior of every output at the {'query' if query else 'check'} rows",
            received=f"{'; '.join(failures)}; with {found.n_gradients:,} gradients and {found.n_draws:,} draws",
            remedy=remedy,
        )
        if not self.accept_unconverged:
            raise error
        warnings.warn(f"accepted as accept_unconverged=True: {error}", NotConvergedWarning, stacklevel=2)
        return failures

    def _sampling_dtype(self, objective: Objective) -> torch.dtype:
        return algebra_dtype(objective.theta.device) if self.dtype is None else self.dtype

    def _rows_to_check(self, objective: Objective, batches: list[Batch]) -> tuple[PyTree, torch.Size]:
        """Return the check rows, and the shape of the outputs of one row."""
        network = objective.network
        if self.check_rows is not None:
            return self._rows_of(objective, self.check_rows)
        x = batches[0].x
        order = torch.randperm(n_rows(x), generator=torch.Generator().manual_seed(self.seed))[:_CHECK_ROWS]
        rows = select_rows(x, order.to(objective.theta.device))
        return rows, network.shaped_outputs(rows).shape[1:]

    def _rows_of(self, objective: Objective, given: PyTree) -> tuple[PyTree, torch.Size]:
        """Return inputs that were given, checked, and the shape of the outputs of one row."""
        rows = objective.batches.layout.mark(as_inputs(given))
        return rows, check_inputs(rows, objective.network, what="check row").shape[1:]

    def _check_draws_fit(self, objective: Objective, layer: LastLayer | None) -> None:
        """Raise TooLargeError if the draws do not fit into memory."""
        numbers = 2 * objective.theta.numel()
        if layer is not None:
            e, c = layer.n_features, layer.n_outputs
            numbers += 2 * c * e * (e + 1)
        check_fits_memory(
            f"{self.n_draws:,} draws of {objective.theta.numel():,} weights",
            self.n_draws * numbers * self._sampling_dtype(objective).itemsize,
            device=objective.theta.device,
            remedy="a smaller n_draws, dtype=torch.float32, or collapse=None.",
        )

    def _check_memory(self, shape: torch.Size, n_draws: int) -> None:
        check_fits_memory(
            f"{n_draws:,} draws of outputs of shape {tuple(shape)}",
            2 * n_draws * shape.numel() * self.weight_draws_.weights.element_size(),
            device=self.theta_.device,
            remedy="fewer rows at a time, or draws(x, max_draws=1000).",
        )

    def _get_fit_state(self) -> Learned:
        tensors, learned = self.weight_draws_.state()
        found = {"rows": asdict(self.diagnostics_.rows), "chains": self._chains, "reached": self.reached_}
        return tensors, {**learned, **found}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        objective.network.routes.swap = BY_IDENTITY
        network = network_in_float64(objective.network, tensors["weights"].dtype)
        self.weight_draws_ = WeightDraws.restored(network, tensors, learned["layer"])
        self._chains, self.reached_ = learned["chains"], learned["reached"]
        rows = learned["rows"]
        self.diagnostics_ = self._with_chains(
            RowDiagnostics(**{**rows, "noise_floor": NoiseFloor(**rows["noise_floor"])})
        )

    def _mean(self, x: PyTree) -> Tensor:
        shape = self.network_.shaped_outputs(without_graph(x)).shape
        means = self._by_rows(without_graph(x), lambda found, _: found.moments()[0])
        return self._to_output_dtype(torch.cat(means)).reshape(shape)

    def _variance(self, x: PyTree) -> Tensor:
        return torch.cat(self._by_rows(x, lambda found, _: found.moments()[1]))

    def _covariance(self, x: PyTree) -> Tensor:
        return torch.cat(self._by_rows(x, lambda found, _: found.covariance()))

    def _joint_covariance(self, x: PyTree, f: Tensor) -> Tensor:
        self._check_memory(f.shape, len(self.weight_draws_))
        found = self.weight_draws_.at(x)
        self._judge(self._with_chains(self._row_diagnostics_of(found, f.shape[1:])), query=True)
        return found.joint_covariance()

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        network = ComposedNetwork(self.network_, of)

        def of_rows(found: FunctionDraws, rows: PyTree) -> Tensor:
            at = found.moments()[0].to(self.theta_.dtype)
            slopes = network.function_jacobian(rows, at=at)
            return variance_by_covariance(slopes, found.covariance().to(slopes))

        return torch.cat(self._by_rows(x, of_rows))

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        shape = self.network_.shaped_outputs(select_rows(x, slice(0, 1))).shape[1:]
        self._judge(self._with_chains(joined(self._row_diagnostics(x, shape))), query=True)
        return self.weight_draws_.outputs(x, self._drawn(n_samples, generator))

    def _weight_displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        return self._drawn(n_samples, generator) - self.theta_.to(self.weight_draws_.weights.dtype)

    def _drawn(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return draws of the weights with replacement, (n_samples, P)."""
        weights = self.weight_draws_.weights.flatten(0, 1)
        return weights[torch.randint(len(weights), (n_samples,), generator=generator, device=generator.device)]


def _checked_chains(n_chains: object) -> int | None:
    n: int | None = checked_integer("n_chains", n_chains, at_least=4, words=(None,), remedy="n_chains=16.")
    if n is not None and n % 2:
        raise OptionError("n_chains, an even number", received=str(n), remedy=f"n_chains={n + 1}.")
    return n


def _checked_rows(name: str, rows: PyTree | None) -> PyTree | None:
    """Return the option as it is; raise OptionError unless it has a tensor."""
    try:
        if rows is None or tensors_of(as_inputs(rows)):
            return rows
        received = shown(rows)
    except DataError as error:
        received = error.received
    raise OptionError(f"{name}, inputs with at least one tensor", received=received, remedy="check_rows=x_test.")


def _checked_sets(sets: object) -> tuple[PyTree, ...]:
    if not isinstance(sets, (list, tuple)) or any(one is None for one in sets):
        raise OptionError(
            "ood_check_rows, a list of inputs", received=shown(sets), remedy="ood_check_rows=[x_shifted, x_ood]."
        )
    return tuple(_checked_rows("ood_check_rows", one) for one in sets)


def _checked_dtype(dtype: object) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in (torch.float64, torch.float32)):
        return dtype
    raise OptionError("dtype torch.float64, torch.float32 or None", received=shown(dtype), remedy="dtype=None.")


def _check_objective(objective: Objective) -> None:
    """Raise for several processes, and for a prior that is no distribution."""
    if objective.process_group.size > 1:
        raise UnsupportedError(
            "one process",
            received=f"an accelerator with {objective.process_group.size}",
            remedy="fit without an accelerator: the chains are vectorised.",
        )
    if not bool((objective.prior.precision > 0).all()):
        raise OptionError(
            "prior_precision > 0 for every weight, since the prior of the chains is a distribution",
            received=f"{int((objective.prior.precision <= 0).sum())} weights with 0",
            remedy="a small positive number.",
        )


def _weight_draws(potential: FullPotential | CollapsedPotential, z: Tensor, *, seed: int) -> WeightDraws:
    """Return the weights of coordinates z (K, S, D), and the last layer in closed form if it was integrated out."""
    generator, flat = torch.Generator().manual_seed(seed), z.flatten(0, 1)
    if isinstance(potential, CollapsedPotential):
        conditional = potential.conditional(flat)
        weights = potential.joined(flat, conditional, generator).unflatten(0, z.shape[:2])
        return WeightDraws.of(potential.objective.network, weights, potential.layer, conditional)
    return WeightDraws(potential.objective.network, potential.to_weights(flat).unflatten(0, z.shape[:2]))


def _spacing(n: int, at_most: int) -> int:
    """Return the step of a slice of n that keeps at most some."""
    return -(-n // at_most)


def _concatenated(parts: list[Prediction]) -> Prediction:
    """Return the prediction of all rows from those of parts."""
    fields: dict[str, Any] = {}
    for name in (*_PREDICTED, *_LOGS, "samples"):
        values = [getattr(part, name) for part in parts]
        known = [value for value in values if value is not None]
        fields[name] = torch.cat(known, dim=int(name == "samples")) if known else None
    return replace(parts[0], **fields)
