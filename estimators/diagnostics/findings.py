"""Findings and costs: what a diagnosis is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Cost", "Finding", "Level"]


Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    name: which. level: "ok", "note" (worth knowing), "warning" (a number will mislead), "error" (a fit would raise, or
    be of something else). measured: the numbers in words. meaning: what follows. remedy: what to try.
    values: the numbers, in JSON types.
    """

    name: str
    level: Level
    measured: str
    meaning: str = ""
    remedy: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What a fit of one method would take here: an estimate, made before.

    estimator: how it is constructed. bytes_needed, bytes_available: at its peak, beside the model and the data.
    passes: forward and backward over the training rows. seconds: of the fit, one process. afterwards: what queries
    cost, where that is more than a few passes.
    """

    estimator: str
    bytes_needed: int
    bytes_available: int
    passes: float
    seconds: float
    afterwards: str = ""

    @property
    def fits(self) -> bool:
        """Whether it fits into the free memory."""
        return self.bytes_needed <= self.bytes_available
