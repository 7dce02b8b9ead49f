"""Epochs of methods that add the prior in every step: sizes of their batches, and the factor of their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from estimators.data.training_data import TrainingData
from estimators.training.recipe import Recipe
from estimators.training.training import epoch

__all__ = ["EpochSizes"]


@dataclass(frozen=True)
class EpochSizes:
    """The number of batches of an epoch and the rows of the largest.

    Args:
        n_batches: K, the steps of an epoch.
        largest: rows of the largest batch.
        n_data: N.
    """

    n_batches: int
    largest: int
    n_data: int

    @classmethod
    def of(cls, batches: TrainingData, recipe: Recipe) -> EpochSizes:
        """Return the sizes of `epoch(batches, recipe, generator, even=True)`, by one pass over the rows."""
        sizes = [len(batch) for batch in epoch(batches, recipe, torch.Generator().manual_seed(0), even=True)]
        return cls(len(sizes), max(sizes), sum(sizes))

    @property
    def largest_ratio(self) -> float:
        """K times the largest batch, divided by N: 1 for equal batches."""
        return self.n_batches * self.largest / self.n_data
