"""The protocol: its ends, failures, axes, costs and records."""

import json
import math

import numpy as np
import pytest
import torch
from tuning_toys import SIGMA, laplace, toy

from estimators import LastLayerLaplace, LinearizedLaplace, optimize_prior_precision, tune
from estimators.baselines.map import MAP
from estimators.errors import IndefiniteHessianError, TuningBoundaryWarning
from estimators.tuning import CalibrationGrid

kinds = pytest.mark.parametrize("kind", ["regression", "classification"])
quiet = pytest.mark.filterwarnings("ignore::estimators.errors.TuningBoundaryWarning")
SMALL = CalibrationGrid((0.1, 0.4, 3.0), (0.6, 1.7), (0.7, 1.4))


@pytest.fixture(scope="module")
def fits():
    """Exact Laplace of each toy at the δ that it was trained with."""
    return {kind: laplace(toy(kind)) for kind in ("regression", "classification")}


@pytest.mark.parametrize(("grid", "end"), [([1e-4, 1e-3], 0.02), ([30.0, 3.0, 100.0], 3.0)])
def test_the_end_of_the_values_is_warned_of_and_named(grid, end, fits):
    problem = toy("regression")
    estimator = fits["regression"] if end == 0.02 else laplace(problem, prior_precision=10.0)
    with pytest.warns(TuningBoundaryWarning, match=rf"prior_precision={end:g}\..*values beyond"):
        found = optimize_prior_precision(estimator, problem.validation, grid=grid)
    assert found.at_boundary == ("prior_precision",)
    with pytest.warns(TuningBoundaryWarning, match="prior_precision=0.02"):
        assert optimize_prior_precision(fits["regression"], method="marglik", grid=[1e-3]).at_boundary


def test_where_every_value_is_as_good_the_given_one_is_kept_without_a_warning():
    problem = toy("classification")
    plain = MAP(problem.model, "classification", prior_precision=0.5).fit(problem.train)
    found = tune(plain, problem.validation, values=[0.1, 2.0])
    assert len({point.score for point in found.trials}) == 1
    assert found.value == 0.5
    assert found.estimator is plain
    assert found.calibration.variance_scale == 1.0
    assert found.calibration.softmax_temperature > 1
    assert found.at_boundary == ()


@pytest.fixture
def indefinite():
    """The exact Hessian of a random network: indefinite below some δ."""
    problem = toy("regression")
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    options = {"curvature": "hessian", "inverse": "cholesky"}
    return LinearizedLaplace(model, problem.likelihood, prior_precision=1e4, **options).fit(problem.train)


@quiet
@pytest.mark.parametrize("method", ["gridsearch", "marglik"])
def test_values_without_a_posterior_are_kept_as_failed_and_never_chosen(method, indefinite):
    found = optimize_prior_precision(indefinite, toy("regression").validation, method=method, grid=[1e-3, 1e-2, 3e4])
    failed = [point for point in found.trials if point.score is None]
    assert [point.value for point in failed][:2] == [1e-3, 1e-2]
    assert all("positive definite" in point.failure for point in failed)
    assert found.value > max(point.value for point in failed)
    record = found.to_dict()
    assert list(record["failures"])[:2] == ["0.001", "0.01"]
    assert record["points"][0] == {"value": 1e-3, "variance_scale": None, "sigma_noise": None, "score": None}


def test_the_least_value_that_did_not_fail_is_an_end(indefinite):
    problem = toy("regression")
    with pytest.warns(TuningBoundaryWarning, match="prior_precision=1e\\+04"):
        found = optimize_prior_precision(indefinite, problem.validation, grid=[1e-2, 1e5, 1e6], score=_wants_variance)
    assert found.at_boundary == ("prior_precision",)


def _wants_variance(prediction, targets):
    return -float(prediction.epistemic_variance.mean()) / len(targets)


def test_where_every_value_fails_their_error_is_raised(indefinite, monkeypatch):
    problem = toy("regression")

    def fail(*_):
        raise IndefiniteHessianError(smallest=-1.0, largest=2.0)

    for name in ("_variance", "log_marginal_likelihood"):
        monkeypatch.setattr(LinearizedLaplace, name, fail)
    with pytest.raises(IndefiniteHessianError):
        optimize_prior_precision(indefinite, problem.validation, grid=[1e-2, 1e-3])
    with pytest.raises(IndefiniteHessianError):
        optimize_prior_precision(indefinite, method="marglik", grid=[1e-2, 1e-3])


class Spread(MAP):
    """A variance that is an option: a method whose knob is its own, and which trains for each value of it."""

    retrains = True

    def __init__(self, model, likelihood, *, prior_precision=1.0, rate=0.1):
        super().__init__(model, likelihood, prior_precision=prior_precision)
        self.rate = rate

    def _fit(self, objective, *, progress_bar):  # noqa: ARG002
        with objective.network.pass_counter.phase("training"):
            objective.gradient(objective.theta)

    def _variance(self, x):
        return torch.full_like(self.network_.outputs(x), self.rate)


