"""FineTune: convergence to the dense solution, its start, its averages, and its learning-rate reductions."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from estimators import FineTune, Gaussian, LinearResponse, ParameterProbes, PosteriorDraws, RegVar
from estimators.errors import ConvergenceError
from estimators.regvar.solvers import fine_tune
from estimators.regvar.solvers.fine_tune import DEFAULT_RECIPE, _Refit
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies
from estimators.runtime.rng import preserved_random_state
from estimators.training import Recipe

SIGMA, DELTA = 0.6, 1.7
PLAIN_DRAWS = PosteriorDraws(3, rao_blackwell=None)


def rows(n=45):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    x[:, 2] = 0  # a feature without data
    y = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return list(zip(x.split(20), y.split(20), strict=True))


def network(*, linear=False):
    with preserved_random_state():
        torch.manual_seed(2)
        layers = [nn.Linear(3, 2)] if linear else [nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)]
        return nn.Sequential(*layers).double().eval()


def fitted(solver, *, model=None, delta=DELTA, regularizer=PLAIN_DRAWS, n=45):
    model = network() if model is None else model
    options = {"prior_precision": delta, "regularizer": regularizer, "solver": solver}
    return RegVar(model, Gaussian(SIGMA), **options).fit(rows(n))


def problem_of(estimator):
    """The centred objective, the perturbation, and A⁻¹ξ by a dense solve with J from reverse mode."""
    objective = estimator.refit_objective_
    perturbation, _ = estimator.regularizer.build_problem(objective)
    x, params = torch.cat([x for x, _ in rows()]), dict(estimator.model.named_parameters())

    def outputs(values):
        return torch.func.functional_call(estimator.model, values, (x,))

    jacobians = torch.func.jacrev(outputs)(params).values()
    jacobian = torch.cat([j.flatten(2) for j in jacobians], 2).flatten(0, 1).detach()
    a = jacobian.T @ jacobian / SIGMA**2 + estimator.prior_precision * torch.eye(jacobian.shape[1]).double()
    return objective, perturbation, torch.linalg.solve(a, perturbation.gradient.T).T


FULL_BATCH = Recipe(
    epochs=200, batch_size=64, optimizer="nesterov", lr="auto", momentum=0.9, schedule="constant", average=0.0
)


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
@pytest.mark.parametrize(("difference", "order", "lam"), [("forward", 1, 2e-3), ("central", 2, 1e-2)])
def test_the_error_against_a_dense_solve_has_the_order_of_the_difference(difference, order, lam):
    errors = []
    for step in (2 * lam, lam):
        estimator = fitted(FineTune(step, difference, FULL_BATCH), delta=8.0)
        exact = problem_of(estimator)[2]
        errors.append(float((estimator.variance_estimate_.displacement - exact).norm() / exact.norm()))
    assert errors[1] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_directions_without_data_stay_at_the_prior_draw_and_others_approach_the_solution():
    estimator = fitted(FineTune())
    _, perturbation, exact = problem_of(estimator)
    found, start = estimator.variance_estimate_.displacement, perturbation.initial_guess
    without_data = [3 * unit + 2 for unit in range(6)]  # the weights of the third feature in the first layer
    assert torch.allclose(found[:, without_data], start[:, without_data], rtol=1e-12)
    assert torch.allclose(found[:, without_data], exact[:, without_data], rtol=1e-12)
    assert float((found - exact).norm()) < 0.1 * float((start - exact).norm())


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_averaged_iterates_are_nearer_to_the_solution_than_the_last():
    distances = []
    for average in (0.3, 0.0):
        estimator = fitted(FineTune(recipe=replace(DEFAULT_RECIPE, batch_size=5, average=average)))
        exact = problem_of(estimator)[2]
        distances.append(float((estimator.variance_estimate_.displacement - exact).norm()))
    assert distances[0] < 0.7 * distances[1]


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
@pytest.mark.parametrize("n", [45, 700])
def test_auto_epochs_are_spent_and_given_ones_too(n):
    for recipe in (DEFAULT_RECIPE, replace(DEFAULT_RECIPE, epochs=2)):
        estimator = fitted(FineTune(recipe=recipe), n=n)
        assert estimator.fit_report_.passes["solve"] == pytest.approx(recipe.resolve(n).epochs + 1)  # F at the start


def linear_refit(regularizer=PLAIN_DRAWS):
    """A refit of a linear network, for which F is quadratic."""
    estimator = fitted(LinearResponse(), model=network(linear=True), regularizer=regularizer)
    objective = estimator.refit_objective_
    perturbation, _ = estimator.regularizer.build_problem(objective)
    refit = _Refit(PerturbedCopies.of(objective, perturbation, 1e-2, difference="forward"))
    refit.evaluate_start()
    return refit, objective, perturbation


@pytest.mark.parametrize("regularizer", [PLAIN_DRAWS, ParameterProbes(3)], ids=repr)
def test_the_value_over_an_epoch_is_that_of_the_quadratic(regularizer):
    refit, objective, perturbation = linear_refit(regularizer)
    generator = torch.Generator().manual_seed(3)
    displacements = torch.randn(perturbation.gradient.shape, generator=generator, dtype=torch.float64)
    slope = sum(refit.gradient(displacements, batch) for batch in objective.batches.shuffled(7, generator))
    image = objective.product(displacements)
    assert torch.allclose(slope, image - perturbation.gradient)
    expected = 0.5 * (displacements * image).sum() - (displacements * perturbation.gradient).sum()  # ½ DᵀAD − ξᵀD
    assert float(refit._value) == pytest.approx(float(expected))
    refit._start = abs(float(expected))  # these displacements are no worse than the start
    assert refit.after_epoch(displacements) == 1.0
    assert refit._value == 0.0


def test_an_increase_halves_the_learning_rate_and_resets_diverged_copies():
    refit, objective, perturbation = linear_refit()
    start = refit.copies.initial_guess

    def after_an_epoch_at(displacements):
        for batch in objective.batches:
            refit.gradient(displacements, batch)
        return refit.after_epoch(displacements)

    solved = torch.linalg.solve(objective.product(torch.eye(8).double()), perturbation.gradient.T).T
    assert after_an_epoch_at(start.clone()) == 1.0
    assert after_an_epoch_at(solved.clone()) == 1.0
    increased = start.clone()
    assert after_an_epoch_at(increased) == 0.5
    assert torch.equal(increased, start)
    assert after_an_epoch_at(solved.clone()) == 1.0
    between = 0.5 * (start + solved)
    assert after_an_epoch_at(kept := between.clone()) == 0.5
    assert torch.equal(kept, between)  # an increase below the start continues from where it is
    for diverged in (1e3 * start, start + float("nan")):
        assert after_an_epoch_at(diverged) == 0.5
        assert torch.equal(diverged, start)
    assert [after_an_epoch_at(1e3 * start) for _ in range(8)] == [0.5] * 8
    with pytest.raises(ConvergenceError, match="an increase still after 12 halvings"):
        after_an_epoch_at(1e3 * start)


# with five rows in a batch of nine the noise at a constant rate is not all averaged away
RATES = {"cosine": (dict(schedule="cosine", average=0.0), 0.02), "constant": ({}, 0.1)}


@pytest.mark.parametrize(("too_fast", "schedule"), [(5.0, "cosine"), (300.0, "constant")])
@pytest.mark.parametrize(
    "regularizer", [PosteriorDraws(4, variance_estimate="monte_carlo"), ParameterProbes(4)], ids=repr
)
def test_a_learning_rate_much_too_high_still_ends_at_the_solution(regularizer, too_fast, schedule, monkeypatch):
    chosen = fine_tune.auto_learning_rate
    monkeypatch.setattr(fine_tune, "auto_learning_rate", lambda *args, **kw: too_fast * chosen(*args, **kw))
    changes, bound = RATES[schedule]
    recipe = replace(DEFAULT_RECIPE, epochs=150, batch_size=9, **changes)
    refit = fitted(FineTune(recipe=recipe), delta=3.0, regularizer=regularizer)
    solved = fitted(LinearResponse(tol=1e-10), delta=3.0, regularizer=regularizer)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    assert float((refit.variance(x) - solved.variance(x)).norm() / solved.variance(x).norm()) < bound
    assert refit.fit_report_.solver.lr < 20 * chosen(refit.refit_objective_, recipe.resolve(45), seed=0)


def test_batches_whose_parts_of_the_objective_differ_in_sign_converge():
    """F at the prior draw is positive, its part on the first batch negative: the first batch does not stand for F."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (20,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    loader = list(zip(x.split(7), y.split(7), strict=True))
    regvar = RegVar(model, "classification", prior_precision=0.5, solver=FineTune()).fit(loader)
    assert regvar.a_norm_error_ < 0.5
