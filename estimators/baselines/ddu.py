"""Deep deterministic uncertainty: the density of the features of the last layer as an out-of-distribution score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from estimators.baselines.map import MAP
from estimators.curvature.last_layer.features import LastLayer
from estimators.errors import DataError, OptionError, UnsupportedError
from estimators.likelihoods import Likelihood
from estimators.numerics.dtype import to_algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import PriorOption, checked_instance, checked_number
from estimators.persistence.state import Learned
from estimators.runtime.memory import check_fits_memory

__all__ = ["DDU", "ClassGaussians"]


@dataclass(frozen=True)
class ClassGaussians:
    """A Gaussian of features for each class, and the share of each class: p(φ) = Σ_k π_k N(φ | μ_k, Σ_k).

    Attributes:
        log_shares: log π, (K,).
        means: μ, (K, D).
        roots: Cholesky factors of Σ, (K, D, D).
    """

    log_shares: Tensor
    means: Tensor
    roots: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, *, shrinkage: float | None, jitter: float) -> ClassGaussians:
        """Fit the Gaussians of the classes that occur.

            Σ_k = (1 − λ_k) S_k + λ_k S + ε tr(S)/D · I,   S = Σ_k π_k S_k,   λ_k = D/(D + n_k) by default

        S_k is the covariance of the n_k rows of class k around their mean, with the divisor n_k.

        Args:
            features: φ (N, D).
            labels: the class of each row, (N,).
            shrinkage: λ, the same for all classes; None for the default.
            jitter: ε.

        Raises:
            DataError: for features that are equal in all rows of each class.
            OptionError: if a covariance is singular.
        """
        _, labels, counts = labels.unique(return_inverse=True, return_counts=True)
        n, d = features.shape
        groups = [features[labels == k] for k in range(len(counts))]
        means = torch.stack([rows.mean(0) for rows in groups])
        within = torch.stack([_second_moment(rows - mean) for rows, mean in zip(groups, means, strict=True)])
        shares = counts.to(features) / n
        pooled = (shares[:, None, None] * within).sum(0)
        scale = float(pooled.diagonal().mean())
        if not scale > torch.finfo(features.dtype).eps ** 1.5 * float(features.square().mean()):  # not round-off alone
            raise DataError(
                "features that vary within a class",
                received=f"{n} rows with the same features in each of {len(counts)} classes",
                remedy="more rows per class, or a network whose last hidden layer is not saturated.",
            )
        weight = d / (d + counts.to(features)) if shrinkage is None else torch.full_like(shares, shrinkage)
        covariance = torch.lerp(within, pooled.expand_as(within), weight[:, None, None])
        covariance.diagonal(dim1=1, dim2=2).add_(jitter * scale)
        roots, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed.any()):
            raise OptionError(
                f"a jitter above {jitter:g} or a larger shrinkage: positive definite covariances of {d} features",
                received=f"{int((failed > 0).sum())} of {len(counts)} classes with a singular one, the smallest of "
                f"{int(counts.min())} rows",
                remedy="jitter=1e-6 and shrinkage=None, the defaults.",
            )
        return cls(shares.log(), means, roots)

    def log_density(self, features: Tensor) -> Tensor:
        """Return log p(φ), (M,), for features (M, D)."""
        logs = []
        for log_share, mean, root in zip(self.log_shares, self.means, self.roots, strict=True):
            whitened = torch.linalg.solve_triangular(root, (features - mean).T, upper=False)
            normaliser = root.diagonal().log().sum() + 0.5 * len(mean) * math.log(2 * math.pi)
            logs.append(log_share - normaliser - 0.5 * whitened.square().sum(0))
        return torch.stack(logs).logsumexp(0)


class DDU(MAP):
    """Deep deterministic uncertainty (Mukhoti et al. 2021): the trained network, and a density of its features.

        score(x) = −log p(φ(x)),   p(φ) = Σ_k π_k N(φ | μ_k, Σ_k)

    φ are the inputs of the last linear layer, and k runs over the classes of the training rows (Gaussian discriminant
    analysis). A binary network has a class for each combination of labels that occurs, and regression a single one. A
    high score says that a row is far from the training rows in feature space. The prediction is that of the network,
    without epistemic variance.

    The paper trains the network with residual connections and spectral normalisation, without which distances between
    inputs may vanish in the features; here the network is taken as it is. The paper's covariances are those of each
    class with a jitter, `shrinkage=0`. By default they are shrunk to the pooled covariance, by D/(D + n) for D features
    and n rows of a class, since a class with fewer rows than features has a singular covariance.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: stored only: neither the density nor the prediction depends on it.
        last_layer_name: the name of the last linear layer. None: found by running the network.
        shrinkage: the share of the pooled covariance in that of each class, between 0 and 1. None: D/(D + n).
        jitter: added to the diagonal of each covariance, as a share of the mean pooled variance of a feature.

    Attributes:
        density_: the Gaussians of the classes.
        last_layer_: the last layer, whose inputs are the features.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option; `fit` raises it for a singular covariance. `fit` raises NoLastLayerError if
            the network does not end in a linear layer, UnsupportedError if the layer is used at several positions of a
            row or labels are soft, and DataError for features without variance.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> ddu = DDU(model, "classification").fit([(torch.randn(20, 3), torch.randint(0, 2, (20,)))])
        >>> ddu.score(torch.randn(4, 3)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: PriorOption = 1.0,
        last_layer_name: str | None = None,
        shrinkage: float | None = None,
        jitter: float = 1e-6,
    ) -> None:
        super().__init__(model, likelihood, prior_precision=prior_precision)
        if last_layer_name is not None:
            checked_instance("last_layer_name", last_layer_name, str, remedy="the name of a layer, or None.")
        self.last_layer_name = last_layer_name
        self.shrinkage = checked_number("shrinkage", shrinkage, at_least=0, at_most=1, words=(None,), remedy="None.")
        self.jitter = checked_number("jitter", jitter, at_least=0, remedy="1e-6.")

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        first = next(iter(objective.batches))
        self.last_layer_ = LastLayer.of(objective.network, first.x, name=self.last_layer_name)
        layer, n = self.last_layer_, objective.batches.n_data
        binary = min(n, 2 ** min(layer.n_outputs, 62))  # combinations of labels
        classes = {"regression": 1, "binary": binary}.get(objective.likelihood.kind, layer.n_outputs)
        check_fits_memory(
            f"the features of {n} rows, and covariances of {layer.n_features} features",
            8 * (2 * n * layer.n_features + 4 * classes * layer.n_features**2),
            device=objective.theta.device,
            remedy="fewer rows, or LastLayerLaplace.",
        )
        parts = [(self._features(batch.x), self._classes(batch.y)) for batch in objective.batches]
        features, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if labels.ndim == 2:
            labels = labels.unique(dim=0, return_inverse=True)[1]
        self.density_ = ClassGaussians.of(features, labels, shrinkage=self.shrinkage, jitter=self.jitter)

    def _features(self, x: PyTree) -> Tensor:
        """Return φ (M, D), without the 1 of a bias, in float64."""
        features = self.last_layer_.features(x)
        bias = self.last_layer_.layer.bias is not None
        return to_algebra_dtype(features[:, :-1] if bias else features)

    def _classes(self, y: Tensor) -> Tensor:
        """Return class indices (B,), or labels (B, C) of binary outputs; the same class for all rows in regression."""
        if self.likelihood.kind == "regression":
            return torch.zeros(len(y), dtype=torch.long, device=y.device)
        labels = y.long()
        hard = bool(((labels == y) & (labels >= 0)).all())
        if not hard or labels.ndim != 1 + (self.likelihood.kind == "binary") or self._without_label(y):
            raise UnsupportedError(
                "hard labels, one class or a vector of binary labels per row, for the densities of classes",
                received=f"targets of dtype {y.dtype} and shape {tuple(y.shape)}, the smallest {float(y.min()):g}, "
                f"with {self.likelihood!r}",
                remedy="hard labels, and no rows without a label.",
            )
        return labels

    def _without_label(self, y: Tensor) -> bool:
        """Whether some rows of y (B,) have the label of rows without one."""
        return self.likelihood.given(y) is not self.likelihood

    def _score(self, x: PyTree) -> Tensor:
        return -self.density_.log_density(self._features(x))

    def _get_fit_state(self) -> Learned:
        density = self.density_
        tensors = {"log_shares": density.log_shares, "means": density.means, "roots": density.roots}
        return tensors, {"last_layer": self.last_layer_.description()}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        self.last_layer_ = LastLayer.from_description(objective.network, learned["last_layer"])
        self.density_ = ClassGaussians(tensors["log_shares"], tensors["means"], tensors["roots"])


def _second_moment(deviations: Tensor) -> Tensor:
    """Return the mean of r rᵀ over rows r, (D, D)."""
    return deviations.T @ deviations / len(deviations)
