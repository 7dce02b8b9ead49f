"""SGD refits: the objective's value from gradients alone, and learning-rate reductions when it increases."""

import warnings
from dataclasses import replace

import pytest
import torch
from estimators.regvar.solvers.fine_tuning import fine_tune, sgd
from estimators.regvar.solvers.fine_tuning.fine_tune import DEFAULT_RECIPE
from estimators.regvar.solvers.fine_tuning.sgd import SGDRefits
from torch import nn

from estimators import FineTune, Gaussian, LinearResponse, ParameterProbes, PosteriorDraws, RegVar
from estimators.errors import ConvergenceError, NotConvergedWarning
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies
from estimators.runtime.rng import preserved_random_state
from estimators.training import Recipe


def rows():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(45, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(45, 2, generator=generator, dtype=torch.float64)
    return [(x[:20], y[:20]), (x[20:40], y[20:40]), (x[40:], y[40:])]


def network(*, linear=False):
    with preserved_random_state():
        torch.manual_seed(2)
        layers = [nn.Linear(3, 2)] if linear else [nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)]
        return nn.Sequential(*layers).double().eval()


def sgd_refits(solver=None, **options):
    """SGD refits of draws for a linear network, for which F is quadratic, with objective and perturbation."""
    options = {"prior_precision": 0.7, "regularizer": PosteriorDraws(3, rao_blackwell=None), **options}
    estimator = RegVar(network(linear=True), Gaussian(0.6), solver=solver or FineTune(), **options).fit(rows())
    objective = estimator.refit_objective_
    perturbation, _ = estimator.regularizer.build_problem(objective)
    return (
        SGDRefits(PerturbedCopies.of(objective, perturbation, 1e-2, difference="forward"), Recipe(lr=0.1)),
        objective,
        perturbation,
    )


@pytest.mark.parametrize("regularizer", [PosteriorDraws(3, rao_blackwell=None), ParameterProbes(3)], ids=repr)
def test_its_value_over_an_epoch_is_that_of_the_parabola(regularizer):
    guarded, objective, perturbation = sgd_refits(LinearResponse(), regularizer=regularizer)
    generator = torch.Generator().manual_seed(3)
    displacements = torch.randn(perturbation.gradient.shape, generator=generator, dtype=torch.float64)
    slope = sum(guarded.gradient(displacements, batch) for batch in objective.batches.shuffled(7, generator))
    image = objective.product(displacements)
    assert torch.allclose(slope, image - perturbation.gradient)
    expected = 0.5 * (displacements * image).sum() - (displacements * perturbation.gradient).sum()  # ½ DᵀAD − ξᵀD
    assert float(guarded._value) == pytest.approx(float(expected))
    assert guarded.after_epoch(displacements) == 1.0
    assert float(guarded._value) == 0.0


def test_an_increase_halves_the_learning_rate_and_resets_diverged_copies():
    guarded, objective, perturbation = sgd_refits()
    start = guarded.copies.initial_guess

    def after_an_epoch_at(displacements):
        for batch in objective.batches:
            guarded.gradient(displacements, batch)
        return guarded.after_epoch(displacements)

    solved = torch.linalg.solve(objective.product(torch.eye(8).double()), perturbation.gradient.T).T
    assert after_an_epoch_at(start.clone()) == 1.0
    assert after_an_epoch_at(solved.clone()) == 1.0
    increased = start.clone()
    assert after_an_epoch_at(increased) == 0.5
    assert torch.equal(increased, start)
    assert guarded.rate == 0.05
    for diverged in (1e3 * start, start + float("nan")):
        assert after_an_epoch_at(diverged) == 0.5
        assert torch.equal(diverged, start)
    assert after_an_epoch_at(solved.clone()) == 1.0
    factors = [after_an_epoch_at(1e3 * start) for _ in range(9)]
    assert factors == [0.5] * 9
    with pytest.raises(ConvergenceError, match="an increase at"):
        after_an_epoch_at(1e3 * start)


