"""Atomic writes: a file is written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["discard_leftovers", "write_bytes", "write_text"]


_SUFFIX = ".part"


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step; a reader sees the old file, or the new one, or none, and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Write text to `path` in one step, in UTF-8."""
    write_bytes(path, content.encode())


def discard_leftovers(path: Path) -> None:
    """Remove the temporary files of killed writers of `path`; no other process may be writing it."""
    if path.parent.is_dir():
        for part in path.parent.iterdir():
            if part.name.startswith(_prefix(path)) and part.name.endswith(_SUFFIX):
                part.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name[:80]}."
