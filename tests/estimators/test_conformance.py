"""Every estimator of the library keeps the contract, by the same kit that is offered to others: one table, a row each.

A row says what the estimator claims; checks that it skips are listed, so that none is lost in silence. A new estimator
is a new row.
"""

import re
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from estimators import (
    FineTune,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    MeanAbsolute,
    NewtonRefit,
    ParameterProbes,
    Pointwise,
    PosteriorDraws,
    RegVar,
    SignedProbes,
)
from estimators.baselines import MAP, LaplaceTorch
from estimators.errors import OptionError
from estimators.testing import CASES, CHECKS, check_estimator, formulas
from estimators.training import Recipe

CLOSED_FORMS = {name for name in CHECKS if name.startswith("closed-form")} | {"sample-joint"}
LAWS = {
    "below-prior",
    "prior-limit",
    "prior-monotone",
    "data-take-variance",
    "scaling-law",
    "noise-not-epistemic",
}
SAMPLES = {name for name in CHECKS if name.startswith("sample")}
COVARIANCE = {"covariance", "functional", "closed-form-covariance"}
ENDS_IN_LINEAR = {"output-shape", "constant-output"}  # networks that do not end in a linear layer are refused


@dataclass(frozen=True)
class Row:
    """An estimator, what it claims, and the names of the checks that do not apply to it."""

    make: object
    claims: dict = field(default_factory=dict)
    skipped: set = field(default_factory=set)


def laplace(**options):
    return partial(LinearizedLaplace, **options)


def regvar(regularizer, solver, **options):
    return partial(RegVar, regularizer=regularizer, solver=solver, **options)


def draws(n, **options):
    return regvar(PosteriorDraws(n_draws=n, **options), LinearResponse())


# A few of each kind: each solve is a refit to ten digits.
REFITTED = [
    "supports-a-model",
    "constructor-stores",
    "not-fitted",
    "shapes",
    "closed-form-network",
    "closed-form-classification",
    "closed-form-prior-groups",
    "closed-form-frozen",
    "closed-form-covariance",
    "constant-output",
    "prior-limit",
    "model-untouched-by-fit",
    "random-state-untouched",
    "state-round-trip",
]
# Products and definiteness are tried by the rows of the GGN and of the dense Hessian; here, that they go together.
SOLVED = [*REFITTED, "closed-form-regression", "closed-form-binary", "covariance", "functional", "predict-epistemic"]
# Minibatch refits: the laws, and what training could touch.
TRAINED = [
    "supports-a-model",
    "constructor-stores",
    "shapes",
    "dtype-device",
    "non-negative",
    "below-prior",
    "prior-limit",
    "data-take-variance",
    "scaling-law",
    "covariance",
    "sample-shape",
    "functional",
    "batch-independence",
    "dict-inputs",
    "model-untouched-by-fit",
    "random-state-untouched",
    "reproducible",
    "state-round-trip",
]
SHORT = Recipe(
    epochs=40, batch_size=10, optimizer="nesterov", lr="auto", momentum=0.9, schedule="constant", average=0.3
)

