"""The measurements of laplace-torch with its fastest backends."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.clock import timed
from benchmarks.core.work import Data, Work

__all__ = ["Theirs", "fastest"]

_BACKENDS = ("BackPackGGN", "CurvlinopsGGN", "AsdlGGN")


class Theirs:
    """laplace-torch with one backend: a call times fit and two predictions and keeps the last result."""

    def __init__(self, work: Work, data: Data, backend: str) -> None:
        self.work, self.data, self.backend = work, data, backend
        self.result: Tensor | None = None

    def __call__(self) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import laplace
            from laplace import curvature

            fitted: Any = laplace.Laplace(
                copy.deepcopy(self.data.model),
                self.work.likelihood,
                prior_precision=1.0,
                backend=getattr(curvature, self.backend),
                **self.work.theirs,
            )
            return [timed(step) for step in (lambda: fitted.fit(self.data.loader), *2 * [self._reader(fitted)])]

    def _reader(self, fitted: Any) -> Callable[[], None]:  # noqa: ANN401
        def read() -> None:
            queries = self.data.queries[: self.work.their_queries]
            covariance = fitted._glm_predictive_distribution(queries)[1].detach()
            self.result = covariance if self.work.covariance else covariance.diagonal(dim1=1, dim2=2)

        return read


def fastest(work: Work, data: Data) -> list[Theirs]:
    """Return the backends that are fastest in some step of one round, without those that raise."""
    tried: dict[Theirs, list[float]] = {}
    for backend in _BACKENDS:
        theirs = Theirs(work, data, backend)
        try:
            tried[theirs] = theirs()
        except Exception:  # backends raise various errors for unsupported models
            continue
    if not tried:
        raise RuntimeError(f"no backend of laplace-torch runs {work.title}")
    best = [min(tried, key=lambda theirs, step=step: tried[theirs][step]) for step in range(3)]  # type: ignore[misc]
    return list(dict.fromkeys(best))
