"""Multi-head ensemble: one body, several last layers, each of a resampled training set and a prior draw of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from estimators.baselines.members import MembersEstimator, check_at_least
from estimators.baselines.report import PassReport
from estimators.batch import Batch
from estimators.batches import Batches
from estimators.head import Head
from estimators.last_linear import last_linear_names
from estimators.likelihoods import Likelihood
from estimators.objective import Objective
from estimators.pytrees import PyTree
from estimators.recipe import Recipe
from estimators.state import Learned
from estimators.training import fit_weights

__all__ = ["MultiHeadEnsemble"]

_RECIPE = Recipe(epochs=100, batch_size=64, optimizer="adam", lr=1e-2, schedule="cosine")


class MultiHeadEnsemble(MembersEstimator):
    """S last linear layers on one body: the bootstrap with shared features of Osband et al. (2016), with prior draws.

        W_s = argmin_W Σₙ wₛₙ (−log p(yₙ | W φₙ)) + ½ Σ δ (W − a_s)²,   a_s ~ N(θ₀, 1/δ),   w_s ~ Multinomial(N, 1/N)

    φₙ are the features of the trained network, which stays as it is (Lee et al. 2015 train the trunk too). Given them
    the loss of a head is convex, so that other initialisations alone would all end in one: what sets the heads apart
    are the weights w of the rows, which stand for the noise of the data, and the anchors a, which stand for the prior
    (Osband et al. 2018; Pearce et al. 2020). A head starts at its anchor. Stored are the heads.

    Args:
        recipe: how the heads are trained, all at once; no pass through the body, whose features are computed once.
        n_heads: S >= 2.
        seed: of weights, anchors and the order of the rows.

    Fitted: `heads_` (S, C, E), a bias last; `fit_report_`, which has the passes for features, not those of the heads.
    Errors: ModelError where the network does not end in a linear layer that is trained and its own.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: float | Mapping[str, float] = 1.0,
        prior_mean: float = 0.0,
        recipe: Recipe = _RECIPE,
        n_heads: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            subset_of_weights="last_layer",
        )
        check_at_least(2, "n_heads", n_heads)
        self.recipe, self.n_heads, self.seed = recipe, n_heads, seed

    def _names(self, train_loader: Iterable[Any]) -> list[str]:
        return last_linear_names(self.model, self._first_inputs(train_loader))

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        self.head_ = Head.of(objective.network, next(iter(objective.batches)).x)
        generator = torch.Generator().manual_seed(self.seed)
        anchors = self._anchors(objective, generator)
        rows = Batches.unchecked(self._weighted_features(objective, generator), keep=self.recipe.batch_size is not None)
        delta = self.head_.to_matrix(objective.prior.precision)

        def gradient(heads: Tensor, batch: Batch) -> Tensor:
            heads = heads.requires_grad_()
            with torch.enable_grad():
                losses = self._losses(heads, batch.x["features"], batch.y)
                prior = 0.5 * (delta * (heads - anchors).square()).sum()
                loss = (batch.x["weights"].T * losses).sum() + len(batch) / rows.n_data * prior
                (slope,) = torch.autograd.grad(loss, heads)
            return slope

        self.heads_ = fit_weights(
            anchors, gradient, rows, recipe=self.recipe, generator=generator, progress_bar=progress_bar
        )
        self.fit_report_ = PassReport.of(objective)

    def _anchors(self, objective: Objective, generator: torch.Generator) -> Tensor:
        """a (S, C, E), draws from the prior; its mean where the prior is flat. The same on every device."""
        delta, mean = objective.prior.precision, objective.prior.mean
        z = torch.randn(self.n_heads, len(delta), generator=generator, dtype=delta.dtype).to(delta.device)
        return self.head_.to_matrix(mean + torch.where(delta > 0, z / delta.sqrt(), 0.0))

    def _weighted_features(self, objective: Objective, generator: torch.Generator) -> list[tuple[PyTree, Tensor]]:
        """Features (B, ..., E), and how often each head has each row (B, S), batch by batch."""
        n, like = objective.batches.n_data, objective.theta
        drawn = torch.randint(n, (self.n_heads, n), generator=generator)
        counts = torch.stack([row.bincount(minlength=n) for row in drawn], dim=1).to(like)
        found, start = [], 0
        for batch in objective.batches:
            weights = counts[start : start + len(batch)]
            found.append(({"features": self._features(batch.x), "weights": weights}, batch.y))
            start += len(batch)
        return found

    def _losses(self, heads: Tensor, features: Tensor, y: Tensor) -> Tensor:
        """−log p of each row by each head, (S, B)."""
        outputs = _apply(heads, features).flatten(0, 1).flatten(1)
        repeated = y.repeat(len(heads), *[1] * (y.ndim - 1))
        losses: Tensor = self.likelihood.nll(outputs, repeated).unflatten(0, (len(heads), -1))
        return losses

    def _features(self, x: PyTree) -> Tensor:
        with self.head_.listening() as heard:
            self.head_.network.outputs(x)
        return heard.at_places

    def _learned(self) -> Learned:
        return {"heads": self.heads_}, {**super()._learned()[1], "head": self.head_.description()}

    def _restore(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        super()._restore(objective, tensors, learned)
        self.head_, self.heads_ = Head.described(objective.network, learned["head"]), tensors["heads"]

    def _members(self, x: PyTree) -> Tensor:
        return _apply(self.heads_, self._features(x)).flatten(2)


def _apply(heads: Tensor, features: Tensor) -> Tensor:
    """W φ: (S, C, E) and (B, ..., E) -> (S, B, ..., C)."""
    return torch.einsum("sce,b...e->sb...c", heads, features)
