"""The report of a fit: the derivative checks, and the passes over the data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from estimators.models.self_check import DerivativeReport
from estimators.option_checks import shown

__all__ = ["FitReport"]


@dataclass(frozen=True, kw_only=True, repr=False)
class FitReport:
    """The report of a fit, in `fit_report_`.

    Counting of passes starts with the first check of the data and includes networks that the fit trains. The training
    of the network that was passed to the constructor is not included. The costs are defined in
    `estimators.runtime.pass_counter`.

    Attributes:
        derivatives: the comparisons with plain autograd on the user's own module, and the derivative routes in use.
        passes: forward and backward passes over the training rows, by the phase of the fit.
    """

    derivatives: DerivativeReport | None = None
    passes: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the passes by phase, the comparisons with plain autograd, and the numbers of a subclass."""
        phases = ", ".join(f"{name} {passes:.3g}" for name, passes in self.passes.items())
        lines = [f"{type(self).__name__}({self.total_passes:.4g} passes" + (f": {phases}" if phases else "")]
        if self.derivatives is not None:
            lines.append(shown(self.derivatives, 400))
        others = [field for field in fields(self) if field.name not in ("passes", "derivatives")]
        lines += [f"{field.name}={shown(getattr(self, field.name), 120)}" for field in others]
        return "\n  ".join(lines) + ")"

    @property
    def total_passes(self) -> float:
        """The sum of `passes`."""
        return sum(self.passes.values())