def test_any_option_can_be_tuned_and_its_cost_is_counted():
    problem = toy("regression")
    fitted = Spread(problem.model, problem.likelihood, rate=0.3).fit(problem.train)
    values, spent = [1e-3, 0.05, 2.0], fitted.passes_
    found = tune(fitted, problem.validation, option="rate", values=values, grid=CalibrationGrid((), (), ()))
    assert [point.value for point in found.trials] == [1e-3, 0.05, 0.3, 2.0]
    f = problem.outputs_and_jacobian(problem.x_val)[0]
    totals = [rate + SIGMA**2 for rate in (1e-3, 0.05, 0.3, 2.0)]
    expected = [(0.5 * (problem.y_val - f) ** 2 / t + 0.5 * np.log(2 * np.pi * t)).sum(1).mean() for t in totals]
    assert [point.score for point in found.trials] == pytest.approx(expected, rel=1e-12)
    assert (found.fits, found.refit_kind) == (3, "with retraining")
    queries = fitted.passes_ - spent
    assert found.passes == pytest.approx(3 * (1 + queries) + queries)


@quiet
@kinds
def test_a_record_is_json_with_every_point_of_every_grid(kind, fits):
    problem = toy(kind)
    found = tune(fits[kind], problem.validation, values=[0.5], grid=SMALL)
    record = json.loads(json.dumps(found.to_dict()))
    other = "sigma_noise" if kind == "regression" else "softmax_temperature"
    assert record["option"] == "prior_precision"
    assert record["unit"] == "1/weight²"
    assert record["chosen"].keys() == {"value", "variance_scale", other, "score"}
    assert record["chosen"]["value"] == found.value
    grids = [point.calibration.points() for point in found.trials]
    assert len(record["points"]) == sum(map(len, grids))
    assert [point["score"] for point in record["points"]] == pytest.approx(
        [point["score"] for grid in grids for point in grid], rel=1e-7
    )
    assert min(record["points"], key=lambda point: point["score"]) == record["chosen"]
    expected = {"fits": 1, "score_name": "NLL", "validation_rows": 60, "refit_kind": "post hoc at fixed weights"}
    assert {name: record[name] for name in expected} == expected
    assert record["at_boundary"] == list(found.at_boundary)
    assert record["seconds"] > 0
    assert record["passes"] == found.passes > 0


@quiet
def test_predict_applies_the_fit_and_the_calibration(fits):
    problem = toy("regression")
    found = tune(fits["regression"], problem.validation)
    x = torch.tensor(problem.x_val)
    prediction = found.predict(x)
    total = prediction.total_variance
    score = (
        0.5 * (torch.tensor(problem.y_val) - prediction.mean) ** 2 / total + 0.5 * torch.log(2 * math.pi * total)
    ).sum(1)
    assert float(score.mean()) == pytest.approx(found.chosen.score, rel=1e-9)
    variance = laplace(problem, prior_precision=found.value).variance(x)
    assert torch.allclose(prediction.epistemic_variance, found.calibration.variance_scale * variance, rtol=1e-9)


@quiet
def test_the_model_and_the_random_state_are_left_as_they_were(fits, untouched):
    problem = toy("classification")
    data = torch.utils.data.TensorDataset(*(torch.tensor(a) for a in (problem.x_val, problem.y_val)))
    loader = torch.utils.data.DataLoader(data, batch_size=7, shuffle=True)
    with untouched(problem.model):
        found = tune(fits["classification"], loader, values=[0.5])
    assert found.validation_rows == 60


def test_the_last_layer_has_its_own_evidence_and_its_own_pick():
    problem = toy("classification")
    fitted = LastLayerLaplace(problem.model, "classification", prior_precision=0.3).fit(problem.train)
    found = optimize_prior_precision(fitted, method="marglik")
    evidence = [float(fitted.log_marginal_likelihood(found.value * factor)) for factor in (0.98, 1.0, 1.02)]
    assert evidence[1] == max(evidence)


@quiet
def test_groups_of_priors_are_values_where_they_are_named(fits):
    problem = toy("classification")
    groups = [{"*.bias": 1e-3, "*": delta} for delta in (0.05, 0.2)]
    found = optimize_prior_precision(fits["classification"], problem.validation, grid=groups)
    assert [point.value for point in found.trials] == [*groups, problem.delta]
    expected = [laplace(problem, prior_precision=group).predict(torch.tensor(problem.x_val)).probs for group in groups]
    y = torch.tensor(problem.y_val)[:, None]
    for point, probs in zip(found.trials, expected, strict=False):
        assert point.score == pytest.approx(-float(probs.gather(1, y).log().mean()), rel=1e-9)


def test_a_value_whose_fit_was_lost_is_kept_as_failed():
    class Lost(MAP):
        def __init__(self, model, likelihood, *, prior_precision=1.0, rate=1.0):
            super().__init__(model, likelihood, prior_precision=prior_precision)
            self.rate = rate

        def _variance(self, x):
            return super()._variance(x) + (float("nan") if self.rate > 1 else 0.0)

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    model = torch.nn.Linear(3, 2).double().eval()
    found = tune(Lost(model, "regression").fit([(x, y)]), [(x, y)], option="rate", values=[0.5, 1.0, 2.0])
    assert [point.value for point in found.trials if point.score is None] == [2.0]
    assert found.chosen.value in (0.5, 1.0)
    assert "finite" in found.to_dict()["failures"]["2.0"]
