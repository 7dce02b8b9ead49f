"""Splits into train, validation and test rows, at random or with a gap; standardisation by train; loaders."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["GapSplit", "Indices", "gap_split", "loader", "split_indices", "standardised"]

Indices = NDArray[np.int64]


def split_indices(n: int, *, train: int, validation: int, seed: int) -> tuple[Indices, ...]:
    """Indices of train, validation and test rows: a random permutation of n rows, cut; test is what remains."""
    return _cut(np.random.default_rng(seed).permutation(n), train, validation)


@dataclass(frozen=True)
class GapSplit:
    """Indices of train, validation and test rows outside a gap, and of the rows inside it."""

    parts: tuple[Indices, ...]
    gap: Indices


def gap_split(feature: Tensor, *, train: float, validation: float, seed: int) -> GapSplit:
    """The middle third of the rows by `feature` (N,) is the gap (Foong et al. 2019); shares of the others are drawn.

    Rows of equal value are ordered at random.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(feature))
    order = shuffled[np.argsort(feature.numpy()[shuffled], kind="stable")]
    third = len(order) // 3
    outer = rng.permutation(np.concatenate([order[:third], order[-third:]]))
    return GapSplit(_cut(outer, round(train * len(outer)), round(validation * len(outer))), order[third:-third])


def standardised(values: Tensor, train: Indices) -> Tensor:
    """Columns in standard deviations from the mean, both of the training rows alone; a constant column is 0."""
    spread = values[train].std(0)
    return (values - values[train].mean(0)) / spread.where(spread > 0, 1.0)


def loader(x: Tensor, y: Tensor, *, batch_size: int = 100) -> DataLoader[tuple[Tensor, ...]]:
    """Batches (x, y) in row order; the trainer shuffles for itself."""
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def _cut(order: Indices, train: int, validation: int) -> tuple[Indices, ...]:
    return tuple(order[start:stop] for start, stop in pairwise((0, train, train + validation, len(order))))
