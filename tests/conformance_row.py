"""What a row of the conformance table says, and the sets of checks that rows have in common."""

from dataclasses import dataclass, field

import pytest

from estimators.testing import CHECKS

CLOSED_FORMS = {name for name in CHECKS if name.startswith("closed-form")} | {"sample-joint"}
INVARIANTS = {
    "below-prior",
    "prior-limit",
    "prior-monotone",
    "data-reduce-variance",
    "noise-scaling",
    "noise-not-epistemic",
}
WEIGHT_SAMPLES = {"weight-samples", "weight-moments"}
MATRICES = {"posterior-matrices"}
SAMPLES = {name for name in CHECKS if name.startswith("sample")} | WEIGHT_SAMPLES
COVARIANCE = {"covariance", "functional", "closed-form-covariance", "joint-covariance"}
GRADIENTS = {"input-gradients"}
NO_WEIGHTS = WEIGHT_SAMPLES | MATRICES | GRADIENTS | {"jacobians"}  # no Gaussian over weights
ENDS_IN_LINEAR = {"output-shape", "constant-output"}  # networks that do not end in a linear layer are rejected
GGN = {"exact": "ggn"}
DIFFERING = {name for name in CHECKS if name.startswith("closed-form")} | INVARIANTS - {"prior-monotone"}
DIFFERING |= {"shapes", "dtype-device", "non-negative", "covariance", "functional", "constant-output", "dict-inputs"}
DIFFERING |= {"batch-independence", "model-untouched-by-fit", "random-state-untouched", "state-round-trip"}
"""Checks of what depends on how a variance is computed. The others are of code that all rows of a class share."""

COMPOSED = {"hessian, cg", "pointwise, linear response, hessian"}
"""Rows of two options that another row has alone, slow: by default not on the device and not in threads."""
VARIANTS = {
    "low rank, all of it",
    "last layer, kron",
    "draws, no Rao-Blackwellisation",
    "subnetwork, all of it",
    "mixture, one network twice",
    "SGHMC",
}
"""Rows whose code other rows run, too: by default not on the device and not in threads."""


@dataclass(frozen=True)
class Row:
    """An estimator, the options of `check_estimator`, and the names of the checks that do not apply to it.

    `has_score` is whether it has an out-of-distribution score of its own; else the check of scores is skipped, too.
    `by_default` names the checks of the default run, if they are not all that the options ask for.
    """

    make: object
    options: dict = field(default_factory=dict)
    skipped: set = field(default_factory=set)
    by_default: frozenset | None = None
    has_score: bool = False

    def __post_init__(self):
        if not self.has_score:
            object.__setattr__(self, "skipped", self.skipped | {"score"})

    def asked(self, *, whole=True):
        """The names of the checks to run, in the default run or as a whole."""
        names = set(self.options.get("checks", CHECKS))
        return names if whole or self.by_default is None else names & self.by_default


def names_of(rows, *, at_night=()):
    """The names of rows as parameters of a test; COMPOSED, VARIANTS and `at_night` run with the verification suite."""
    at_night = COMPOSED | VARIANTS | set(at_night)
    return [pytest.param(name, marks=pytest.mark.verification if name in at_night else ()) for name in rows]
