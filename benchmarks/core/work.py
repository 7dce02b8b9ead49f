"""A row of the page: a network, its data, and both estimators of its variance."""

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
    """The definition of a row.

    Args:
        title: name in the table.
        network: function that makes the network, called after the seed is set.
        shape: shape of one input.
        ours: function that makes our estimator.
        theirs: options of laplace-torch.
        goals: smallest ratio (laplace-torch / ours, per query) by step; "fit + first variance" is the sum of both.
        queries: number of our queries.
        their_queries: number of queries of laplace-torch, if all of them do not fit into memory.
        likelihood: likelihood of both.
        covariance: whether the variance steps compute covariances (C, C).
        peak_goal: largest peak memory of ours, in bytes.
        batch_size: batch size of both; smaller than the fastest if Jacobians of laplace-torch do not fit into memory.
        their_bytes: bytes that laplace-torch would allocate, if that is too much to run it.
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
        """Return the data, equal at every call."""
        torch.manual_seed(0)
        model, x = self.network(), torch.randn(_ROWS, *self.shape)
        with torch.no_grad():
            f = model(x)
        y = f.argmax(-1) if self.likelihood == "classification" else f + torch.randn_like(f)
        loader = DataLoader(TensorDataset(x, y), batch_size=self.batch_size)
        return Data(model, loader, torch.randn(self.queries, *self.shape))

    def read(self, estimator: UncertaintyEstimator, x: Tensor) -> Tensor:
        """Return the variance (M, C), or the covariance (M, C, C)."""
        return estimator.covariance(x) if self.covariance else estimator.variance(x)

    def describe(self) -> dict[str, Any]:
        """Return the definition in JSON types."""
        return {
            "title": self.title,
            "goals": dict(self.goals),
            "queries": self.queries,
            "their_queries": self.their_queries or self.queries,
            "covariance": self.covariance,
            "peak_goal": self.peak_goal,
            "their_bytes": self.their_bytes,
        }
