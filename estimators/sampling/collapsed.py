"""The posterior with the last layer integrated out, for a Gaussian likelihood and a linear last layer.

Given the other weights R, the network is a linear regression on its features φ (N, E), for each output c

    y_c = Φ w_c + noise,   w_c ~ N(m_c, D_c⁻¹)     A_c = ΦᵀΦ/σ_c² + D_c,   b_c = Φᵀy_c/σ_c² + D_c m_c,   v_c = A_c⁻¹ b_c
    −log p(y_c | R) = ½ [‖y_c‖²/σ_c² + m_cᵀD_c m_c − b_cᵀv_c + log det A_c − log det D_c + N log 2πσ_c²]

The sampler moves in R alone; the last layer given R is N(v_c, A_c⁻¹), in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import vmap

from estimators.curvature.last_layer.features import LastLayer
from estimators.data.batch import Batch
from estimators.errors import NoLastLayerError, OptionError, UnsupportedError
from estimators.likelihoods import Gaussian
from estimators.models.kernels import differentiable
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.sampling.potential import Potential

__all__ = ["CollapsedPotential", "Conditional", "features_at", "find_collapsible_layer", "frozen_bias"]

_CHUNK_ELEMENTS = 2**22
"""Numbers in the features of all training rows for the draws of one vectorised call: 32 MiB in float64."""


@dataclass(frozen=True)
class Conditional:
    """The last layer given the other weights, for S draws of these.

    Args:
        mean: v, (S, C, E).
        factor: Cholesky factors of A, (S, C, E, E), or (S, 1, E, E) if all outputs have the same.
    """

    mean: Tensor
    factor: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return a draw of the layer for each draw of the other weights, (S, C, E)."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float64).to(self.mean)
        factor = self.factor.expand(*self.mean.shape, self.mean.shape[-1])
        spread: Tensor = torch.linalg.solve_triangular(factor.mT, noise[..., None], upper=True)[..., 0]
        return self.mean + spread

    def whitened(self, features: Tensor) -> Tensor:
        """Return L⁻¹φ for features (S, M, E): (S, C or 1, E, M); its squared norm over E is the variance φᵀA⁻¹φ."""
        columns = features.mT[:, None].expand(-1, self.factor.shape[1], -1, -1)
        whitened: Tensor = torch.linalg.solve_triangular(self.factor, columns, upper=False)
        return whitened

    def means(self, features: Tensor) -> Tensor:
        """Return the mean of f given the other weights, without a frozen bias, (S, M, C)."""
        return torch.einsum("sme,sce->smc", features, self.mean)


@dataclass
class CollapsedPotential(Potential):
    """U(z) = −log p(y | R) − log p(R) over the weights R outside the last layer.

    Args:
        objective: L, in the dtype of the sampling.
        batches: all training rows.
        layer: the last layer.
    """

    objective: Objective
    batches: list[Batch]
    layer: LastLayer

    def __post_init__(self) -> None:
        prior, likelihood = self.objective.prior, cast(Gaussian, self.objective.likelihood)
        c = self.layer.n_outputs
        self.rest = (~self.layer.mask).nonzero().squeeze(1)
        self.n_dims = len(self.rest)
        self._prior_mean = self.layer.to_matrix(prior.mean)  # m
        self._prior_precision = self.layer.to_matrix(prior.precision)  # D
        sigma = torch.as_tensor(likelihood.sigma_noise, dtype=prior.mean.dtype, device=prior.mean.device)
        self._noise = sigma.square().expand(c)  # σ² (C,)
        same = bool((self._noise == self._noise[0]).all() & (self._prior_precision == self._prior_precision[:1]).all())
        self._n_factors = 1 if same else c
        y = torch.cat([batch.y.flatten(1) for batch in self.batches])
        self._targets = y - self.offset
        self._prior_pull = self._prior_precision * self._prior_mean  # D m
        constant = (self._targets.square() / self._noise).sum() + (self._prior_pull * self._prior_mean).sum()
        constant = constant - self._prior_precision.log().sum() + len(y) * self._noise.log().sum()
        self._constant = 0.5 * (constant + y.numel() * math.log(2 * math.pi))

    @property
    def offset(self) -> Tensor:
        """The bias of the layer if it is no parameter, (C,), else 0."""
        return frozen_bias(self.layer, self._prior_mean)

    def energy(self, z: Tensor) -> Tensor:
        features = self._features(self._network_weights(z))
        fixed = features.detach()
        mean, factor = self._solved(fixed)  # v, and the Cholesky factors of A
        right = self._right(fixed)  # b
        copies = self.layer.n_outputs / self._n_factors
        log_det = 2 * copies * factor.diagonal(dim1=-2, dim2=-1).log().sum()
        value = 0.5 * (log_det - (right * mean).sum() + z.detach().square().sum()) + self._constant
        # ∂U/∂Φ = Σ_c [Φ(A_c⁻¹ + v_c v_cᵀ) − y_c v_cᵀ]/σ_c², since v_c minimises the quadratic form: no factorisation is
        # differentiated. The features enter linearly with this slope, and the value is replaced by that of U.
        second = torch.cholesky_inverse(factor) + mean[:, :, None] * mean[:, None]
        slope = fixed @ (second / self._noise[:, None, None]).sum(0) - (self._targets / self._noise) @ mean
        tangent = (features * slope).sum() + 0.5 * z.square().sum()
        return value + (tangent - tangent.detach())

    def conditional(self, z: Tensor) -> Conditional:
        """Return the last layer given coordinates z (S, D) of the other weights."""
        size = max(1, _CHUNK_ELEMENTS // (len(self._targets) * self.layer.n_features))

        def one(z: Tensor) -> tuple[Tensor, Tensor]:
            return self._solved(self._features(self._network_weights(z)))

        with torch.no_grad(), differentiable():
            mean, factor = vmap(one, chunk_size=size)(z)
        return Conditional(mean, factor)

    def joined(self, z: Tensor, conditional: Conditional, generator: torch.Generator) -> Tensor:
        """Return θ (S, P) of coordinates z (S, D), with the last layer drawn from its conditional distribution."""
        theta = self.layer.to_theta(conditional.sample(generator))
        theta[:, self.rest] = self._rest_weights(z)
        return theta

    def _solved(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return v (C, E) and the Cholesky factors of A (C or 1, E, E) at features Φ (N, E)."""
        n = self._n_factors
        gram = features.mT @ features
        precision = gram / self._noise[:n, None, None] + torch.diag_embed(self._prior_precision[:n])  # A
        factor = torch.linalg.cholesky(precision)
        factors = factor.expand(self.layer.n_outputs, *factor.shape[1:])
        return torch.cholesky_solve(self._right(features)[..., None], factors)[..., 0], factor

    def _right(self, features: Tensor) -> Tensor:
        """Return b (C, E) at features Φ (N, E)."""
        return (features.mT @ self._targets).mT / self._noise[:, None] + self._prior_pull

    def _features(self, theta: Tensor) -> Tensor:
        """Return φ (N, E) at weights θ (P,), of which those of the last layer do not matter."""
        return torch.cat([features_at(self.layer, theta, batch.x)[1] for batch in self.batches])

    def _network_weights(self, z: Tensor) -> Tensor:
        """Return θ (P,) with the coordinates z (D,), and the prior mean in the last layer."""
        return self.objective.prior.mean.index_copy(0, self.rest, self._rest_weights(z))

    def _rest_weights(self, z: Tensor) -> Tensor:
        prior = self.objective.prior
        return prior.mean[self.rest] + z * prior.precision[self.rest].rsqrt()