GGN = {"exact": "ggn"}
ROWS = {
    "full": Row(laplace(), GGN),
    "full, cholesky": Row(laplace(inverse="cholesky"), GGN),
    "full, dual": Row(laplace(inverse="dual"), GGN),
    "full, streamed": Row(laplace(inverse="streamed"), GGN),
    "full, cg": Row(laplace(inverse="cg"), GGN),
    "low rank, all of it": Row(laplace(hessian_structure="lowrank"), GGN),
    "low rank": Row(laplace(hessian_structure="lowrank", rank=5), {"prior_of": "all"}, CLOSED_FORMS),
    "kron": Row(laplace(hessian_structure="kron"), {"prior_of": "all"}, CLOSED_FORMS),
    "ekfac": Row(laplace(hessian_structure="ekfac"), {"prior_of": "all"}, CLOSED_FORMS),
    "diag": Row(laplace(hessian_structure="diag"), {"prior_of": "all"}, CLOSED_FORMS),
    "hessian": Row(laplace(curvature="hessian"), {"exact": "hessian"}),
    "hessian, cg": Row(laplace(curvature="hessian", inverse="cg"), {"exact": "hessian", "checks": SOLVED}),
    "last layer": Row(LastLayerLaplace, {"exact": "last_layer"}, ENDS_IN_LINEAR),
    "last layer, kron": Row(
        partial(LastLayerLaplace, hessian_structure="kron"),
        {"prior_of": "last_layer"},
        ENDS_IN_LINEAR | CLOSED_FORMS,
    ),
    "last layer, diag": Row(
        partial(LastLayerLaplace, hessian_structure="diag"),
        {"prior_of": "last_layer"},
        ENDS_IN_LINEAR | CLOSED_FORMS,
    ),
    "pointwise, linear response": Row(regvar(Pointwise(), LinearResponse()), GGN, SAMPLES),
    "pointwise, linear response, hessian": Row(
        regvar(Pointwise(), LinearResponse(), curvature="hessian"), {"exact": "hessian", "checks": SOLVED}
    ),
    "pointwise, newton": Row(regvar(Pointwise(), NewtonRefit()), {**GGN, "tolerance": 1e-5, "checks": REFITTED}),
    "draws": Row(draws(800), {**GGN, "noise": 0.05, "n_samples": 800}),
    "draws, no exact block": Row(draws(800, exact_block=None), {**GGN, "noise": 0.05, "n_samples": 800}),
    "draws, bounds": Row(
        draws(800, readout="bounds"),
        {
            **GGN,
            "noise": 0.05,
            "n_samples": 800,
            "skip": {"sample-moments": "samples are the draws, the variance is not"},
        },
        {"sample-moments"},
    ),
    "draws, fine tune": Row(
        regvar(PosteriorDraws(n_draws=16), FineTune(recipe=SHORT)),
        {"prior_of": "all", "noise": 0.4, "n_samples": 16, "checks": TRAINED},
        CLOSED_FORMS,
    ),
    "parameter probes": Row(
        regvar(ParameterProbes(n_probes=1500), LinearResponse()), {**GGN, "noise": 0.1}, SAMPLES | COVARIANCE
    ),
    "signed probes": Row(
        regvar(SignedProbes(n_probes=1500), LinearResponse()),
        {**GGN, "noise": 0.1},
        SAMPLES | COVARIANCE | {"batch-independence"},
    ),
    "mean absolute": Row(regvar(MeanAbsolute(), LinearResponse()), {}, CLOSED_FORMS | LAWS | SAMPLES | COVARIANCE),
    "map": Row(
        MAP,
        {"skip": {"not-constant": "its variance is zero by definition"}},
        CLOSED_FORMS | LAWS | {"not-constant"},
    ),
    "laplace-torch, full": Row(
        partial(LaplaceTorch, hessian_structure="full"),
        {**GGN, "tolerance": 1e-5},
        SAMPLES
        | {"output-shape", "dict-inputs", "state-round-trip"}
        | {"closed-form-binary", "closed-form-prior-groups", "closed-form-noise-per-output"},
    ),
    "laplace-torch, kron": Row(
        partial(LaplaceTorch, hessian_structure="kron"),
        {"prior_of": "all"},
        CLOSED_FORMS | SAMPLES | {"output-shape", "dict-inputs", "state-round-trip"},
    ),
    "laplace-torch, last layer": Row(
        partial(LaplaceTorch, subset_of_weights="last_layer", hessian_structure="full"),
        {"exact": "last_layer", "tolerance": 1e-5},
        SAMPLES
        | ENDS_IN_LINEAR
        | {"dict-inputs", "state-round-trip"}
        | {"closed-form-binary", "closed-form-prior-groups", "closed-form-noise-per-output"},
    ),
}

# Methods that train or sample networks of their own (estimators/baselines): no Gaussian posterior over weights, so no
# `prior_of`, and no laws. Those that need layers of their own (dropout) take `adapt=`; those that train need reasons in
# `skip=` for checks of a mean that is not the network's. One row each, here:
ROWS |= {}


@cache
def report_of(name):
    return check_estimator(ROWS[name].make, **ROWS[name].claims, raises=False)


@pytest.mark.parametrize("name", ROWS)
def test_an_estimator_keeps_the_contract_and_skips_nothing_but_what_is_listed(name):
    row, report = ROWS[name], report_of(name)
    assert report.failed == {}
    asked = set(row.claims.get("checks", CHECKS))
    assert set(report.skipped) == row.skipped & asked


def test_every_check_is_passed_by_some_estimator():
    assert set(report_of("full").passed) == set(CHECKS)


def test_the_page_lists_every_check_with_what_it_says_of_itself():
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \|$", page, re.MULTILINE))
    said = {name: check.__doc__.partition("\n")[0] for name, check in CHECKS.items()}
    assert said.items() <= listed.items()


@pytest.mark.parametrize("name", CASES)
def test_the_kits_jacobian_is_that_of_automatic_differentiation(name):
    case = CASES[name]
    model, x = case.module(), case.queries
    names = list(dict(model.named_parameters()))

    def f(*weights):
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))

    parts = torch.autograd.functional.jacobian(f, tuple(model.parameters()))
    expected = torch.cat([part.flatten(2) for part in parts], dim=2)
    assert np.allclose(case.network.jacobian(case.query), expected.numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["regression", "classification", "binary"])
def test_the_exact_hessian_of_the_kits_networks_is_another_one_and_positive_definite(name):
    case = CASES[name]
    assert formulas.smallest_eigenvalue(case, "hessian") > 1
    hessian, ggn = (np.diag(formulas.covariance(case, exact)) for exact in ("hessian", "ggn"))
    assert np.abs(hessian / ggn - 1).max() > 0.02


@pytest.mark.parametrize(
    ("options", "received"),
    [
        ({"exact": "diag"}, "diag"),
        ({"prior_of": "first_layer"}, "first_layer"),
        ({"skip": {"closed-form": "a typo"}}, "closed-form"),
        ({"checks": ["shape"]}, "shape"),
    ],
)
def test_a_claim_that_does_not_exist_is_refused(options, received):
    with pytest.raises(OptionError, match=received):
        check_estimator(MAP, **options)


def test_the_claim_of_a_class_is_read_where_none_is_passed():
    class Claiming(LinearizedLaplace):
        exact = True

    report = check_estimator(Claiming, checks=["closed-form-regression"])
    assert report.passed == ["closed-form-regression"]
