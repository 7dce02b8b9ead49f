"""The page docs/benchmarks/large.md."""

from __future__ import annotations

import math
from statistics import fmean

from scipy.stats import chi2

from benchmarks.large.methods import METHODS, N_DRAWS
from benchmarks.large.models import MODELS, N_DATA, N_QUERIES, PRIOR_PRECISION
from benchmarks.machine import machine
from benchmarks.markdown import gib, table, verdict
from benchmarks.records import Measured

__all__ = ["REFERENCE", "to_markdown"]

REFERENCE = "reference"
_PEAK = 8.0
_STATED = 2.0  # the RMS error at three queries may be this many times the stated one
_DRAWS = 3 * math.sqrt(2 / N_DRAWS)
_WITHIN = {"exact": 0.01, "pointwise": 0.1}
_WITHIN |= dict.fromkeys(("auto", "linear-response", "fine-tune", "fine-tune-other-draws"), _DRAWS)
_HEADER = (
    *("network", "P", "method", "fit, s", "variance, s", "passes", "A-norm error", "peak, GiB", "goal", ""),
    *("largest error", "goal", "", "RMS error", "stated", "goal", ""),
)
_HEAD = """# All weights of large networks

Measured on {machine}
Float32, N = {n}, {draws} draws, δ = {delta:g}, {queries} queries; other programs were running.
The command of this page is `python -m benchmarks --select large`, which takes hours; `--select resnet18-kron` measures
one row again.

ResNet-18 and ViT-tiny (patches of 8) see handwritten digits enlarged to 3×32×32; MiniLM (all-MiniLM-L6-v2, six
layers, published weights, a new classification layer) predicts from 16 tokens which of six texts they are from. Each
was trained on the {n} rows first. The largest error is max |variance / reference − 1| over the queries, at the
predicted class of each; a dash means that the reference was not run. The reference is independent: curvlinops' GGN in
float64 and scipy's conjugate gradients at a relative residual of 1e-6, with the function-space solution in float64 as
the initial guess. Kron and diag are approximations of the posterior; their error has no goal.

exact: `LinearizedLaplace(inverse="matrix_free_dual")`. pointwise: RegVar with `Pointwise`, by `LinearResponse` with its
default tolerance, at the predicted class of each query, where it solves. linear-response and fine-tune: RegVar with
`PosteriorDraws` and the solver of that name; fine-tune-other-draws has another seed. Passes (forward and backward
over the rows) are per draw, or per linear system. The A-norm error, per effective dimension, shows whether the solver
converged: above 0.5, fine-tune warns. The RMS error is the root mean square of variance / reference − 1 over the
queries. Stated is `relative_error_`, of which it may be twice; a dash means that the row was measured before it was
recorded. The variance of {draws} exact draws is χ²/{draws} times the true one, so that
one number in {chance:.0f} misses the goal of {goal:.1f} by sampling error alone.

"""


def to_markdown(rows: dict[str, Measured]) -> str:
    """Return the text of the page."""
    head = _HEAD.format(
        machine=machine(),
        n=N_DATA,
        draws=N_DRAWS,
        delta=PRIOR_PRECISION,
        queries=N_QUERIES,
        goal=_DRAWS,
        chance=1 / chi2.sf(N_DRAWS * (1 + _DRAWS), N_DRAWS),  # _DRAWS > 1, so that errors below do not occur
    )
    lines = [
        _line(model, method, rows[f"{model}-{method}"], rows.get(f"{model}-{REFERENCE}"))
        for model in MODELS
        for method in METHODS
        if f"{model}-{method}" in rows
    ]
    return head + table(_HEADER, lines) + "\n" + _references(rows)


def _line(model: str, method: str, row: Measured, reference: Measured | None) -> list[str]:
    if "failed" in row:
        return [model, "–", method, row["failed"], *["–"] * 12, "**missed**"]
    start = [model, f"{row['n_parameters']:,}", method, f"{row['fit_seconds']:.0f}", f"{row['variance_seconds']:.1f}"]
    start += [f"{row['passes']:.0f}" if "passes" in row else "–", f"{row['energy']:.2f}" if "energy" in row else "–"]
    size = row["peak"] / 2**30
    start += [gib(row["peak"]), *verdict(size, _PEAK if method in _WITHIN else None, at_most=True)]
    if reference is None:
        return [*start, *["–"] * 7]
    largest, rms = largest_error(row, reference), math.sqrt(fmean(error**2 for error in _errors(row, reference)))
    start += [f"{largest:.3f}", *verdict(largest, _WITHIN.get(method), at_most=True), f"{rms:.3f}"]
    if "stated" not in row:
        return [*start, "–", "–", "–"]
    return [*start, f"{row['stated']:.3f}", *verdict(rms, round(_STATED * row["stated"], 3), at_most=True)]


def largest_error(row: Measured, reference: Measured) -> float:
    """Return max |variance / reference − 1| at the classes of the reference."""
    return max(map(abs, _errors(row, reference)))


def _errors(row: Measured, reference: Measured) -> list[float]:
    """Return variance / reference − 1 of each query, at the classes of the reference."""
    pairs = zip(row["variance"], reference["classes"], reference["variance"], strict=True)
    return [variance[c if len(variance) > 1 else 0] / exact - 1 for variance, c, exact in pairs]


def _references(rows: dict[str, Measured]) -> str:
    found = {model: rows[f"{model}-{REFERENCE}"] for model in MODELS if f"{model}-{REFERENCE}" in rows}
    words = [
        f"{model}: residual {max(row['guess_residuals']):.1e} at the start, {row['products']} products, "
        f"{row['seconds']:.0f} s, {row['guess_seconds']:.0f} of them for the start"
        for model, row in found.items()
    ]
    return f"\nThe reference, for {N_QUERIES} numbers each: {'; '.join(words)}.\n" if words else ""
