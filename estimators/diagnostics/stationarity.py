"""How far the weights are from the optimum of L."""

from __future__ import annotations

import math
from collections.abc import Iterator

from estimators.curvature.krylov.block_cg import block_cg
from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Finding, Level
from estimators.regvar.report import relative_to_prior

__all__ = ["gradient_finding", "newton_finding"]

_SMALL, _LARGE = 0.1, 1.0
_ITERATIONS = 20


def gradient_finding(subject: DiagnosticContext) -> Iterator[Finding]:
    """‖∇L‖ / ‖δ(θ − θ₀)‖."""
    relative = relative_to_prior(subject.gradient, subject.objective)
    norm, loss = float(subject.gradient.norm()), float(subject.objective.loss(subject.objective.theta))
    values = {"relative_gradient": relative, "gradient_norm": norm, "loss": loss, "loss_per_row": loss / subject.n_data}
    measured = (
        f"|∇L| = {norm:.3g}, {relative:.2g} times the slope of the prior, |δ(θ − θ0)|; "
        f"L = {loss:.4g} nats, {loss / subject.n_data:.3g} a row"
    )
    if relative <= _SMALL:
        yield Finding("gradient", "ok", measured, values=values)
        return
    meaning = (
        "data and prior do not balance: not a maximum a posteriori of this prior precision. Centred forms (the "
        "default) are right for the posterior around these weights; centred=False and the marginal likelihood are not."
    )
    remedy = "train longer with a decaying rate, and check prior_precision against the weight decay"
    yield Finding("gradient", "note" if relative <= _LARGE else "warning", measured, meaning, remedy, values)


def newton_finding(subject: DiagnosticContext) -> Iterator[Finding]:
    """½ gᵀA⁻¹g with A = GGN + δ, by a few iterations of CG, which give it from below.

    By Cauchy and Schwarz |J A⁻¹g| ≤ √(J A⁻¹Jᵀ) √(gᵀA⁻¹g): a Newton step moves no linearised output by more than
    √(gᵀA⁻¹g) of its own posterior standard deviations.
    """
    centred, gradient = subject.objective.centred(curvature="ggn"), subject.gradient
    if not float(gradient.norm()):
        yield Finding("distance to the optimum", "ok", "no slope at all", values={"newton_decrement": 0.0})
        return
    solved = block_cg(centred.product, gradient[None], tol=1e-3, max_iter=_ITERATIONS, must_converge=False)
    step = solved.solution
    energy = max(0.0, float((gradient * step[0]).sum()))
    x = next(iter(subject.objective.batches)).x
    moved = float(subject.objective.network.jvp(x, step).square().mean().sqrt())
    values = {
        "newton_decrement": energy / 2,
        "newton_decrement_per_row": energy / 2 / subject.n_data,
        "standard_deviations": math.sqrt(energy),
        "output_change": moved,
        "residual": float(solved.residuals.max()),
        "iterations": solved.iterations,
    }
    measured = (
        f"a Newton step with the GGN would lower L by {energy / 2:.3g} nats ({energy / 2 / subject.n_data:.2g} a row) "
        f"and move the outputs by {moved:.2g} (rms), none of them by more than {math.sqrt(energy):.2g} of its standard "
        f"deviations; CG stopped at a residual of {values['residual']:.1g}"
    )
    if energy <= 1:
        yield Finding("distance to the optimum", "ok", measured, values=values)
        return
    meaning = "the posterior is centred where training stopped, not at its optimum."
    level: Level = "note" if energy <= 100 else "warning"
    yield Finding("distance to the optimum", level, measured, meaning, "train longer with a decaying rate", values)
