"""Every estimator of the library keeps the contract, by the same kit that is offered to others: one table, a row each.

A row has the capabilities of an estimator and the checks that it skips, so that none is lost in silence. A new
estimator is a new row.
"""

import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance_baselines import BASELINES
from conformance_families import FAMILIES
from conformance_posteriors import POSTERIORS

import estimators
from estimators import LinearizedLaplace, UncertaintyEstimator
from estimators.baselines import MAP
from estimators.errors import OptionError, UnsupportedError
from estimators.testing import CASES, CHECKS, check_estimator, formulas

ROWS = {**POSTERIORS, **BASELINES, **FAMILIES}


@cache
def report_of(name, *, whole=False):
    row = ROWS[name]
    return check_estimator(row.make, **{**row.options, "checks": row.asked(whole=whole)}, raises=False)


@pytest.mark.filterwarnings("ignore:Expected a maximum of the ELBO")  # four epochs
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        *((name, False) for name in ROWS),
        *(pytest.param(name, True, marks=pytest.mark.verification) for name, row in ROWS.items() if row.by_default),
    ],
)
def test_an_estimator_keeps_the_contract_and_skips_nothing_but_what_is_listed(name, whole):
    row, report = ROWS[name], report_of(name, whole=whole)
    assert report.failed == {}
    asked = row.asked(whole=whole)
    assert set(report.skipped) == (row.skipped | set(row.options.get("skip", {}))) & asked


def class_of(row):
    """What a row makes."""
    made = getattr(row.make, "func", row.make)
    if isinstance(made, type):
        return made
    case, adapt = CASES["classification"], row.options.get("adapt", lambda model: model)
    return type(made(adapt(case.module()).eval(), case.likelihood, prior_precision=case.delta))


def subclasses_of(cls):
    return {cls}.union(*map(subclasses_of, cls.__subclasses__()))


def test_every_estimator_of_the_library_is_in_the_table():
    for module in pkgutil.walk_packages(estimators.__path__, "estimators."):
        importlib.import_module(module.name)
    found = {cls for cls in subclasses_of(UncertaintyEstimator) if cls.__module__.startswith("estimators.")}
    concrete = {cls for cls in found if not inspect.isabstract(cls)}
    assert LinearizedLaplace in concrete
    assert concrete - {class_of(row) for row in ROWS.values()} == set()


def test_every_check_is_passed_by_some_estimator():
    assert {*report_of("full").passed, *report_of("DDU").passed} == set(CHECKS)


def test_the_page_lists_every_check_with_what_it_says_of_itself():
    page = (Path(__file__).parents[2] / "docs" / "guide" / "conformance.md").read_text(encoding="utf-8")
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
def test_an_option_that_does_not_exist_is_rejected(options, received):
    with pytest.raises(OptionError, match=received):
        check_estimator(MAP, **options)


def test_an_attribute_of_the_class_is_read_if_exact_is_not_passed():
    class Exact(LinearizedLaplace):
        exact = True

    report = check_estimator(Exact, checks=["closed-form-regression"])
    assert report.passed == ["closed-form-regression"]


def of_classes_alone(model, likelihood, *, prior_precision):
    """Laplace, but for regression."""
    made = LinearizedLaplace(model, likelihood, prior_precision=prior_precision)
    if made.likelihood.kind == "regression":
        raise UnsupportedError("a likelihood of classes", received=repr(likelihood), remedy="LinearizedLaplace.")
    return made


def test_an_estimator_of_classes_alone_is_asked_all_that_is_not_about_regression():
    report = check_estimator(of_classes_alone, exact="ggn")
    of_regression = {"closed-form-regression", "closed-form-noise-per-output"}
    of_regression |= {"noise-scaling", "total-variance", "noise-not-epistemic"}
    assert set(report.skipped) == of_regression | {"score"}
