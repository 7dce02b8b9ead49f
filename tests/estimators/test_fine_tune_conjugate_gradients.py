"""Refits along conjugate directions: exact ones from slopes alone, where they stop, and when they are chosen."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from estimators import FineTune, Gaussian, LinearResponse, MeanAbsolute, PosteriorDraws, RegVar
from estimators.errors import NotConvergedWarning, OptionError
from estimators.persistence import checkpoint
from estimators.persistence.checkpoint import Checkpoint
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.solvers.fine_tuning import conjugate_gradients as module
from estimators.regvar.solvers.fine_tuning.conjugate_gradients import ConjugateRefits, conjugate_refits
from estimators.regvar.solvers.fine_tuning.fine_tune import DEFAULT_RECIPE
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies
from estimators.runtime.rng import preserved_random_state
from estimators.training import Recipe

SIGMA, DELTA = 0.4, 1.3
CONJUGATE = replace(DEFAULT_RECIPE, optimizer="conjugate")
BLOCKS = pytest.mark.parametrize("block", ["auto", None])


def problem(n=70, *, dtype=torch.float64, linear=False):
    with preserved_random_state():
        torch.manual_seed(4)
        layers = [nn.Linear(5, 3)] if linear else [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)]
        model, x = nn.Sequential(*layers).to(dtype).eval(), torch.randn(n, 5).to(dtype)
    return model, list(zip(x.split(16), torch.sin(x[:, :3]).split(16), strict=True)), x


def fitted(model, rows, recipe=CONJUGATE, *, k=4, block="auto", solver=None, **options):
    regularizer = PosteriorDraws(k, rao_blackwell=block, variance_estimate="monte_carlo")
    solver = FineTune(recipe=recipe) if solver is None else solver
    parts = {"prior_precision": DELTA, "regularizer": regularizer, "solver": solver}
    return RegVar(model, Gaussian(SIGMA), **parts).fit(rows, **options)


def posed(*, linear=False, k=4, lam=1e-6):
    model, rows, _ = problem(linear=linear)
    estimator = fitted(model, rows, solver=LinearResponse(), k=k, block=None)
    objective = estimator.refit_objective_
    perturbation, _ = estimator.regularizer.build_problem(objective)
    return PerturbedCopies.of(objective, perturbation, lam, difference="forward"), objective, perturbation


def test_steps_are_those_of_conjugate_gradients_written_a_second_time():
    copies, objective, perturbation = posed(linear=True, lam=1e-3)
    a = objective.product(torch.eye(len(objective.theta)).double())
    u = perturbation.initial_guess.clone()
    r = perturbation.gradient - u @ a
    p = r.clone()
    refits = ConjugateRefits.begun(copies)
    for _ in range(5):
        step = (r * r).sum(1) / (p * (p @ a)).sum(1)
        u, before = u + step[:, None] * p, r
        r = r - step[:, None] * (p @ a)
        p = r + ((r * r).sum(1) / (before * before).sum(1))[:, None] * p
        refits.step()
        assert torch.allclose(refits.at, u, rtol=1e-6, atol=1e-8)
        assert torch.allclose(refits.slope, -r, rtol=1e-5, atol=1e-6)
    assert refits.steps == 5


@BLOCKS
def test_with_all_their_steps_they_are_the_exact_response(block):
    model, rows, x = problem()
    exact = fitted(model, rows, solver=LinearResponse(tol=1e-12), block=block).variance(x)
    solver = FineTune(1e-7, recipe=replace(CONJUGATE, epochs=80))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TARGET_ERROR", 1e-9)
        found = fitted(model, rows, solver=solver, block=block)
    assert float((found.variance(x) / exact - 1).abs().max()) < 1e-3
    assert found.fit_report_.solver.iterations <= 80
    assert found.fit_report_.solver.lr is None


def test_they_stop_at_a_small_a_norm_error_and_report_it_from_recomputed_gradients():
    model, rows, _ = problem()
    estimator = fitted(model, rows)
    objective, u = estimator.refit_objective_, estimator.variance_estimate_.displacement
    perturbation, _ = estimator.regularizer.build_problem(objective)
    a = objective.product(torch.eye(u.shape[1]).double())
    exact = torch.linalg.solve(a, perturbation.gradient.T).T
    error = estimator.fit_report_.a_norm_error
    true = float((((u - exact) @ a) * (u - exact)).sum(1).mean())
    dimension = error.per_parameter * float((perturbation.gradient != 0).any(0).sum()) / error.per_dimension
    assert true / dimension <= error.bound * (1 + 1e-3)
    assert min(error.per_dimension, error.bound) <= module._RECOMPUTED_FACTOR * module._TARGET_ERROR
    measured = SampleANormErrors.of(
        perturbation, objective.prior.precision, u, objective.product(u) - perturbation.gradient
    ).error
    assert error.per_dimension == pytest.approx(measured.per_dimension, rel=1e-4, abs=1e-5)
    assert 3 < estimator.fit_report_.solver.iterations < 40
    passes = estimator.fit_report_.passes["solve"]
    assert passes == pytest.approx(estimator.fit_report_.solver.iterations + 3, abs=1.5)  # start, end, λ again


def test_slopes_that_were_followed_wrongly_are_found_out():
    copies, _, _ = posed()
    refits = ConjugateRefits.begun(copies)
    for _ in range(3):
        refits.step()
    right = refits.slope.clone()
    refits.slope, refits._known = torch.zeros_like(right), None  # a bound of 0
    assert refits.enough(module._TARGET_ERROR)
    refits.recompute_slope()
    assert torch.allclose(refits.slope, right, rtol=1e-3, atol=1e-3)
    assert torch.equal(refits.direction, -refits.slope)
    assert not refits.enough(module._RECOMPUTED_FACTOR * module._TARGET_ERROR)


def test_a_direction_along_which_it_does_not_rise_is_left_for_the_steepest_descent():
    copies, _, _ = posed()
    refits = ConjugateRefits.begun(copies)
    at, slope, tried = refits.at.clone(), refits.slope.clone(), refits.tried.clone()
    refits.copies = _Falling(copies)
    refits.step()
    assert torch.allclose(refits.at, at)
    assert torch.allclose(refits.slope, slope)
    assert torch.allclose(refits.direction, -slope)
    assert torch.allclose(refits.tried, 0.5 * tried)


def test_converged_samples_stay_while_others_continue():
    _, objective, perturbation = posed(linear=True, lam=1e-3)
    exact = torch.linalg.solve(objective.product(torch.eye(len(objective.theta)).double()), perturbation.gradient.T).T
    start = torch.cat([exact[:1], perturbation.initial_guess[1:]])
    refits = ConjugateRefits.begun(
        PerturbedCopies.of(objective, replace(perturbation, initial_guess=start), 1e-3, difference="forward")
    )
    refits.slope[0] = refits.direction[0] = 0.0
    for _ in range(12):
        refits.step()
    assert torch.allclose(refits.at, exact, rtol=1e-6, atol=1e-7)


def test_without_a_prior_on_what_is_drawn_they_start_at_zero_and_end_all_the_same():
    with preserved_random_state():
        torch.manual_seed(3)
        x = torch.randn(60, 2, dtype=torch.float64)
        model = nn.Linear(2, 1).double().eval()
    parts = {
        "prior_precision": {"*": 0.0},
        "regularizer": PosteriorDraws(4, rao_blackwell=None, variance_estimate="monte_carlo"),
    }
    rows = [(x[:40], x[:40, :1]), (x[40:], x[40:, :1])]
    found, exact = (RegVar(model, Gaussian(SIGMA), solver=s, **parts).fit(rows) for s in (FineTune(), LinearResponse()))
    assert found.fit_report_.solver.iterations <= 10
    assert torch.allclose(found.variance(x[:5]), exact.variance(x[:5]), rtol=0.2)


def test_a_new_direction_is_tried_as_far_as_the_one_before():
    copies, _, _ = posed()
    refits = ConjugateRefits.begun(copies)
    for _ in range(4):
        refits.step()
    before = refits.tried * refits.direction.norm(dim=1)
    refits.recompute_slope()
    assert torch.allclose(refits.tried * refits.direction.norm(dim=1), before)


def test_another_lam_recomputes_the_nonlinear_part(monkeypatch):
    copies, _, _ = posed(lam=1e-3)
    refits = ConjugateRefits.begun(copies)
    refits.step()
    refits.recompute_slope()
    refits.step()
    assert refits.nonlinear_part is not None
    monkeypatch.setattr(module, "select_lam", lambda *args: 1e-1)  # noqa: ARG005
    refits.select_lam_again()
    assert refits.lam == pytest.approx(1e-2)
    assert refits.nonlinear_part is None
    refits.step()
    assert refits.nonlinear_part is not None


class _Falling:
    """Slopes as of −A."""

    def __init__(self, copies):
        self.copies = copies
        self.first = copies.gradient(copies.initial_guess)

    def __getattr__(self, name):
        return getattr(self.copies, name)

    def gradient(self, displacements):
        return 2 * self.first - self.copies.gradient(displacements)


def test_few_steps_warn_and_are_kept_to():
    model, rows, _ = problem()
    with pytest.warns(NotConvergedWarning):
        estimator = fitted(model, rows, replace(CONJUGATE, epochs=1), k=16)
    assert estimator.fit_report_.solver.iterations == 1


@pytest.mark.parametrize(
    ("n", "conjugate"), [(70, True), (540, True), (640, False)]
)  # 30, 27 and 24 epochs of stochastic gradients
def test_they_are_chosen_where_rows_are_few(n, conjugate):
    model, rows, _ = problem(n)
    report = fitted(model, rows, DEFAULT_RECIPE).fit_report_.solver
    assert (report.lr is None, report.iterations is not None) == (conjugate, conjugate)


@pytest.mark.parametrize(
    "solver",
    [
        FineTune(recipe=replace(DEFAULT_RECIPE, epochs=30)),
        FineTune(recipe=replace(DEFAULT_RECIPE, lr=1e-3)),
        FineTune(recipe=replace(DEFAULT_RECIPE, optimizer="nesterov")),
        FineTune(recipe=replace(DEFAULT_RECIPE, schedule="cosine", average=0.0)),
        FineTune(difference="central"),
    ],
    ids=["epochs", "rate", "optimizer", "schedule", "central"],
)
@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_a_recipe_that_asks_for_something_is_a_stochastic_one(solver):
    model, rows, _ = problem(40)
    report = fitted(model, rows, solver=solver).fit_report_.solver
    assert report.lr is not None
    assert report.iterations is None


def test_perturbations_without_an_initial_guess_are_refitted_by_sgd():
    model, rows, _ = problem(40)
    solver = FineTune(recipe=replace(DEFAULT_RECIPE, epochs="auto"))
    estimator = RegVar(model, Gaussian(SIGMA), regularizer=MeanAbsolute(), solver=solver).fit(rows)
    assert estimator.fit_report_.solver.lr is not None
    with pytest.raises(OptionError, match="posterior draws of a centred objective"):
        RegVar(model, Gaussian(SIGMA), regularizer=MeanAbsolute(), solver=FineTune(recipe=CONJUGATE)).fit(rows)


def test_central_differences_raise():
    with pytest.raises(OptionError, match='difference="forward"'):
        FineTune(difference="central", recipe=CONJUGATE)


def test_no_optimizer_is_built_of_them():
    with pytest.raises(OptionError, match="stochastic optimizer"):
        Recipe(optimizer="conjugate").make_optimizer(nn.Parameter(torch.zeros(2)))
    assert isinstance(Recipe(optimizer="auto", lr=0.1).make_optimizer(nn.Parameter(torch.zeros(2))), torch.optim.SGD)


def test_single_precision_comes_near_to_double():
    found = {}
    for dtype in (torch.float64, torch.float32):
        model, rows, x = problem(dtype=dtype)
        estimator = fitted(model, rows, k=200)
        found[dtype] = estimator.variance(x).double()
        assert estimator.fit_report_.solver.lam < 1e-2
        assert math.isfinite(estimator.a_norm_error_)
    exact = fitted(*problem()[:2], solver=LinearResponse(), k=200).variance(problem()[2])
    for variance in found.values():  # their draws differ: 1/10 is √(2/200)
        assert float((variance / exact - 1).square().mean().sqrt()) < 0.2


@pytest.mark.parametrize("max_concurrent", ["auto", 2])
def test_an_interrupted_fit_resumes_with_the_same_result(max_concurrent, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    model, rows, x = problem()
    solver = FineTune(recipe=CONJUGATE, max_concurrent=max_concurrent)
    whole = fitted(model, rows, solver=solver, k=5)
    written, write = [], checkpoint.write_file

    def writing(*args):
        write(*args)
        written.append(args)
        if len(written) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_file", writing)
    with pytest.raises(KeyboardInterrupt):
        fitted(model, rows, solver=solver, k=5, checkpoint=tmp_path / "fit.safetensors")
    resumed = fitted(model, rows, solver=solver, k=5, checkpoint=tmp_path / "fit.safetensors")
    assert torch.equal(resumed.variance(x), whole.variance(x))
    assert resumed.fit_report_.solver == whole.fit_report_.solver
    assert resumed.fit_report_.a_norm_error == whole.fit_report_.a_norm_error


def test_no_step_is_made_from_an_exact_initial_guess():
    copies, objective, perturbation = posed()
    exact = torch.linalg.solve(objective.product(torch.eye(len(objective.theta)).double()), perturbation.gradient.T).T
    there = PerturbedCopies.of(objective, replace(perturbation, initial_guess=exact), 1e-7, difference="forward")
    assert conjugate_refits(there, 10, Checkpoint()).steps == 0
    assert conjugate_refits(copies, 10, Checkpoint()).steps > 2
