"""An exact Gaussian process of the inputs, without the network: a sanity baseline."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from estimators.baselines.gp_inference import IndependentOutputs, find_mode
from estimators.curvature.base import standard_normal
from estimators.errors import NotConvergedWarning, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from estimators.likelihoods.prediction import Prediction
from estimators.models.functionals import ComposedNetwork, Functional, variance_by_covariance
from estimators.numerics.dtype import algebra_dtype, to_algebra_dtype
from estimators.numerics.pytrees import PyTree, split_rows
from estimators.objective.objective import Objective
from estimators.option_checks import PriorOption, checked_integer, checked_number
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory, rows_per_chunk

__all__ = ["RBF", "GaussianProcess"]

_LIKELIHOODS = (Gaussian, Categorical, Bernoulli)
_STARTS = (0.25, 1.0, 4.0)
"""Lengthscales at which the search may begin, times the median distance between rows: the best one is chosen."""
_LARGEST_FACTORS = 1e3, 1e2
"""Largest factors by which amplitude and lengthscale may differ from the start, up or down: if targets are linear in
the inputs, the marginal likelihood increases without end in both."""
_MAX_ITER = 60
_GRADIENT_TOL = 1e-2
"""Largest derivative of the log marginal likelihood, in nats per unit of log ℓ or log s, after the search."""
_SAMPLES = 500
"""Samples of the latent functions whose class probabilities are averaged."""
_COPIES = 8
"""Matrices (N, N) per output that a fit holds at a time, with the graph of the marginal likelihood."""


@dataclass(frozen=True)
class RBF:
    """The kernel s² exp(−‖x − x'‖² / 2ℓ²), of rows whose distances from 0 are not much larger than those between them.

    Args:
        amplitude: s, in units of the latent function; a number or a scalar tensor.
        lengthscale: ℓ, in units of the inputs.
    """

    amplitude: float | Tensor
    lengthscale: float | Tensor

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the kernel matrix (N, M) of rows x (N, D) and z (M, D)."""
        distance = (x.square().sum(1)[:, None] + z.square().sum(1) - 2 * x @ z.T).clamp_min(0)
        return self.amplitude**2 * torch.exp(-0.5 * distance / self.lengthscale**2)


class GaussianProcess(UncertaintyEstimator):
    """A Gaussian process of the inputs (Rasmussen and Williams 2006): the network is not used, only its rows are.

        f_c ~ GP(m_c, s² exp(−‖x − x'‖² / 2ℓ²)),   y ~ p(y | f)

    Every output has an independent process, and all share s and ℓ, which maximise the log marginal likelihood of
    `search_rows` training rows. Regression has the closed form, with the σ of the likelihood and the mean of the
    targets as m. Classes and binary outputs have m = 0 and the Laplace approximation (algorithms 3.3 and 3.4).
    Gradients for s and ℓ are exact: they pass through one Newton step at the mode. Computations are in float64 on
    devices that have it.

    It says what a method without any network achieves. There is one lengthscale for all inputs, so scale them. Time
    grows as N³ C, memory as N² C.

    Args:
        model: the trained network, which only says which outputs there are; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Gaussian`, `Categorical` or `Bernoulli`.
        prior_precision: stored only: the process has no weights.
        lengthscale: ℓ, in units of the inputs; "auto": by marginal likelihood.
        amplitude: s, in units of the outputs; "auto": by marginal likelihood.
        max_rows: the largest number N of training rows.
        search_rows: the largest number of rows whose marginal likelihood chooses s and ℓ, evenly spaced among all. The
            process itself has all rows.

    Attributes:
        lengthscale_: ℓ.
        amplitude_: s.
        log_marginal_likelihood_: log p(y), in nats; for classes its Laplace approximation.
        fit_report_: the passes of the fit, all of them for checks.

    Raises:
        OptionError: for an invalid option. `fit` raises UnsupportedError for more than `max_rows` rows, for another
            likelihood, for inputs other than one floating-point tensor, and for class predictions at several positions.
            It raises TooLargeError if the kernel matrices do not fit into memory, and ConvergenceError if the variance
            of the process exceeds that of the noise so much that round-off makes a covariance indefinite.

    Warns:
        NotConvergedWarning: if the search for s and ℓ has not converged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> process = GaussianProcess(nn.Linear(3, 2), "regression")
        >>> process = process.fit([(torch.randn(20, 3), torch.randn(20, 2))])
        >>> process.variance(torch.randn(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: PriorOption = 1.0,
        lengthscale: float | str = "auto",
        amplitude: float | str = "auto",
        max_rows: int = 2000,
        search_rows: int = 500,
    ) -> None:
        super().__init__(model, likelihood, prior_precision=prior_precision)
        remedy = '"auto", or a positive number.'
        self.lengthscale = checked_number("lengthscale", lengthscale, above=0, words=("auto",), remedy=remedy)
        self.amplitude = checked_number("amplitude", amplitude, above=0, words=("auto",), remedy=remedy)
        self.max_rows = checked_integer("max_rows", max_rows, at_least=1)
        self.search_rows = checked_integer("search_rows", search_rows, at_least=1)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        self._check_size(objective)
        first = next(iter(objective.batches))
        self._output_shape = objective.network.shaped_outputs(first.x).shape[1:]
        x = torch.cat([_rows(batch.x) for batch in objective.batches])
        self._origin = x.mean(0)
        x = x - self._origin  # squared distances by products cancel if rows are far from 0
        y = torch.cat([batch.y for batch in objective.batches])
        likelihood = objective.likelihood
        if likelihood.kind == "classification" and (
            len(self._output_shape) > 1 or likelihood.given(y) is not likelihood
        ):
            raise UnsupportedError(
                "one class per row for a Gaussian process",
                received=f"outputs of shape (B, {', '.join(map(str, self._output_shape))}), or rows without a label",
                remedy="leave out rows without a label.",
            )
        if likelihood.kind != "classification" or y.is_floating_point():
            y = y.flatten(1).to(x.dtype)
        outputs = int(math.prod(self._output_shape))
        regression = likelihood.kind == "regression"
        mean = y.mean(0) if regression else x.new_zeros(outputs)
        scale = float((y - mean).square().mean().sqrt()) if regression else 1.0
        with torch.no_grad():
            some = torch.linspace(0, len(x) - 1, min(len(x), self.search_rows), device=x.device).round().long()
            kernel = self._chosen_kernel(_Fit(likelihood, x[some], y[some], mean), scale or 1.0)
            whole = _Fit(likelihood, x, y, mean)
            a, f = whole.mode(kernel)
            self._set_posterior(kernel, x, mean, a, f)
            evidence = whole.evidence_at(self.posterior_, a, f)
        self.lengthscale_, self.amplitude_ = float(kernel.lengthscale), float(kernel.amplitude)
        self.log_marginal_likelihood_ = float(evidence)

    def _check_size(self, objective: Objective) -> None:
        n, likelihood = objective.batches.n_data, objective.likelihood
        if type(likelihood) not in _LIKELIHOODS:
            raise UnsupportedError(
                "a Gaussian, Categorical or Bernoulli likelihood for a Gaussian process",
                received=type(likelihood).__name__,
                remedy="LinearizedLaplace, which takes every likelihood.",
            )
        outputs = objective.network.outputs(next(iter(objective.batches)).x).shape[1]
        size = 8 * n * n * outputs
        if n > self.max_rows:
            raise UnsupportedError(
                f"at most max_rows={self.max_rows:,} training rows for an exact Gaussian process",
                received=f"{n:,} rows: {outputs} kernel matrices ({n:,}, {n:,}), {size / 2**30:.2g} GiB, several times",
                remedy=f"fewer rows, or max_rows={n} with the time for N³ C = {n**3 * outputs:.1g} operations a step.",
            )
        what = f"{outputs} kernel matrices of {n:,} rows, {_COPIES} times"
        check_fits_memory(what, _COPIES * size, device=objective.theta.device, remedy="fewer rows.")

    def _chosen_kernel(self, fitted: _Fit, scale: float) -> RBF:
        """Return the kernel with the given options, and those that are "auto" by marginal likelihood."""
        distances = torch.pdist(fitted.x)
        median = float(distances.median()) if len(distances) else 1.0
        amplitude = scale if isinstance(self.amplitude, str) else self.amplitude
        lengths = [factor * (median or 1.0) for factor in _STARTS]
        lengths = lengths if isinstance(self.lengthscale, str) else [self.lengthscale]
        start = max((RBF(amplitude, length) for length in lengths), key=lambda kernel: float(fitted.evidence(kernel)))
        free = [isinstance(option, str) for option in (self.amplitude, self.lengthscale)]
        return _maximise(fitted, start, free) if any(free) else start

    def _set_posterior(self, kernel: RBF, x: Tensor, mean: Tensor, a: Tensor, f: Tensor) -> None:
        self._kernel, self._x, self._prior_mean, self._a, self._f = kernel, x, mean, a, f
        self.posterior_ = IndependentOutputs.at(self.likelihood, kernel(x, x), f)

    def _get_fit_state(self) -> Learned:
        tensors = {"x": self._x, "prior_mean": self._prior_mean, "a": self._a, "f": self._f, "origin": self._origin}
        learned = {"lengthscale": self.lengthscale_, "amplitude": self.amplitude_}
        learned |= {"evidence": self.log_marginal_likelihood_}
        return tensors, {**learned, "output_shape": list(self._output_shape)}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        self.lengthscale_, self.amplitude_ = learned["lengthscale"], learned["amplitude"]
        self.log_marginal_likelihood_ = learned["evidence"]
        self._output_shape = torch.Size(learned["output_shape"])
        kernel = RBF(self.amplitude_, self.lengthscale_)
        self._origin = tensors["origin"]
        self._set_posterior(kernel, tensors["x"], tensors["prior_mean"], tensors["a"], tensors["f"])

    def predict(self, x: PyTree, *, link_approx: str | None = None, n_samples: int | None = None) -> Prediction:
        """Return the predictive distribution.

        Args:
            x: M query rows.
            link_approx: None: for classes the average over samples of the latent functions at each row (algorithm 3.4),
                which the probit approximation replaces badly, since a shift that all latent functions share has a large
                variance and changes no probability; else "probit". Or one of the values of other estimators.
            n_samples: the number of samples; None: 500, or 100 for a given `link_approx`.

        Returns:
            The prediction, for classes with its `samples` (S, M, C).

        Raises:
            OptionError: for an unknown `link_approx`.
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        return self._finish_prediction(self.predict_uncalibrated(x, link_approx=link_approx, n_samples=n_samples))

    def predict_uncalibrated(
        self, x: PyTree, *, link_approx: str | None = None, n_samples: int | None = None
    ) -> Prediction:
        if link_approx is not None or self.likelihood.kind != "classification":
            return super().predict_uncalibrated(x, link_approx=link_approx or "probit", n_samples=n_samples or 100)
        x = self._prepare_query(x)
        self._check_query(x)
        mean, covariance = self._mean(x), self._covariance(x)
        n = checked_integer("n_samples", _SAMPLES if n_samples is None else n_samples, at_least=1)
        z = standard_normal((n, mean.shape[1]), covariance, self._generator(0))  # the same for every row
        samples = mean + self._to_output_dtype(torch.einsum("mcd,sd->smc", _root(covariance), z))
        return self.likelihood.predict(mean, self._to_output_dtype(covariance.diagonal(dim1=1, dim2=2)), samples)

    def _centred(self, x: PyTree) -> Tensor:
        """Return rows (M, D) less the mean of the training rows."""
        return _rows(x) - self._origin

    def _mean(self, x: PyTree) -> Tensor:
        mean = self._prior_mean + self._kernel(self._centred(x), self._x) @ self._a
        return self._to_output_dtype(mean).reshape(-1, *self._output_shape)

    def _variance(self, x: PyTree) -> Tensor:
        return self._covariance(x).diagonal(dim1=1, dim2=2)

    def _covariance(self, x: PyTree) -> Tensor:
        chunk = rows_per_chunk(32 * self.posterior_.root.numel())
        reduction = [
            self.posterior_.row_reduction(self._kernel(self._x, self._centred(part))) for part in split_rows(x, chunk)
        ]
        covariance = -torch.cat(reduction)
        covariance.diagonal(dim1=1, dim2=2).add_(self._kernel.amplitude**2)
        return covariance

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        slopes = ComposedNetwork(self.network_, of).function_jacobian(x, at=self._mean(x).flatten(1))
        return variance_by_covariance(slopes, self._covariance(x))

    def _joint_covariance(self, x: PyTree, f: Tensor) -> Tensor:
        m, c = f.shape
        what = f"the covariance between {m} rows of {c} outputs"
        size = 8 * (4 * (m * c) ** 2 + 3 * m * self.posterior_.root.numel())
        check_fits_memory(what, size, device=f.device, remedy="fewer rows.")
        rows = self._centred(x)
        prior = torch.einsum(
            "mk,cd->mckd", self._kernel(rows, rows), torch.eye(c, dtype=rows.dtype, device=rows.device)
        )
        return prior - self.posterior_.reduction(self._kernel(self._x, rows))

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        mean = to_algebra_dtype(self._mean(x).flatten(1))
        covariance = self._joint_covariance(x, mean).reshape(mean.numel(), mean.numel())
        root = _root(covariance)
        z = standard_normal((n_samples, len(root)), root, generator)
        return mean + (z @ root.T).reshape(n_samples, *mean.shape)


@dataclass
class _Fit:
    """The rows of a fit in float64, and what follows from them for a kernel; the last mode is where the next starts."""

    likelihood: Likelihood
    x: Tensor
    y: Tensor
    mean: Tensor
    last: Tensor | None = None

    def mode(self, kernel: RBF) -> tuple[Tensor, Tensor]:
        """Return a and f̂, (N, C)."""
        k = kernel(self.x, self.x)
        if self.likelihood.kind == "regression":
            a = self._gaussian(k)[1]
            return a, self.mean + k @ a

        def step(f: Tensor) -> Tensor:
            return IndependentOutputs.at(self.likelihood, k, f).newton(self.likelihood, self.y, f, self.mean)

        mean = self.mean.expand(len(self.x), -1)
        self.last, f = find_mode(self.likelihood, self.y, mean, lambda a: k @ a, step, self.last)
        return self.last, f

    def evidence(self, kernel: RBF) -> Tensor:
        """Return log p(y), or log q(y) for classes, with a graph to the parameters of the kernel if they have one.

        At the mode, a Newton step has a derivative of 0 in the f that it starts from. So the derivatives of f̂ by the
        parameters are those of one Newton step from the mode, taken as constant.
        """
        if self.likelihood.kind == "regression":
            return self.evidence_at(*self._gaussian(kernel(self.x, self.x)), self.mean)
        with torch.no_grad():
            _, f = self.mode(kernel)
        k = kernel(self.x, self.x)
        a = IndependentOutputs.at(self.likelihood, k, f).newton(self.likelihood, self.y, f, self.mean)
        f = self.mean + k @ a
        return self.evidence_at(IndependentOutputs.at(self.likelihood, k, f), a, f)

    def evidence_at(self, outputs: IndependentOutputs, a: Tensor, f: Tensor) -> Tensor:
        """Return log p(y) or log q(y) at the mode; regression does not need f̂."""
        if self.likelihood.kind == "regression":
            return outputs.gaussian_evidence(self.likelihood, self.y, a, self.mean)
        return outputs.evidence(self.likelihood, self.y, a, f)

    def _gaussian(self, k: Tensor) -> tuple[IndependentOutputs, Tensor]:
        """Return the factors of K + σ² and a (N, C) of regression, where W does not depend on f."""
        outputs = IndependentOutputs.at(self.likelihood, k, self.mean.expand(len(self.x), -1))
        return outputs, outputs.gaussian_mode(self.y, self.mean)


def _maximise(fitted: _Fit, start: RBF, free: list[bool]) -> RBF:
    """Return the kernel of the largest log marginal likelihood over the free parameters, by L-BFGS from a start."""
    origin = torch.tensor([start.amplitude, start.lengthscale], dtype=fitted.x.dtype, device=fitted.x.device).log()
    reach = torch.tensor(_LARGEST_FACTORS, dtype=origin.dtype, device=origin.device).log()
    mask = torch.tensor(free, device=origin.device)
    u = torch.zeros_like(origin).requires_grad_()

    def kernel() -> RBF:
        amplitude, lengthscale = (origin + torch.where(mask, reach * torch.tanh(u / reach), 0.0)).exp()
        return RBF(amplitude, lengthscale)

    options: dict[str, Any] = {"max_iter": _MAX_ITER, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([u], tolerance_grad=1e-4, tolerance_change=1e-9, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -fitted.evidence(kernel())
        loss.backward()
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)
        closure()
    assert u.grad is not None
    slope = float(u.grad.abs().max())
    if slope > _GRADIENT_TOL:
        warnings.warn(
            f"the search for amplitude and lengthscale has not converged: a derivative of {slope:.2g} nats; "
            "scaled inputs, or amplitude= and lengthscale=",
            NotConvergedWarning,
            stacklevel=2,
        )
    found = kernel()
    return RBF(float(found.amplitude), float(found.lengthscale))


def _root(covariance: Tensor) -> Tensor:
    """Return R with R Rᵀ = covariance (..., n, n). Round-off makes small eigenvalues negative: they become 0."""
    values, vectors = torch.linalg.eigh(0.5 * (covariance + covariance.mT))
    root: Tensor = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return root


def _rows(x: PyTree) -> Tensor:
    """Return inputs as rows (M, D) in float64. Raises UnsupportedError for other inputs than one tensor of numbers."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise UnsupportedError(
            "inputs that are one floating-point tensor (M, ...) for a Gaussian process",
            received=f"{x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}",
            remedy="NTKGaussianProcess, whose kernel is that of the network.",
        )
    return x.detach().flatten(1).to(algebra_dtype(x.device))
