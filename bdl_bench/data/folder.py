"""The folder of downloaded data; files that are there whole, or are downloaded, or whose absence is explained."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from estimators.errors import DataError, EstimatorError

__all__ = ["VARIABLE", "MissingDataError", "Source", "data_folder"]

VARIABLE = "BDL_BENCH_DATA"
"""The environment variable that names the folder."""


class MissingDataError(DataError):
    """The files of a task are not there, and could not be downloaded."""


def data_folder() -> Path:
    """What BDL_BENCH_DATA names, else ~/.cache/bdl-bench (under XDG_CACHE_HOME where that is set)."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdl-bench"


@dataclass(frozen=True)
class Source:
    """Files of one data set under the data folder, and how to download them.

    Args:
        name: what errors call it.
        files: paths relative to the data folder.
        address: from where, for errors and for a download by hand.
        download: makes `files` under the folder that it is given, or raises.
    """

    name: str
    files: Sequence[str]
    address: str
    download: Callable[[Path], None]

    def paths(self) -> list[Path]:
        """Where the files lie, downloaded first where one is missing. Errors: MissingDataError.

        A download is made beside its end and moved there when it is whole; other processes wait for it.
        """
        folder = data_folder()
        paths = [folder / file for file in self.files]
        if all(path.is_file() for path in paths):
            return paths
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{self.name}.lock"):
                self._fill(folder)
        except EstimatorError:
            raise
        except Exception as error:  # a downloader may raise anything
            raise self._missing(folder, error) from error
        return paths

    def _fill(self, folder: Path) -> None:
        missing = [file for file in self.files if not (folder / file).is_file()]
        if not missing:
            return
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{self.name}.") as made:
            self.download(Path(made))
            if absent := [file for file in missing if not (Path(made) / file).is_file()]:
                raise FileNotFoundError(f"the download has no {', '.join(absent)}")
            for file in missing:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(made) / file, folder / file)

    def _missing(self, folder: Path, error: Exception) -> MissingDataError:
        missing = [file for file in self.files if not (folder / file).is_file()]
        return MissingDataError(
            f"the files of {self.name} under {folder}: {', '.join(missing)}",
            received=f"none of that name, and a download that fails: {type(error).__name__}: {error}",
            remedy=f"put them there from {self.address}, or name a folder that has them: {VARIABLE}=DIR.",
        )
