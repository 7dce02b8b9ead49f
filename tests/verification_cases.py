"""The cases of the verification: problem × curvature × subset, all of them and a pairwise cover of the choices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import torch
from verification_problems import ARCHITECTURES, LIKELIHOODS, TRAININGS, test_problem

from bdl_bench.verify.case import VerificationCase
from bdl_bench.verify.reference import DenseReference
from estimators.models.subsets import SubsetSpec

__all__ = ["CURVATURES", "SUBSETS", "Case", "all_cases", "pairwise_cover"]

CURVATURES = ("ggn", "hessian")
SUBSETS = ("all", "last_layer", "by_name")

_DELTA, _SEED = 1.5, 0
_OTHERS: dict[tuple[str, str, str], tuple[int, float]] = {  # (seed, δ) for problems that need others:
    ("mlp", "regression", "converged"): (1, 1.5),  # ill-conditioned or indefinite Hessians,
    ("mlp", "binary", "minibatch"): (0, 3.0),
    ("cnn", "classification", "minibatch"): (3, 3.0),
    ("cnn", "binary", "minibatch"): (3, 1.5),
    ("residual", "classification", "minibatch"): (1, 3.0),
    ("residual", "binary", "minibatch"): (1, 1.5),
    ("attention", "regression", "converged"): (1, 1.5),  # and query and key that the prior would switch off
    **{("attention", "classification", training): (0, 0.5) for training in TRAININGS},
    **{("attention", "binary", training): (0, 0.5) for training in TRAININGS},
    ("attention", "binary", "minibatch"): (1, 0.5),
    ("attention", "classification", "retuned"): (2, 0.5),  # and sweeps still nonlinear, or central errors
    ("attention", "binary", "retuned"): (1, 0.5),  # of 1.3e-6, at the smallest λ, 1e-5 (seed 0)
}
_GLOBS: dict[str, list[str]] = {
    "mlp": ["0.bias", "2.*"],
    "cnn": ["1.*", "3.*", "6.bias"],
    "residual": ["stem_norm.*", "block.weight", "head.*"],
    "attention": ["norm.*", "value.*", "head.*"],  # query and key can be turned together, and so can value and out
}
_HEADS = {"mlp": "2.", "cnn": "6.", "residual": "head.", "attention": "head."}


@dataclass(frozen=True)
class Case:
    """A test problem with a curvature and a subset of weights."""

    architecture: str
    likelihood: str
    training: str
    curvature: str
    subset: str

    def __str__(self) -> str:
        return "-".join((self.architecture, self.likelihood, self.training, self.curvature, self.subset))

    @property
    def problem(self) -> VerificationCase:
        """The trained problem, cached."""
        seed, delta = _OTHERS.get((self.architecture, self.likelihood, self.training), (_SEED, _DELTA))
        return test_problem(self.architecture, self.likelihood, self.training, seed, delta)

    @property
    def subset_of_weights(self) -> SubsetSpec:
        """What the estimators are told."""
        return _GLOBS[self.architecture] if self.subset == "by_name" else self.subset

    @property
    def names(self) -> list[str]:
        """The same parameters, chosen here by their names and not by the library."""
        names = [name for name, _ in self.problem.model.named_parameters()]
        if self.subset == "last_layer":
            names = [name for name in names if name.startswith(_HEADS[self.architecture])]
        if self.subset == "by_name":
            stems = [glob.removesuffix("*") for glob in _GLOBS[self.architecture]]
            names = [name for name in names if name.startswith(tuple(stems))]
        return names

    @property
    def reference(self) -> DenseReference:
        """The dense reference over these parameters."""
        return self.problem.reference(self.names)

    @property
    def singular_by_symmetry(self) -> bool:
        """Whether rotating query and key together leaves the loss unchanged: the Hessian is singular for every δ."""
        return self.architecture == "attention" and (self.subset, self.training) == ("all", "converged")

    def spectrum(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue of the reference's A."""
        eigenvalues = torch.linalg.eigvalsh(_precision(self))
        return float(eigenvalues[0]), float(eigenvalues[-1])

    @property
    def well_posed(self) -> bool:
        """Whether A is well conditioned: always for the GGN; a Hessian with λ_min ≥ δ/10 and condition ≤ 1e6."""
        smallest, largest = self.spectrum()
        delta = float(self.problem.reference(self.names).delta_vector().min())
        return self.curvature == "ggn" or (smallest >= delta / 10 and largest <= 1e6 * smallest)


@cache
def _precision(case: Case) -> torch.Tensor:
    return case.reference.precision(case.curvature)


def all_cases() -> list[Case]:
    """The full product."""
    return [Case(*choice) for choice in product(ARCHITECTURES, LIKELIHOODS, TRAININGS, CURVATURES, SUBSETS)]


def pairwise_cover() -> list[Case]:
    """Few cases that contain every pair of choices that can be verified, chosen greedily in a fixed order.

    Hessians off a minimum may be indefinite but for the last layer, so that "retuned" stands in for "minibatch" there;
    at a converged optimum of attention they are singular for all weights. Those are left to the tests of the errors.
    """
    candidates = [case for case in all_cases() if _promising(case)]
    open_pairs = {pair for case in candidates for pair in _pairs(case)}
    chosen: list[Case] = []
    while open_pairs:
        best = max(candidates, key=lambda case: (len(open_pairs & _pairs(case)), case.curvature == "hessian"))
        chosen.append(best)
        open_pairs -= _pairs(best)
    return chosen


def _promising(case: Case) -> bool:
    if case.curvature == "ggn" or case.subset == "last_layer":
        return case.training != "retuned"
    return case.training in ("converged", "retuned") and not case.singular_by_symmetry


def _pairs(case: Case) -> set[tuple[tuple[int, str], ...]]:
    training = "minibatch" if case.training == "retuned" else case.training  # neither is stationary
    choices = enumerate((case.architecture, case.likelihood, training, case.curvature, case.subset))
    return set(combinations(choices, 2))