def features_at(layer: LastLayer, theta: Tensor, x: PyTree) -> tuple[Tensor, Tensor]:
    """Return outputs f (B, C) and features φ (B, E) of B rows at weights θ (P,), both differentiable in θ."""
    with layer.capture_features(x) as hook:
        f = layer.network(theta, x)
    return f, hook.with_graph


def frozen_bias(layer: LastLayer, like: Tensor) -> Tensor:
    """Return the bias of the layer if it is no parameter, (C,), else zeros."""
    linear = layer.network.module.get_submodule(layer.layer.name)
    assert isinstance(linear, nn.Linear)
    if layer.layer.bias is None and linear.bias is not None:
        return linear.bias.detach().to(like)
    return like.new_zeros(layer.n_outputs)


def find_collapsible_layer(objective: Objective, batches: list[Batch], collapse: str | None) -> LastLayer | None:
    """Return the last layer that can be integrated out, or None.

    Args:
        objective: L.
        batches: all training rows, at which the layer is checked.
        collapse: "auto", "last_layer" or None.

    Raises:
        OptionError: "last_layer" is requested, and there is no such layer, or the likelihood is not Gaussian.
    """
    if collapse is None:
        return None
    try:
        return _checked_layer(objective, batches)
    except (NoLastLayerError, UnsupportedError) as error:
        if collapse == "auto":
            return None
        raise OptionError(
            f'{error.expected}, for collapse="last_layer"', received=error.received, remedy='collapse="auto".'
        ) from error


def _checked_layer(objective: Objective, batches: list[Batch]) -> LastLayer:
    if not isinstance(objective.likelihood, Gaussian):
        raise UnsupportedError("a Gaussian likelihood", received=repr(objective.likelihood), remedy="collapse=None.")
    layer = LastLayer.of(objective.network, batches[0].x)
    chosen = set(objective.network.subset.shapes)
    if not set(layer.layer.parameter_names) <= chosen:
        raise UnsupportedError(
            "a last layer among the chosen weights", received=f"weights {sorted(chosen)}", remedy="collapse=None."
        )
    if set(layer.layer.parameter_names) == chosen:
        raise UnsupportedError("weights outside the last layer", received="none", remedy="collapse=None.")
    for batch in batches:
        layer.features(batch.x)
    return layer
