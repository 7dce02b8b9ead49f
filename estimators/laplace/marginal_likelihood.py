"""Gradient ascent of the marginal likelihood in the prior precision and the noise together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from estimators.errors import ConvergenceError, NotConvergedWarning, OptionError, UnsupportedError
from estimators.laplace.evidence import EvidenceFunction
from estimators.laplace.last_layer import LastLayerLaplace
from estimators.laplace.linearized import LinearizedLaplace
from estimators.likelihoods import Gaussian
from estimators.numerics.dtype import algebra_dtype
from estimators.option_checks import PriorOption, checked_integer, shown

__all__ = ["MarginalLikelihoodFit", "maximize_marginal_likelihood"]

E = TypeVar("E", LastLayerLaplace, LinearizedLaplace)

_TOLERANCE = 1e-9
"""Largest change of log p(D) in nats, of log δ and log σ, or gradient by them, at which the search ends."""
_EVALUATIONS = 25
"""The most evaluations of one line search by strong Wolfe conditions in torch: the iterations are the only limit."""
_LARGEST = 1e6
"""A δ, or a factor of σ, above this value or below its inverse lets NotConvergedWarning be raised.

Weights of this prior precision have a standard deviation of 0.001. If all weights with a δ equal their prior mean, such
as biases that are 0, log p(D) has no maximum in δ: it was 5e9 when the search ended."""
_EXACT_FIT = 500
"""Mean squared residual over 2σ², in units of round-off, below which a network fits its targets exactly."""


@dataclass(frozen=True)
class MarginalLikelihoodFit(Generic[E]):
    """A fit with the δ and σ of the largest marginal likelihood, as `maximize_marginal_likelihood` returns it.

    Attributes:
        estimator: a new fit at the same weights, with these options; `save` stores them.
        prior_precision: δ, a number or a mapping as that of the given fit.
        sigma_noise: σ; a tensor (C,) if the given likelihood has one σ per output; None for other likelihoods than a
            Gaussian.
        log_marginal_likelihood: the value at these options, in nats.
        trace: the value at every evaluation, the first at the given options, the last at the returned ones.
    """

    estimator: E
    prior_precision: float | dict[str, float]
    sigma_noise: float | Tensor | None
    log_marginal_likelihood: float
    trace: tuple[float, ...]


def maximize_marginal_likelihood(estimator: E, *, max_iterations: int = 100) -> MarginalLikelihoodFit[E]:
    """Maximise the Laplace approximation of log p(D) over δ and, in regression, σ, by L-BFGS in their logarithms.

    The weights stay those of the fit (MacKay 1992; Immer et al. 2021, "Scalable marginal likelihood estimation",
    equation 7, with one inner step). A mapping of prior precisions is maximised over all of its values, such as one
    per layer. If a Gaussian has one σ per output, their ratios are kept, and a common factor is maximised over: for
    other ratios the curvature would be another one. The data are passed once, for log p(D|θ̂).

    Args:
        estimator: a fitted LinearizedLaplace or LastLayerLaplace whose prior precision is a positive number, or a
            mapping to positive numbers; it is not changed.
        max_iterations: the largest number of L-BFGS iterations.

    Returns:
        The new fit, with its δ and σ.

    Raises:
        OptionError: for a prior precision of 0, a tensor of prior precisions, max_iterations < 1, or several prior
            precisions with hessian_structure="lowrank".
        UnsupportedError: for another estimator, a form without a differentiable determinant ("cg"), or a subclass of
            Gaussian that overrides `nll`; and for a regression network that fits its training targets exactly, since
            log p(D) has no maximum in σ.
        ConvergenceError: if log p(D) is not finite at some δ and σ of the search.

    Warns:
        NotConvergedWarning: if the search is not at a maximum after max_iterations, or ends at a δ above 1e6 or below
            1e-6, or at a σ that is 1e6 times larger or smaller than that of the fit: log p(D) may have no maximum.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators import LinearizedLaplace
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> y = x.sum(1, keepdim=True) + 0.1 * torch.randn(50, 1, dtype=torch.float64)
        >>> model = nn.Linear(3, 1).double()
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1), model.bias.fill_(0)
        >>> found = maximize_marginal_likelihood(LinearizedLaplace(model, "regression").fit([(x, y)]))
        >>> 0.08 < found.sigma_noise < 0.12
        True
    """
    if not isinstance(estimator, (LastLayerLaplace, LinearizedLaplace)):
        raise UnsupportedError(
            "LinearizedLaplace or LastLayerLaplace, whose weights do not depend on the prior precision",
            received=type(estimator).__name__,
            remedy="one of these; for SubnetworkLaplace, compare clone_with(prior_precision=...) at several values by "
            "log_marginal_likelihood().",
        )
    max_iterations = checked_integer("max_iterations", max_iterations, at_least=1)
    given, likelihood = estimator.prior_precision_, estimator.likelihood
    start = _start_of(given)
    names = list(given) if isinstance(given, Mapping) else ["*"]
    has_noise = isinstance(likelihood, Gaussian)
    start += [1.0] if has_noise else []  # the factor of σ
    device = estimator.theta_.device
    logs = torch.tensor(start, dtype=algebra_dtype(device), device=device).log().requires_grad_()
    evidence, trace = estimator.evidence_function(), list[float]()
    if has_noise:
        _check_residuals(evidence)
    optimizer = torch.optim.LBFGS(
        [logs], max_iter=max_iterations, max_eval=_EVALUATIONS * max_iterations,
        tolerance_grad=_TOLERANCE, tolerance_change=_TOLERANCE, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def options(values: Tensor) -> tuple[Tensor | dict[str, Tensor], Tensor | None]:
        deltas = dict(zip(names, values, strict=False))
        return deltas if isinstance(given, Mapping) else deltas["*"], values[-1] if has_noise else None

    def evaluate() -> Tensor:
        value = evidence.at_noise_factor(*options(logs.exp())) if bool(logs.isfinite().all()) else logs.sum()
        trace.append(float(value.detach()))
        if not math.isfinite(trace[-1]):
            raise _not_finite(trace[-1], logs.detach().exp().tolist())
        return value

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = -evaluate()
            value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        evaluate()  # at the returned options: the last evaluation of a line search may be elsewhere
    values = logs.detach().exp().tolist()
    _warn_unless_converged(optimizer.state[logs]["n_iter"], max_iterations, values)
    chosen = dict(zip(names, values, strict=False)) if isinstance(given, Mapping) else values[0]
    changed, sigma = dict[str, Any](prior_precision=chosen), None
    if isinstance(likelihood, Gaussian):
        sigma = likelihood.sigma_noise * values[-1]
        changed["likelihood"] = likelihood.with_sigma(sigma)
    return MarginalLikelihoodFit(estimator.clone_with(**changed), chosen, sigma, trace[-1], tuple(trace))


def _check_residuals(evidence: EvidenceFunction) -> None:
    """Raise UnsupportedError if the residuals of a Gaussian are 0 up to round-off."""
    evidence.check_plain_gaussian()
    squares = -evidence.sum_of_squares / evidence.n_targets
    if float(squares) <= _EXACT_FIT * torch.finfo(squares.dtype).eps:
        raise UnsupportedError(
            "training targets with noise: log p(D) has no maximum in sigma_noise if all residuals are 0",
            received="a network that fits its training targets exactly",
            remedy="set sigma_noise, for instance to the RMSE on validation data, and choose the prior precision by "
            "fit(train_loader, val_loader=...).",
        )


def _not_finite(value: float, options: list[float]) -> ConvergenceError:
    return ConvergenceError(
        "a finite log marginal likelihood at every step of the search",
        received=f"{value} at {', '.join(f'{option:.3g}' for option in options)} (prior precisions, factor of sigma)",
        remedy="a prior_precision and a sigma_noise nearer to the maximum, or standardised inputs and targets.",
    )


def _warn_unless_converged(iterations: int, max_iterations: int, values: list[float]) -> None:
    """Warn with NotConvergedWarning if the iterations were spent, or if values are far from 1."""
    reasons = []
    if iterations >= max_iterations:
        reasons.append(f"max_iterations={max_iterations} were not enough: try more")
    far = ", ".join(f"{value:.3g}" for value in values if not 1 / _LARGEST <= value <= _LARGEST)
    if far:
        reasons.append(
            f"it ended at {far} (a prior precision or a factor of sigma), beyond {_LARGEST:.0e} or its inverse, where "
            "it may have no maximum: try one prior precision for more weights"
        )
    if reasons:
        warnings.warn(
            f"the search for the largest marginal likelihood did not converge: {'; '.join(reasons)}",
            NotConvergedWarning,
            stacklevel=3,
        )


def _start_of(given: PriorOption) -> list[float]:
    """Return the given prior precisions as a list. Raises OptionError unless they are positive numbers."""
    values = list(given.values()) if isinstance(given, Mapping) else [given]
    numbers = [float(value) for value in values if not isinstance(value, Tensor) and value > 0]
    if len(numbers) < len(values):
        raise OptionError(
            "positive prior precisions to start from, one number or a mapping to numbers",
            received=shown(given),
            remedy='prior_precision=1.0, or a mapping from globs such as {"0.*": 1.0, "*": 1.0}, one per layer.',
        )
    return numbers
