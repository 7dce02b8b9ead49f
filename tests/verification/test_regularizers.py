"""Each regularizer, solved exactly, equals its own dense formula.

By default with both curvatures, of all weights and of some; the other two architectures with `-m verification`.
"""

import pytest
import reference as dense
import torch
from cases import fitted, relative_error
from verification_cases import Case

from estimators import (
    LinearResponse,
    MeanAbsolute,
    ParameterProbes,
    Pointwise,
    PosteriorDraws,
    RegVar,
    SignedProbes,
)

SOLVER = LinearResponse(tol=1e-12)
CASES = [
    Case("mlp", "classification", "converged", "ggn", "all"),
    Case("cnn", "binary", "retuned", "hessian", "all"),
    Case("residual", "regression", "early", "ggn", "by_name"),
    Case("attention", "classification", "converged", "hessian", "by_name"),
]
NIGHTLY = ("cnn", "residual")
PROBES = 5


def each(cases):
    """The cases as parameters of a test."""
    return [
        pytest.param(case, marks=pytest.mark.verification if case.architecture in NIGHTLY else ()) for case in cases
    ]


def variance(case, regularizer, **how):
    return fitted(RegVar, case, regularizer=regularizer, solver=SOLVER).variance(case.problem.queries, **how)


@pytest.mark.parametrize("case", each(CASES), ids=str)
def test_pointwise_is_the_diagonal_and_of_a_functional_the_delta_method(case):
    x = case.problem.queries
    exact = case.reference.covariance(x, case.curvature).diagonal(dim1=1, dim2=2)
    assert relative_error(variance(case, Pointwise()), exact) < 1e-8
    f = case.reference.outputs(x)
    slope = (torch.eye(f.shape[1], dtype=f.dtype)[0] - torch.eye(f.shape[1], dtype=f.dtype)[1]) * torch.ones(2, 1, 1)
    margin = dense.pointwise_variance_of(case.reference, x, case.curvature, slope.to(f.dtype))
    assert relative_error(variance(case, Pointwise(of=lambda output: output[0] - output[1])), margin) < 1e-8


@pytest.mark.parametrize("case", each(CASES), ids=str)
def test_mean_absolute_is_the_sign_weighted_mean_covariance(case):
    train = torch.cat([x for x, _ in case.problem.batches])
    exact = dense.mean_absolute_variance(case.reference, case.problem.queries, train, case.curvature)
    assert relative_error(variance(case, MeanAbsolute()), exact) < 1e-8


@pytest.mark.parametrize("case", each(CASES), ids=str)
def test_signed_probes_are_signs_around_the_joint_covariance(case):
    x = case.problem.queries
    regularizer = SignedProbes(PROBES, seed=4)
    objective = fitted(RegVar, case, regularizer=regularizer, solver=SOLVER).objective_
    signs = regularizer.signs(objective, case.reference.outputs(x))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    exact = dense.signed_probes_variance(case.reference, x, case.curvature, signs)
    assert relative_error(variance(case, regularizer), exact) < 1e-8


@pytest.mark.parametrize("case", each(CASES), ids=str)
def test_parameter_probes_are_products_of_two_responses(case):
    estimator = fitted(RegVar, case, regularizer=ParameterProbes(PROBES, seed=4), solver=SOLVER)
    u = _direction(estimator)
    exact = dense.parameter_probes_variance(case.reference, case.problem.queries, case.curvature, u)
    assert relative_error(estimator.variance(case.problem.queries), exact) < 1e-8


@pytest.mark.parametrize("case", each([case for case in CASES if case.curvature == "ggn"]), ids=str)
def test_plain_draws_are_mean_squared_responses(case):
    estimator = fitted(RegVar, case, regularizer=PosteriorDraws(PROBES, seed=4, rao_blackwell=None), solver=SOLVER)
    exact = dense.draws_variance(case.reference, case.problem.queries, _direction(estimator))
    assert relative_error(estimator.variance(case.problem.queries), exact) < 1e-8


def test_parameter_directions_are_standard_normal_and_draws_have_the_covariance_of_the_precision():
    case = CASES[0]
    u = _direction(fitted(RegVar, case, regularizer=ParameterProbes(4000), solver=SOLVER))
    p = u.shape[1]
    assert relative_error(u.T @ u / len(u), torch.eye(p, dtype=u.dtype)) < 0.12
    xi = _direction(fitted(RegVar, case, regularizer=PosteriorDraws(4000, rao_blackwell=None), solver=SOLVER))
    exact = case.reference.precision("ggn")
    assert relative_error(xi.T @ xi / len(xi), exact) < 0.12


def _direction(estimator):
    """∇r of the fitted estimator's probes, drawn again from their seed: (K, P)."""
    perturbation, _ = estimator.regularizer.build_problem(estimator.refit_objective_)
    return perturbation.gradient
