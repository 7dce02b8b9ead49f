"""The λ sweep: refits at decreasing λ tend to the dense reference of their curvature, at the expected order.

Every single choice by default; every pair of choices and the full product with `-m verification`, which writes its
table to the file that BDL_VERIFICATION_TABLE names, if it is set.
"""

import pytest
from cases import all_cases, pairwise_cover, singular_cases

from bdl_bench.verify.verification import Check, verify

COVER = pairwise_cover()


def each_choice_once():
    """Few cases of the cover in which every single choice occurs: they run by default, the others nightly."""
    chosen, seen = [], set()
    while left := {choice for case in COVER for choice in choices(case)} - seen:
        chosen.append(max(COVER, key=lambda case: len(left & choices(case))))
        seen |= choices(chosen[-1])
    return chosen


def choices(case):
    return {case.architecture, case.likelihood, case.training, case.curvature, case.subset}


DEFAULT = each_choice_once()


def verification_of(case):
    return verify(
        case.problem, Check(case.curvature, case.subset_of_weights, case.names), name=str(case), with_error_parts=False
    )


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in DEFAULT else [pytest.mark.verification]) for c in COVER], ids=str
)
def test_refits_tend_to_the_reference_at_their_order(case):
    assert case.well_posed
    verification = verification_of(case)
    _assert_steps(verification)
    assert verification.failures() == []


def _assert_steps(verification):
    """The bounds once more, as numbers."""
    forward, central = verification.sweeps["forward"], verification.sweeps["central"]
    assert central.at(1e-4) <= 2e-4
    assert central.best <= 1e-6
    if forward.order.note == "quadratic":
        assert all(error <= 1e-9 for error in (*forward.errors, *central.errors))
        return
    assert abs(forward.order.slope - 1) <= 0.1
    assert abs(central.order.slope - 2) <= 0.15
    assert len(central.order.lams) >= 3


def test_the_cover_has_every_pair_that_can_be_verified():
    def pairs(case):
        training = "minibatch" if case.training == "retuned" else case.training
        choices = list(enumerate((case.architecture, case.likelihood, training, case.curvature, case.subset)))
        return {(a, b) for a in choices for b in choices if a < b}

    verifiable = [
        case
        for case in all_cases()
        if case.curvature == "ggn"
        or case.subset == "last_layer"
        or (case.training in ("converged", "retuned") and not case.singular_by_symmetry)
    ]
    wanted = set().union(*(pairs(case) for case in verifiable))
    assert wanted == set().union(*(pairs(case) for case in COVER))
    assert len(COVER) <= 18


@pytest.mark.verification
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_case_and_every_step(case, page):
    smallest, _ = case.spectrum()
    if smallest > 0 and not case.well_posed and case not in singular_cases():
        pytest.skip(f"smallest eigenvalue {smallest:.2g}, below a tenth of the prior precision")
    verification = verification_of(case)
    page(str(case), verification)
    assert verification.failures() == []
