"""One cell as a value: its record and its arrays, written by who asked for them."""

from __future__ import annotations

from typing import TypeAlias

from bdl_bench.cells import Arrays, Cell, _blank, _measured, failed
from bdl_bench.records import Cost, Record
from estimators.errors import TooLargeError, UnsupportedError

__all__ = ["Measured", "measure", "with_exclusive"]

Measured: TypeAlias = tuple[Record, Arrays | None]


def measure(cell: Cell) -> Measured:
    """Run a cell. A method that cannot run here is skipped, with the reason; any other error is recorded."""
    try:
        return _measured(cell)
    except (TooLargeError, UnsupportedError) as error:
        return _blank(cell, status="skipped", reason=f"{type(error).__name__}: {error}"), None
    except Exception as error:
        return failed(cell, error), None


def with_exclusive(record: Record, *, exclusive: bool) -> Record:
    """The record with whether its cost was taken while nothing else of a grid ran."""
    if record.cost is None or "exclusive" not in Cost.model_fields:
        return record
    return record.model_copy(update={"cost": record.cost.model_copy(update={"exclusive": exclusive})})
