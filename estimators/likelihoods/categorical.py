"""Softmax classes: one prediction per row, or one at each of several positions of a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from estimators.errors import DataError, OptionError
from estimators.likelihoods.base import Likelihood, Uniform
from estimators.likelihoods.prediction import Prediction, from_logits, from_samples
from estimators.option_checks import checked_integer, shown

__all__ = ["Categorical", "Sites"]


class Categorical(Likelihood):
    """Softmax cross-entropy on logits f (B, C), y (B,) class indices; or on several class predictions per row.

    −log p = logsumexp f − f_y;  with p = softmax f:  Λ = diag(p) − p pᵀ,  S = diag(√p) − p √pᵀ.
    y (B, C) of floating-point numbers are soft targets, the probabilities of the classes: −Σ_c y_c log p_c, the same Λ.

    Args:
        class_dim: -1 for logits (B, ..., C), as of token classifiers; 1 for (B, C, ...), as of segmentation networks.
            Targets have the shape without it.
        ignore_index: label of positions without a target: padding, void pixels, or a whole row. Such a row counts in N,
            but has no loss and no curvature.

    Raises:
        OptionError: class_dim is not -1 or 1, or ignore_index is not a whole number.

    Example:
        >>> Categorical().nll(torch.zeros(3, 2), torch.tensor([0, 1, -100]))
        tensor([0.6931, 0.6931, 0.0000])
    """

    kind = "classification"

    def __init__(self, class_dim: int = -1, ignore_index: int = -100) -> None:
        self.class_dim = checked_integer("class_dim", class_dim, remedy="1 for logits (B, C, H, W).")
        if self.class_dim not in (-1, 1):
            raise OptionError("class_dim -1 or 1", received=shown(class_dim), remedy="1 for logits (B, C, H, W).")
        self.ignore_index = checked_integer("ignore_index", ignore_index, remedy="-100.")

    def __repr__(self) -> str:
        special = {"class_dim": -1, "ignore_index": -100}
        listed = [f"{name}={getattr(self, name)}" for name, usual in special.items() if getattr(self, name) != usual]
        return f"{type(self).__name__}({', '.join(listed)})"

    def given(self, y: Tensor) -> Likelihood:
        if y.is_floating_point() or (y.ndim == 1 and not bool((y == self.ignore_index).any())):
            return self
        return Sites(y.reshape(len(y), -1), classes_first=self.class_dim == 1, ignored=self.ignore_index)

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point():
            return -(y.to(f.dtype) * f.log_softmax(-1)).sum(-1)
        if y.ndim == 1:
            return F.cross_entropy(f, y.long(), reduction="none", ignore_index=self.ignore_index)
        return self.given(y).nll(f, y)

    def expected_nll(self, f: Tensor, f_ref: Tensor) -> Tensor:
        return -(f_ref.softmax(-1) * f.log_softmax(-1)).sum(-1)

    def root_product(self, f: Tensor, v: Tensor) -> Tensor:
        p = f.softmax(-1)
        root = p.sqrt()
        return root * v - p * (root * v).sum(-1, keepdim=True)

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        p = f.softmax(-1)
        return p * v - p * (p * v).sum(-1, keepdim=True)

    def hessian_diagonal(self, f: Tensor) -> Tensor:
        p = f.softmax(-1)
        return p * (1 - p)

    def hessian_sum(self, f: Tensor) -> Tensor:
        p = f.softmax(-1)
        total: Tensor = p.sum(0).diag() - p.T @ p
        return total

    def sample_labels(self, f: Tensor, uniform: Uniform) -> Tensor:
        return _sampled_classes(f, uniform(1)[..., 0])

    def check_targets(self, f: Tensor, y: Tensor) -> None:
        if y.is_floating_point() and y.shape == f.shape and f.ndim == 2:
            _check_probabilities(y)
            return
        if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
            raise DataError(
                "integer class indices, or probabilities of the classes for outputs (B, C), of their shape",
                received=f"targets of dtype {y.dtype} and shape {tuple(y.shape)}",
                remedy='y.long() for indices, y.argmax(-1) for one-hot rows, or likelihood="regression"/"binary".',
            )
        classes = f.movedim(self.class_dim, -1)
        if y.shape != classes.shape[:-1]:
            raise DataError(
                f"class indices of shape {tuple(classes.shape[:-1])} for outputs of shape {tuple(f.shape)}",
                received=f"shape {tuple(y.shape)}",
                remedy="one index per row: y.squeeze(-1), or y.argmax(-1) for one-hot rows; "
                "Categorical(class_dim=1) for outputs (B, C, H, W).",
            )
        self._check_range(y[y != self.ignore_index], classes.shape[-1])

    def _check_range(self, y: Tensor, n_classes: int) -> None:
        if y.numel() and (int(y.max()) >= n_classes or int(y.min()) < 0):
            raise DataError(
                f"class indices in 0..{n_classes - 1}, the network having {n_classes} classes",
                received=f"indices from {int(y.min())} to {int(y.max())}",
                remedy="renumber the classes from 0, or give the network one output per class.",
            )

    def predict(self, mean: Tensor, variance: Tensor, samples: Tensor | None) -> Prediction:
        if samples is not None:
            return from_samples(mean, variance, samples, kind=self.kind, class_dim=self.class_dim)
        return from_logits(mean, variance, kind=self.kind, class_dim=self.class_dim)


def _sampled_classes(logits: Tensor, u: Tensor) -> Tensor:
    """Return classes (...) with the probabilities softmax(logits) (..., C), by uniform numbers u (...)."""
    below = logits.softmax(-1).cumsum(-1)
    u = u * below[..., -1]  # the sum of all probabilities, 1 up to round-off
    classes = torch.searchsorted(below, u[..., None], right=True)[..., 0]
    return classes.clamp(max=logits.shape[-1] - 1)


def _check_probabilities(y: Tensor) -> None:
    """Raise DataError unless soft targets are >= 0 and sum to 1 per row, within the precision of their dtype."""
    total, least = y.sum(-1), float(y.min()) if y.numel() else 0.0
    if least < 0 or bool(((total - 1).abs() > max(1e-4, 8 * torch.finfo(y.dtype).eps)).any()):
        raise DataError(
            "soft targets that are probabilities: not negative, with the sum 1 over the classes",
            received=f"rows with sums from {float(total.min()):.6g} to {float(total.max()):.6g}, smallest {least:.6g}",
            remedy='y.softmax(-1) for logits, y / y.sum(-1, keepdim=True) for counts, or likelihood="binary" for '
            "several labels per row.",
        )


class Sites(Likelihood):
    """A categorical likelihood at each of S positions (sites) per row, for rows whose labels (B, S) are known.

    Outputs are flat, (..., B, S·C), classes last or first. Λ has one block (C, C) per site. It is 0 at ignored sites,
    which therefore contribute to no loss, no curvature and no noise.
    """

    kind = "classification"

    def __init__(self, labels: Tensor, *, classes_first: bool, ignored: int) -> None:
        self.labels, self.classes_first = labels, classes_first
        self.kept = labels != ignored
        self.site = Categorical()

    def nll(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        log_p = self.by_site(f).log_softmax(-1)
        chosen = torch.where(self.kept, self.labels, 0).long()[..., None]
        return -(self.kept * log_p.gather(-1, chosen)[..., 0]).sum(-1)

    def expected_nll(self, f: Tensor, f_ref: Tensor) -> Tensor:
        return (self.kept * self.site.expected_nll(self.by_site(f), self.by_site(f_ref))).sum(-1)

    def root_product(self, f: Tensor, v: Tensor) -> Tensor:
        return self._flat(self.site.root_product(self.by_site(f), self.by_site(v)))

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        return self._flat(self.site.hessian_product(self.by_site(f), self.by_site(v)))

    def hessian_diagonal(self, f: Tensor) -> Tensor:
        return self._flat(self.site.hessian_diagonal(self.by_site(f)))

    def nll_gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the gradient (B, S·C) of −log p(y | f) for other labels y (B, S), 0 at ignored sites."""
        gradient = self.by_site(f).softmax(-1)  # p − the unit vector of y
        ones = gradient.new_ones(()).expand(*y.shape, 1)
        return self._flat(gradient.scatter_add(-1, y[..., None], -ones))

    def sample_labels(self, f: Tensor, uniform: Uniform) -> Tensor:
        return _sampled_classes(self.by_site(f), uniform(self.labels.shape[-1]))

    def check_targets(self, f: Tensor, y: Tensor) -> None:
        self.site.check_targets(f, y)

    def predict(self, mean: Tensor, variance: Tensor, samples: Tensor | None) -> Prediction:
        return self.site.predict(mean, variance, samples)

    def by_site(self, values: Tensor) -> Tensor:
        """Return flat values by site and class: (..., B, S·C) -> (..., B, S, C)."""
        sites = self.labels.shape[-1]
        shape = (-1, sites) if self.classes_first else (sites, -1)
        split: Tensor = values.unflatten(-1, shape)
        return split.transpose(-1, -2) if self.classes_first else split

    def _flat(self, values: Tensor) -> Tensor:
        """Return values (..., B, S, C) as (..., B, S·C), zero at ignored sites."""
        kept = values * self.kept[..., None]
        return (kept.transpose(-1, -2) if self.classes_first else kept).flatten(-2)
