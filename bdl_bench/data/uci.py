"""Tables of the UCI Machine Learning Repository, in the CSV files that it serves."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from bdl_bench.data.folder import Source, reading

__all__ = ["uci_table"]


def uci_table(name: str, number: int, n_inputs: int) -> tuple[Tensor, Tensor]:
    """Return inputs (N, D), the first columns, and the target (N, 1), the next one, of `uci/<name>.csv` in float64.

    `number` is that of the data set in the repository. Duplicate rows are dropped, so that no row is in two parts of a
    split.
    """
    address = f"https://archive.ics.uci.edu/static/public/{number}/data.csv"
    (path,) = Source(f"uci-{name}", [f"uci/{name}.csv"], address, {address: None}).paths()
    expected = f"a header and rows of at least {n_inputs + 1} finite numbers with commas between them"
    with reading(path, expected), warnings.catch_warnings():
        warnings.simplefilter("error")  # of an empty file
        table = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(n_inputs + 1), ndmin=2)
        if not np.isfinite(table).all():
            raise ValueError("NaN or Inf in it")
    first = np.sort(np.unique(table, axis=0, return_index=True)[1])
    kept = torch.from_numpy(table[first])
    return kept[:, :n_inputs], kept[:, n_inputs:]
