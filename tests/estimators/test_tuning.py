"""Tuning against brute force on toys: every pick is that of a dense Laplace written out in numpy."""

import math
import random

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from tuning_toys import SIGMA, laplace, toy

from estimators import Categorical, FineTune, MeanAbsolute, RegVar, optimize_prior_precision, tune
from estimators.errors import OptionError
from estimators.training import Recipe
from estimators.tuning import CalibrationGrid

kinds = pytest.mark.parametrize("kind", ["regression", "classification"])
quiet = pytest.mark.filterwarnings("ignore::estimators.errors.TuningBoundaryWarning")
DELTAS = [10 ** (k / 4) for k in range(-8, 9)]
SMALL = CalibrationGrid((0.1, 0.4, 3.0), (0.6, 1.7), (0.7, 1.4))


@pytest.fixture(scope="module")
def fits():
    """Exact Laplace of each toy at the δ that it was trained with."""
    return {kind: laplace(toy(kind)) for kind in ("regression", "classification")}


@kinds
def test_the_search_picks_the_brute_force_optimum_of_the_predictive(kind, fits):
    problem, estimator = toy(kind), fits[kind]
    found = optimize_prior_precision(estimator, problem.validation, grid=DELTAS)
    values = sorted([*DELTAS, problem.delta])
    expected = [problem.score(delta) for delta in values]
    assert [point.value for point in found.trials] == values
    assert [point.score for point in found.trials] == pytest.approx(expected, rel=1e-9)
    best = int(np.argmin(expected))
    assert 0 < best < len(values) - 1
    assert found.value == values[best] == found.estimator.prior_precision
    assert found.at_boundary == ()
    x = torch.tensor(problem.x_val)
    fresh = laplace(problem, prior_precision=values[best])
    assert torch.allclose(found.predict(x).epistemic_variance, fresh.variance(x), rtol=1e-9)
    assert estimator.prior_precision == problem.delta


