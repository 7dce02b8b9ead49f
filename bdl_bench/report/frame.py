"""Every number of a report as a pandas DataFrame and as a Parquet file; pandas and pyarrow are optional."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING

from bdl_bench.report.tidy import LongRow
from estimators.errors import UnsupportedError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["has_parquet", "to_frame", "to_parquet"]


def to_frame(rows: Sequence[LongRow]) -> pd.DataFrame:
    """Return a data frame with columns task, method, seed, variant, quantity, value.

    Raises:
        UnsupportedError: if pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise UnsupportedError(
            "pandas, for a data frame",
            received="an environment without it",
            remedy='pip install "bdl-bench[notebook]".',
        ) from error
    return pd.DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(LongRow)])


def has_parquet() -> bool:
    """Return whether pandas and pyarrow are installed."""
    return find_spec("pandas") is not None and find_spec("pyarrow") is not None


def to_parquet(rows: Sequence[LongRow]) -> bytes:
    """Return the content of a Parquet file.

    Raises:
        UnsupportedError: if pandas or pyarrow is not installed.
    """
    if not has_parquet():
        raise UnsupportedError(
            "pandas and pyarrow, for a Parquet file",
            received="an environment without one of them",
            remedy='pip install "bdl-bench[parquet]".',
        )
    buffer = io.BytesIO()
    to_frame(rows).to_parquet(buffer, engine="pyarrow", index=False)
    return buffer.getvalue()
