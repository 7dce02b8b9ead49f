"""Calibration of stored predictions: the grid is a double loop, the choice its least point, refined between points."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from estimators import Bernoulli, Categorical, Gaussian, calibrate
from estimators.errors import DataError, OptionError, TuningBoundaryWarning, UnsupportedError
from estimators.likelihoods import CausalTokens
from estimators.likelihoods.prediction import Prediction
from estimators.tuning import CalibrationGrid

M, C, SIGMA = 300, 3, 0.4
GRID = CalibrationGrid(
    variance_scales=(0.0, 0.03, 0.2, 0.7, 3.0, 20.0),
    softmax_temperatures=(0.3, 0.6, 2.0, 5.0),
    noise_factors=(0.5, 2.0, 4.0),
)
KINDS = ("regression", "classification", "binary")
pytestmark = pytest.mark.filterwarnings("ignore::estimators.errors.TuningBoundaryWarning")
kinds = pytest.mark.parametrize("kind", KINDS)
LIKELIHOODS = {"regression": Gaussian(SIGMA), "classification": Categorical(), "binary": Bernoulli()}


def moments():
    """Overconfident logits or means, and a variance that knows where they are wrong, four times too large."""
    rng = np.random.default_rng(3)
    truth = rng.normal(size=(M, C))
    spread = rng.gamma(2.0, 0.4, size=(M, C))
    mean = 2.0 * (truth + np.sqrt(spread) * rng.normal(size=(M, C)))
    return truth, mean, 16 * spread, rng


def rows(kind, samples=None):
    """A prediction of all rows, and targets."""
    truth, mean, variance, rng = moments()
    noise = rng.gumbel(size=(M, C))
    y = {
        "regression": lambda: torch.tensor(2 * truth + 1.1 * rng.normal(size=(M, C))),
        "classification": lambda: torch.tensor((truth + noise).argmax(1)),
        "binary": lambda: torch.tensor((truth + rng.logistic(size=(M, C)) > 0).astype(float)),
    }[kind]()
    mean, variance = torch.tensor(mean), torch.tensor(variance)
    if samples is not None:
        z = torch.tensor(rng.normal(size=(samples, M, C)))
        samples = mean + variance.sqrt() * (z - z.mean(0))
    return LIKELIHOODS[kind].predict(mean, variance, samples), y


def by_hand(kind, mean, variance, y, scale, other, samples=None):
    """Mean −log p(y), from formulas."""
    mean, variance, y = (np.asarray(a) for a in (mean, variance, y))
    if kind == "regression":
        total = scale * variance + (other * SIGMA) ** 2
        return float((0.5 * (y - mean) ** 2 / total + 0.5 * np.log(2 * np.pi * total)).sum(1).mean())
    if samples is not None:
        logits = (mean + math.sqrt(scale) * (np.asarray(samples) - mean)) / other
    else:
        logits = (mean / other / np.sqrt(1 + math.pi / 8 * scale * variance / other**2))[None]
    if kind == "binary":
        p = (1 / (1 + np.exp(-logits))).mean(0)
        return float(-np.where(y == 1, np.log(p), np.log(1 - p)).mean())
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).mean(0)
    return float(-np.log(p[np.arange(len(y)), y]).mean())


@pytest.mark.parametrize(("kind", "samples"), [*((kind, None) for kind in KINDS), ("classification", 5), ("binary", 5)])
def test_the_grid_is_a_double_loop_and_the_choice_its_least_point(kind, samples):
    prediction, y = rows(kind, samples)
    found = calibrate(prediction, y, grid=GRID, refine=False)
    others = found.grid.noise_or_temperature(kind)
    expected = [
        [
            by_hand(kind, prediction.mean, prediction.epistemic_variance, y, scale, other, prediction.samples)
            for other in others
        ]
        for scale in found.grid.variance_scales
    ]
    assert np.allclose(found.scores, expected, rtol=1e-12)
    i, j = np.unravel_index(np.argmin(expected), np.shape(expected))
    assert (found.variance_scale, found.noise_or_temperature) == (found.grid.variance_scales[i], others[j])
    assert found.score == pytest.approx(np.min(expected), rel=1e-12)
    assert found.variance_scale != 1
    assert not found.refined


@kinds
def test_the_refined_choice_is_the_continuous_optimum_between_the_neighbours(kind):
    prediction, y = rows(kind)
    found = calibrate(prediction, y)
    moments_of = kind, prediction.mean, prediction.epistemic_variance, y
    best = minimize(
        lambda logs: by_hand(*moments_of, *np.exp(logs)),
        np.log([found.variance_scale, found.noise_or_temperature]) + 0.1,
        method="BFGS",
    )
    assert np.log([found.variance_scale, found.noise_or_temperature]) == pytest.approx(best.x, abs=2e-3)
    assert found.score == pytest.approx(best.fun, abs=1e-8)
    assert found.score < float(found.scores.min())
    assert found.refined
    assert found.evaluations > 0
    assert found.score == pytest.approx(
        by_hand(*moments_of, found.variance_scale, found.noise_or_temperature), rel=1e-12
    )


@kinds
def test_what_is_applied_has_the_score_that_was_chosen(kind):
    prediction, y = rows(kind)
    found = calibrate(prediction, y)
    applied = found.apply(prediction)
    if kind == "regression":
        total = applied.total_variance
        score = (0.5 * (y - applied.mean) ** 2 / total + 0.5 * torch.log(2 * math.pi * total)).sum(1).mean()
        assert torch.allclose(applied.aleatoric_variance.sqrt(), torch.tensor(found.sigma_noise, dtype=torch.float64))
    else:
        p = applied.probs.gather(1, y[:, None]) if kind == "classification" else (1 - y + (2 * y - 1) * applied.probs)
        score = -p.log().mean()
    assert float(score) == pytest.approx(found.score, rel=1e-10)
    assert torch.allclose(applied.epistemic_variance * (1 if kind == "regression" else found.noise_or_temperature**2),
                          found.variance_scale * prediction.epistemic_variance)  # fmt: skip


def test_no_change_is_always_in_the_grid_exactly():
    prediction, y = rows("classification")
    for grid in (CalibrationGrid(), GRID, CalibrationGrid((0.5,), (2.0,), ())):
        found = calibrate(prediction, y, grid=grid, refine=False)
        i, j = grid.variance_scales.index(1.0), grid.softmax_temperatures.index(1.0)
        expected = by_hand("classification", prediction.mean, prediction.epistemic_variance, y, 1.0, 1.0)
        assert float(found.scores[i, j]) == pytest.approx(expected, rel=1e-12)
    default = CalibrationGrid()
    assert (default.variance_scales[:2], default.variance_scales[-1]) == ((0.0, 1e-4), 1e4)
    assert (default.softmax_temperatures[0], default.softmax_temperatures[-1]) == pytest.approx((0.1, 10.0))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_without_variance_the_scale_stays_one(kind):
    prediction, y = rows(kind)
    plain = LIKELIHOODS[kind].predict(prediction.mean, 0 * prediction.epistemic_variance, None)
    found = calibrate(plain, y)
    assert found.variance_scale == 1.0
    assert found.noise_or_temperature != 1.0
    assert found.at_boundary == ()


def test_where_the_variance_misleads_the_scale_is_zero_and_no_edge():
    prediction, y = rows("classification")
    top = prediction.mean == prediction.mean.amax(1, keepdim=True)
    wrong = LIKELIHOODS["classification"].predict(prediction.mean, 9.0 * top, None)
    y = prediction.mean.argmax(1)
    y[::4] = (y[::4] + 1) % C
    found = calibrate(wrong, y)
    assert found.variance_scale == 0.0
    assert found.at_boundary == ()


def test_batches_are_as_good_as_all_rows_at_once():
    prediction, y = rows("classification", samples=4)
    whole = calibrate(prediction, y)
    params = [
        Categorical().predict(prediction.mean[part], prediction.epistemic_variance[part], prediction.samples[:, part])
        for part in (slice(0, 25), slice(25, 50), slice(50, M))
    ]
    found = calibrate(params, [y[:25], y[25:50], y[50:]])
    assert torch.equal(found.scores, whole.scores)
    assert (found.variance_scale, found.noise_or_temperature) == (whole.variance_scale, whole.noise_or_temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_computed_in_float64(dtype):
    prediction, y = rows("classification")
    narrow = Categorical().predict(prediction.mean.to(dtype), prediction.epistemic_variance.to(dtype), None)
    assert torch.allclose(calibrate(narrow, y).scores, calibrate(prediction, y).scores, rtol=1e-5)
    assert calibrate(narrow, y).scores.dtype == torch.float64


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_end_of_a_range_is_warned_of_and_named(kind):
    prediction, y = rows(kind)
    grid = CalibrationGrid((0.9, 0.95), (1.0,), (1.0,))
    with pytest.warns(TuningBoundaryWarning, match=r"variance_scale=.*values beyond"):
        found = calibrate(prediction, y, grid=grid)
    assert found.at_boundary == ("variance_scale",)
    other = "sigma_noise" if kind == "regression" else "softmax_temperature"
    grid = CalibrationGrid((), (0.5, 0.7), (0.2, 0.3))
    with pytest.warns(TuningBoundaryWarning, match=other):
        assert calibrate(prediction, y, grid=grid).at_boundary == (other,)


def test_labels_of_places_are_those_that_are_kept_and_shifted():
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(4, C, 2, 3)))
    variance = torch.tensor(rng.gamma(1.0, size=(4, C, 2, 3)))
    y = torch.tensor(rng.integers(0, C, size=(4, 2, 3)))
    y[0, 0], y[3, 1, 2] = -100, -100
    likelihood = Categorical(class_dim=1)
    prediction = likelihood.predict(logits, variance, None)
    shrunken = np.asarray(logits) / np.sqrt(1 + math.pi / 8 * np.asarray(variance))
    p = np.exp(shrunken) / np.exp(shrunken).sum(1, keepdims=True)
    places = [(i, r, c) for i in range(4) for r in range(2) for c in range(3) if y[i, r, c] >= 0]
    expected = np.mean([-np.log(p[i, int(y[i, r, c]), r, c]) for i, r, c in places])
    found = calibrate(prediction, y, grid=CalibrationGrid((), (), ()), likelihood=likelihood)
    assert found.score == pytest.approx(expected, rel=1e-12)

    words = torch.tensor(rng.integers(0, C, size=(4, 5)))
    words[1, 3:] = -100
    text = CausalTokens().predict(torch.tensor(rng.normal(size=(4, 5, C))), torch.zeros(4, 5, C), None)
    log_p = text.probs.log()
    told = [(i, t) for i in range(4) for t in range(1, 5) if words[i, t] >= 0]
    expected = np.mean([-float(log_p[i, t - 1, words[i, t]]) for i, t in told])
    found = calibrate(text, words, grid=CalibrationGrid((), (), ()), likelihood=CausalTokens())
    assert found.score == pytest.approx(expected, rel=1e-12)


def test_texts_of_several_lengths_are_scored_together():
    rng = np.random.default_rng(2)
    lengths, likelihood = (3, 5), CausalTokens()
    logits = [torch.tensor(rng.normal(size=(2, n, C))) for n in lengths]
    predictions = [likelihood.predict(f, torch.ones_like(f), None) for f in logits]
    words = [torch.tensor(rng.integers(0, C, size=(2, n))) for n in lengths]
    options = {"likelihood": likelihood, "refine": False}
    apart = [calibrate(p, y, **options).scores for p, y in zip(predictions, words, strict=True)]
    together = calibrate(predictions, words, **options).scores
    assert torch.allclose(together, (apart[0] * 4 + apart[1] * 8) / 12, rtol=1e-12)
    with pytest.raises(DataError, match="one shape for a custom score"):
        calibrate(predictions, words, likelihood=likelihood, score=lambda prediction, _: float(prediction.mean.sum()))


@pytest.mark.parametrize("sigma", [torch.tensor([0.2, 0.4, 1.6])])
def test_noises_of_several_outputs_are_multiplied_alike(sigma):
    prediction, y = rows("regression")
    several = Gaussian(sigma).predict(prediction.mean, prediction.epistemic_variance, None)
    found = calibrate(several, y)
    noise = found.apply(several).aleatoric_variance.sqrt()
    assert torch.allclose(noise / noise[:, :1], (sigma / sigma[0]).double().expand_as(noise), rtol=1e-6)
    assert found.sigma_noise == pytest.approx(float(noise[0].log().mean().exp()))


def test_a_score_of_ones_own_sees_fresh_predictions_at_every_point():
    prediction, y = rows("classification")
    seen = []

    def brier(p: Prediction, targets):
        seen.append(p)
        return float((p.probs - torch.nn.functional.one_hot(targets, C)).square().sum(1).mean())

    found = calibrate(prediction, y, grid=GRID, score=brier, refine=False)
    others = found.grid.softmax_temperatures
    assert len(seen) == found.scores.numel() == len({id(p) for p in seen})
    expected = [
        [brier(prediction.calibrated(variance_scale=scale, softmax_temperature=other), y) for other in others]
        for scale in found.grid.variance_scales
    ]
    assert torch.allclose(found.scores, torch.tensor(expected, dtype=torch.float64))
    assert found.score_name == "brier"


@kinds
def test_a_record_has_every_point_under_the_names_of_records(kind):
    prediction, y = rows(kind)
    found = calibrate(prediction, y)
    points = found.points()
    other = "sigma_noise" if kind == "regression" else "softmax_temperature"
    assert all(point.keys() == {"variance_scale", other, "score"} for point in points)
    assert len(points) == found.scores.numel() + 1
    assert min(points, key=lambda point: point["score"]) == points[-1] == found.chosen()
    assert json.loads(json.dumps(points)) == points
    assert found.chosen()[other] == (found.sigma_noise if kind == "regression" else found.softmax_temperature)


def test_invalid_input_is_rejected():
    prediction, y = rows("classification")
    with pytest.raises(DataError, match="targets of the same rows"):
        calibrate(prediction, y[:-1])
    with pytest.raises(DataError, match="targets of the same rows"):
        calibrate([], [])
    with pytest.raises(DataError, match="labels of shape"):
        calibrate(prediction, y[:, None])
    with pytest.raises(OptionError, match=r"score.*'mse'"):
        calibrate(prediction, y, score="mse")
    with pytest.raises(OptionError, match="variance_scales"):
        CalibrationGrid(variance_scales=(-1.0,))
    with pytest.raises(OptionError, match="softmax_temperatures"):
        CalibrationGrid(softmax_temperatures=(0.0,))
    with pytest.raises(OptionError, match="a classification prediction"):
        calibrate(prediction, y).apply(rows("regression")[0])
    with pytest.raises(OptionError, match="sigma_noise"):
        _ = calibrate(prediction, y).sigma_noise
    with pytest.raises(OptionError, match="softmax_temperature"):
        _ = calibrate(*rows("regression")).softmax_temperature
    with pytest.raises(DataError, match="NaN"):
        calibrate(Categorical().predict(prediction.mean * math.nan, prediction.epistemic_variance, None), y)
    with pytest.raises(DataError, match="shape of the outputs"):
        calibrate(rows("regression")[0], torch.zeros(M, 1, dtype=torch.float64))


def test_a_monte_carlo_prediction_without_its_samples_is_rejected():
    prediction, y = rows("classification", samples=3)
    moments_of = prediction.mean, prediction.epistemic_variance
    bare = Prediction(*moments_of, "classification", probs=prediction.probs, link_approx="mc")
    with pytest.raises(UnsupportedError, match="samples"):
        calibrate(bare, y)
