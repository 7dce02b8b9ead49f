"""Measured rows on disk, one JSON file each, so that a page is made again from what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from estimators.persistence.atomic import write_text

__all__ = ["Measured", "read", "write"]

Measured = dict[str, Any]
"""What a row measured, in JSON types."""


def write(directory: Path, page: str, row: str, measured: Measured) -> None:
    """Into DIR/records/PAGE/ROW.json."""
    write_text(directory / "records" / page / f"{row}.json", json.dumps(measured, indent=1) + "\n")


def read(directory: Path, page: str, rows: list[str]) -> dict[str, Measured]:
    """The rows of a page that have been measured, in the order asked for."""
    paths = {row: directory / "records" / page / f"{row}.json" for row in rows}
    return {row: json.loads(path.read_text(encoding="utf-8")) for row, path in paths.items() if path.is_file()}
