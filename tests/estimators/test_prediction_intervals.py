"""Standard deviation, intervals and original units of predictions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from estimators import Gaussian, LastLayerLaplace, LinearizedLaplace, RegVar, calibrate, tune
from estimators.baselines import MAP, DeepEnsemble
from estimators.errors import DataError, OptionError, UnsupportedError

SHIFT, SCALE = [3.0, -20.0], [0.5, 40.0]


def rows(n=23, seed=1, outputs=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return list(
        zip(x.split(9), torch.randn(n, outputs, generator=generator, dtype=torch.float64).split(9), strict=True)
    )


def network(seed=3, outputs=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double().eval()


def test_std_is_that_of_the_target_in_regression_and_of_the_logits_else():
    x = rows()[0][0]
    regression = LinearizedLaplace(network(), Gaussian([0.3, 0.7]), prior_precision=2.0).fit(rows()).predict(x)
    assert torch.allclose(
        regression.std**2, regression.epistemic_variance + torch.tensor([0.09, 0.49], dtype=torch.float64)
    )
    labels = [(x, y.argmax(1)) for x, y in rows()]
    fitted = LinearizedLaplace(network(), "classification", prior_precision=2.0).fit(labels)
    assert torch.allclose(fitted.predict(x).std ** 2, fitted.variance(x))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_an_interval_is_the_central_one_of_the_gaussian(level):
    x = rows()[0][0]
    prediction = LinearizedLaplace(network(), Gaussian([0.3, 0.7]), prior_precision=2.0).fit(rows()).predict(x)
    normal = torch.distributions.Normal(prediction.mean, prediction.total_variance.sqrt())
    for end, probability in zip(prediction.interval(level), ((1 - level) / 2, (1 + level) / 2), strict=True):
        assert torch.allclose(normal.cdf(end), torch.tensor(probability, dtype=torch.float64), atol=1e-9)


def test_intervals_have_their_coverage_on_data_of_the_model():
    """Weights from the prior, a linear network: the posterior predictive is exact, and so is its coverage."""
    generator, covered = torch.Generator().manual_seed(0), {0.5: [], 0.9: []}
    for _ in range(60):
        weight = torch.randn(1, 3, generator=generator, dtype=torch.float64) / math.sqrt(2.0)
        x = torch.randn(72, 3, generator=generator, dtype=torch.float64)
        y = x @ weight.T + 0.5 * torch.randn(72, 1, generator=generator, dtype=torch.float64)
        model = nn.Linear(3, 1, bias=False).double()
        precision = x[:8].T @ x[:8] / 0.25 + 2.0 * torch.eye(3, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(torch.linalg.solve(precision, x[:8].T @ y[:8] / 0.25).T)
        likelihood = Gaussian(0.5, target_shift=7.0, target_scale=3.0)
        fitted = LinearizedLaplace(model.eval(), likelihood, prior_precision=2.0).fit([(x[:8], y[:8])])
        for level, inside in covered.items():
            low, high = fitted.predict(x[8:]).interval(level)
            target = 7.0 + 3.0 * y[8:]
            inside.append(float(((low <= target) & (target <= high)).double().mean()))
    for level, inside in covered.items():
        assert abs(np.mean(inside) - level) < 4 * np.std(inside) / math.sqrt(len(inside))
        assert np.std(inside) / math.sqrt(len(inside)) < 0.02


def test_classes_have_no_interval_and_a_level_is_a_probability():
    labels = [(x, y.argmax(1)) for x, y in rows()]
    prediction = MAP(network(), "classification").fit(labels).predict(rows()[0][0])
    with pytest.raises(UnsupportedError, match="probs"):
        prediction.interval()
    with pytest.raises(UnsupportedError, match="units"):
        prediction.rescaled(shift=1.0, scale=2.0)
    regression = MAP(network(), "regression").fit(rows()).predict(rows()[0][0])
    for level in (0.0, 1.0, 95, "0.9"):
        with pytest.raises(OptionError, match="level"):
            regression.interval(level)


@pytest.mark.parametrize("estimator", [LinearizedLaplace, LastLayerLaplace, RegVar, MAP, DeepEnsemble])
@pytest.mark.parametrize("as_tensors", [True, False])
def test_original_units_are_those_of_the_model_with_the_transform_in_its_last_layer(estimator, as_tensors, tmp_path):
    """A network of y = shift + scale f, with σ in the units of y, has the same prediction."""
    x = rows()[1][0]
    shift, scale = (torch.tensor(v, dtype=torch.float64) if as_tensors else v for v in (SHIFT, SCALE))
    likelihood = Gaussian([0.3, 0.7], target_shift=shift, target_scale=scale)
    options = {"members": [network(8), network(9)]} if estimator is DeepEnsemble else {"prior_precision": 2.0}
    fitted = estimator(network(), likelihood, **options).fit(rows(), val_loader=rows(seed=2))
    plain = estimator(network(), Gaussian([0.3, 0.7]), **options).fit(rows(), val_loader=rows(seed=2))
    assert torch.equal(fitted.variance(x), plain.variance(x))
    assert fitted.calibration_.chosen_values == plain.calibration_.chosen_values
    made, standard = fitted.predict(x), plain.predict(x)
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (SHIFT, SCALE))
    assert torch.allclose(made.mean, a + b * standard.mean, rtol=1e-12)
    for name in ("epistemic_variance", "aleatoric_variance", "total_variance"):
        assert torch.allclose(getattr(made, name), b**2 * getattr(standard, name), rtol=1e-12)
    for end, of_standard in zip(made.interval(0.8), standard.interval(0.8), strict=True):
        assert torch.allclose(end, a + b * of_standard, rtol=1e-10)
    fitted.save(tmp_path / "fit.safetensors")
    loaded = estimator(network(), likelihood, **options).load(tmp_path / "fit.safetensors")
    assert torch.equal(loaded.predict(x).std, made.std)
    with pytest.raises(ValueError, match="target_s"):
        estimator(network(), Gaussian([0.3, 0.7]), **options).load(tmp_path / "fit.safetensors")


def test_tuning_keeps_the_units():
    x = rows()[1][0]
    likelihood = Gaussian(0.3, target_shift=SHIFT, target_scale=SCALE)
    fitted = LinearizedLaplace(network(), likelihood, prior_precision=2.0).fit(rows())
    tuned = tune(fitted, rows(seed=2), option="sigma_noise", values=[0.2, 1.1])
    plain = LinearizedLaplace(network(), Gaussian(0.3), prior_precision=2.0).fit(rows())
    expected = tune(plain, rows(seed=2), option="sigma_noise", values=[0.2, 1.1])
    assert tuned.value == expected.value
    scale = torch.tensor(SCALE, dtype=torch.float64)
    assert torch.allclose(tuned.predict(x).std, scale * expected.predict(x).std, rtol=1e-12)
    assert torch.allclose(tuned.predict_standardized(x).std, expected.predict(x).std, rtol=1e-12)


def test_calibrating_predictions_in_original_units_chooses_the_same_factors():
    x, y = rows(seed=2)[0]
    likelihood = Gaussian(0.3, target_shift=SHIFT, target_scale=SCALE)
    fitted = LinearizedLaplace(network(), likelihood, prior_precision=2.0).fit(rows())
    original = calibrate(fitted.predict(x), torch.tensor(SHIFT) + torch.tensor(SCALE, dtype=torch.float64) * y)
    standard = calibrate(fitted.predict_uncalibrated(x), y)
    assert original.variance_scale == pytest.approx(standard.variance_scale, rel=1e-2)
    assert original.noise_or_temperature == pytest.approx(standard.noise_or_temperature, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_scale": 0.0}, "target_scale > 0"),
        ({"target_scale": [1.0, -1.0]}, "target_scale > 0"),
        ({"target_shift": math.nan}, "finite target_shift"),
        ({"target_shift": "mean"}, "finite target_shift"),
        ({"target_shift": [[1.0]]}, "finite target_shift"),
    ],
)
def test_units_that_cannot_be_are_rejected(options, message):
    with pytest.raises(OptionError, match=message):
        Gaussian(0.5, **options)


def test_units_of_another_number_of_outputs_are_found_in_fit():
    with pytest.raises(DataError, match="one target_shift for each of the 2 outputs"):
        MAP(network(), Gaussian(0.5, target_shift=[1.0, 2.0, 3.0])).fit(rows())
