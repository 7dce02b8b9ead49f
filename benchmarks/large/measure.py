"""Measurement of a row: a method or the reference on a network, in a new process."""

from __future__ import annotations

from benchmarks.fresh import in_fresh_process
from benchmarks.large.methods import method_record
from benchmarks.large.page import REFERENCE
from benchmarks.large.reference import reference_record
from benchmarks.records import Measured
from estimators.errors import EstimatorError

__all__ = ["measure"]


def measure(model: str, method: str) -> Measured:
    """Return the measurements with the peak memory in bytes, or the typed error that ended the fit."""
    try:
        if method == REFERENCE:
            found, peak = in_fresh_process(reference_record, model)
        else:
            found, peak = in_fresh_process(method_record, model, method)
    except EstimatorError as error:
        return {"failed": f"{type(error).__name__}: {error.received}"}
    return {**found, "peak": peak}
