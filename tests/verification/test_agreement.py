"""Every case: exact Laplace by each inverse, and RegVar by linear response, against the dense reference."""

import pytest
from cases import all_cases, fitted, pairwise_cover, relative_error, singular_cases

from estimators import LinearizedLaplace, LinearResponse, Pointwise, RegVar
from estimators.errors import IndefiniteHessianError

INVERSES = {"ggn": ("cholesky", "cg", "dual"), "hessian": ("cholesky", "cg")}
SINGULAR = singular_cases()
COVER = pairwise_cover()
LATER = pytest.mark.verification
REST = [  # by default a pairwise cover of the choices; the full product with the verification suite
    pytest.param(case, marks=[] if case in COVER else [LATER]) for case in all_cases() if case not in SINGULAR
]
TOLERANCE = 1e-8


def routes(case):
    """Each exact route to the covariance at the queries, by name."""
    x = case.problem.queries
    for inverse in INVERSES[case.curvature]:
        yield inverse, lambda inverse=inverse: fitted(LinearizedLaplace, case, inverse=inverse).covariance(x)
    response = {"regularizer": Pointwise(), "solver": LinearResponse(tol=1e-12)}
    yield "response", lambda: fitted(RegVar, case, **response).covariance(x)


@pytest.mark.parametrize("case", REST, ids=str)
def test_exact_routes_agree_with_the_reference_and_with_each_other(case):
    _assert_the_problem_is_what_the_verification_needs(case)
    smallest, _ = case.spectrum()
    if smallest <= 0:  # a Hessian off a minimum: there is nothing to agree on
        _assert_all_raise(case)
        return
    exact = case.reference.covariance(case.problem.queries, case.curvature)
    found = {name: route() for name, route in routes(case)}
    for name, covariance in found.items():
        assert relative_error(covariance, exact) < TOLERANCE, name
        assert relative_error(covariance, found["cholesky"]) < TOLERANCE, name


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[LATER] if i else []) for i, case in enumerate(SINGULAR)], ids=str
)
def test_a_symmetry_of_attention_makes_the_hessian_singular_and_every_route_says_so(case):
    smallest, largest = case.spectrum()
    assert abs(smallest) < 1e-12 * largest
    assert case.problem.relative_gradient() < 1e-10
    _assert_all_raise(case)


def _assert_the_problem_is_what_the_verification_needs(case):
    problem = case.problem
    theta = case.reference.theta
    assert theta.numel() <= 300
    assert str(theta.dtype) == "torch.float64"
    assert problem.prior_precision != 1
    assert getattr(problem.likelihood, "sigma_noise", 0.8) != 1
    assert len({len(y) for _, y in problem.batches}) > 1
    assert not problem.model.training
    gradient = problem.relative_gradient()
    assert gradient < 1e-10 if case.training == "converged" else gradient > 0.01
    if case.training in ("early", "retuned"):
        assert 0.3 < gradient < 1.3


def _assert_all_raise(case):
    for _, route in routes(case):
        with pytest.raises(IndefiniteHessianError):
            route()
