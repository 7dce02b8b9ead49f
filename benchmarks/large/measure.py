"""The rows of the page: a method, or the reference, on a network, in a process of its own."""

from __future__ import annotations

from benchmarks.fresh import in_fresh_process
from benchmarks.large.methods import method_record
from benchmarks.large.page import REFERENCE
from benchmarks.large.reference import reference_record
from benchmarks.records import Measured
from estimators.errors import EstimatorError

__all__ = ["measure"]


def measure(model: str, method: str) -> Measured:
    """What it found, and its peak in bytes; or the error of the library that ended it."""
    try:
        if method == REFERENCE:
            found, peak = in_fresh_process(reference_record, model)
        else:
            found, peak = in_fresh_process(method_record, model, method)
    except EstimatorError as error:
        return {"failed": f"{type(error).__name__}: {error.received}"}
    return {**found, "peak": peak}
