"""Check whether a model returns probabilities although the likelihood expects logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from estimators.likelihoods.base import Likelihood
from estimators.likelihoods.bernoulli import Bernoulli
from estimators.likelihoods.categorical import Categorical
from estimators.numerics.pytrees import PyTree, split_rows

__all__ = ["LinkCheck"]

_LEAST_ROWS = 10
_RATIO = 0.7
"""Logits in [0, 1] by chance: at the best constant, the loss of the same numbers as probabilities is at least .89 of
theirs as logits; that of a sigmoid which has learned anything is below .7."""
_LINKS = ("Sigmoid", "Softmax")
_SHAPE_OPERATIONS = (
    "View", "Reshape", "UnsafeView", "Squeeze", "Unsqueeze", "Transpose", "Permute", "Select", "Slice", "Index",
    "Clone", "Alias", "ToCopy", "Expand", "Clamp", "Cat", "Stack", "T",
)  # fmt: skip


@dataclass
class LinkCheck:
    """Collect outputs batch by batch, and decide whether all of them must be probabilities.

    Categorical: every row is >= 0 and sums to 1 over the classes. Bernoulli: every output is in [0, 1] and, since
    logits can be that too, either a sigmoid is the last operation of the model, or the labels fit the outputs much
    better as probabilities than as logits. Log-probabilities are logits as well, and pass.
    """

    likelihood: Likelihood
    possible: bool = True
    rows: int = 0
    loss_as_logits: float = 0.0
    loss_as_probs: float = 0.0
    _first: list[PyTree] = field(default_factory=list)

    def add(self, x: PyTree, f: Tensor, y: Tensor | None) -> None:
        """Take the outputs f (B, ...) of one batch x, y into account."""
        if not self.possible or not len(f):
            return
        f = f.detach()
        if isinstance(self.likelihood, Categorical):
            self.possible = _are_distributions(f.movedim(self.likelihood.class_dim, -1))
        elif isinstance(self.likelihood, Bernoulli):
            self.possible = bool(((f >= 0) & (f <= 1)).all())
            self._compare(f, y)
        else:
            self.possible = False
        self.rows += len(f)
        if self.possible and not self._first:
            self._first.append(split_rows(x, 1)[0])

    def found(self, forward: Callable[[PyTree], Tensor]) -> str | None:
        """Return what is wrong with the outputs seen so far, or None; `forward` is the model."""
        if not self.possible or not self.rows:
            return None
        if isinstance(self.likelihood, Categorical):
            return "probabilities: every row of outputs is >= 0 and sums to 1, as after a softmax"
        fits = self.rows >= _LEAST_ROWS and self.loss_as_probs < _RATIO * self.loss_as_logits
        if fits or self._ends_in_link(forward):
            return "probabilities: every output is between 0 and 1, as after a sigmoid"
        return None

    def _compare(self, f: Tensor, y: Tensor | None) -> None:
        if not self.possible or y is None or y.shape != f.shape:
            return
        outputs, labels = f.float(), y.to(torch.float32)
        self.loss_as_logits += float(F.binary_cross_entropy_with_logits(outputs, labels, reduction="sum"))
        self.loss_as_probs += float(F.binary_cross_entropy(outputs, labels.clamp(0, 1), reduction="sum"))

    def _ends_in_link(self, forward: Callable[[PyTree], Tensor]) -> bool:
        with torch.enable_grad():
            f = forward(self._first[0])
        return _last_operation(f).startswith(_LINKS)


REMEDY = (
    "return the values before the softmax or sigmoid; of a model that cannot be changed, take the logarithm of the "
    "probabilities p (classification) or torch.logit(p) (binary)."
)


def _are_distributions(rows: Tensor) -> bool:
    """Return whether rows (..., C) are >= 0 and sum to 1, within the rounding of their dtype."""
    if rows.shape[-1] < 2:
        return False
    tolerance = 1e-4 if rows.dtype in (torch.float32, torch.float64) else 2e-2
    sums = rows.double().sum(-1) if rows.device.type != "mps" else rows.float().sum(-1)
    return bool((rows >= 0).all()) and bool(((sums - 1).abs() < tolerance).all())


def _last_operation(f: Tensor) -> str:
    """Return the name of the autograd node that computed f, skipping nodes that only move or select entries."""
    node = f.grad_fn
    while node is not None and type(node).__name__.startswith(_SHAPE_OPERATIONS):
        inputs = [parent for parent, _ in node.next_functions if parent is not None]
        node = inputs[0] if inputs else None
    return "" if node is None else type(node).__name__
