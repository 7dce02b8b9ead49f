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
    regularizer = PosteriorDraws(k, rao_blackwell=block, readout="draws")
    solver = FineTune(recipe=recipe) if solver is None else solver
    parts = {"prior_precision": DELTA, "regularizer": regularizer, "solver": solver}
    return RegVar(model, Gaussian(SIGMA), **parts).fit(rows, **options)


def posed(*, linear=False, k=4, lam=1e-6):
    model, rows, _ = problem(linear=linear)
    estimator = fitted(model, rows, solver=LinearResponse(), k=k, block=None)
    objective = estimator.refit_objective_
    perturbation, _ = estimator.regularizer.pose(objective)
    return PerturbedCopies.of(objective, perturbation, lam, difference="forward"), objective, perturbation


def test_steps_are_those_of_conjugate_gradients_written_a_second_time():
    replicas, objective, perturbation = posed(linear=True, lam=1e-3)
    a = objective.product(torch.eye(len(objective.theta)).double())
    u = perturbation.start.clone()
    r = perturbation.direction - u @ a
    p = r.clone()
    refits = ConjugateRefits.begun(replicas)
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
        patch.setattr(module, "_ENOUGH", 1e-9)
        found = fitted(model, rows, solver=solver, block=block)
    assert float((found.variance(x) / exact - 1).abs().max()) < 1e-3
    assert found.fit_report_.solver.iterations <= 80
    assert found.fit_report_.solver.lr is None


def test_they_end_where_the_energy_error_is_small_and_report_it_from_slopes_computed_anew():
    model, rows, _ = problem()
    estimator = fitted(model, rows)
    objective, u = estimator.refit_objective_, estimator.readout_.displacement
    perturbation, _ = estimator.regularizer.pose(objective)
    a = objective.product(torch.eye(u.shape[1]).double())
    exact = torch.linalg.solve(a, perturbation.direction.T).T
    error = estimator.fit_report_.energy
    true = float((((u - exact) @ a) * (u - exact)).sum(1).mean())
    dimension = error.per_parameter * float((perturbation.direction != 0).any(0).sum()) / error.per_dimension
    assert true / dimension <= error.bound * (1 + 1e-3)
    assert min(error.per_dimension, error.bound) <= module._TRUSTED * module._ENOUGH
    measured = SampleANormErrors.of(
        perturbation, objective.prior.precision, u, objective.product(u) - perturbation.direction
    ).error
    assert error.per_dimension == pytest.approx(measured.per_dimension, rel=1e-4, abs=1e-5)
    assert 3 < estimator.fit_report_.solver.iterations < 40
    passes = estimator.fit_report_.passes["solve"]
    assert passes == pytest.approx(estimator.fit_report_.solver.iterations + 3, abs=1.5)  # start, end, λ again


def test_slopes_that_were_followed_wrongly_are_found_out():
    replicas, _, _ = posed()
    refits = ConjugateRefits.begun(replicas)
    for _ in range(3):
        refits.step()
    right = refits.slope.clone()
    refits.slope, refits._known = torch.zeros_like(right), None  # a bound of 0
    assert refits.enough(module._ENOUGH)
    refits.look_at_limit()
    assert torch.allclose(refits.slope, right, rtol=1e-3, atol=1e-3)
    assert torch.equal(refits.direction, -refits.slope)
    assert not refits.enough(module._TRUSTED * module._ENOUGH)


def test_a_direction_along_which_it_does_not_rise_is_left_for_the_steepest_descent():
    replicas, _, _ = posed()
    refits = ConjugateRefits.begun(replicas)
    at, slope, tried = refits.at.clone(), refits.slope.clone(), refits.tried.clone()
    refits.replicas = _Falling(replicas)
    refits.step()
    assert torch.allclose(refits.at, at)
    assert torch.allclose(refits.slope, slope)
    assert torch.allclose(refits.direction, -slope)
    assert torch.allclose(refits.tried, 0.5 * tried)


