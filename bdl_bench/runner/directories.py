"""The directory that a run writes into: checked, created, or named by the time."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path

from estimators.errors import OptionError

__all__ = ["check_directory", "make_directory", "new_directory", "output_directory"]


def check_directory(directory: Path) -> None:
    """Raise OptionError if a directory cannot be written: it is a file, lies below one, or there is no permission."""
    found = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    if not found.is_dir():
        raise _unusable(directory, f"{found} is a file" if found.exists() else f"{found} is a broken link")
    if not os.access(found, os.W_OK | os.X_OK):
        raise _unusable(directory, f"no permission to write in {found}")


def make_directory(directory: Path) -> Path:
    """Create a directory if it does not exist, and return it; raise OptionError if that is impossible."""
    check_directory(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _unusable(directory, f"{type(error).__name__}: {error.strerror}") from error
    return directory


def new_directory(parent: Path = Path("bdl-results")) -> Path:
    """Create and return a directory named by the time, with a number if that name exists."""
    make_directory(parent)
    now = f"{datetime.now():%Y-%m-%d_%H%M%S}"
    for number in count(1):
        directory = parent / (now if number == 1 else f"{now}-{number}")
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        return directory
    raise AssertionError


@contextmanager
def output_directory(out: Path | None) -> Iterator[Path]:
    """Create a directory, for None a new one named by the time, for what the block writes.

    If the block raises, remove what was created and is empty. Raises OptionError if the directory cannot be written.
    """
    named = Path("bdl-results") if out is None else out
    absent = [path for path in (named, *named.parents) if not path.exists()]
    directory = new_directory(named) if out is None else make_directory(named)
    try:
        yield directory
    except BaseException:
        for path in dict.fromkeys([*([directory] if out is None else []), *absent]):
            try:
                path.rmdir()
            except OSError:  # the block, or another process, has written into it
                break
        raise


def _unusable(directory: Path, received: str) -> OptionError:
    return OptionError(
        f"a directory to write into at {directory}", received=received, remedy="name another with --out (out=)."
    )
