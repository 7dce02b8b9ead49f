"""Measurement of a row: alternating times in one process, peak memory in one process each, and differences."""

from __future__ import annotations

import gc

from torch import Tensor

from benchmarks.clock import Timing, interleaved, timed
from benchmarks.core import all_weights, full_ggn, last_layer
from benchmarks.core.laplace_torch import Theirs, fastest
from benchmarks.core.work import STEPS, Data, Work
from benchmarks.fresh import in_fresh_process
from benchmarks.records import Measured

__all__ = ["ROWS", "measure"]

ROWS: dict[str, Work] = {**full_ggn.ROWS, **all_weights.ROWS, **last_layer.ROWS}
"""Every row of the page by name."""


def measure(name: str) -> Measured:
    """Return the measurements of a row."""
    work = ROWS[name]
    times, _ = in_fresh_process(_times, name)
    _, peak = in_fresh_process(_ours_once, name)
    found = {**work.describe(), **times, "peak": peak}
    if work.their_bytes is None or work.their_queries is not None:
        found["error"], _ = in_fresh_process(_error, name)
        _, found["their_peak"] = in_fresh_process(_theirs_once, name, times["backends"][0])
    return found


class _Ours:
    """Our estimator: a call times a fit and two predictions and keeps the last result."""

    def __init__(self, work: Work, data: Data) -> None:
        self.work, self.data = work, data
        self.result: Tensor | None = None

    def __call__(self) -> list[float]:
        estimator = self.work.ours(self.data.model)

        def read() -> None:
            self.result = self.work.read(estimator, self.data.queries)

        seconds = [timed(step) for step in (lambda: estimator.fit(self.data.loader), read, read)]
        gc.collect()
        return seconds


def _times(name: str) -> Measured:
    work = ROWS[name]
    data = work.data()
    ours = _Ours(work, data)
    runs = work.their_bytes is None or work.their_queries is not None
    ours()
    theirs = fastest(work, data) if runs else []
    timings = interleaved([ours, *theirs])
    best = [min(timing, key=lambda t: t.median) for timing in zip(*timings[1:], strict=True)]
    return {
        "ours": _seconds(timings[0]),
        "theirs": _seconds(best) if runs else None,
        "backends": [one.backend for one in theirs],
        "difference": {one.backend: _difference(ours, one) for one in theirs},
    }


def _seconds(timings: list[Timing]) -> dict[str, dict[str, float]]:
    return {step: {"median": t.median, "spread": t.spread} for step, t in zip(STEPS, timings, strict=True)}


def _difference(ours: _Ours, theirs: Theirs) -> float:
    """Return max |ours − theirs| / max |theirs| at the queries of both."""
    assert ours.result is not None
    assert theirs.result is not None
    b = theirs.result
    return float((ours.result[: len(b)] - b).abs().max() / b.abs().max())


def _error(name: str) -> float:
    """Return max |float32 − float64| / max |float64| of our results."""
    work = ROWS[name]
    data = work.data()
    single = work.read(work.ours(data.model).fit(data.loader), data.queries)
    rows = [(x.double(), y.double() if y.is_floating_point() else y) for x, y in data.loader]
    double = work.read(work.ours(data.model.double()).fit(rows), data.queries.double())
    return float((single - double).abs().max() / double.abs().max())


def _ours_once(name: str) -> None:
    work = ROWS[name]
    data = work.data()
    estimator = work.ours(data.model)
    estimator.fit(data.loader)
    work.read(estimator, data.queries)


def _theirs_once(name: str, backend: str) -> None:
    work = ROWS[name]
    Theirs(work, work.data(), backend)()
