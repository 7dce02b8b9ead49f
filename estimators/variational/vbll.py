"""Variational Bayesian last layer: a Gaussian over the last linear layer that maximises a bound in closed form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from estimators.curvature.last_layer.features import LastLayer
from estimators.errors import NotConvergedWarning, OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import PriorOptions, inherits_options
from estimators.likelihoods import Gaussian, Likelihood
from estimators.models.functionals import ComposedNetwork, Functional, variance_by_covariance
from estimators.models.last_linear import find_last_linear
from estimators.numerics.dtype import to_algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import checked_instance, checked_integer, checked_number
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory

__all__ = ["VBLL", "LastLayerData", "LastLayerGaussian", "bound"]

_NATURAL_STEPS = 10
"""Steps along the natural gradient before L-BFGS."""
_HISTORY = 50
"""Stored pairs of L-BFGS."""


@dataclass(frozen=True)
class LastLayerData:
    """The rows of a fit as the last layer sees them, and the prior on its weights, in float64.

    Attributes:
        kind: "regression", "classification" or "binary".
        features: φ, with a 1 for the bias, (N, E).
        offset: the part of the outputs that does not depend on the chosen weights, (N, C).
        targets: targets, or probabilities of the classes, (N, C).
        precision: δ of the weights, (C, E).
        prior_mean: θ₀ of the weights, (C, E).
        sigma: σ of each output in regression, (C,).
    """

    kind: str
    features: Tensor
    offset: Tensor
    targets: Tensor
    precision: Tensor
    prior_mean: Tensor
    sigma: Tensor | None = None


@dataclass(frozen=True)
class LastLayerGaussian:
    """Independent Gaussians over the weights of each output, q(w_c) = N(m_c, P_c⁻¹).

    Attributes:
        mean: m, (C, E).
        precision: P, (C, E, E).
    """

    mean: Tensor
    precision: Tensor

    @property
    def root(self) -> Tensor:
        """The Cholesky factor L of P = L Lᵀ, (C, E, E)."""
        root: Tensor = torch.linalg.cholesky(self.precision)
        return root

    def variance(self, features: Tensor) -> Tensor:
        """Return φᵀ P_c⁻¹ φ, (M, C), for features (M, E)."""
        return self._whitened(features).square().sum(1).T

    def between_rows(self, features: Tensor) -> Tensor:
        """Return φ_mᵀ P_c⁻¹ φ_n, (C, M, M), for features (M, E)."""
        white = self._whitened(features)
        return white.transpose(1, 2) @ white

    def _whitened(self, features: Tensor) -> Tensor:
        rows = features.T.expand(len(self.mean), -1, -1)
        white: Tensor = torch.linalg.solve_triangular(self.root, rows, upper=False)
        return white  # L⁻¹ φ, (C, E, M)

    def noise(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return samples of w − m, (S, C, E)."""
        shape = (n_samples, *self.mean.shape)
        z = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        noise: Tensor = torch.linalg.solve_triangular(self.root.mT, z[..., None], upper=True)
        return noise[..., 0]  # L⁻ᵀ z

    def divergence(self, data: LastLayerData) -> Tensor:
        """Return KL(q ‖ prior) in nats, a scalar."""
        root = self.root
        unit = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
        marginal: Tensor = torch.linalg.solve_triangular(root, unit, upper=False).square().sum(1)  # diag P⁻¹, (C, E)
        log_det = 2 * root.diagonal(dim1=1, dim2=2).log().sum()
        distance = data.precision * (marginal + (self.mean - data.prior_mean).square()) - data.precision.log() - 1
        return 0.5 * (distance.sum() + log_det)


def bound(q: LastLayerGaussian, data: LastLayerData) -> Tensor:
    """Return the lower bound of log p(D) that VBLL maximises, in nats (Harrison et al. 2024, Theorems 1 and 2).

        regression       Σₙ log N(yₙ | m φₙ, σ²) − ½ φₙᵀSφₙ/σ² − KL
        classification   Σₙ yₙᵀzₙ − log Σ_c exp(zₙ_c + ½ φₙᵀS_cφₙ) − KL,   z = m φ

    The first is the ELBO. The second is below it by Jensen's inequality, E log Σ exp ≤ log E Σ exp. A binary output has
    log(1 + exp(z + ½ φᵀSφ)) in place of the sum over classes.

    Args:
        q: the Gaussian over the weights.
        data: the rows and the prior.
    """
    z, v = data.features @ q.mean.T + data.offset, q.variance(data.features)
    if data.kind == "regression":
        assert data.sigma is not None
        squares = ((data.targets - z).square() + v) / data.sigma.square()
        fit = -0.5 * (squares + math.log(2 * math.pi)).sum() - len(z) * data.sigma.log().sum()
    elif data.kind == "classification":
        fit = (data.targets * z).sum() - (z + 0.5 * v).logsumexp(1).sum()
    else:
        fit = (data.targets * z).sum() - F.softplus(z + 0.5 * v).sum()
    return fit - q.divergence(data)


