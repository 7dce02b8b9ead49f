"""Measured rows on disk, one JSON file each, from which pages are rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from estimators.persistence.atomic import write_text

__all__ = ["Measured", "read", "write"]

Measured = dict[str, Any]
"""The measurements of a row, in JSON types."""


def write(directory: Path, page: str, row: str, measured: Measured) -> None:
    """Write a row to DIR/records/PAGE/ROW.json."""
    write_text(directory / "records" / page / f"{row}.json", json.dumps(measured, indent=1) + "\n")


def read(directory: Path, page: str, rows: list[str]) -> dict[str, Measured]:
    """Return the measured rows of a page in the given order."""
    paths = {row: directory / "records" / page / f"{row}.json" for row in rows}
    return {row: json.loads(path.read_text(encoding="utf-8")) for row, path in paths.items() if path.is_file()}
