"""The distance of the weights from the minimum of L."""

from __future__ import annotations

import math
from collections.abc import Iterator

from estimators.curvature.krylov.block_cg import block_cg
from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Finding, Level
from estimators.regvar.report import relative_to_prior

__all__ = ["gradient_finding", "newton_finding"]

_SMALL, _LARGE = 0.1, 1.0
"""Gradients relative to that of the prior: below the first the weights count as stationary, above the second not."""
_LARGE_DECREMENT = 100
"""gᵀA⁻¹g above which a finding is a warning: ten posterior standard deviations."""
_ITERATIONS = 20


def gradient_finding(context: DiagnosticContext) -> Iterator[Finding]:
    """Compare the gradient of L with that of the prior, ‖∇L‖ / ‖δ(θ − θ₀)‖."""
    relative = relative_to_prior(context.gradient, context.objective)
    norm, loss = float(context.gradient.norm()), float(context.objective.loss(context.objective.theta))
    values = {"relative_gradient": relative, "gradient_norm": norm, "loss": loss, "loss_per_row": loss / context.n_data}
    measured = (
        f"|∇L| = {norm:.3g}, {relative:.2g} times the gradient of the prior, |δ(θ − θ0)|; "
        f"L = {loss:.4g} nats, {loss / context.n_data:.3g} per row"
    )
    if relative <= _SMALL:
        yield Finding("gradient", "ok", measured, values=values)
        return
    meaning = (
        "the weights are not a maximum a posteriori for this prior precision. Centred methods (the default) are "
        "correct for the posterior around these weights; centred=False and the marginal likelihood are not."
    )
    remedy = "train longer with a decaying rate, and check prior_precision against the weight decay"
    yield Finding("gradient", "note" if relative <= _LARGE else "warning", measured, meaning, remedy, values)


def newton_finding(context: DiagnosticContext) -> Iterator[Finding]:
    """Estimate ½ gᵀA⁻¹g with A = GGN + δ from below, by a few CG iterations.

    By Cauchy-Schwarz |J A⁻¹g| ≤ √(J A⁻¹Jᵀ) √(gᵀA⁻¹g): a Newton step moves a linearized output by at most √(gᵀA⁻¹g) of
    its posterior standard deviations.
    """
    centred, gradient = context.objective.centred(curvature="ggn"), context.gradient
    if not float(gradient.norm()):
        yield Finding("distance to the optimum", "ok", "the gradient is 0", values={"newton_decrement": 0.0})
        return
    solved = block_cg(centred.product, gradient[None], tol=1e-3, max_iter=_ITERATIONS, must_converge=False)
    step = solved.solution
    squared = max(0.0, float((gradient * step[0]).sum()))
    x = next(iter(context.objective.batches)).x
    moved = float(context.objective.network.jvp(x, step).square().mean().sqrt())
    values = {
        "newton_decrement": squared / 2,
        "newton_decrement_per_row": squared / 2 / context.n_data,
        "standard_deviations": math.sqrt(squared),
        "output_change": moved,
        "residual": float(solved.residuals.max()),
        "iterations": solved.iterations,
    }
    measured = (
        f"a Newton step with the GGN would lower L by {squared / 2:.3g} nats ({squared / 2 / context.n_data:.2g} per "
        f"row) and move the outputs by {moved:.2g} (rms), each by at most {math.sqrt(squared):.2g} of its standard "
        f"deviations; CG stopped at a residual of {values['residual']:.1g}"
    )
    if squared <= 1:
        yield Finding("distance to the optimum", "ok", measured, values=values)
        return
    meaning = "the posterior is centred where training stopped, not at its optimum."
    level: Level = "note" if squared <= _LARGE_DECREMENT else "warning"
    yield Finding("distance to the optimum", level, measured, meaning, "train longer with a decaying rate", values)
