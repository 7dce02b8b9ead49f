"""What a fit says about itself."""

from __future__ import annotations

from dataclasses import dataclass

from estimators.models.self_check import DerivativeReport

__all__ = ["FitReport"]


@dataclass(frozen=True)
class FitReport:
    """What `fit` checked and chose.

    Attributes:
        derivatives: the comparisons with plain autograd on the user's own module, and the routes in use.
    """

    derivatives: DerivativeReport | None = None
