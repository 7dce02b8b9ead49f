"""The folder of downloaded data, and downloads into it that are complete or raise an error."""

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
    """The files of a task are missing and could not be downloaded."""


def data_folder() -> Path:
    """Return the folder that BDL_BENCH_DATA names, else ~/.cache/bdl-bench (under XDG_CACHE_HOME if that is set)."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdl-bench"


@dataclass(frozen=True)
class Source:
    """Files of one data set under the data folder, and how to download them.

    Args:
        name: of the data set, for errors.
        files: paths relative to the data folder.
        address: of the data set, for errors and for a manual download.
        download: function of a folder that creates `files` under it, or raises.
    """

    name: str
    files: Sequence[str]
    address: str
    download: Callable[[Path], None]

    def paths(self) -> list[Path]:
        """Return the paths of the files, after a download if one is missing.

        A download goes to a temporary folder and is moved when it is complete. Other processes wait for it.

        Raises:
            MissingDataError: if the download fails.
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
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{self.name}.") as temporary:
            self.download(Path(temporary))
            if absent := [file for file in missing if not (Path(temporary) / file).is_file()]:
                raise FileNotFoundError(f"the download has no {', '.join(absent)}")
            for file in missing:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(temporary) / file, folder / file)

    def _missing(self, folder: Path, error: Exception) -> MissingDataError:
        missing = [file for file in self.files if not (folder / file).is_file()]
        return MissingDataError(
            f"the files of {self.name} under {folder}: {', '.join(missing)}",
            received=f"missing files, and a download that fails: {type(error).__name__}: {error}",
            remedy=f"put them there from {self.address}, or name a folder that has them: {VARIABLE}=DIR.",
        )
