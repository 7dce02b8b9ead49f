"""One verification: exact routes and λ sweeps against the dense reference, and the parts of the error of draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from bdl_bench.verify.case import VerificationCase
from bdl_bench.verify.error_parts import SINGULAR, ErrorPart, error_parts_of
from bdl_bench.verify.lambda_sweep import EXPECTED, LAMS, LambdaSweep, relative_error, run_sweep
from bdl_bench.verify.reference import DenseReference
from estimators import LinearizedLaplace, LinearResponse, Pointwise, RegVar, UncertaintyEstimator
from estimators.errors import EstimatorError, IndefiniteHessianError, TooLargeError
from estimators.models.subsets import SubsetSpec
from estimators.runtime.memory import available_bytes

__all__ = ["Check", "Verification", "check_size", "verify"]

_Estimator = TypeVar("_Estimator", bound=UncertaintyEstimator)

EXACT_BOUND = 1e-8
"""Largest relative error of an exact route."""
CENTRAL_LAM, CENTRAL_BOUND = 1e-4, 2e-4
"""Largest relative error of the refit with central differences at this λ."""
BEST_BOUND = 1e-6
"""Largest relative error of central differences at the best λ of the sweep."""
_INVERSES = {"ggn": ("cholesky", "cg", "dual"), "hessian": ("cholesky", "cg")}
_MAX_BYTES = 2**31
"""Memory of the dense reference beyond which it takes hours."""


@dataclass(frozen=True)
class Verification:
    """What was measured for one network.

    Args:
        name: of the network.
        curvature: "ggn" or "hessian".
        subset: the weights, in words.
        n_parameters: P.
        n_rows: N.
        relative_gradient: ‖∇L(θ̂)‖ / ‖δ θ̂‖.
        spectrum: smallest and largest eigenvalue of the reference's A.
        exact: relative error of each exact route.
        raised: error message of each exact route that raised.
        sweeps: λ sweep of each difference.
        error_parts: parts of the error of posterior draws.
        notes: what was changed before the measurement.
    """

    name: str
    curvature: str
    subset: str
    n_parameters: int
    n_rows: int
    relative_gradient: float
    spectrum: tuple[float, float]
    exact: dict[str, float] = field(default_factory=dict)
    raised: dict[str, str] = field(default_factory=dict)
    sweeps: dict[str, LambdaSweep] = field(default_factory=dict)
    error_parts: tuple[ErrorPart, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def definite(self) -> bool:
        """Whether A is positive definite, so that there is a variance to compare."""
        return self.spectrum[0] > SINGULAR * self.spectrum[1]

    def failures(self) -> list[str]:
        """Return every bound that is exceeded, in words. If A is not positive definite, every route must raise."""
        return list(self._failures() if self.definite else self._accepted())

    def _accepted(self) -> Iterator[str]:
        yield from (f"{route} accepted a Hessian that is not positive definite" for route in self.exact)
        for route, error in self.raised.items():
            if not error.startswith(IndefiniteHessianError.__name__):
                yield f"{route} raised {error}"

    def _failures(self) -> Iterator[str]:
        yield from (f"{route}: {error}" for route, error in self.raised.items())
        for route, error in self.exact.items():
            if error > EXACT_BOUND:
                yield f"{route}: error {error:.1e} > {EXACT_BOUND:g}"
        for difference, sweep in self.sweeps.items():
            if not sweep.order.as_expected(difference):
                expected, tolerance = EXPECTED[difference]
                found = sweep.order.note if sweep.order.slope is None else f"slope {sweep.order.slope:.3f}"
                yield f"{difference}: {found}, not {expected:g} ± {tolerance:g}"
        if "central" in self.sweeps:
            yield from _central_failures(self.sweeps["central"])


def _central_failures(sweep: LambdaSweep) -> Iterator[str]:
    error = sweep.at(CENTRAL_LAM) if CENTRAL_LAM in sweep.lams else 0.0
    if error is None or error > CENTRAL_BOUND:
        found = "raised an error" if error is None else f"error {error:.1e}"
        yield f"central at λ = {CENTRAL_LAM:g}: {found}, not ≤ {CENTRAL_BOUND:g}"
    if sweep.best > BEST_BOUND:
        yield f"central: best step {sweep.best:.1e} > {BEST_BOUND:g}"


@dataclass(frozen=True)
class Check:
    """What is verified: A of a curvature, over weights as the estimators and as the reference take them."""

    curvature: str
    subset: SubsetSpec
    names: list[str]

    def __str__(self) -> str:
        return self.subset if isinstance(self.subset, str) else ", ".join(self.subset)


def verify(
    case: VerificationCase, check: Check, *, name: str, lams: Sequence[float] = LAMS, with_error_parts: bool = True
) -> Verification:
    """Compare exact routes and λ sweeps with the dense reference; `failures()` compares the result with the bounds.

    Raises TooLargeError if the dense reference does not fit into memory.
    """
    reference = case.reference(check.names)
    check_size(case, reference)
    eigenvalues = torch.linalg.eigvalsh(reference.precision(check.curvature))
    verification = Verification(
        name,
        check.curvature,
        str(check),
        n_parameters=len(eigenvalues),
        n_rows=case.n_rows,
        relative_gradient=case.relative_gradient(),
        spectrum=(float(eigenvalues[0]), float(eigenvalues[-1])),
    )
    exact = reference.covariance(case.queries, check.curvature)
    errors, raised = _exact_routes(case, check, exact)
    sweeps: dict[str, LambdaSweep] = {}
    if verification.definite and not raised:
        fitted = _build(RegVar, case, check, regularizer=Pointwise(), solver=LinearResponse()).fit(case.batches)
        sweeps = {d: run_sweep(fitted, case.queries, exact, difference=d, lams=lams) for d in EXPECTED}
    error_parts = error_parts_of(case, check.subset, check.names) if with_error_parts else []
    return replace(verification, exact=errors, raised=raised, sweeps=sweeps, error_parts=tuple(error_parts))


def _exact_routes(case: VerificationCase, check: Check, exact: Tensor) -> tuple[dict[str, float], dict[str, str]]:
    errors, raised = {}, {}
    for route, estimator in _routes(case, check):
        try:
            errors[route] = relative_error(estimator.fit(case.batches).covariance(case.queries), exact)
        except EstimatorError as error:
            raised[route] = f"{type(error).__name__}: {error.received}"
    return errors, raised


def _routes(case: VerificationCase, check: Check) -> Iterator[tuple[str, UncertaintyEstimator]]:
    for inverse in _INVERSES[check.curvature]:
        yield f"laplace {inverse}", _build(LinearizedLaplace, case, check, inverse=inverse)
    response = LinearResponse(tol=1e-12)
    yield "linear response", _build(RegVar, case, check, regularizer=Pointwise(), solver=response)


def _build(kind: Callable[..., _Estimator], case: VerificationCase, check: Check, **options: object) -> _Estimator:
    return kind(
        case.model,
        case.likelihood,
        prior_precision=case.prior_precision,
        subset_of_weights=check.subset,
        curvature=check.curvature,
        **options,
    )


def check_size(case: VerificationCase, reference: DenseReference) -> None:
    """Raise TooLargeError if the dense reference needs more than 2 GiB or half of the free memory."""
    theta, f = reference.theta, reference.outputs(case.batches[0][0])
    p, rows = theta.numel(), case.n_rows * f.shape[-1]
    needed = theta.element_size() * (4 * p * p + 2 * rows * p)
    available = min(_MAX_BYTES, available_bytes(theta.device) // 2)
    if needed > available:
        raise TooLargeError(
            f"the dense reference over {p:,} parameters and {rows:,} outputs",
            bytes_needed=needed,
            bytes_available=available,
            remedy="a smaller subset of weights such as --subset last_layer, a smaller network, or fewer rows.",
        )
