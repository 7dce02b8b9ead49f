"""Convergence of a trained network to a stationary point of L, by full-batch L-BFGS."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from estimators.data.training_data import TrainingData
from estimators.errors import NotConvergedWarning
from estimators.likelihoods import Likelihood, resolve_likelihood
from estimators.models.outputs import output_tensor
from estimators.models.subsets import Subset, delta_of_names, matching_names
from estimators.numerics.pytrees import PyTree, forward_arguments
from estimators.option_checks import PriorOption, checked_integer, checked_number, checked_precision
from estimators.runtime.module_wrappers import parameter_names, unwrapped
from estimators.runtime.optional import optional_module

__all__ = ["TOLERANCE", "ConvergenceReport", "converge_map"]

Floats = NDArray[np.float64]

TOLERANCE = 1e-3
"""Relative gradient at which training ends. From there to 1e-6 outputs of the bundled tasks change by at most 0.002,
on average over test rows (logits of digits)."""
_MAX_ITERATIONS = 20_000
"""L-BFGS iterations. The bundled tasks take 45 (wine) to 3,300 (toy-gap)."""
_HISTORY = 30
"""Pairs of steps and gradient differences that L-BFGS keeps."""


@dataclass(frozen=True)
class ConvergenceReport:
    """How the weights were converged.

    Attributes:
        relative_gradient: ‖∇L‖ / ‖δ θ‖ at the end; 0 at a stationary point, about 1 far from it.
        tolerance: the relative gradient that was asked for.
        iterations: number of L-BFGS iterations.
        gradients: number of gradients over all training rows.
        loss_before: L at the start, in nats.
        loss: L at the end, in nats.
    """

    relative_gradient: float
    tolerance: float
    iterations: int
    gradients: int
    loss_before: float
    loss: float

    @property
    def reached(self) -> bool:
        """Whether the relative gradient is at most the tolerance."""
        return self.relative_gradient <= self.tolerance


def converge_map(
    model: nn.Module,
    likelihood: str | Likelihood,
    train_loader: Iterable[Any],
    *,
    prior_precision: PriorOption,
    tolerance: float = TOLERANCE,
    max_iterations: int = _MAX_ITERATIONS,
) -> ConvergenceReport:
    """Continue training in place, in eval mode, until the gradient of L vanishes, and return how far it got.

    A recipe of stochastic gradients ends near a minimum of L(θ) = Σₙ −log p(yₙ | f(xₙ; θ)) + ½ Σ δ θ². Methods that
    expand L around the weights, and comparisons with the posterior, depend on how near. This is L-BFGS of scipy with
    the gradient over all rows, which is deterministic: no dropout, fixed batch statistics.

    Args:
        model: the trained network; parameters that require a gradient are trained. It ends in eval mode.
        likelihood: a likelihood, or the name of one such as "regression".
        train_loader: batches (x, y), the same rows on every pass.
        prior_precision: δ > 0 as for an estimator, or a mapping from globs of parameter names to numbers.
        tolerance: relative gradient ‖∇L‖ / ‖δ θ‖ at which it ends.
        max_iterations: the largest number of L-BFGS iterations.

    Returns:
        The relative gradient at the end, and the numbers of iterations and gradients.

    Raises:
        OptionError: for an option out of its range.
        DataError: for a batch that does not fit the model or the likelihood.
        UnsupportedError: scipy is not installed.

    Warns:
        NotConvergedWarning: the tolerance was not reached.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators.training import converge_map
        >>> model = nn.Linear(3, 1).double()
        >>> rows = [(torch.randn(20, 3).double(), torch.randn(20, 1).double())]
        >>> converge_map(model, "regression", rows, prior_precision=1.0).reached
        True
    """
    tolerance = checked_number("tolerance", tolerance, above=0, remedy="tolerance=1e-3.")
    max_iterations = checked_integer("max_iterations", max_iterations, at_least=1)
    minimize = optional_module("scipy.optimize", purpose="converge a network", install="scipy").minimize
    loss = _FullBatchLoss.of(unwrapped(model).eval(), resolve_likelihood(likelihood), train_loader, prior_precision)
    start = loss.theta()
    before, gradient = loss(start)
    iterations = 0
    if loss.relative(start, gradient) > tolerance:
        options = {"maxiter": max_iterations, "maxfun": 4 * max_iterations, "maxcor": _HISTORY, "ftol": 0, "gtol": 0}
        callback = partial(_stop_at, loss, tolerance)
        found = minimize(loss, start, jac=True, method="L-BFGS-B", callback=callback, options=options)
        start, iterations = found.x, int(found.nit)
    after, gradient = loss(start)  # writes these weights into the model
    report = ConvergenceReport(
        loss.relative(start, gradient), tolerance, iterations, loss.gradients, float(before), float(after)
    )
    if not report.reached:
        warnings.warn(
            f"the relative gradient of L is {report.relative_gradient:.2g} after {iterations} iterations of L-BFGS, "
            f"above tolerance={tolerance:.2g}: more max_iterations, float64, or smooth activations",
            NotConvergedWarning,
            stacklevel=2,
        )
    return report


def _stop_at(loss: _FullBatchLoss, tolerance: float, intermediate_result: Any) -> None:  # noqa: ANN401
    """End the iterations once the relative gradient at the new weights is small."""
    theta = intermediate_result.x
    gradient = loss.last_gradient if np.array_equal(theta, loss.last_theta) else loss(theta)[1]
    if loss.relative(theta, gradient) <= tolerance:
        raise StopIteration


@dataclass
class _FullBatchLoss:
    """L and its gradient over all rows as a function of a float64 vector, through the module itself."""

    model: nn.Module
    likelihood: Likelihood
    batches: TrainingData
    parameters: list[nn.Parameter]
    delta: Floats
    gradients: int = 0
    last_theta: Floats = field(default_factory=lambda: np.empty(0))
    last_gradient: Floats = field(default_factory=lambda: np.empty(0))

    @classmethod
    def of(
        cls, model: nn.Module, likelihood: Likelihood, loader: Iterable[Any], prior_precision: PriorOption
    ) -> _FullBatchLoss:
        batches = TrainingData.unchecked(loader, keep=True, outputs=partial(_outputs, model))
        subset = Subset.of(model, matching_names(model, "all"))
        own, named = parameter_names(model), dict(model.named_parameters())
        chosen = [named[own[name]] for name in subset.shapes]
        start = torch.cat([p.detach().flatten() for p in chosen])
        if isinstance(prior_precision, (Mapping, Tensor)):
            prior_precision = checked_precision(prior_precision)
        delta = delta_of_names(prior_precision, subset, start)
        return cls(model, likelihood, batches, chosen, _array(delta.expand_as(start)))

    def theta(self) -> Floats:
        """Return the weights of the model, (P,)."""
        return _array(torch.cat([p.detach().flatten() for p in self.parameters]))

    def __call__(self, theta: Floats) -> tuple[float, Floats]:
        """Write the weights into the model, and return L in nats and ∇L, (P,)."""
        self._write(theta)
        loss, total = 0.0, np.zeros_like(theta)
        for batch in self.batches:
            with torch.enable_grad():
                f = _outputs(self.model, batch.x)
                self.likelihood.check_targets(f, batch.y)
                nll = self.likelihood.nll(f.flatten(1), batch.y).sum()
                slopes = torch.autograd.grad(nll, self.parameters, allow_unused=True)
            loss += float(nll.detach())
            pairs = zip(slopes, self.parameters, strict=True)
            total += _array(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]))
        self.gradients += 1
        self.last_theta, self.last_gradient = theta.copy(), total + self.delta * theta
        return loss + 0.5 * float((self.delta * theta**2).sum()), self.last_gradient

    def relative(self, theta: Floats, gradient: Floats) -> float:
        """Return ‖∇L‖ / ‖δ θ‖; relative to the gradient of the data if the prior has none."""
        prior = self.delta * theta
        scale = np.linalg.norm(prior) or np.linalg.norm(gradient - prior) or 1.0
        return float(np.linalg.norm(gradient) / scale)

    def _write(self, theta: Floats) -> None:
        parts = torch.from_numpy(theta).split([p.numel() for p in self.parameters])
        with torch.no_grad():
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.copy_(part.view_as(parameter))


def _outputs(model: nn.Module, x: PyTree) -> Tensor:
    arguments, keywords = forward_arguments(x)
    return output_tensor(model(*arguments, **keywords))


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().cpu().double().numpy().copy()
    return array
