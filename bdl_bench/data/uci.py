"""Tables of the UCI Machine Learning Repository, in the CSV files that it serves."""

from __future__ import annotations

import shutil
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdl_bench.data.folder import Source
from estimators.errors import DataError

__all__ = ["uci_table"]

_TIMEOUT = 60
"""Seconds without an answer after which a download fails."""


def uci_table(name: str, number: int, n_inputs: int) -> tuple[Tensor, Tensor]:
    """Return inputs (N, D), the first columns, and the target (N, 1), the next one, of `uci/<name>.csv` in float64.

    `number` is that of the data set in the repository. Duplicate rows are dropped, so that no row is in two parts of a
    split.
    """
    address = f"https://archive.ics.uci.edu/static/public/{number}/data.csv"
    file = f"uci/{name}.csv"

    def download(into: Path) -> None:
        (into / "uci").mkdir()
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer, (into / file).open("wb") as copy:
            shutil.copyfileobj(answer, copy)

    (path,) = Source(f"uci-{name}", [file], address, download).paths()
    table = _read(path, n_inputs + 1)
    return table[:, :n_inputs], table[:, n_inputs:]


def _read(path: Path, n_columns: int) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of an empty file
            table = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(n_columns), ndmin=2)
    except (ValueError, UserWarning) as error:
        raise _unreadable(path, n_columns, str(error)) from error
    if not np.isfinite(table).all():
        raise _unreadable(path, n_columns, "NaN or Inf in it")
    first = np.sort(np.unique(table, axis=0, return_index=True)[1])
    return torch.from_numpy(table[first])


def _unreadable(path: Path, n_columns: int, received: str) -> DataError:
    return DataError(
        f"a header and rows of at least {n_columns} numbers with commas between them at {path}",
        received=received,
        remedy="remove it, so that it is downloaded again.",
    )
