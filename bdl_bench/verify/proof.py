"""One proof: every exact route and both λ ladders of one subject against the dense reference, and the error split."""

from __future__ import annotations

import torch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from bdl_bench.verify.decomposition import Link, decompose
from bdl_bench.verify.ladder import LAMS, Ladder, climb, relative_error
from bdl_bench.verify.orders import EXPECTED
from bdl_bench.verify.reference import DenseReference
from bdl_bench.verify.subject import Subject
from estimators import LinearizedLaplace, LinearResponse, Pointwise, RegVar
from estimators.errors import EstimatorError, IndefiniteHessianError, TooLargeError
from estimators.memory import available_bytes
from estimators.subsets import SubsetSpec

__all__ = ["EXACT", "Proof", "bytes_needed", "prove"]

EXACT, AT_RUNG, BEST = 1e-8, (1e-4, 2e-4), 1e-6
"""Bounds: of every exact route; of the central refit at λ = 1e-4; of the best rung of its ladder."""

_INVERSES = {"ggn": ("cholesky", "cg", "dual"), "hessian": ("cholesky", "cg")}
_LARGEST = 2**31  # bytes: beyond this the dense, slow route takes hours


@dataclass(frozen=True)
class Proof:
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
    exact: dict[str, float]
    refusals: dict[str, str]
    ladders: dict[str, Ladder]
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


def _central_failures(ladder: Ladder) -> Iterator[str]:
    lam, bound = AT_RUNG
    at = ladder.at(lam) if lam in ladder.lams else 0.0
    if at is None or at > bound:
        yield f"central at λ = {lam:g}: {'refused' if at is None else f'error {at:.1e}'}, not ≤ {bound:g}"
    if ladder.best > BEST:
        yield f"central: best rung {ladder.best:.1e} > {BEST:g}"


def prove(
    subject: Subject,
    names: Sequence[str],
    *,
    name: str,
    curvature: str,
    subset: SubsetSpec,
    lams: Sequence[float] = LAMS,
    split: bool = True,
) -> Proof:
    """Measure everything for the weights `subset`, which the reference knows as `names`; `split`: also the error's parts.

    Errors: TooLargeError where the dense reference would not fit.
    """
    reference = subject.reference(names)
    _refuse_if_too_large(subject, reference)
    eigenvalues = torch.linalg.eigvalsh(reference.precision(curvature))
    exact = reference.covariance(subject.queries, curvature)
    fit = partial(_fit, subject, curvature=curvature, subset=subset)
    errors, refusals = _exact_routes(fit, subject.queries, exact, curvature)
    proof = Proof(
        name,
        curvature,
        subset if isinstance(subset, str) else ", ".join(subset),
        n_parameters=len(eigenvalues),
        n_rows=subject.n_rows,
        relative_gradient=subject.relative_gradient(),
        spectrum=(float(eigenvalues[0]), float(eigenvalues[-1])),
        exact=errors,
        refusals=refusals,
        ladders={},
    )
    return proof
