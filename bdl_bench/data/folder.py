"""The folder of downloaded data, and downloads into it that are complete or raise an error."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pooch
from filelock import FileLock

from estimators.errors import DataError

__all__ = ["VARIABLE", "MissingDataError", "Source", "cache_folder", "data_folder", "reading"]

VARIABLE = "BDL_BENCH_DATA"
"""The environment variable that names the folder."""
_TIMEOUT = 60
"""Seconds without an answer after which a download fails."""


class MissingDataError(DataError):
    """The files of a task are missing and could not be downloaded."""


def data_folder() -> Path:
    """Return the folder that BDL_BENCH_DATA names, else ~/.cache/bdl-bench (under XDG_CACHE_HOME if that is set)."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else cache_folder()


def cache_folder() -> Path:
    """Return the folder of what is computed once: ~/.cache/bdl-bench (under XDG_CACHE_HOME if that is set)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdl-bench"


@dataclass(frozen=True)
class Source:
    """Files of one data set under the data folder, and where they are downloaded.

    Args:
        name: of the data set, for errors.
        files: paths relative to the data folder.
        address: of the data set, for errors and for a manual download.
        downloads: the checksum of each address, as "md5:..."; None if it is not known. A tar file is unpacked into the
            data folder, a .gz file into the folder of `files`, and any other file is one of `files`.
    """

    name: str
    files: Sequence[str]
    address: str
    downloads: Mapping[str, str | None]

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
        except Exception as error:  # a downloader may raise anything
            raise self._missing(folder, error) from error
        return paths

    def _fill(self, folder: Path) -> None:
        missing = [file for file in self.files if not (folder / file).is_file()]
        if not missing:
            return
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{self.name}.") as temporary:
            for url, checksum in self.downloads.items():
                self._download(url, checksum, Path(temporary))
            if absent := [file for file in missing if not (Path(temporary) / file).is_file()]:
                raise FileNotFoundError(f"the download has no {', '.join(absent)}")
            for file in missing:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(temporary) / file, folder / file)

    def _download(self, url: str, checksum: str | None, into: Path) -> None:
        name = url.rpartition("/")[2].partition("?")[0]
        target, unpack = into / Path(self.files[0]).parent / name, None
        if ".tar" in name:
            target, unpack = into / name, pooch.Untar(extract_dir=".")
        elif name.endswith(".gz"):
            unpack = pooch.Decompress(name=name.removesuffix(".gz"))
        elif len(self.files) == 1:
            target = into / self.files[0]
        downloader = pooch.HTTPDownloader(timeout=_TIMEOUT)
        pooch.retrieve(url, checksum, target.name, target.parent, processor=unpack, downloader=downloader)

    def _missing(self, folder: Path, error: Exception) -> MissingDataError:
        missing = [file for file in self.files if not (folder / file).is_file()]
        return MissingDataError(
            f"the files of {self.name} under {folder}: {', '.join(missing)}",
            received=f"missing files, and a download that fails: {type(error).__name__}: {error}",
            remedy=f"put them there from {self.address}, or name a folder that has them: {VARIABLE}=DIR.",
        )


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Raise any error of the block, in which a file is read, as a DataError that says what was expected in it."""
    try:
        yield
    except Exception as error:  # a damaged file may raise anything
        raise DataError(
            f"{expected} at {path}",
            received=f"{type(error).__name__}: {error}",
            remedy="remove it, so that it is downloaded again.",
        ) from error