def _wanted_and_gradient(q: LastLayerGaussian, data: LastLayerData) -> tuple[Tensor, Tensor]:
    """Return the precisions that the bound wants at q, (C, E, E), and its gradient in m, (C, E).

    ∂/∂S_c = ½ (P_c − δ − Σₙ rₙ_c φₙφₙᵀ), with r = 1/σ² in regression and r = p̃, the probabilities at z + ½ φᵀSφ, else.
    """
    z, v = data.features @ q.mean.T + data.offset, q.variance(data.features)
    if data.kind == "regression":
        assert data.sigma is not None
        r = data.sigma.square().reciprocal().expand_as(z)
        slope = (data.targets - z) * r
    else:
        shifted = z + 0.5 * v
        r = shifted.softmax(1) if data.kind == "classification" else shifted.sigmoid()
        slope = data.targets - r
    wanted = torch.stack([data.features.T @ (w[:, None] * data.features) for w in r.unbind(1)])
    gradient = slope.T @ data.features - data.precision * (q.mean - data.prior_mean)
    return wanted + torch.diag_embed(data.precision), gradient


def _solve(data: LastLayerData, start: Tensor, *, tol: float, max_iter: int) -> tuple[LastLayerGaussian, int, float]:
    """Return the maximum of the bound, the number of iterations, and the largest entry of the whitened gradient.

    The first steps go along the natural gradient, P ← P_wanted and m ← m + P⁻¹ ∂/∂m, which ends regression. L-BFGS in
    the coordinates that they whiten does the rest, since natural gradients converge slowly where classes are certain.
    """
    no_variance = LastLayerGaussian(start, torch.diag_embed(data.precision) / torch.finfo(start.dtype).eps)
    q = LastLayerGaussian(start, _wanted_and_gradient(no_variance, data)[0])
    value = bound(q, data)
    for _ in range(1 if data.kind == "regression" else _NATURAL_STEPS):
        wanted, gradient = _wanted_and_gradient(q, data)
        step = torch.linalg.solve(wanted, gradient[..., None])[..., 0]
        moved = LastLayerGaussian(q.mean + step, wanted)
        found = bound(moved, data)
        if not bool(found >= value):
            break
        q, value = moved, found
    if data.kind == "regression":
        return q, 1, 0.0
    return _maximise(q, data, tol=tol, max_iter=max_iter)


def _maximise(
    q: LastLayerGaussian, data: LastLayerData, *, tol: float, max_iter: int
) -> tuple[LastLayerGaussian, int, float]:
    """Return the maximum of the bound by L-BFGS over a and B, m = m₀ + L⁻ᵀa and S = L⁻ᵀ B Bᵀ L⁻¹ with P₀ = L Lᵀ.

    B is lower triangular with a positive diagonal, whose logarithm is optimised. At the start a = 0 and B = I.
    """
    root, start = q.root, q.mean
    c, e = start.shape
    rows, columns = torch.tril_indices(e, e, -1, device=start.device)
    x = start.new_zeros(c, e + e + len(rows)).requires_grad_()  # a, log of the diagonal of B, the rest of B

    def gaussian(x: Tensor) -> LastLayerGaussian:
        a, log_diagonal, below = x.split([e, e, len(rows)], dim=1)
        b = torch.diag_embed(log_diagonal.exp()).index_put((torch.arange(c)[:, None], rows, columns), below)
        mean = start + torch.linalg.solve_triangular(root.mT, a[..., None], upper=True)[..., 0]
        factor = torch.linalg.solve_triangular(b, root.mT, upper=False)  # B⁻¹ Lᵀ; P = L B⁻ᵀ B⁻¹ Lᵀ
        return LastLayerGaussian(mean, factor.mT @ factor)

    options = {"max_iter": max_iter, "history_size": _HISTORY, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([x], tolerance_grad=tol, tolerance_change=0.0, **options)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -bound(gaussian(x), data)
        loss.backward()
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)
        closure()
    assert x.grad is not None
    n_iter = optimizer.state[x]["n_iter"]
    found = gaussian(x.detach())
    return LastLayerGaussian(found.mean.detach(), found.precision.detach()), n_iter, float(x.grad.abs().max())