@kinds
def test_the_marginal_likelihood_picks_the_optimum_of_the_evidence_by_hand(kind, fits):
    problem = toy(kind)
    found = optimize_prior_precision(fits[kind], method="marglik")
    best = minimize_scalar(
        lambda log_delta: problem.minus_evidence(math.exp(log_delta)),
        bounds=(math.log(1e-3), math.log(1e3)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    assert math.log(found.value) == pytest.approx(best.x, abs=1e-4)
    assert found.chosen.score == pytest.approx(best.fun, rel=1e-10)
    assert [point.score for point in found.trials] == pytest.approx(
        [problem.minus_evidence(point.value) for point in found.trials], rel=1e-9
    )
    assert found.estimator.prior_precision == found.value
    assert (found.fits, found.at_boundary, found.refit_kind) == (1, (), "post hoc at fixed weights")


@quiet
@kinds
def test_the_protocol_picks_the_brute_force_optimum_over_all_three(kind, fits):
    problem = toy(kind)
    found = tune(fits[kind], problem.validation, values=DELTAS, grid=SMALL, refine=False)
    others = found.calibration.grid.noise_or_temperature(kind)
    places = [(d, s, t) for d in sorted([*DELTAS, problem.delta]) for s in (0.1, 0.4, 1.0, 3.0) for t in others]
    expected = [problem.score(*place) for place in places]
    best = places[int(np.argmin(expected))]
    assert (found.value, found.calibration.variance_scale, found.calibration.noise_or_temperature) == best
    assert best != (problem.delta, 1.0, 1.0)
    scores = torch.stack([point.calibration.scores for point in found.trials]).flatten()
    assert scores.tolist() == pytest.approx(expected, rel=1e-9)
    assert found.fits == len(DELTAS)


@quiet
@kinds
def test_the_penalty_of_few_rows_is_added_to_the_score_of_every_temperature(kind, fits):
    problem, w = toy(kind), 40.0
    plain, shrunk = (
        tune(fits[kind], problem.validation, option=None, grid=SMALL, refine=False, shrinkage=shrinkage)
        for shrinkage in (0.0, w)
    )
    n, factors = sum(len(y) for _, y in problem.validation), SMALL.noise_or_temperature(fits[kind].likelihood.kind)
    penalty = [w * math.log(t) ** 2 / n for t in factors]
    difference = shrunk.calibration.scores - plain.calibration.scores
    assert torch.allclose(difference, torch.tensor(penalty, dtype=torch.float64).expand_as(difference), rtol=1e-9)
    assert shrunk.calibration.noise_or_temperature != plain.calibration.noise_or_temperature or min(penalty) == 0


@quiet
@kinds
def test_refining_finds_a_better_place_and_its_own_score_there(kind, fits):
    problem = toy(kind)
    options = {
        "values": [0.1, 0.2, 0.5],
        "grid": CalibrationGrid((0.03, 0.2, 0.6, 4.0, 20.0), (), (0.6, 0.9, 1.3, 2.0)),
    }
    coarse = tune(fits[kind], problem.validation, **options, refine=False)
    found = tune(fits[kind], problem.validation, **options)
    assert found.calibration.refined
    assert not found.calibration.at_boundary
    assert found.chosen.score < coarse.chosen.score
    place = found.value, found.calibration.variance_scale, found.calibration.noise_or_temperature
    assert found.chosen.score == pytest.approx(problem.score(*place), rel=1e-9)
    for k in (1, 2) if kind == "regression" else (1,):
        for factor in (0.97, 1.03):
            moved = list(place)
            moved[k] *= factor
            assert problem.score(*moved) > found.chosen.score


@quiet
@kinds
def test_a_value_is_scored_alike_whatever_was_tried_before_it(kind, fits):
    problem = toy(kind)
    whole = {p.value: p.score for p in optimize_prior_precision(fits[kind], problem.validation, grid=DELTAS).trials}
    shuffled = random.Random(0).sample(DELTAS[3:], 8)
    found = optimize_prior_precision(fits[kind], list(reversed(problem.validation)), grid=[*shuffled, DELTAS[0]])
    assert [point.score for point in found.trials] == pytest.approx([whole[point.value] for point in found.trials])


def test_the_noise_is_an_option_too(fits):
    problem = toy("regression")
    found = tune(fits["regression"], problem.validation, option="sigma_noise", grid=CalibrationGrid((), (), ()))
    values = [point.value for point in found.trials]
    expected = [problem.score(problem.delta, sigma=sigma) for sigma in values]
    assert values == pytest.approx([SIGMA * 10 ** (k / 4) for k in range(-4, 5)])
    assert [point.score for point in found.trials] == pytest.approx(expected, rel=1e-9)
    assert found.value == values[int(np.argmin(expected))]
    assert found.estimator.likelihood.sigma_noise == found.value


@quiet
def test_lambda_by_variance_scale_is_a_grid_of_scores():
    """The paper's Figure 4, of its own form: NLL over λ × scale, each entry from a fit of its own and a formula."""
    problem = toy("classification")
    options = {"prior_precision": problem.delta, "curvature": "hessian", "centred": False}
    ladder = [1e-3, 1e-2, 0.1]
    recipe = Recipe(epochs=3, batch_size=16, optimizer="sgd", lr=0.02)

    def paper(lam):
        parts = {"regularizer": MeanAbsolute(), "solver": FineTune(lam, recipe=recipe)}
        return RegVar(problem.model, "classification", **options, **parts).fit(problem.train)

    grid = CalibrationGrid((0.0, 0.01, 0.1), (), ())
    found = tune(paper(1e-2), problem.validation, option="solver.lam", values=ladder, grid=grid)
    score_grid = found.score_grid()
    assert score_grid.values == (1e-3, 1e-2, 0.1)
    assert score_grid.variance_scales == (0.0, 0.01, 0.1, 1.0)
    x, y = torch.tensor(problem.x_val), torch.tensor(problem.y_val)
    for lam, row in zip(score_grid.values, score_grid.scores, strict=True):
        fitted = paper(lam)
        for scale, score in zip(score_grid.variance_scales, row.tolist(), strict=True):
            prediction = Categorical().predict(problem.model(x).detach(), scale * fitted.variance(x), None)
            expected = -prediction.probs[torch.arange(len(y)), y].log().mean()
            assert score == pytest.approx(float(expected), rel=1e-6)


@quiet
def test_the_score_grid_is_read_at_one_temperature_or_at_the_best(fits):
    problem = toy("classification")
    found = tune(fits["classification"], problem.validation, values=DELTAS, refine=False)
    others = found.calibration.grid.softmax_temperatures
    every = torch.stack([point.calibration.scores for point in found.trials])
    assert torch.equal(found.score_grid().scores, every[..., others.index(1.0)])
    assert torch.equal(found.score_grid(noise_or_temperature=others[2]).scores, every[..., 2])
    assert torch.equal(found.score_grid(noise_or_temperature=None).scores, every.amin(-1))
    assert float(found.score_grid(noise_or_temperature=None).scores.min()) == found.chosen.score
    with pytest.raises(OptionError, match="noise_or_temperature among"):
        found.score_grid(noise_or_temperature=0.123)
    with pytest.raises(OptionError, match="an option with numeric values"):
        tune(fits["classification"], problem.validation, option=None).score_grid()
