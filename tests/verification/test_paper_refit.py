"""The paper's own refit of L: right at a stationary point, wrong off one, where the centred refits are right."""

import pytest
import torch
from cases import fitted, relative_error
from verification_cases import Case

from estimators import LinearResponse, NewtonRefit, Pointwise, RegVar
from estimators.errors import IndefiniteHessianError

STATIONARY = Case("mlp", "classification", "converged", "hessian", "all")
MOVED = Case("mlp", "classification", "minibatch", "hessian", "all")


def error_of(case, *, centred):
    refit = {"regularizer": Pointwise(), "solver": NewtonRefit(1e-4, "central"), "centred": centred}
    x = case.problem.queries
    return relative_error(fitted(RegVar, case, **refit).covariance(x), case.reference.covariance(x, "hessian"))


def test_the_uncentred_refit_agrees_at_a_converged_optimum():
    assert STATIONARY.problem.relative_gradient() < 1e-10
    assert error_of(STATIONARY, centred=False) < 2e-4


def test_the_uncentred_refit_is_off_where_the_network_is_not_stationary_and_the_centred_one_is_not():
    assert MOVED.well_posed
    assert MOVED.problem.relative_gradient() > 0.05
    assert error_of(MOVED, centred=True) < 2e-4
    assert error_of(MOVED, centred=False) > 0.01


LATER = pytest.mark.verification


@pytest.mark.parametrize("solver", [LinearResponse(), NewtonRefit()], ids=repr)
@pytest.mark.parametrize(
    "likelihood", ["classification", pytest.param("regression", marks=LATER), pytest.param("binary", marks=LATER)]
)
def test_both_solvers_reject_the_singular_hessian_of_attention(solver, likelihood):
    case = Case("attention", likelihood, "converged", "hessian", "all")
    with pytest.raises(IndefiniteHessianError, match=r"subset_of_weights.*curvature"):
        fitted(RegVar, case, regularizer=Pointwise(), solver=solver).covariance(case.problem.queries)


@pytest.mark.parametrize("pair", [("query.*", "key.*"), ("value.*", "out.*")], ids=" and ".join)
def test_each_pair_of_projections_that_can_be_turned_together_makes_the_hessian_singular(pair):
    case = Case("attention", "classification", "converged", "hessian", "all")
    stems = tuple(glob.removesuffix("*") for glob in pair)
    names = [name for name in case.names if name.startswith(stems)]

    both = torch.linalg.eigvalsh(case.problem.reference(names).precision("hessian"))
    one = torch.linalg.eigvalsh(case.problem.reference(names[:2]).precision("hessian"))
    assert abs(float(both[0])) < 1e-12 * float(both[-1])
    assert float(one[0]) > 1e-3 * float(one[-1])
