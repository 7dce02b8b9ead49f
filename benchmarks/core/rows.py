"""Every row of the table by name."""

from __future__ import annotations

from benchmarks.core import all_weights, full_ggn, last_layer
from benchmarks.core.work import Work

__all__ = ["ROWS"]

ROWS: dict[str, Work] = {**full_ggn.ROWS, **all_weights.ROWS, **last_layer.ROWS}
