"""One row: a network, its data, and two ways to its variance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from estimators.estimator.base import UncertaintyEstimator

__all__ = ["GIB", "STEPS", "Data", "Work"]

GIB = 2**30
STEPS = ("fit", "first variance", "later variance")
_ROWS, _BATCH = 1000, 500


@dataclass(frozen=True)
class Data:
    """The network, its loader of 1000 rows, and queries."""

    model: nn.Module
    loader: DataLoader[tuple[Tensor, ...]]
    queries: Tensor


@dataclass(frozen=True)
class Work:
    """What is fitted and asked for.

    Args:
        title: in the table.
        network: made after the seed was set.
        shape: of one input.
        ours: the estimator.
        theirs: options of laplace-torch.
        goals: least ratio (theirs over ours, a query) by step; "fit + first variance" is their sum.
        queries: of ours; `their_queries` of laplace-torch, fewer where it could not hold them.
        likelihood: of both.
        covariance: the variance steps ask for all of (C, C).
        peak_goal: of our peak, in bytes.
        batch_size: of the rows, for both: less than the fastest where laplace-torch's Jacobians would not fit.
        their_bytes: what laplace-torch would need for our queries, by size, where that is too much to run it at all.
    """

    title: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ours: Callable[[nn.Module], UncertaintyEstimator]
    theirs: Mapping[str, str]
    goals: Mapping[str, float] = field(default_factory=dict)
    queries: int = 50
    their_queries: int | None = None
    likelihood: str = "classification"
    covariance: bool = False
    peak_goal: float | None = None
    batch_size: int = _BATCH
    their_bytes: float | None = None

    def data(self) -> Data:
        """The same at every call."""
        torch.manual_seed(0)
        model, x = self.network(), torch.randn(_ROWS, *self.shape)
        with torch.no_grad():
            f = model(x)
        y = f.argmax(-1) if self.likelihood == "classification" else f + torch.randn_like(f)
        loader = DataLoader(TensorDataset(x, y), batch_size=self.batch_size)
        return Data(model, loader, torch.randn(self.queries, *self.shape))

    def read(self, estimator: UncertaintyEstimator, x: Tensor) -> Tensor:
        """Variance (M, C), or covariance (M, C, C)."""
        return estimator.covariance(x) if self.covariance else estimator.variance(x)

    def describe(self) -> dict[str, Any]:
        """In JSON types."""
        return {
            "title": self.title,
            "goals": dict(self.goals),
            "queries": self.queries,
            "their_queries": self.their_queries or self.queries,
            "covariance": self.covariance,
            "peak_goal": self.peak_goal,
            "their_bytes": self.their_bytes,
        }
