"""The ends of the spectrum: is the exact Hessian positive definite, which learning rates are stable."""

from __future__ import annotations

from collections.abc import Iterator

from estimators.curvature.dense.cholesky import smallest_allowed_ratio
from estimators.curvature.krylov.definiteness import extreme_eigenvalues
from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Finding

__all__ = ["spectrum_findings"]

_WHOLE, _STEPS, _STEPS_UP = 400, 64, 16
_BUDGET = 2**31


def spectrum_findings(subject: DiagnosticContext) -> Iterator[Finding]:
    """Smallest eigenvalue of ∇²L, largest of GGN + δ, by Lanczos; the whole spectrum below 400 parameters."""
    theta = subject.objective.theta
    room = max(8, _BUDGET // (2 * theta.numel() * theta.element_size()))
    whole = theta.numel() <= _WHOLE
    steps, steps_up = (theta.numel(), theta.numel()) if whole else (min(_STEPS, room), min(_STEPS_UP, room))
    smallest, largest = extreme_eigenvalues(subject.objective.product, theta, columns=1, size=steps)
    yield _definiteness(smallest, largest, smallest_allowed_ratio(theta.dtype) * largest, exact=whole)
    ggn = subject.objective.centred(curvature="ggn").product
    top = extreme_eigenvalues(ggn, theta, columns=1, size=steps_up)[1]
    rate = 2 * subject.n_data / top
    measured = f"largest eigenvalue of GGN + δ {top:.3g}: gradient descent on L/N is stable below a rate of {rate:.2g}"
    yield Finding("largest curvature", "ok", measured, values={"largest": top, "stable_rate": rate})


def _definiteness(smallest: float, largest: float, allowed: float, *, exact: bool) -> Finding:
    values = {"smallest": smallest, "largest": largest, "exact": exact}
    bound = "" if exact else "at most "
    measured = f"smallest eigenvalue of the exact Hessian + δ {bound}{smallest:.3g}, largest {largest:.3g}"
    if smallest > allowed:
        return Finding("smallest curvature", "ok", measured, values=values)
    return Finding(
        "smallest curvature",
        "note",
        measured,
        'the exact Hessian has no inverse to read a variance from: curvature="hessian" would raise. The GGN + δ is '
        "positive definite all the same.",
        'curvature="ggn" (the default), training longer, or a larger prior_precision',
        values,
    )
