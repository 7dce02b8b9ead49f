"""The Gaussian process of the linearized network: its kernel is the empirical neural tangent kernel."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from estimators.baselines.gp_inference import find_mode, newton_dense
from estimators.curvature.base import standard_normal
from estimators.curvature.dense.dual import DualPrecision, bytes_needed
from estimators.errors import OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.laplace.posterior import LinearizedPosterior
from estimators.likelihoods import Likelihood
from estimators.models.exclusive import wants_graph
from estimators.models.functionals import ComposedNetwork, Functional, variance_by_covariance
from estimators.numerics.dtype import to_algebra_dtype
from estimators.numerics.pytrees import PyTree, split_rows
from estimators.objective.objective import Objective
from estimators.option_checks import checked_integer
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory, rows_per_chunk

__all__ = ["NTKGaussianProcess"]


class NTKGaussianProcess(LinearizedPosterior):
    """The posterior of the network linearized at its trained weights, as a Gaussian process over its outputs.

        f(x) = f(x; θ̂) + J(x)(θ − θ̂),   θ ~ N(θ₀, 1/δ):
        kernel J(x) diag(1/δ) J(x')ᵀ,   prior mean f(x; θ̂) + J(x)(θ₀ − θ̂)

    The kernel is the empirical neural tangent kernel (Jacot et al. 2018) at the trained weights. In regression the
    posterior is exact: the variance is that of `LinearizedLaplace` at the same δ, and the mean is corrected by
    −J A⁻¹ ∇L(θ̂), which is zero if training ended at a stationary point (Khan et al. 2019; Immer et al. 2021). For a
    network that is linear in its weights it is Bayesian linear regression, whatever θ̂ is. For classes and
    binary outputs it is the Laplace approximation at the mode of the linearized network, so that the curvature is taken
    there and not at θ̂.

    Time grows as (N C)³ and memory as (N C)² + N C P.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        max_outputs: the largest number N·C of training rows times outputs.

    Attributes:
        displacement_: the posterior mean of θ − θ̂, or for classes its mode, (P,).
        precision_: the posterior precision A.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option; `fit` raises it for a δ of 0. `fit` raises UnsupportedError for more than
            `max_outputs` outputs, or rows with several or absent labels, and TooLargeError if the kernel matrix and the
            Jacobian do not fit into memory.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> process = NTKGaussianProcess(model, "regression").fit([(torch.randn(20, 3), torch.randn(20, 2))])
        >>> process.covariance(torch.randn(4, 3)).shape
        torch.Size([4, 2, 2])
    """

    uses_prior_precision = True
    precision_: DualPrecision

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        max_outputs: int = 5000,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **options)
        self.max_outputs = checked_integer("max_outputs", max_outputs, at_least=1)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        prior, theta = objective.prior, objective.theta
        if not bool((prior.precision > 0).all()):
            raise OptionError(
                "a positive prior_precision for every parameter of the kernel",
                received="0 for some",
                remedy='a small positive one, or LinearizedLaplace with inverse="cholesky".',
            )
        jacobian, f, y = self._collect(objective)
        likelihood = objective.likelihood
        if likelihood.given(y) is not likelihood:
            raise UnsupportedError(
                "one label for every output of a row, for a Gaussian process",
                received=f"{likelihood!r}, which leaves out outputs",
                remedy="LinearizedLaplace, or LastLayerLaplace.",
            )
        n, c, p = jacobian.shape
        delta, offset = to_algebra_dtype(prior.precision), to_algebra_dtype(prior.mean - theta)  # θ₀ − θ̂
        rows = jacobian.reshape(n * c, p)
        kernel = (rows / delta) @ rows.T
        mean = f + jacobian @ offset
        a, f = find_mode(
            likelihood,
            y,
            mean,
            lambda a: (kernel @ a.flatten()).reshape(n, c),
            lambda f: newton_dense(likelihood, kernel, mean, y, f),
        )
        self.displacement_ = offset + (a.flatten() @ rows) / delta
        root = likelihood.hessian_sqrt(f)  # S, (N, C, C)
        self._set_precision(objective, (root.mT @ jacobian).reshape(n * c, p))

    def _collect(self, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """Return J (N, C, P), f (N, C) and y of all rows, in float64."""
        network, n = objective.network, objective.batches.n_data
        outputs = network.outputs(next(iter(objective.batches)).x).shape[1]
        if n * outputs > self.max_outputs:
            raise UnsupportedError(
                f"at most max_outputs={self.max_outputs:,} outputs of the training rows for a Gaussian process",
                received=f"{n:,} rows with {outputs} outputs: a kernel matrix ({n * outputs:,}, {n * outputs:,})",
                remedy=f"max_outputs={n * outputs} with the time for it, fewer rows, or LinearizedLaplace.",
            )
        what = f"the Jacobian and the kernel matrix of {n:,} rows with {outputs} outputs"
        size = bytes_needed(n * outputs, network.n_parameters, 8) + 8 * 3 * (n * outputs) ** 2
        check_fits_memory(what, size, device=objective.theta.device, remedy="fewer rows, or LinearizedLaplace.")
        chunk = rows_per_chunk(4 * outputs * network.n_parameters * 8)
        jacobian, f, y = [], [], []
        for batch in objective.batches:
            parts = split_rows(batch.x, chunk)
            jacobian += [to_algebra_dtype(network.jacobian(part)) for part in parts]
            f.append(to_algebra_dtype(network.outputs(batch.x)))
            y.append(to_algebra_dtype(batch.y) if batch.y.is_floating_point() else batch.y)
        return torch.cat(jacobian), torch.cat(f), torch.cat(y)

    def _set_precision(self, objective: Objective, rows: Tensor) -> None:
        self.precision_ = DualPrecision(to_algebra_dtype(objective.prior.precision), rows)

    def _get_fit_state(self) -> Learned:
        return {"rows": self.precision_.rows, "displacement": self.displacement_}, {}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        self.displacement_ = tensors["displacement"]
        self._set_precision(objective, tensors["rows"])

    def _mean(self, x: PyTree) -> Tensor:
        f, displacement = super()._mean(x), self.displacement_.to(self.theta_.dtype)
        if wants_graph(x):
            shift = self.network_.jacobian_with_graph(x) @ displacement
        else:
            shift = self.network_.jvp(x, displacement[None])[0]
        return f + self._to_output_dtype(shift).reshape(f.shape)

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        slopes = ComposedNetwork(self.network_, of).function_jacobian(x, at=self._mean(x).flatten(1))
        return variance_by_covariance(slopes, self._covariance(x))

    def _variance_with_graph(self, x: PyTree, of: Functional | None) -> Tensor:
        if of is not None:  # its slopes are taken at the corrected mean
            raise self._not_differentiable()
        return super()._variance_with_graph(x, of)

    def _weight_displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return samples θ − θ̂ ~ N(displacement_, A⁻¹), with A⁻¹ξ for ξ ~ N(0, A)."""
        precision, theta = self.precision_, self.theta_
        g = standard_normal((n_samples, len(precision.cholesky)), precision.cholesky, generator)
        z = standard_normal((n_samples, len(theta)), precision.cholesky, generator)
        noise = precision.transposed_times(g) + precision.prior_precision.sqrt() * z
        return (self.displacement_ + precision.solve(noise)).to(theta.dtype)
