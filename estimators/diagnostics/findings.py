"""The parts of a diagnosis: findings and costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Cost", "Finding", "Level"]


Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: the checked property.
        level: "ok", "note" (worth knowing), "warning" (a number will mislead) or "error" (a fit would raise, or fit
            another model).
        measured: the measured numbers, in words.
        meaning: the consequence.
        remedy: what to try.
        values: the numbers in JSON types.
    """

    name: str
    level: Level
    measured: str
    meaning: str = ""
    remedy: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """The estimated cost of fitting one method.

    Attributes:
        estimator: the constructor call.
        bytes_needed: the peak memory in bytes, without model and data.
        bytes_available: the free memory in bytes.
        passes: forward and backward passes over the training rows.
        seconds: the time of the fit in one process.
        afterwards: the cost of queries, if it is more than a few passes.
    """

    estimator: str
    bytes_needed: int
    bytes_available: int
    passes: float
    seconds: float
    afterwards: str = ""

    @property
    def fits(self) -> bool:
        """Whether the fit needs no more than the free memory."""
        return self.bytes_needed <= self.bytes_available
