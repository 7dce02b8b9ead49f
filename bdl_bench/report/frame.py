"""Every number of a report as a pandas DataFrame and as a Parquet file; pandas and pyarrow are optional."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING

from bdl_bench.report.tidy import LongRow
from estimators.runtime.optional import optional_module

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["has_parquet", "to_frame", "to_parquet"]


def to_frame(rows: Sequence[LongRow]) -> pd.DataFrame:
    """Return columns task, method, seed, variant, quantity, value; raise UnsupportedError without pandas."""
    pandas = optional_module("pandas", purpose="make a data frame", install='"bdl-bench[notebook]"')
    columns = [field.name for field in fields(LongRow)]
    frame: pd.DataFrame = pandas.DataFrame([asdict(row) for row in rows], columns=columns)
    return frame


def has_parquet() -> bool:
    """Return whether pandas and pyarrow are installed."""
    return find_spec("pandas") is not None and find_spec("pyarrow") is not None


def to_parquet(rows: Sequence[LongRow]) -> bytes:
    """Return the content of a Parquet file; pandas and pyarrow must be installed."""
    buffer = io.BytesIO()
    to_frame(rows).to_parquet(buffer, engine="pyarrow", index=False)
    return buffer.getvalue()
