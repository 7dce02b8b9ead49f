"""Data sets of text through `datasets`: files under the data folder, or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdl_bench.data.folder import VARIABLE, MissingDataError, data_folder
from bdl_bench.data.pretrained import package, without_progress_bars

__all__ = ["Texts"]

_READERS = {"parquet": "parquet", "arrow": "arrow", "json": "json", "jsonl": "json"}


@dataclass(frozen=True)
class Texts:
    """A data set of the hub whose splits are tables with columns such as "text" and "label".

    Files `<split>*` (.parquet, .arrow, .json or .jsonl) in the folder `name` under the data folder have precedence.

    Args:
        name: of the folder.
        address: on the hub.
        configuration: of the data set on the hub.
    """

    name: str
    address: str
    configuration: str | None = None

    def split(self, split: str) -> Any:  # noqa: ANN401
        """Return a split as a `datasets.Dataset`; raise MissingDataError without files and a connection."""
        datasets = package("datasets", extra="hub")
        folder = data_folder() / self.name
        reader, files = _files(folder, split)
        try:
            if not files:
                return datasets.load_dataset(self.address, self.configuration, split=split)
            with without_progress_bars(datasets):
                cache = str(data_folder() / ".datasets")
                return datasets.load_dataset(reader, data_files=files, split="train", cache_dir=cache)
        except Exception as error:  # a downloader may raise anything
            raise MissingDataError(
                f"files {split}*.parquet, .arrow or .json in {folder}, or {self.address} on the hub",
                received=f"{type(error).__name__}: {error}",
                remedy=f"put its files there, or name a folder that has {self.name}: {VARIABLE}=DIR.",
            ) from error


def _files(folder: Path, split: str) -> tuple[str, list[str]]:
    """Return the reader of the first file type that exists, and all files of that type."""
    for ending, reader in _READERS.items():
        if files := sorted(map(str, folder.glob(f"{split}*.{ending}"))):
            return reader, files
    return "", []
