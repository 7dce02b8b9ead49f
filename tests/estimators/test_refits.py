"""A fit made from another: the same as a fresh one with the other option, and no dearer than it must be."""

import pytest
import torch
from torch import nn

from estimators import (
    FineTune,
    Gaussian,
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
from estimators.baselines import LaplaceTorch
from estimators.baselines.map import MAP
from estimators.errors import ModelChangedError, NotFittedError, OptionError, UnsupportedError
from estimators.estimator.cloning import clone
from estimators.training import Recipe

SHORT = FineTune(1e-3, recipe=Recipe(epochs=3, batch_size=7, optimizer="sgd", lr=0.02))
KEPT = {
    "cholesky": (LinearizedLaplace, {"inverse": "cholesky"}),
    "dual": (LinearizedLaplace, {"inverse": "dual"}),
    "matrix_free_dual": (LinearizedLaplace, {"inverse": "matrix_free_dual"}),
    "products": (LinearizedLaplace, {"inverse": "cg"}),
    "kron": (LinearizedLaplace, {"hessian_structure": "kron"}),
    "ekfac": (LinearizedLaplace, {"hessian_structure": "ekfac"}),
    "diag": (LinearizedLaplace, {"hessian_structure": "diag"}),
    "lowrank": (LinearizedLaplace, {"hessian_structure": "lowrank", "rank": 5}),
    "last layer": (LastLayerLaplace, {}),
    "last layer, kron": (LastLayerLaplace, {"hessian_structure": "kron"}),
    "last layer, diag": (LastLayerLaplace, {"hessian_structure": "diag"}),
}
FITTED_AGAIN = {
    "map": (MAP, {}),
    "laplace-torch": (LaplaceTorch, {"hessian_structure": "full"}),
    "laplace-torch kron": (LaplaceTorch, {"hessian_structure": "kron"}),
    "laplace-torch diag": (LaplaceTorch, {"hessian_structure": "diag"}),
    "laplace-torch last layer": (LaplaceTorch, {"hessian_structure": "full", "subset_of_weights": "last_layer"}),
    "pointwise": (RegVar, {"regularizer": Pointwise(), "solver": LinearResponse()}),
    "newton": (RegVar, {"regularizer": ParameterProbes(3), "solver": NewtonRefit()}),
    "mean absolute": (RegVar, {"regularizer": MeanAbsolute(), "solver": SHORT}),
    "signed probes": (RegVar, {"regularizer": SignedProbes(3), "solver": LinearResponse()}),
    "draws": (RegVar, {"regularizer": PosteriorDraws(3), "solver": SHORT}),
    "bounds": (RegVar, {"regularizer": PosteriorDraws(3, variance_estimate="bounds"), "solver": LinearResponse()}),
}
everything = pytest.mark.parametrize("name", KEPT | FITTED_AGAIN)
kept = pytest.mark.parametrize("name", KEPT)
pytestmark = pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")


def fit(name, problem, **options):
    kind, own = (KEPT | FITTED_AGAIN)[name]
    return kind(problem.model, problem.likelihood, **{"prior_precision": problem.delta, **own, **options}).fit(
        problem.loader
    )


def close(found, expected, tol=1e-9):
    return float((found - expected).abs().max()) <= tol * float(expected.abs().max())


@everything
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_a_fit_at_another_prior_is_a_fresh_fit_with_it(name, kind, make_problem):
    problem = make_problem(kind)
    fitted = fit(name, problem)
    before = fitted.variance(problem.query)
    found = fitted.clone_with(prior_precision=11.0)
    fresh = fit(name, problem, prior_precision=11.0).variance(problem.query)
    assert close(found.variance(problem.query), fresh)
    assert name == "map" or not close(fresh, before, 1e-3)
    assert torch.equal(fitted.variance(problem.query), before)
    assert (found.prior_precision, fitted.prior_precision) == (11.0, problem.delta)


@everything
def test_a_fit_at_another_noise_is_a_fresh_fit_with_it(name, make_problem):
    problem = make_problem("regression")
    found = fit(name, problem).clone_with(likelihood=Gaussian(1.7)).predict(problem.query)
    problem.likelihood = Gaussian(1.7)
    fresh = fit(name, problem).predict(problem.query)
    assert close(found.epistemic_variance, fresh.epistemic_variance)
    assert torch.allclose(found.total_variance, fresh.epistemic_variance + 1.7**2, rtol=1e-9)


@pytest.mark.parametrize("name", ["cholesky", "dual", "kron", "last layer"])
def test_a_noise_that_turns_the_outputs_against_each_other_is_fitted_again(name, make_problem):
    problem = make_problem("regression")
    sigma = torch.tensor([0.3, 1.9], dtype=torch.float64)
    found = fit(name, problem).clone_with(likelihood=Gaussian(sigma))
    assert found.passes_ > 0
    again = found.clone_with(likelihood=Gaussian(2 * sigma))
    assert again.passes_ == 0
    for fitted, likelihood in ((found, Gaussian(sigma)), (again, Gaussian(2 * sigma))):
        problem.likelihood = likelihood
        assert close(fitted.variance(problem.query), fit(name, problem).variance(problem.query))


@pytest.mark.parametrize("inverse", ["cholesky", "cg"])
def test_the_exact_hessian_is_kept_too(inverse, make_problem):
    problem = make_problem("regression", delta=150.0)
    options = {"curvature": "hessian", "inverse": inverse}
    fitted = fit("cholesky", problem, **options)
    found = fitted.clone_with(prior_precision=300.0).clone_with(likelihood=Gaussian(0.9))
    problem.likelihood = Gaussian(0.9)
    fresh = fit("cholesky", problem, prior_precision=300.0, **options)
    assert close(found.variance(problem.query), fresh.variance(problem.query))


@kept
def test_a_curvature_that_is_kept_costs_no_pass(name, make_problem):
    problem = make_problem("regression")
    fitted = fit(name, problem)
    spent = fitted.passes_
    assert fitted.clone_with(prior_precision=11.0).passes_ == 0
    assert fitted.clone_with(likelihood=Gaussian(1.7)).passes_ == 0
    assert fitted.passes_ == spent > 0


@pytest.mark.parametrize("name", ["cholesky", "dual", "matrix_free_dual", "products", "diag", "lowrank", "last layer"])
def test_groups_of_other_priors_are_fitted_rightly(name, make_problem):
    problem = make_problem()
    groups = {"*.bias": 0.7, "*": 9.0}
    found = fit(name, problem).clone_with(prior_precision=groups)
    assert close(found.variance(problem.query), fit(name, problem, prior_precision=groups).variance(problem.query))


def test_a_dual_form_gives_way_to_another_where_biases_lose_their_prior(make_problem, by_hand):
    problem = make_problem("regression", n=12)
    fitted = fit("dual", problem, inverse="auto")
    assert fitted.inverse_ == "dual"
    found = fitted.clone_with(prior_precision={"*.bias": 0.0, "*": 2.0})
    assert found.inverse_ == "cholesky"
    delta = torch.cat([torch.full((20,), 2.0), torch.zeros(5), torch.full((10,), 2.0), torch.zeros(2)])
    assert close(found.variance(problem.query), by_hand(problem).variance(problem.query, delta=delta), 1e-8)
    with pytest.raises(OptionError, match="dual form"):
        fit("dual", problem).clone_with(prior_precision={"*.bias": 0.0, "*": 2.0})


def test_what_is_fitted_again_pays_in_a_ledger_of_its_own(make_problem):
    problem = make_problem()
    fitted, fresh = fit("draws", problem), fit("draws", problem, prior_precision=11.0)
    spent, report = fitted.passes_, fitted.fit_report_.passes
    found = fitted.clone_with(prior_precision=11.0).fit_report_.passes
    assert (fitted.passes_, fitted.fit_report_.passes) == (spent, report)
    once = ("checks", "self-check")  # of the rows and of the derivatives: made by the fit that the network comes from
    paid = {name: passes for name, passes in fresh.fit_report_.passes.items() if name not in once}
    assert {name: found[name] for name in paid} == pytest.approx(paid)
    assert found.keys() == paid.keys()


@pytest.mark.parametrize("name", ["products", "pointwise"])
def test_queries_of_a_new_fit_are_not_entered_for_the_old(name, make_problem):
    problem = make_problem()
    fitted = fit(name, problem)
    found = fitted.clone_with(prior_precision=11.0)
    old, new = fitted.passes_, found.passes_
    found.variance(problem.query)
    assert fitted.passes_ == old
    assert found.passes_ > new


@pytest.mark.parametrize("name", ["matrix_free_dual", "kron", "last layer"])
def test_a_new_fit_can_be_saved_and_loaded(name, make_problem, tmp_path):
    problem = make_problem("regression")
    found = fit(name, problem).clone_with(prior_precision=11.0).clone_with(likelihood=Gaussian(1.7))
    found.save(tmp_path / "fit.safetensors")
    problem.likelihood = found.likelihood
    kind, own = KEPT[name]
    loaded = kind(problem.model, problem.likelihood, prior_precision=11.0, **own).load(tmp_path / "fit.safetensors")
    if name == "matrix_free_dual":
        loaded.attach_data(problem.loader)
    assert close(loaded.variance(problem.query), found.variance(problem.query))


def test_a_loaded_fit_needs_its_data_only_where_it_is_fitted_again(make_problem):
    problem = make_problem()
    state = fit("kron", problem).state_dict()
    loaded = LinearizedLaplace(problem.model, "classification", prior_precision=2.5, hessian_structure="kron")
    found = loaded.load_state_dict(state).clone_with(prior_precision=11.0).variance(problem.query)
    assert close(found, fit("kron", problem, prior_precision=11.0).variance(problem.query))
    draws = {"prior_precision": 2.5, "regularizer": PosteriorDraws(3), "solver": SHORT}
    alone = RegVar(problem.model, "classification", **draws).load_state_dict(fit("draws", problem).state_dict())
    with pytest.raises(NotFittedError, match="attach_data"):
        alone.clone_with(prior_precision=11.0)


def test_options_of_parts_are_reached_by_dotted_names(make_problem):
    problem = make_problem()
    fitted = fit("draws", problem)
    found = fitted.clone_with(**{"solver.lam": 1e-4, "solver.recipe.epochs": 2, "regularizer.n_draws": 2})
    solver = FineTune(1e-4, recipe=Recipe(epochs=2, batch_size=7, optimizer="sgd", lr=0.02))
    fresh = fit("draws", problem, solver=solver, regularizer=PosteriorDraws(2))
    assert close(found.variance(problem.query), fresh.variance(problem.query))
    assert (fitted.solver.lam, fitted.solver.recipe.epochs, fitted.regularizer.n_draws) == (1e-3, 3, 3)


def test_another_subset_is_looked_up_anew(make_problem):
    problem = make_problem()
    fitted = fit("cholesky", problem)
    for subset in ("0.*", "last_layer"):
        found = fitted.clone_with(subset_of_weights=subset).variance(problem.query)
        assert close(found, fit("cholesky", problem, subset_of_weights=subset).variance(problem.query))


@everything
def test_the_model_and_the_random_state_are_left_as_they_were(name, make_problem, untouched):
    problem = make_problem()
    fitted = fit(name, problem)
    with untouched(problem.model):
        fitted.clone_with(prior_precision=11.0)


def test_invalid_changes_are_rejected(make_problem):
    problem = make_problem()
    fitted = fit("cholesky", problem)
    with pytest.raises(OptionError, match=r"an option of LinearizedLaplace.*'rate'"):
        fitted.clone_with(rate=0.2)
    with pytest.raises(OptionError, match=r"an option of LinearizedLaplace.*'solver'"):
        fitted.clone_with(**{"solver.lam": 0.2})
    with pytest.raises(OptionError, match="of the kind that was fitted"):
        fitted.clone_with(likelihood="binary")
    with pytest.raises(OptionError, match="prior_precision > 0"):
        fitted.clone_with(prior_precision=-1.0)
    with pytest.raises(OptionError, match="of the kind that was fitted"):
        fitted.clone_with(likelihood=Gaussian(0.3))
    with pytest.raises(NotFittedError):
        LinearizedLaplace(problem.model, "classification").clone_with(prior_precision=2.0)
    with torch.no_grad():
        problem.model[0].weight += 1
    with pytest.raises(ModelChangedError):
        fitted.clone_with(prior_precision=2.0)


def test_a_constructor_that_does_not_store_is_named():
    class Forgetful:
        def __init__(self, size):
            self.half = size / 2

    with pytest.raises(UnsupportedError, match=r"Forgetful.*without 'size'"):
        clone(Forgetful(3), {"size": 4})


def test_fits_of_fixed_networks_say_that_they_do_not_retrain():
    assert not any(kind.retrains for kind, _ in (KEPT | FITTED_AGAIN).values())


def test_padded_batches_of_dicts_are_fitted_again(make_problem):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, features):
            return self.layer(features)

    problem = make_problem(model=Named())
    loader = [{"features": x, "labels": y} for x, y in problem.loader]
    options = {"prior_precision": 2.5, "regularizer": PosteriorDraws(3), "solver": SHORT}
    query = {"features": problem.query}
    found = (
        RegVar(problem.model, "classification", **options).fit(loader).clone_with(prior_precision=7.0).variance(query)
    )
    fresh = RegVar(problem.model, "classification", **{**options, "prior_precision": 7.0}).fit(loader)
    assert close(found, fresh.variance(query))
