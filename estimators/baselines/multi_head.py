"""Multi-head ensemble: several last layers on one trained body, each with its own bootstrap and prior sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from estimators.baselines.stacked_minimum import Whitening, stacked_minimum
from estimators.curvature.last_layer.features import LastLayer
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.members import MembersEstimator
from estimators.estimator.options import PriorOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.models.last_linear import last_linear_names
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import checked_integer, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.memory import rows_per_chunk

__all__ = ["MultiHeadEnsemble"]

_OUTPUT_COPIES = 6
"""Copies of all outputs that a loss and its gradient hold at a time."""


class MultiHeadEnsemble(MembersEstimator):
    """S last linear layers on one body: the bootstrap with shared features of Osband et al. (2016), with prior samples.

        W_s = argmin_W Σₙ wₛₙ (−log p(yₙ | W φₙ)) + ½ Σ δ (W − a_s)²,   a_s ~ N(θ₀, 1/δ),   w_s ~ Multinomial(N, 1/N)

    φₙ are the features of the trained network, which does not change (Lee et al. 2015 train the body too). Given the
    features, the loss of a head is convex, so that different initialisations would all end at one minimum. The heads
    differ by the bootstrap weights w, which represent the noise of the data, and by the anchors a, which represent the
    prior (Osband et al. 2018; Pearce et al. 2020). Full-batch L-BFGS minimises all heads together from the trained
    layer, in float64 if the device supports it. The features are computed once.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        n_heads: the number S >= 2 of heads.
        max_iter: the maximum number of L-BFGS iterations. They end if the gradient of every head, whitened by the
            curvature at the trained layer, is below 1e-6 of that at the start (1e-3 without float64).
        seed: the seed of bootstrap weights and anchors.

    Attributes:
        heads_: (S, C, E), the bias last.
        last_layer_: the trained last layer and its features.
        fit_report_: the passes for the features; those of the heads are not counted.

    Raises:
        OptionError: for an invalid option. `fit` raises ModelError if the network does not end in a trained linear
            layer with its own weights.

    Warns:
        NotConvergedWarning: in `fit`, if a head is not at its minimum after `max_iter` iterations.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> ensemble = MultiHeadEnsemble(model, "regression", n_heads=3)
        >>> ensemble.fit([(torch.randn(20, 3), torch.randn(20, 2))]).member_outputs(torch.randn(4, 3)).shape
        torch.Size([3, 4, 2])
    """

    retrains = True

    @inherits_options(UncertaintyEstimator, PriorOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        n_heads: int = 20,
        max_iter: int = 500,
        seed: int = 0,
        **prior: Unpack[PriorOptions],
    ) -> None:
        super().__init__(model, likelihood, subset_of_weights="last_layer", **prior)
        self.n_heads, self.seed = checked_integer("n_heads", n_heads, at_least=2), checked_seed(seed)
        self.max_iter = checked_integer("max_iter", max_iter, at_least=1)

    def _parameter_names(self, train_loader: Iterable[Any]) -> list[str]:
        return last_linear_names(self.model, self._first_inputs(train_loader))

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        self.last_layer_ = LastLayer.of(objective.network, next(iter(objective.batches)).x)
        generator = torch.Generator().manual_seed(self.seed)
        dtype = algebra_dtype(objective.theta.device)
        anchors = self._anchors(objective, generator).to(dtype)
        batches = self._weighted_features(objective, generator)
        delta = self.last_layer_.to_matrix(objective.prior.precision).to(dtype)
        trained = self.last_layer_.to_matrix(objective.theta).to(dtype)

        def loss_and_gradient(heads: Tensor) -> tuple[Tensor, Tensor]:
            deviations = heads - anchors
            loss, gradient = 0.5 * (delta * deviations.square()).sum(), delta * deviations
            for batch in batches:
                data_loss, data_gradient = self._data_part(heads, batch)
                loss, gradient = loss + data_loss, gradient + data_gradient
            return loss, gradient

        heads = stacked_minimum(
            loss_and_gradient,
            trained.expand_as(anchors),
            lambda heads: self._whitening(heads, delta, batches),
            max_iter=self.max_iter,
            progress_bar=progress_bar,
        )
        self.heads_ = heads.to(objective.theta.dtype)

    def _anchors(self, objective: Objective, generator: torch.Generator) -> Tensor:
        """Return a (S, C, E), samples from the prior, or its mean if δ = 0; the same on every device."""
        delta, mean = objective.prior.precision, objective.prior.mean
        z = torch.randn(self.n_heads, len(delta), generator=generator, dtype=delta.dtype).to(delta.device)
        return self.last_layer_.to_matrix(mean + torch.where(delta > 0, z / delta.sqrt(), 0.0))

    def _weighted_features(self, objective: Objective, generator: torch.Generator) -> list[_Rows]:
        """Return features and bootstrap weights in chunks of rows, so that the outputs of all heads fit into memory."""
        n, like = objective.batches.n_data, objective.theta
        drawn = torch.randint(n, (self.n_heads, n), generator=generator)
        counts = torch.stack([row.bincount(minlength=n) for row in drawn], dim=1).to(like)
        found, start = [], 0
        for batch in objective.batches:
            features, weights = self._features(batch.x), counts[start : start + len(batch)]
            outputs_per_row = features[0].numel() // features.shape[-1] * self.last_layer_.n_outputs
            size = rows_per_chunk(_OUTPUT_COPIES * self.n_heads * outputs_per_row * 8)
            chunks = zip(features.split(size), weights.split(size), batch.y.split(size), strict=True)
            found += [_Rows(*chunk) for chunk in chunks]
            start += len(batch)
        return found

    def _whitening(self, heads: Tensor, delta: Tensor, batches: list[_Rows]) -> Whitening:
        """Return the whitening of each head, with G = Σ w λ φφᵀ, λ = mean_c Λ_cc, and κ_c = Σ w Λ_cc over its mean."""
        s, c, e = heads.shape
        gram, curvature = heads.new_zeros(s, e, e), heads.new_zeros(s, c)
        for batch in batches:
            features = batch.features.to(heads.dtype)
            outputs, repeated = self._head_outputs(heads, features).flatten(0, 1).flatten(1), _repeated(batch.y, s)
            lam = self.likelihood.given(repeated).hessian_diagonal(outputs).reshape(s, len(features), -1, c)
            lam = (lam * batch.weights.T[..., None, None]).flatten(1, 2)
            positions = features.flatten(0, -2)
            gram += torch.stack([(positions.T * row) @ positions for row in lam.mean(-1)])
            curvature += lam.sum(1)
        curvature = curvature.clamp_min(torch.finfo(curvature.dtype).tiny)  # 0 if a head is certain of every row
        return Whitening.of(gram, curvature / curvature.mean(-1, keepdim=True), delta[0])

    def _data_part(self, heads: Tensor, batch: _Rows) -> tuple[Tensor, Tensor]:
        """Return Σ over heads and rows of w · (−log p), and its gradient (S, C, E)."""
        heads = heads.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self._head_outputs(heads, batch.features.to(heads.dtype)).flatten(0, 1).flatten(1)
            losses = self.likelihood.nll(outputs, _repeated(batch.y, len(heads))).unflatten(0, (len(heads), -1))
            loss = (batch.weights.T * losses).sum()
            (gradient,) = torch.autograd.grad(loss, heads)
        return loss.detach(), gradient

    def _head_outputs(self, heads: Tensor, features: Tensor) -> Tensor:
        """Return W φ plus a frozen bias: (S, C, E) and (B, ..., E) to (S, B, ..., C)."""
        return torch.einsum("sce,b...e->sb...c", heads, features) + self.last_layer_.frozen_bias.to(heads.dtype)

    def _features(self, x: PyTree) -> Tensor:
        with self.last_layer_.capture_features(x) as features:
            self.last_layer_.network.outputs(x)
        return features.at_positions

    def _get_fit_state(self) -> Learned:
        return {"heads": self.heads_}, {"last_layer": self.last_layer_.description()}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        self.last_layer_ = LastLayer.from_description(objective.network, learned["last_layer"])
        self.heads_ = tensors["heads"]

    def _members(self, x: PyTree) -> Tensor:
        return self._head_outputs(self.heads_, self._features(x)).flatten(2)


@dataclass(frozen=True)
class _Rows:
    """Features (B, ..., E), how often each head's bootstrap contains each row (B, S), and targets."""

    features: Tensor
    weights: Tensor
    y: Tensor


def _repeated(y: Tensor, n: int) -> Tensor:
    """Repeat targets (B, ...) for n heads, (n·B, ...)."""
    return y.repeat(n, *[1] * (y.ndim - 1))
