"""The extreme eigenvalues: definiteness of the exact Hessian, and the largest stable learning rate."""

from __future__ import annotations

from collections.abc import Iterator

from estimators.curvature.definiteness import smallest_allowed_ratio
from estimators.curvature.krylov.extreme_eigenvalues import extreme_eigenvalues
from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Finding

__all__ = ["spectrum_findings"]

_EXACT_PARAMETERS = 400
"""The number of parameters up to which the whole spectrum is computed."""
_STEPS_SMALLEST, _STEPS_LARGEST = 64, 16
"""Lanczos steps: the smallest eigenvalue converges more slowly than the largest."""
_BASIS_BYTES = 2**31
"""The largest size of the Lanczos basis."""


def spectrum_findings(context: DiagnosticContext) -> Iterator[Finding]:
    """Find the smallest eigenvalue of ∇²L and the largest of GGN + δ by Lanczos, exactly up to 400 parameters."""
    theta = context.objective.theta
    most = max(8, _BASIS_BYTES // (2 * theta.numel() * theta.element_size()))
    exact = theta.numel() <= _EXACT_PARAMETERS
    limits = (theta.numel(),) * 2 if exact else (min(_STEPS_SMALLEST, most), min(_STEPS_LARGEST, most))
    smallest, largest = extreme_eigenvalues(context.objective.product, theta, columns=1, size=limits[0])
    yield _definiteness(smallest, largest, smallest_allowed_ratio(theta.dtype) * largest, exact=exact)
    ggn = context.objective.centred(curvature="ggn").product
    top = extreme_eigenvalues(ggn, theta, columns=1, size=limits[1])[1]
    rate = 2 * context.n_data / top
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
        'the exact Hessian is not positive definite: curvature="hessian" would raise. GGN + δ always is.',
        'curvature="ggn" (the default), training longer, or a larger prior_precision',
        values,
    )
