"""The Laplace approximation of the marginal likelihood, as a number or as a differentiable function of δ and σ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.curvature.forms import DataCurvature, DenseCurvature, FactoredCurvature, JacobianCurvature
from estimators.curvature.layerwise.blocks import Blocks
from estimators.errors import IndefiniteHessianError, OptionError, UnsupportedError
from estimators.likelihoods import Gaussian
from estimators.models.network import Network
from estimators.models.subsets import delta_of_names
from estimators.numerics.dtype import to_algebra_dtype
from estimators.objective.objective import Objective
from estimators.option_checks import PriorOption, checked_number, checked_precision

__all__ = [
    "EMPIRICAL_EXPONENT",
    "LAMBDA_EXPONENT",
    "EvidenceFunction",
    "log_det_of",
    "log_det_of_sum",
    "log_marginal_likelihood",
    "prior_vector",
]

LAMBDA_EXPONENT, EMPIRICAL_EXPONENT = 2, 4
"""The e of a data curvature that is proportional to σ^−e: the GGN, and the empirical Fisher."""

_OF_SIGMA = ("nll", "nll_gradient", "root_product", "hessian_product", "given")
"""The methods of a Gaussian that determine how log p(D|θ̂) and its curvature depend on σ."""


def log_marginal_likelihood(
    objective: Objective, prior_precision: Tensor, log_det: Tensor, index: Tensor | None = None
) -> Tensor:
    """Return log p(D|θ̂) − ½ Σ δ(θ̂−θ₀)² + ½ Σ log δ − ½ log|A|, a scalar in nats.

    The 2π of the prior and of the Gaussian integral cancel. With `index`, the sums are over these entries of θ, and A
    is that of these entries: all others are fixed. Raises UnsupportedError for an improper prior (a δ of 0), which has
    no evidence.
    """
    return log_likelihood(objective) + _log_prior_and_volume(objective, prior_precision, log_det, index)


def _log_prior_and_volume(
    objective: Objective, prior_precision: Tensor, log_det: Tensor, index: Tensor | None
) -> Tensor:
    """Return − ½ Σ δ(θ̂−θ₀)² + ½ Σ log δ − ½ log|A|."""
    uncertain = slice(None) if index is None else index
    prior_precision = prior_precision[uncertain]
    if not bool((prior_precision > 0).all()):
        raise UnsupportedError(
            "a proper prior for a marginal likelihood",
            received="prior_precision 0 for some parameters",
            remedy="give every parameter a positive prior_precision.",
        )
    theta, mean = objective.theta[uncertain], objective.prior.mean[uncertain]
    delta, theta, mean = map(to_algebra_dtype, (prior_precision, theta, mean))
    scatter = (delta * (theta - mean).square()).sum()
    return -0.5 * (scatter - delta.log().sum() + log_det)


def log_likelihood(objective: Objective) -> Tensor:
    """Return log p(D|θ̂), a scalar in nats, by a pass over the data."""
    network, likelihood = objective.network, objective.likelihood
    losses = [likelihood.nll(to_algebra_dtype(network.outputs(b.x)), b.y).sum() for b in objective.batches]
    return -torch.stack(losses).sum()


@dataclass(frozen=True)
class EvidenceFunction:
    """log p(D) as a differentiable function of δ (P,) and σ, at the θ̂ of a fit and without passes over the data.

    With σ the data's curvature is that of the fit times (σ_fit/σ)^e, and log p(D|θ̂) has the same sum of squares. This
    holds for a Gaussian, and not for a subclass with its own `nll`; for that, a σ other than that of the fit raises
    UnsupportedError.

    Args:
        objective: that of the fit.
        log_det: (δ (P,), s) -> log |s · G + diag δ| of the data's curvature G.
        fitted_log_likelihood: log p(D|θ̂) at the σ of the fit.
        n_targets: N · C.
        index: the entries of θ that are uncertain; None: all.
        sigma_exponent: e, `LAMBDA_EXPONENT` for Λ = 1/σ², `EMPIRICAL_EXPONENT` for squares of gradients (f − y)/σ².
    """

    objective: Objective
    log_det: Callable[[Tensor, Tensor], Tensor]
    fitted_log_likelihood: Tensor
    n_targets: int
    index: Tensor | None = None
    sigma_exponent: int = LAMBDA_EXPONENT

    @classmethod
    def of(
        cls,
        objective: Objective,
        log_det: Callable[[Tensor, Tensor], Tensor],
        *,
        index: Tensor | None = None,
        sigma_exponent: int = LAMBDA_EXPONENT,
    ) -> EvidenceFunction:
        """Return the function, with one forward pass over the data."""
        n_outputs = objective.network.outputs(next(iter(objective.batches)).x).shape[1]
        n_targets = objective.batches.n_data * n_outputs
        return cls(objective, log_det, log_likelihood(objective), n_targets, index, sigma_exponent)

    def __call__(self, prior_precision: PriorOption, sigma_noise: float | Tensor | None) -> Tensor:
        """Return log p(D) in nats at δ and σ; None: the σ of the fit."""
        if sigma_noise is None:
            return self.at_noise_factor(prior_precision, None)
        before, like = _fitted_sigma(self.objective), to_algebra_dtype(self.objective.theta)
        return self.at_noise_factor(prior_precision, _checked_sigma(sigma_noise, like) / before)

    def at_noise_factor(self, prior_precision: PriorOption, factor: Tensor | None) -> Tensor:
        """Return log p(D) in nats at δ and, for a Gaussian, at the σ of the fit times a factor; None: at its σ."""
        delta = to_algebra_dtype(prior_vector(prior_precision, self.objective.network))
        if factor is None:
            scale, fitted = torch.ones((), dtype=delta.dtype, device=delta.device), self.fitted_log_likelihood
        else:
            if factor.requires_grad or float(factor) != 1:
                self.check_plain_gaussian()
            constant = self._gaussian_constant
            fitted = self.sum_of_squares / factor.square() - self.n_targets * factor.log() - constant
            scale = factor**-self.sigma_exponent
        return fitted + _log_prior_and_volume(self.objective, delta, self.log_det(delta, scale), self.index)

    def check_plain_gaussian(self) -> None:
        """Raise UnsupportedError if a subclass overrides how log p(y | f) depends on σ: its form is unknown."""
        kind = type(self.objective.likelihood)
        changed = [name for name in _OF_SIGMA if getattr(kind, name) is not getattr(Gaussian, name)]
        if changed:
            raise UnsupportedError(
                "a Gaussian with the methods of the library for a sigma_noise other than that of the fit",
                received=f"{kind.__name__}, which overrides {' and '.join(changed)}",
                remedy="clone_with(likelihood=likelihood.with_sigma(sigma)).log_marginal_likelihood(), by nll.",
            )

    @property
    def sum_of_squares(self) -> Tensor:
        """−Σ (y − f)² / 2σ², a scalar, of a Gaussian with the σ of the fit."""
        return self.fitted_log_likelihood + self._gaussian_constant

    @property
    def _gaussian_constant(self) -> Tensor:
        """Σ log σ + ½ log 2π over all targets of a Gaussian with the σ of the fit."""
        likelihood, like = self.objective.likelihood, self.fitted_log_likelihood
        assert isinstance(likelihood, Gaussian)
        log_sigma = torch.as_tensor(likelihood.sigma_noise, dtype=like.dtype, device=like.device).log().mean()
        return self.n_targets * (log_sigma + 0.5 * math.log(2 * math.pi))


def _fitted_sigma(objective: Objective) -> float:
    """Return the σ of the fit. Raises OptionError unless it is one number of a Gaussian likelihood."""
    likelihood = objective.likelihood
    if isinstance(likelihood, Gaussian) and isinstance(likelihood.sigma_noise, float):
        return likelihood.sigma_noise
    raise OptionError(
        "sigma_noise for a regression with one σ for all outputs",
        received=repr(likelihood),
        remedy="Gaussian(sigma_noise=1.0), or leave sigma_noise out.",
    )


def _checked_sigma(value: float | Tensor, like: Tensor) -> Tensor:
    """Return σ as a scalar tensor, differentiable. Raises OptionError unless it is one positive, finite number."""
    remedy = "one standard deviation of the noise for all outputs, such as 0.5."
    checked_number("sigma_noise", value, above=0, remedy=remedy)
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(())


def prior_vector(value: PriorOption, network: Network) -> Tensor:
    """Return δ (P,), differentiable with respect to tensors that require a gradient.

    Raises:
        OptionError: for a negative δ, and for tensors of other shapes than those of `PriorOption`.
    """
    checked = checked_precision(value)  # without graphs
    subset = network.subset
    if not any(isinstance(v, Tensor) and v.requires_grad for v in _values(value)):
        return delta_of_names(checked, subset, network.theta)
    theta = to_algebra_dtype(network.theta)
    if isinstance(value, Tensor):
        return (
            value.to(theta).reshape(()).expand_as(theta) if value.numel() == 1 else delta_of_names(value, subset, theta)
        )
    assert isinstance(checked, Mapping)
    # Each number or entry of a tensor has an index into `entries`, and δ (P,) takes the entries at these indices.
    tensors = [torch.as_tensor(v, dtype=theta.dtype, device=theta.device) for v in _values(value)]
    entries, indices, start = torch.cat([t.reshape(-1) for t in tensors]), dict[str, float | Tensor](), 0
    for name, tensor in zip(checked, tensors, strict=True):
        several = torch.arange(start, start + tensor.numel(), device=theta.device).view_as(tensor)
        indices[name] = start if tensor.numel() == 1 else several
        start += tensor.numel()
    return entries[delta_of_names(indices, subset, torch.zeros_like(theta, dtype=torch.int64))]


def _values(value: PriorOption) -> list[float | Tensor]:
    """Return the numbers and tensors of a prior precision."""
    return list(value.values()) if isinstance(value, Mapping) else [value]


def log_det_of(data_curvature: DataCurvature, delta: Tensor, scale: Tensor) -> Tensor:
    """Return log |scale · G + diag δ|, differentiable, for the data's curvature G and δ (P,).

    Raises:
        UnsupportedError: for a form without a differentiable determinant.
        IndefiniteHessianError: if the matrix is not positive definite.
    """
    if isinstance(data_curvature, DenseCurvature):
        return log_det_of_sum(data_curvature.matrix, delta, scale)
    if isinstance(data_curvature, JacobianCurvature):
        rows = to_algebra_dtype(data_curvature.rows) * delta.rsqrt()
        return delta.log().sum() + _log_det_beside_identity(scale * (rows @ rows.T))
    if isinstance(data_curvature, FactoredCurvature):
        rows_in_factors = data_curvature.rows
        if not rows_in_factors.suits(delta.detach()):  # another δ for each weight
            rows = to_algebra_dtype(rows_in_factors.dense()) * delta.rsqrt()
            return delta.log().sum() + _log_det_beside_identity(scale * (rows @ rows.T))
        inner = rows_in_factors.inner(rows_in_factors, rows_in_factors.deltas(delta))
        return delta.log().sum() + _log_det_beside_identity(scale * inner)
    if isinstance(data_curvature, Blocks):
        return _log_det_of_blocks(data_curvature, delta, scale)
    raise UnsupportedError(
        "a form whose determinant is differentiable",
        received=type(data_curvature).__name__,
        remedy='inverse="cholesky" or "dual", or hessian_structure="kron", "ekfac", "diag" or "lowrank".',
    )


def log_det_of_sum(matrix: Tensor, delta: Tensor, scale: Tensor) -> Tensor:
    """Return log |scale · M + diag δ| of a dense M."""
    total = scale * to_algebra_dtype(matrix) + delta.diag()
    factor, info = torch.linalg.cholesky_ex(total)
    if int(info) != 0:
        eigenvalues = torch.linalg.eigvalsh(total.detach())
        raise IndefiniteHessianError(smallest=float(eigenvalues[0]), largest=float(eigenvalues[-1]))
    log_det: Tensor = 2 * factor.diagonal().log().sum()
    return log_det


def _log_det_beside_identity(inner: Tensor) -> Tensor:
    """Return log |I + K| of K (N·C, N·C)."""
    identity = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    log_det: Tensor = 2 * torch.linalg.cholesky(identity + inner).diagonal().log().sum()
    return log_det


def _log_det_of_blocks(blocks: Blocks, delta: Tensor, scale: Tensor) -> Tensor:
    """Return the sum over blocks; in a Kronecker basis, each weight has one δ."""
    layout = blocks.layout
    total = (scale * blocks.other_diagonal + layout.other_entries(delta)).log().sum()
    for name, block in blocks.blocks.items():
        of_map = layout.matrix(delta, name)
        if block.input_basis is None:
            total = total + (scale * block.eigenvalues + of_map).log().sum()
            continue
        total = total + (scale * block.eigenvalues + of_map[0, 0]).log().sum()
        total = total + block.n_outside * of_map[0, 0].log()
    return total
