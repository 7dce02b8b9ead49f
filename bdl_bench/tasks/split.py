"""Splits into train, validation and test rows, standardisation by the training rows, and loaders."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["GapSplit", "Indices", "gap_split", "loader", "split_indices", "split_validation", "standardised"]

Indices = NDArray[np.int64]


def split_indices(n: int, *, train: int, validation: int, seed: int) -> tuple[Indices, ...]:
    """Return indices of train, validation and test rows from a random permutation of n rows; the rest are test rows."""
    return _cut(np.random.default_rng(seed).permutation(n), train, validation)


def split_validation(n: int, share: float, seed: int) -> tuple[Indices, ...]:
    """Return indices of train and validation rows, the latter a share of a random permutation of n rows."""
    n_validation = round(share * n)
    return split_indices(n, train=n - n_validation, validation=n_validation, seed=seed)[:2]


@dataclass(frozen=True)
class GapSplit:
    """Indices of train, validation and test rows outside a gap, and of the rows inside it."""

    parts: tuple[Indices, ...]
    gap: Indices


def gap_split(feature: Tensor, *, train: float, validation: float, seed: int) -> GapSplit:
    """Return a gap split (Foong et al. 2019): the middle third of the rows by `feature` (N,) is the gap.

    Of the other rows, the shares `train` and `validation` are drawn. Rows of equal value are ordered at random.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(feature))
    order = shuffled[np.argsort(feature.numpy()[shuffled], kind="stable")]
    third = len(order) // 3
    outer = rng.permutation(np.concatenate([order[:third], order[-third:]]))
    return GapSplit(_cut(outer, round(train * len(outer)), round(validation * len(outer))), order[third:-third])


def standardised(values: Tensor, train: Indices) -> Tensor:
    """Return columns standardised by mean and standard deviation of the training rows; a constant column is 0."""
    spread = values[train].std(0)
    return (values - values[train].mean(0)) / spread.where(spread > 0, 1.0)


def loader(x: Tensor, y: Tensor, *, batch_size: int = 100) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches (x, y) in row order; the trainer shuffles."""
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def _cut(order: Indices, train: int, validation: int) -> tuple[Indices, ...]:
    return tuple(order[start:stop] for start, stop in pairwise((0, train, train + validation, len(order))))
