"""The estimated cost of every method, before a fit: bytes, passes, seconds.

A pass is a forward and a backward pass over N rows, as `estimators.runtime.pass_counter` counts: a forward pass is one
third, a backward pass two thirds, and a product with A one pass per vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from estimators.curvature.builders import LOW_RANK
from estimators.curvature.dense import cholesky as dense
from estimators.curvature.dense import dual
from estimators.curvature.layerwise import factored_dual, matrix_free_dual
from estimators.curvature.sizes import choose_inverse
from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Cost, Finding
from estimators.diagnostics.sizes import Sizes
from estimators.regvar.regularizers import PosteriorDraws
from estimators.regvar.solvers.fine_tune import DEFAULT_RECIPE
from estimators.runtime.units import in_bytes, in_seconds

__all__ = ["cost_finding", "costs_of"]

_CHECKS = 2 / 3  # two forward passes before every fit
_SELF_CHECK = 1.0  # one pass of plain autograd per kind of product
_DRAWS = PosteriorDraws().n_draws
_PRODUCTS = 9  # products with A per posterior draw, with bounds
_ITERATIONS_TO_TOLERANCE = (
    20  # of the default RegVar, rtol = .05: 4 to 40 on the bundled tasks (docs/benchmarks/tolerance.md)
)
_PROBE_PRODUCTS = 64  # products with A for its probes
_BASIS_BYTES = 2**32  # the largest Krylov basis
_CHUNK_BYTES = 2**28  # Jacobian rows that are in memory together
_ITERATIONS = 100  # CG iterations; a CNN with 38,000 parameters needed 80 for a residual of 3e-4


def cost_finding(context: DiagnosticContext) -> Iterator[Finding]:
    """Find the exact method that fits into memory and those that do not; add the costs to the context."""
    sizes = Sizes.of(context)
    costs = costs_of(sizes, context)
    context.costs.extend(costs)
    chosen = choose_inverse(context.objective.centred(curvature="ggn"), curvature="ggn", available=sizes.available)
    exact = next(cost for cost in costs if cost.estimator == _FULL.format(chosen))
    too_large = [cost.estimator for cost in costs if not cost.fits]
    values = {
        "inverse": chosen,
        "bytes": exact.bytes_needed,
        "seconds": exact.seconds,
        "seconds_per_pass": sizes.seconds_per_pass,
        "too_large": too_large,
    }
    measured = (
        f"a pass over {sizes.n_data:,} rows takes {in_seconds(sizes.seconds_per_pass)}; the exact variance of "
        f'{sizes.n_parameters:,} parameters by inverse="{chosen}", {in_bytes(exact.bytes_needed)} and about '
        f"{in_seconds(exact.seconds)}"
    )
    if chosen != "cg" and not too_large:
        yield Finding("cost", "ok", measured, values=values)
        return
    listed = f"too large: {', '.join(too_large)}." if too_large else "everything fits."
    if chosen == "cg":
        listed += f" The exact method that fits solves {sizes.n_outputs} linear systems per query row."
    remedy = f'RegVar(), or inverse="{chosen}" for a few rows'
    yield Finding("cost", "note", measured, listed, remedy, values)


_FULL = 'LinearizedLaplace(inverse="{}")'
_DIVIDE_BY_DELTA = ('"dual"', '"matrix_free_dual"', '"lowrank"')


def costs_of(sizes: Sizes, context: DiagnosticContext) -> list[Cost]:
    """Return the cost of every method, exact methods first."""
    kinds: list[tuple[str, Callable[[Sizes], tuple[float, float, float]]]] = [
        (_FULL.format("cholesky"), _cholesky),
        (_FULL.format("dual"), _dual),
        (_FULL.format("matrix_free_dual"), _matrix_free_dual),
        (_FULL.format("cg"), _cg),
        ('LinearizedLaplace(hessian_structure="kron")', lambda s: _kron(s, passes=1)),
        ('LinearizedLaplace(hessian_structure="ekfac")', lambda s: _kron(s, passes=2)),
        ('LinearizedLaplace(hessian_structure="diag")', _diagonal),
        ('LinearizedLaplace(hessian_structure="lowrank")', _low_rank),
        ("RegVar()", _to_tolerance),
        ("RegVar(solver=FineTune())", _fine_tune),
        ("RegVar(solver=LinearResponse())", _linear_response),
    ]
    if sizes.last_layer is not None:
        kinds.insert(0, ("LastLayerLaplace()", _last_layer))
    if not bool((context.objective.prior.precision > 0).all()):
        kinds = [(name, kind) for name, kind in kinds if not any(form in name for form in _DIVIDE_BY_DELTA)]
    return [_cost(name, sizes, *kind(sizes)) for name, kind in kinds]


def _cost(name: str, s: Sizes, bytes_needed: float, passes: float, flops: float) -> Cost:
    seconds = s.seconds_of_checks + passes * s.seconds_per_pass + flops * s.seconds_per_flop
    afterwards = f"and {_ITERATIONS * s.n_outputs:,} passes per query" if "cg" in name else ""
    return Cost(name, int(bytes_needed), s.available, round(passes + _CHECKS, 2), seconds, afterwards)


def _jacobian_passes(s: Sizes) -> float:
    """Return the cost of a forward pass and one backward pass per output."""
    return 1 / 3 + 2 / 3 * s.n_outputs


def _last_layer(s: Sizes) -> tuple[float, float, float]:
    assert s.last_layer is not None
    return 5 * s.last_layer**2 * s.algebra, 1 / 3 + _SELF_CHECK, s.n_data * s.last_layer**2 + s.last_layer**3


def _cholesky(s: Sizes) -> tuple[float, float, float]:
    flops = s.n_data * s.n_outputs * s.n_parameters**2 + s.n_parameters**3 / 3
    return dense.bytes_needed(s.n_parameters, s.algebra), _jacobian_passes(s) + _SELF_CHECK, flops


def _dual(s: Sizes) -> tuple[float, float, float]:
    rows = s.n_data * s.n_outputs
    if s.in_factors:
        flops = 2 * rows**2 * sum(o + e for o, e in s.maps) + rows**3 / 3
        needed = factored_dual.bytes_needed(s.n_data, s.n_outputs, s.n_parameters, s.maps, s.algebra)
        return needed, _jacobian_passes(s) + _SELF_CHECK, flops
    flops = 2 * rows**2 * s.n_parameters + rows**3 / 3
    return dual.bytes_needed(rows, s.n_parameters, s.algebra), _jacobian_passes(s) + _SELF_CHECK, flops


def _matrix_free_dual(s: Sizes) -> tuple[float, float, float]:
    rows = s.n_data * s.n_outputs
    widths = sum(o + e for o, e in s.maps)
    flops = 2 * rows**2 * widths + rows**3 / 3
    return matrix_free_dual.bytes_needed(rows, s.algebra), 2 * _jacobian_passes(s) + _SELF_CHECK, flops


def _cg(s: Sizes) -> tuple[float, float, float]:
    return min(_BASIS_BYTES, 64 * s.n_outputs * s.n_parameters * s.element), 0, 0


def _kron(s: Sizes, *, passes: int) -> tuple[float, float, float]:
    factors = sum(o**2 + e**2 for o, e in s.maps)
    held = 3 * factors * s.algebra + 2 * s.n_parameters * s.element + _factor_rows(s)
    flops = 2 * s.n_data * s.n_outputs * factors + 10 * sum(o**3 + e**3 for o, e in s.maps)
    return held, passes * _jacobian_passes(s) + _SELF_CHECK, flops


def _diagonal(s: Sizes) -> tuple[float, float, float]:
    return 3 * s.n_parameters * s.element + _factor_rows(s), _jacobian_passes(s) + _SELF_CHECK, 0


def _low_rank(s: Sizes) -> tuple[float, float, float]:
    size = min(2 * LOW_RANK + 32, s.n_parameters)
    return 4 * size * s.n_parameters * s.element, size + 2 * _SELF_CHECK, 4 * size**2 * s.n_parameters


def _fine_tune(s: Sizes) -> tuple[float, float, float]:
    epochs = DEFAULT_RECIPE.resolve(s.n_data).epochs
    assert isinstance(epochs, int)
    vector = s.n_parameters * s.element
    return 12 * _DRAWS * vector, 1 + _DRAWS * (epochs + 2) + 4 * _SELF_CHECK, 0


def _to_tolerance(s: Sizes) -> tuple[float, float, float]:
    size, vector = min(_DRAWS * _ITERATIONS_TO_TOLERANCE, s.n_parameters), s.n_parameters * s.element
    products = _DRAWS + size + (_PROBE_PRODUCTS if size < s.n_parameters else 0)
    return (
        (2 * size + _PROBE_PRODUCTS + 6 * _DRAWS) * vector,
        1 + products + 3 * _SELF_CHECK,
        4 * size**2 * s.n_parameters,
    )


def _linear_response(s: Sizes) -> tuple[float, float, float]:
    size = min(_DRAWS * _PRODUCTS, s.n_parameters)
    vector = s.n_parameters * s.element
    return (
        (2 * size + 6 * _DRAWS) * vector,
        1 + _DRAWS * (_PRODUCTS + 1) + 3 * _SELF_CHECK,
        4 * size**2 * s.n_parameters,
    )


def _factor_rows(s: Sizes) -> float:
    """Return the bytes of the Jacobian factors of a chunk of rows."""
    per_row = sum(2 * e + 3 * s.n_outputs * o for o, e in s.maps) * s.element
    return min(_CHUNK_BYTES, s.n_data * per_row)
