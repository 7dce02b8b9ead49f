"""A full disk: said with the name of the directory, and nothing more is computed that could not be kept."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from estimators.errors import EstimatorError
from estimators.persistence.atomic import write_bytes

__all__ = ["Disk", "FullDiskError"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE = 2**16  # bytes; more than a record without arrays


class FullDiskError(EstimatorError, OSError):
    """There is no room for a result."""


class Disk:
    """The one that a directory lies on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.was_full = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Writes within; where the disk is full they raise FullDiskError."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self.was_full = True
            raise self._error(error) from error

    def check(self) -> None:
        """FullDiskError where the disk has been full and has still no room: then an item is better not begun."""
        if not self.was_full:
            return
        probe = self.directory / f".room-{os.getpid()}"
        with self.writing():
            try:
                write_bytes(probe, bytes(_PROBE))
            finally:
                probe.unlink(missing_ok=True)

    def _error(self, error: OSError) -> FullDiskError:
        free = shutil.disk_usage(
            next(p for p in (self.directory, *self.directory.absolute().parents) if p.exists())
        ).free
        return FullDiskError(
            f"room for results in {self.directory.resolve()}",
            received=f"{error.strerror} (free: {free / 2**20:.1f} MiB)",
            remedy="make room there and give the same command again; it goes on from what is done.",
        )
