"""A full disk: an error that names the directory, and no further job whose result could not be written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from estimators.errors import EstimatorError
from estimators.persistence.atomic import write_bytes
from estimators.runtime.units import in_bytes

__all__ = ["Disk", "FullDiskError"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEST_BYTES = 2**16
"""Bytes written to see whether there is room again: more than a record without arrays."""


class FullDiskError(EstimatorError, OSError):
    """The disk has no room for a result."""


class Disk:
    """The disk of the directory that results are written into."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.was_full = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the OSError of a full disk, raised in the block, into a FullDiskError."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self.was_full = True
            raise self._error(error) from error

    def check(self) -> None:
        """Raise FullDiskError if the disk was full and still has no room, before a job starts."""
        if not self.was_full:
            return
        test_file = self.directory / f".room-{os.getpid()}"
        with self.writing():
            try:
                write_bytes(test_file, bytes(_TEST_BYTES))
            finally:
                test_file.unlink(missing_ok=True)

    def _error(self, error: OSError) -> FullDiskError:
        existing = next(p for p in (self.directory, *self.directory.absolute().parents) if p.exists())
        return FullDiskError(
            f"room for results in {self.directory.resolve()}",
            received=f"{error.strerror} (free: {in_bytes(shutil.disk_usage(existing).free)})",
            remedy="make room there and repeat the command; it continues from what is done.",
        )
