"""Multi-head ensemble: one body, several last layers, each of a resampled training set and a prior draw of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from estimators.baselines.members import MembersEstimator
from estimators.baselines.stacked_minimum import Whitening, stacked_minimum
from estimators.curvature.last_layer.features import LastLayer
from estimators.estimator.fit_report import PassReport
from estimators.likelihoods import Likelihood
from estimators.models.last_linear import last_linear_names
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import checked_integer, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.memory import rows_per_chunk

__all__ = ["MultiHeadEnsemble"]

_COPIES = 6  # of all outputs, that a loss and its slope hold at a time


class MultiHeadEnsemble(MembersEstimator):
    """S last linear layers on one body: the bootstrap with shared features of Osband et al. (2016), with prior draws.

        W_s = argmin_W Σₙ wₛₙ (−log p(yₙ | W φₙ)) + ½ Σ δ (W − a_s)²,   a_s ~ N(θ₀, 1/δ),   w_s ~ Multinomial(N, 1/N)

    φₙ are the features of the trained network, which stays as it is (Lee et al. 2015 train the trunk too). Given them
    the loss of a head is convex, so that other initialisations alone would all end in one: what sets the heads apart
    are the weights w of the rows, which stand for the noise of the data, and the anchors a, which stand for the prior
    (Osband et al. 2018; Pearce et al. 2020). All are minimised together, from the trained layer, by full-batch L-BFGS
    in float64 where the device has it; the body's features are computed once. Stored are the heads.

    Args:
        n_heads: S >= 2.
        max_iter: iterations of L-BFGS at most. They end where the slope of every head, whitened by the curvature at the
            trained layer, is below 1e-6 of that at the start (1e-3 where there is no float64).
        seed: of weights and anchors.

    Fitted: `heads_` (S, C, E), a bias last; `fit_report_`, which has the passes for features, not those of the heads.
    Warns: NotConvergedWarning where a head is not at its minimum after `max_iter` iterations.
    Errors: ModelError where the network does not end in a linear layer that is trained and its own.
    """

    retrains = True

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: float | Mapping[str, float] = 1.0,
        prior_mean: float = 0.0,
        n_heads: int = 20,
        max_iter: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            subset_of_weights="last_layer",
        )
        self.n_heads, self.seed = checked_integer("n_heads", n_heads, at_least=2), checked_seed(seed)
        self.max_iter = checked_integer("max_iter", max_iter, at_least=1)

    def _parameter_names(self, train_loader: Iterable[Any]) -> list[str]:
        return last_linear_names(self.model, self._first_inputs(train_loader))

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        self.head_ = LastLayer.of(objective.network, next(iter(objective.batches)).x)
        generator = torch.Generator().manual_seed(self.seed)
        wide = algebra_dtype(objective.theta.device)
        anchors = self._anchors(objective, generator).to(wide)
        batches = self._weighted_features(objective, generator)
        delta = self.head_.to_matrix(objective.prior.precision).to(wide)
        trained = self.head_.to_matrix(objective.theta).to(wide)

        def loss_and_slope(heads: Tensor) -> tuple[Tensor, Tensor]:
            deviations = heads - anchors
            loss, slope = 0.5 * (delta * deviations.square()).sum(), delta * deviations
            for batch in batches:
                data, data_slope = self._data_part(heads, batch)
                loss, slope = loss + data, slope + data_slope
            return loss, slope

        heads = stacked_minimum(
            loss_and_slope,
            trained.expand_as(anchors),
            lambda heads: self._whitening(heads, delta, batches),
            max_iter=self.max_iter,
            progress_bar=progress_bar,
        )
        self.heads_ = heads.to(objective.theta.dtype)
        self.fit_report_ = PassReport.of(objective)

    def _anchors(self, objective: Objective, generator: torch.Generator) -> Tensor:
        """a (S, C, E), draws from the prior; its mean where the prior is flat. The same on every device."""
        delta, mean = objective.prior.precision, objective.prior.mean
        z = torch.randn(self.n_heads, len(delta), generator=generator, dtype=delta.dtype).to(delta.device)
        return self.head_.to_matrix(mean + torch.where(delta > 0, z / delta.sqrt(), 0.0))

    def _weighted_features(self, objective: Objective, generator: torch.Generator) -> list[_Rows]:
        """Batch by batch, in parts for which the outputs of all heads are small."""
        n, like = objective.batches.n_data, objective.theta
        drawn = torch.randint(n, (self.n_heads, n), generator=generator)
        counts = torch.stack([row.bincount(minlength=n) for row in drawn], dim=1).to(like)
        found, start = [], 0
        for batch in objective.batches:
            features, weights = self._features(batch.x), counts[start : start + len(batch)]
            outputs_a_row = features[0].numel() // features.shape[-1] * self.head_.n_outputs
            size = rows_per_chunk(_COPIES * self.n_heads * outputs_a_row * 8)
            parts = zip(features.split(size), weights.split(size), batch.y.split(size), strict=True)
            found += [_Rows(*part) for part in parts]
            start += len(batch)
        return found

    def _whitening(self, heads: Tensor, delta: Tensor, batches: list[_Rows]) -> Whitening:
        """Of Σ w λ φφᵀ, λ the mean of Λ_cc over c at the outputs of each head, and of Σ w Λ_cc relative to its mean."""
        s, c, e = heads.shape
        gram, curvature = heads.new_zeros(s, e, e), heads.new_zeros(s, c)
        for batch in batches:
            features = batch.features.to(heads.dtype)
            outputs, repeated = _apply(heads, features).flatten(0, 1).flatten(1), _repeated(batch.y, s)
            lam = self.likelihood.given(repeated).hessian_diagonal(outputs).reshape(s, len(features), -1, c)
            lam = (lam * batch.weights.T[..., None, None]).flatten(1, 2)
            places = features.flatten(0, -2)
            gram += torch.stack([(places.T * row) @ places for row in lam.mean(-1)])
            curvature += lam.sum(1)
        curvature = curvature.clamp_min(torch.finfo(curvature.dtype).tiny)  # 0 where a head is sure of every row
        return Whitening.of(gram, curvature / curvature.mean(-1, keepdim=True), delta[0])

    def _data_part(self, heads: Tensor, batch: _Rows) -> tuple[Tensor, Tensor]:
        """Σ over heads and rows of w · −log p, and its slope (S, C, E)."""
        heads = heads.detach().requires_grad_()
        with torch.enable_grad():
            outputs = _apply(heads, batch.features.to(heads.dtype)).flatten(0, 1).flatten(1)
            losses = self.likelihood.nll(outputs, _repeated(batch.y, len(heads))).unflatten(0, (len(heads), -1))
            loss = (batch.weights.T * losses).sum()
            (slope,) = torch.autograd.grad(loss, heads)
        return loss.detach(), slope

    def _features(self, x: PyTree) -> Tensor:
        with self.head_.capture_features() as heard:
            self.head_.network.outputs(x)
        return heard.at_positions

    def _get_fit_state(self) -> Learned:
        return {"heads": self.heads_}, {**super()._get_fit_state()[1], "head": self.head_.description()}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        super()._set_fit_state(objective, tensors, learned)
        self.head_, self.heads_ = LastLayer.described(objective.network, learned["head"]), tensors["heads"]

    def _members(self, x: PyTree) -> Tensor:
        return _apply(self.heads_, self._features(x)).flatten(2)


@dataclass(frozen=True)
class _Rows:
    """Features (B, ..., E), how often each head has each row (B, S), and targets."""

    features: Tensor
    weights: Tensor
    y: Tensor


def _apply(heads: Tensor, features: Tensor) -> Tensor:
    """W φ: (S, C, E) and (B, ..., E) -> (S, B, ..., C)."""
    return torch.einsum("sce,b...e->sb...c", heads, features)


def _repeated(y: Tensor, n: int) -> Tensor:
    """Targets of rows (B, ...) for n heads, (n·B, ...)."""
    return y.repeat(n, *[1] * (y.ndim - 1))
