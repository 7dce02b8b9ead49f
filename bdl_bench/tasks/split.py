"""Random splits into train, validation and test rows, and loaders over them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["loader", "split_indices"]


def split_indices(n: int, *, train: int, validation: int, seed: int) -> tuple[NDArray[np.int64], ...]:
    """Indices of train, validation and test rows: a random permutation of n rows, cut; test is what remains."""
    order = np.random.default_rng(seed).permutation(n)
    cuts = (0, train, train + validation, n)
    return tuple(order[start:stop] for start, stop in pairwise(cuts))


def loader(x: Tensor, y: Tensor, *, batch_size: int = 100) -> DataLoader[tuple[Tensor, ...]]:
    """Batches (x, y) in row order; the trainer shuffles for itself."""
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)