# with five rows in a batch of nine the noise at a constant rate is not all averaged away
RATES = {"cosine": (dict(schedule="cosine", average=0.0), 0.02), "constant": ({}, 0.1)}


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("too_fast", [5.0, 300.0])
@pytest.mark.parametrize(
    "regularizer", [PosteriorDraws(4, variance_estimate="monte_carlo"), ParameterProbes(4)], ids=repr
)
def test_a_rate_much_too_high_ends_at_the_solution_all_the_same(regularizer, too_fast, schedule, monkeypatch):
    chosen = fine_tune.auto_learning_rate
    monkeypatch.setattr(fine_tune, "auto_learning_rate", lambda *args, **kw: too_fast * chosen(*args, **kw))
    options = {"prior_precision": 3.0, "regularizer": regularizer}
    changes, bound = RATES[schedule]
    recipe = replace(DEFAULT_RECIPE, epochs=150, batch_size=9, **changes)
    refit = RegVar(network(), Gaussian(0.6), solver=FineTune(recipe=recipe), **options).fit(rows())
    solved = RegVar(network(), Gaussian(0.6), solver=LinearResponse(tol=1e-10), **options).fit(rows())
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    assert float((refit.variance(x) - solved.variance(x)).norm() / solved.variance(x).norm()) < bound
    assert refit.fit_report_.solver.lr < 20 * chosen(refit.refit_objective_, recipe.resolve(45), seed=0)


STOCHASTIC = replace(DEFAULT_RECIPE, optimizer="nesterov")


def fitted(delta, recipe=STOCHASTIC):
    regularizer = PosteriorDraws(40, variance_estimate="monte_carlo")
    estimator = RegVar(
        network(), Gaussian(0.6), prior_precision=delta, regularizer=regularizer, solver=FineTune(recipe=recipe)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        estimator.fit(rows())
    return estimator


USUAL = DEFAULT_RECIPE.resolve(45).epochs
EARLY = round(USUAL / 4)


def epochs_of(estimator):
    """Only forward and backward passes of each copy are counted under "solve"."""
    return estimator.fit_report_.passes["solve"]


@pytest.mark.parametrize(("delta", "epochs"), [(30.0, EARLY), (0.03, USUAL), (0.003, 2 * USUAL)])
def test_draws_have_the_epochs_that_they_need(delta, epochs):
    estimator = fitted(delta)
    assert epochs_of(estimator) == pytest.approx(epochs)
    assert (estimator.a_norm_error_ < 0.35) == (epochs < 2 * USUAL)
    if epochs == 2 * USUAL:
        assert estimator.a_norm_error_ < 0.9 * fitted(delta, replace(DEFAULT_RECIPE, epochs=USUAL)).a_norm_error_


def test_the_a_norm_error_of_stopped_draws_is_that_of_a_product():
    estimator = fitted(30.0)
    objective, displacement = estimator.refit_objective_, estimator.variance_estimate_.displacement
    perturbation, _ = estimator.regularizer.build_problem(objective)
    image, delta = objective.product(displacement), objective.prior.precision
    n, from_prior = (perturbation.gradient != 0).any(0).sum(), delta * perturbation.initial_guess.square()
    gap = from_prior.sum(1) - 2 * (displacement * perturbation.gradient).sum(1) + (displacement * image).sum(1)
    assert estimator.fit_report_.a_norm_error.per_parameter == pytest.approx(float(gap.mean() / n), abs=1e-3)


def test_epochs_that_are_given_are_kept_and_a_falling_rate_has_the_usual_ones():
    assert epochs_of(fitted(30.0, replace(DEFAULT_RECIPE, epochs=5))) == pytest.approx(5)
    falling = replace(DEFAULT_RECIPE, schedule="cosine", average=0.0)
    assert epochs_of(fitted(30.0, falling)) == pytest.approx(USUAL)


def test_it_looks_at_lam_again_after_some_epochs_and_not_where_lam_was_given(monkeypatch):
    guarded, _, _ = sgd_refits()
    looked, now = [], [0]

    def halved(objective, perturbation, at):  # noqa: ARG001
        looked.append((now[0], len(perturbation.gradient), len(at)))
        return 0.5 * free.copies.lam

    monkeypatch.setattr(sgd, "select_lam", halved)
    free = SGDRefits(guarded.copies, guarded.recipe, selects_lam=True)
    free._at_start = 1.0
    for now[0] in range(1, 9):
        free._value = free._value - 1.0
        free.after_epoch(free.copies.initial_guess)
        if now[0] == 2:  # killed, and resumed
            saved = free.state()
            free = SGDRefits(replace(guarded.copies, lam=saved["lam"]), guarded.recipe, selects_lam=True)
            free.restore(saved)
    assert looked == [(1, 3, 1), (4, 3, 1)]
    assert free.copies.lam == guarded.copies.lam / 4
    guarded._at_start = 1.0
    for _ in range(4):
        guarded.after_epoch(guarded.copies.initial_guess)
    assert len(looked) == 2