def test_replicas_that_are_at_their_end_stay_there_while_others_go_on():
    _, objective, perturbation = posed(linear=True, lam=1e-3)
    exact = torch.linalg.solve(objective.product(torch.eye(len(objective.theta)).double()), perturbation.direction.T).T
    start = torch.cat([exact[:1], perturbation.start[1:]])
    refits = ConjugateRefits.begun(
        PerturbedCopies.of(objective, replace(perturbation, start=start), 1e-3, difference="forward")
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
    parts = {"prior_precision": {"*": 0.0}, "regularizer": PosteriorDraws(4, rao_blackwell=None, readout="draws")}
    rows = [(x[:40], x[:40, :1]), (x[40:], x[40:, :1])]
    found, exact = (RegVar(model, Gaussian(SIGMA), solver=s, **parts).fit(rows) for s in (FineTune(), LinearResponse()))
    assert found.fit_report_.solver.iterations <= 10
    assert torch.allclose(found.variance(x[:5]), exact.variance(x[:5]), rtol=0.2)


def test_a_new_direction_is_tried_as_far_as_the_one_before():
    replicas, _, _ = posed()
    refits = ConjugateRefits.begun(replicas)
    for _ in range(4):
        refits.step()
    before = refits.tried * refits.direction.norm(dim=1)
    refits.look_at_limit()
    assert torch.allclose(refits.tried * refits.direction.norm(dim=1), before)


def test_where_what_is_bent_is_taken_off_another_lam_measures_it_anew(monkeypatch):
    replicas, _, _ = posed(lam=1e-3)
    refits = ConjugateRefits.begun(replicas)
    refits.step()
    refits.look_at_limit()
    refits.step()
    assert refits.bent is not None
    monkeypatch.setattr(module, "straightest_lam", lambda *args: 1e-1)  # noqa: ARG005
    refits.choose_again()
    assert refits.lam == pytest.approx(1e-2)
    assert refits.bent is None
    refits.step()
    assert refits.bent is not None


class _Falling:
    """Slopes as of −A."""

    def __init__(self, replicas):
        self.replicas = replicas
        self.first = replicas.gradient(replicas.start)

    def __getattr__(self, name):
        return getattr(self.replicas, name)

    def gradient(self, arms):
        return 2 * self.first - self.replicas.gradient(arms)


def test_few_steps_warn_and_are_kept_to():
    model, rows, _ = problem()
    with pytest.warns(NotConvergedWarning):
        estimator = fitted(model, rows, replace(CONJUGATE, epochs=1), k=16)
    assert estimator.fit_report_.solver.iterations == 1


@pytest.mark.parametrize(
    ("n", "conjugate"), [(70, True), (540, True), (640, False), (2000, False)]
)  # 30, 27, 24 and 15 epochs of stochastic gradients
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


def test_penalties_without_a_start_descend_by_stochastic_gradients():
    model, rows, _ = problem(40)
    solver = FineTune(recipe=replace(DEFAULT_RECIPE, epochs="auto"))
    estimator = RegVar(model, Gaussian(SIGMA), regularizer=MeanAbsolute(), solver=solver).fit(rows)
    assert estimator.fit_report_.solver.lr is not None
    with pytest.raises(OptionError, match="posterior draws of a centred objective"):
        RegVar(model, Gaussian(SIGMA), regularizer=MeanAbsolute(), solver=FineTune(recipe=CONJUGATE)).fit(rows)


def test_two_arms_are_refused():
    with pytest.raises(OptionError, match='difference="forward"'):
        FineTune(difference="central", recipe=CONJUGATE)


def test_no_optimizer_is_built_of_them():
    with pytest.raises(OptionError, match="stochastic optimizer"):
        Recipe(optimizer="conjugate").build(nn.Parameter(torch.zeros(2)))
    assert isinstance(Recipe(optimizer="auto", lr=0.1).build(nn.Parameter(torch.zeros(2))), torch.optim.SGD)


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


@pytest.mark.parametrize("in_flight", ["auto", 2])
def test_a_fit_that_stopped_goes_on_and_ends_alike(in_flight, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    model, rows, x = problem()
    solver = FineTune(recipe=CONJUGATE, in_flight=in_flight)
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
    assert resumed.fit_report_.energy == whole.fit_report_.energy


def test_a_penalty_is_followed_from_its_start_without_a_look_where_it_is_there():
    replicas, objective, perturbation = posed()
    exact = torch.linalg.solve(objective.product(torch.eye(len(objective.theta)).double()), perturbation.direction.T).T
    there = PerturbedCopies.of(objective, replace(perturbation, start=exact), 1e-7, difference="forward")
    assert conjugate_refits(there, 10, Checkpoint()).steps == 0
    assert conjugate_refits(replicas, 10, Checkpoint()).steps > 2
