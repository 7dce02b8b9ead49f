"""One proof: every exact route and both λ ladders of one subject against the dense reference, and the error split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from bdl_bench.verify.decomposition import Link, decompose
from bdl_bench.verify.lambda_sweep import LAMS, LambdaSweep, relative_error, run_sweep
from bdl_bench.verify.orders import EXPECTED
from bdl_bench.verify.reference import DenseReference
from bdl_bench.verify.subject import VerificationCase
from estimators import LinearizedLaplace, LinearResponse, Pointwise, RegVar, UncertaintyEstimator
from estimators.errors import EstimatorError, IndefiniteHessianError, TooLargeError
from estimators.models.subsets import SubsetSpec
from estimators.runtime.memory import available_bytes

__all__ = ["Check", "Verification", "check_fits_memory", "verify"]

_Estimator = TypeVar("_Estimator", bound=UncertaintyEstimator)

EXACT, AT_RUNG, BEST = 1e-8, (1e-4, 2e-4), 1e-6
"""Bounds: of every exact route; of the central refit at λ = 1e-4; of the best rung of its ladder."""

_INVERSES = {"ggn": ("cholesky", "cg", "dual"), "hessian": ("cholesky", "cg")}
_LARGEST = 2**31  # bytes: beyond this the dense, slow route takes hours


@dataclass(frozen=True)
class Verification:
    """What was measured.

    exact: the error of each exact route; refusals: of the routes that raised, the error; ladders: by difference;
    spectrum: smallest and largest eigenvalue of the reference's A.
    """

    name: str
    curvature: str
    subset: str
    n_parameters: int
    n_rows: int
    relative_gradient: float
    spectrum: tuple[float, float]
    exact: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    ladders: dict[str, LambdaSweep] = field(default_factory=dict)
    links: tuple[Link, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def definite(self) -> bool:
        """Whether A has an inverse to prove something about."""
        return self.spectrum[0] > 5e-10 * self.spectrum[1]

    def failures(self) -> list[str]:
        """Every bound that does not hold, in words; an A without an inverse must be refused by every route."""
        return list(self._failures() if self.definite else self._accepted())

    def _accepted(self) -> Iterator[str]:
        yield from (f"{route} accepted a Hessian that is not positive definite" for route in self.exact)
        for route, error in self.refusals.items():
            if not error.startswith(IndefiniteHessianError.__name__):
                yield f"{route} refused it with {error}"

    def _failures(self) -> Iterator[str]:
        yield from (f"{route}: {error}" for route, error in self.refusals.items())
        yield from (f"{route}: error {error:.1e} > {EXACT:g}" for route, error in self.exact.items() if error > EXACT)
        for difference, ladder in self.ladders.items():
            if not ladder.order.as_expected(difference):
                expected, tolerance = EXPECTED[difference]
                found = ladder.order.note if ladder.order.slope is None else f"slope {ladder.order.slope:.3f}"
                yield f"{difference}: {found}, not {expected:g} ± {tolerance:g}"
        if "central" in self.ladders:
            yield from _central_failures(self.ladders["central"])


def _central_failures(ladder: LambdaSweep) -> Iterator[str]:
    lam, bound = AT_RUNG
    at = ladder.at(lam) if lam in ladder.lams else 0.0
    if at is None or at > bound:
        yield f"central at λ = {lam:g}: {'refused' if at is None else f'error {at:.1e}'}, not ≤ {bound:g}"
    if ladder.best > BEST:
        yield f"central: best rung {ladder.best:.1e} > {BEST:g}"


@dataclass(frozen=True)
class Check:
    """What is to be proved: A of this curvature over the weights `subset`, which the reference knows as `names`."""

    curvature: str
    subset: SubsetSpec
    names: list[str]

    def __str__(self) -> str:
        return self.subset if isinstance(self.subset, str) else ", ".join(self.subset)


def verify(
    subject: VerificationCase,
    claim: Check,
    *,
    name: str,
    lams: Sequence[float] = LAMS,
    split: bool = True,
    draws: int = 16,
) -> Verification:
    """Measure everything; with `split` also the parts of the error of `draws` posterior draws.

    Errors: TooLargeError where the dense reference would not fit.
    """
    reference = subject.reference(claim.names)
    check_fits_memory(subject, reference)
    eigenvalues = torch.linalg.eigvalsh(reference.precision(claim.curvature))
    proof = Verification(
        name,
        claim.curvature,
        str(claim),
        n_parameters=len(eigenvalues),
        n_rows=subject.n_rows,
        relative_gradient=subject.relative_gradient(),
        spectrum=(float(eigenvalues[0]), float(eigenvalues[-1])),
    )
    exact = reference.covariance(subject.queries, claim.curvature)
    errors, refusals = _exact_routes(subject, claim, exact)
    ladders = _ladders(subject, claim, exact, lams) if proof.definite and not refusals else {}
    links = decompose(subject, claim.subset, claim.names, n_draws=draws) if split else []
    return replace(proof, exact=errors, refusals=refusals, ladders=ladders, links=tuple(links))


def _exact_routes(subject: VerificationCase, claim: Check, exact: Tensor) -> tuple[dict[str, float], dict[str, str]]:
    errors, refusals = {}, {}
    for route, estimator in _routes(subject, claim):
        try:
            errors[route] = relative_error(estimator.fit(subject.batches).covariance(subject.queries), exact)
        except EstimatorError as error:
            refusals[route] = f"{type(error).__name__}: {error.received}"
    return errors, refusals


def _routes(subject: VerificationCase, claim: Check) -> Iterator[tuple[str, UncertaintyEstimator]]:
    for inverse in _INVERSES[claim.curvature]:
        yield f"laplace {inverse}", _build(LinearizedLaplace, subject, claim, inverse=inverse)
    response = LinearResponse(tol=1e-12)
    yield "linear response", _build(RegVar, subject, claim, regularizer=Pointwise(), solver=response)


def _ladders(subject: VerificationCase, claim: Check, exact: Tensor, lams: Sequence[float]) -> dict[str, LambdaSweep]:
    estimator = _build(RegVar, subject, claim, regularizer=Pointwise(), solver=LinearResponse()).fit(subject.batches)
    return {d: run_sweep(estimator, subject.queries, exact, difference=d, lams=lams) for d in EXPECTED}


def _build(kind: Callable[..., _Estimator], subject: VerificationCase, claim: Check, **options: object) -> _Estimator:
    return kind(
        subject.model,
        subject.likelihood,
        prior_precision=subject.prior_precision,
        subset_of_weights=claim.subset,
        curvature=claim.curvature,
        **options,
    )


def check_fits_memory(subject: VerificationCase, reference: DenseReference) -> None:
    """TooLargeError where the dense reference needs more than 2 GiB or half of the free memory."""
    theta, f = reference.theta, reference.outputs(subject.batches[0][0])
    p, rows = theta.numel(), subject.n_rows * f.shape[-1]
    needed = theta.element_size() * (4 * p * p + 2 * rows * p)
    available = min(_LARGEST, available_bytes(theta.device) // 2)
    if needed > available:
        raise TooLargeError(
            f"the dense reference over {p:,} parameters and {rows:,} outputs",
            bytes_needed=needed,
            bytes_available=available,
            remedy="a smaller subset of weights such as --subset last_layer, a smaller network, or fewer rows.",
        )