class VBLL(UncertaintyEstimator):
    """Variational Bayesian last layer on the features of a trained network (Harrison, Willes and Snoek 2024).

        q(W) = Π_c N(w_c | m_c, S_c),   f_c = w_cᵀφ,   m and S maximise a lower bound of log p(D) in closed form

    Regression has the discriminative bound of the paper's Theorem 1 with the fixed σ of the likelihood: its maximum is
    the exact posterior of Bayesian linear regression on the features, whose variance is that of `LastLayerLaplace`.
    Classification has the bound of Theorem 2, with a full S_c per class and no noise on the logits; its maximum is
    computed by L-BFGS, without minibatches. Binary outputs have the same bound with one logit.

    The mean of the outputs is that of q, and not the output of the network. The features are not trained further, which
    the paper calls post-training; there is no prior on σ.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "last_layer", the only possible value.
        last_layer_name: the name of the layer. None: found by running the network.
        tol: the largest derivative of the bound, in nats per standard deviation of a weight, at which iterations end.
        max_iter: the largest number of L-BFGS iterations.

    Attributes:
        posterior_: m (C, E) and the precisions S⁻¹ (C, E, E); E counts the features, and 1 for a bias.
        bound_: the maximum of the bound, in nats.
        n_iter_: the number of iterations.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option; `fit` raises it for a δ of 0. `fit` raises NoLastLayerError if the network
            does not end in a linear layer, and UnsupportedError if the layer is used at several positions of a row.

    Warns:
        NotConvergedWarning: if a derivative is above `tol` after `max_iter` iterations.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> vbll = VBLL(model, "classification").fit([(torch.randn(20, 3), torch.randint(0, 2, (20,)))])
        >>> vbll.posterior_.mean.shape, vbll.variance(torch.randn(4, 3)).shape
        (torch.Size([2, 9]), torch.Size([4, 2]))
    """

    uses_prior_precision = True

    @inherits_options(UncertaintyEstimator, PriorOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        subset_of_weights: str = "last_layer",
        last_layer_name: str | None = None,
        tol: float = 1e-3,
        max_iter: int = 1000,
        **prior: Unpack[PriorOptions],
    ) -> None:
        super().__init__(model, likelihood, subset_of_weights=subset_of_weights, **prior)
        self.last_layer_name = last_layer_name
        if subset_of_weights != "last_layer":
            raise OptionError(
                'subset_of_weights="last_layer"', received=repr(subset_of_weights), remedy="use MeanFieldVI."
            )
        if last_layer_name is not None:
            checked_instance("last_layer_name", last_layer_name, str, remedy="the name of a layer, or None.")
        self.tol = checked_number("tol", tol, above=0, remedy="1e-4.")
        self.max_iter = checked_integer("max_iter", max_iter, at_least=1)

    def _parameter_names(self, train_loader: Iterable[Any]) -> list[str]:
        return find_last_linear(self.model, self._first_inputs(train_loader), name=self.last_layer_name).parameter_names

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        first = next(iter(objective.batches))
        self.last_layer_ = LastLayer.of(objective.network, first.x, name=self.last_layer_name)
        data = self._collect(objective)
        start = to_algebra_dtype(self.last_layer_.to_matrix(objective.theta))
        self.posterior_, self.n_iter_, slope = _solve(data, start, tol=self.tol, max_iter=self.max_iter)
        self.bound_ = float(bound(self.posterior_, data))
        if slope > self.tol:
            warnings.warn(
                f"VBLL has not converged: a derivative of {slope:.2g} after {self.n_iter_} iterations; "
                "a larger max_iter or tol",
                NotConvergedWarning,
                stacklevel=2,
            )

    def _collect(self, objective: Objective) -> LastLayerData:
        """Read features and targets of all rows."""
        layer, prior = self.last_layer_, objective.prior
        c, e, n = layer.n_outputs, layer.n_features, objective.batches.n_data
        _check_proper(prior.precision)
        check_fits_memory(
            f"the features of {n} rows and {c} precisions of {e} weights",
            8 * (3 * n * (e + c) + 4 * c * e * e),
            device=objective.theta.device,
            remedy='LastLayerLaplace with hessian_structure="kron" or "diag".',
        )
        parts = [self._of_batch(objective, batch.x, batch.y) for batch in objective.batches]
        features, offset, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        precision, prior_mean = (to_algebra_dtype(layer.to_matrix(t)) for t in (prior.precision, prior.mean))
        data = LastLayerData(objective.likelihood.kind, features, offset, targets, precision, prior_mean)
        if isinstance(objective.likelihood, Gaussian):
            sigma = torch.as_tensor(objective.likelihood.sigma_noise, dtype=features.dtype, device=features.device)
            data = replace(data, sigma=sigma.expand(c))
        return data

    def _of_batch(self, objective: Objective, x: PyTree, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (B, E), offsets (B, C) and targets (B, C) in float64."""
        features, f = self._features_and_outputs(x)
        targets = y
        if objective.likelihood.kind == "classification" and not y.is_floating_point():
            if y.ndim != 1 or objective.likelihood.given(y) is not objective.likelihood:
                raise UnsupportedError(
                    "one class per row for VBLL",
                    received=f"classes of shape {tuple(y.shape)} with {objective.likelihood!r}, or rows without label",
                    remedy="LastLayerLaplace.",
                )
            targets = F.one_hot(y, f.shape[1])
        return features, self._offset(features, f), targets.flatten(1).to(features.dtype)

    def _features_and_outputs(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """Return φ (M, E) and the outputs of the network (M, C), in float64."""
        network = self.last_layer_.network
        with self.last_layer_.capture_features(x) as hook:
            f = network.shaped_outputs(x)
        self.last_layer_.check(x, f, hook)
        return to_algebra_dtype(hook.features), to_algebra_dtype(f.flatten(1))

    def _offset(self, features: Tensor, f: Tensor) -> Tensor:
        """Return the part of the outputs (M, C) that does not depend on θ: 0, or a frozen bias."""
        matrix = to_algebra_dtype(self.last_layer_.to_matrix(self.last_layer_.network.theta))
        return torch.zeros_like(f) if self.last_layer_.layer.bias is not None else f - features @ matrix.T

    def _get_fit_state(self) -> Learned:
        learned = {"last_layer": self.last_layer_.description(), "bound": self.bound_, "n_iter": self.n_iter_}
        return {"mean": self.posterior_.mean, "precision": self.posterior_.precision}, learned

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        self.last_layer_ = LastLayer.from_description(objective.network, learned["last_layer"])
        self.posterior_ = LastLayerGaussian(tensors["mean"], tensors["precision"])
        self.bound_, self.n_iter_ = learned["bound"], learned["n_iter"]

    def _mean(self, x: PyTree) -> Tensor:
        features, f = self._features_and_outputs(x)
        mean = features @ self.posterior_.mean.T + self._offset(features, f)
        return self._to_output_dtype(mean)

    def _variance(self, x: PyTree) -> Tensor:
        return self.posterior_.variance(self._features_and_outputs(x)[0])

    def _covariance(self, x: PyTree) -> Tensor:
        return torch.diag_embed(self._variance(x))  # independent outputs

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        slopes = ComposedNetwork(self.network_, of).function_jacobian(x, at=self._mean(x).flatten(1))
        return variance_by_covariance(slopes, self._covariance(x))

    def _joint_covariance(self, x: PyTree, f: Tensor) -> Tensor:  # noqa: ARG002
        blocks = self.posterior_.between_rows(self._features_and_outputs(x)[0])  # (C, M, M)
        return torch.diag_embed(blocks.permute(1, 2, 0)).permute(0, 2, 1, 3)

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        features, f = self._features_and_outputs(x)
        weights = self.posterior_.mean + self.posterior_.noise(n_samples, generator)
        return torch.einsum("sce,me->smc", weights, features) + self._offset(features, f)

    def _weight_displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        weights = self.posterior_.mean + self.posterior_.noise(n_samples, generator)
        return self.last_layer_.to_theta(weights) - to_algebra_dtype(self.theta_)


def _check_proper(precision: Tensor) -> None:
    """Raise OptionError for an improper prior."""
    if not bool((precision > 0).all()):
        raise OptionError(
            "prior_precision > 0 for every weight of the last layer",
            received=f"{int((precision == 0).sum())} weights with δ = 0",
            remedy="a small positive δ for them.",
        )
