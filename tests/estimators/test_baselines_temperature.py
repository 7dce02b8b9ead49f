"""The softmax temperature against a search in its inverse."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torch.nn import functional as F

from estimators import Categorical
from estimators.baselines import MAP, TemperatureScaling
from estimators.errors import DataError, NotConvergedWarning, UnsupportedError
from estimators.tuning import shrinkage_of_few_rows


def overconfident(make_problem, kind):
    """Logits ten times too large for labels that follow them in part."""
    problem = make_problem(kind, n=200)
    with torch.no_grad():
        f = problem.model(problem.x)
        probs = 3 * f
        problem.y = (
            torch.distributions.Categorical(logits=probs).sample()
            if kind == "classification"
            else torch.distributions.Bernoulli(logits=probs).sample()
        )
        problem.model[2].weight.mul_(30)
        problem.model[2].bias.mul_(30)
    return problem


@pytest.mark.parametrize("kind", ["classification", "binary"])
def test_the_temperature_is_the_minimum_of_the_validation_loss(kind, make_problem):
    problem = overconfident(make_problem, kind)
    x, y = problem.x[120:], problem.y[120:]
    validation = [(x[:33], y[:33]), (x[33:], y[33:])]
    fitted = TemperatureScaling(problem.model, kind, validation=validation).fit(problem.loader)
    f = problem.model(x).detach()
    loss = F.cross_entropy if kind == "classification" else F.binary_cross_entropy_with_logits
    by_hand = minimize_scalar(lambda beta: float(loss(beta * f, y)), bracket=(0.05, 0.1), tol=1e-12)
    assert fitted.temperature_ == pytest.approx(1 / by_hand.x, rel=1e-6)
    assert 3 < fitted.temperature_ < 40
    beta = torch.tensor(1 / fitted.temperature_, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(beta * f, y), beta)
    assert abs(float(slope)) < 1e-6
    prediction = fitted.predict(problem.query)
    scaled = problem.model(problem.query).detach() / fitted.temperature_
    assert torch.allclose(prediction.mean, scaled, rtol=1e-12)
    probs = scaled.softmax(-1) if kind == "classification" else scaled.sigmoid()
    assert torch.allclose(prediction.probs, probs, rtol=1e-12)
    assert torch.allclose(fitted.predict(problem.query, link_approx="mc", n_samples=3).probs, probs, rtol=1e-12)
    assert float(prediction.epistemic_variance.abs().max()) == 0
    by_calibration = MAP(problem.model, kind).fit(problem.loader).predict(problem.query)
    by_calibration = by_calibration.calibrated(softmax_temperature=fitted.temperature_)
    assert torch.allclose(by_calibration.probs, probs, rtol=1e-12)


def test_temperature_of_pixels_leaves_ignored_ones_out(make_problem):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1)

        def forward(self, x):
            return 5 * self.conv(x)

    problem = make_problem("regression", Pixels(), shape=(1, 2, 2))
    f = problem.model(problem.x).detach()
    y = torch.distributions.Categorical(logits=f.movedim(1, -1) / 5).sample()
    y[:, 0, 0] = -100
    fitted = TemperatureScaling(problem.model, Categorical(class_dim=1), validation=[(problem.x, y)])
    fitted.fit([(problem.x, y)])
    flat, kept = f.movedim(1, -1).reshape(-1, 3), y.reshape(-1) != -100
    by_hand = minimize_scalar(lambda b: float(F.cross_entropy(b * flat[kept], y.reshape(-1)[kept])), tol=1e-12)
    assert fitted.temperature_ == pytest.approx(1 / by_hand.x, rel=1e-6)
    assert fitted.predict(problem.query).probs.shape == (7, 3, 2, 2)


def test_a_validation_set_without_an_error_determines_no_temperature(make_problem):
    problem = make_problem("classification")
    y = problem.model(problem.x).argmax(-1)
    fitted = TemperatureScaling(problem.model, "classification", validation=[(problem.x, y)])
    with pytest.warns(NotConvergedWarning, match="bound, 0.01"):
        fitted.fit(problem.loader)


def test_with_a_penalty_correct_rows_have_a_temperature_at_the_root_of_the_slope(make_problem):
    problem, w = make_problem("classification"), shrinkage_of_few_rows("classification")
    f = problem.model(problem.x).detach()
    validation = [(problem.x, f.argmax(-1))]
    fitted = TemperatureScaling(problem.model, "classification", validation=validation, shrinkage=w).fit(problem.loader)

    def loss(log_t):
        return float(F.cross_entropy(f / math.exp(log_t), f.argmax(-1), reduction="sum")) + w * log_t**2

    by_hand = minimize_scalar(loss, bounds=(-4.6, 4.6), method="bounded", options={"xatol": 1e-10})
    assert math.log(fitted.temperature_) == pytest.approx(by_hand.x, abs=1e-6)
    assert 0.05 < fitted.temperature_ < 1
    assert w == pytest.approx(1 / (2 * math.log(1.5) ** 2))


def test_what_has_no_temperature_is_rejected(make_problem):
    problem = make_problem("regression")
    with pytest.raises(UnsupportedError, match=r"Gaussian\(sigma_noise=0.6\).*sigma_noise tuned"):
        TemperatureScaling(problem.model, problem.likelihood, validation=problem.loader)
    classes = make_problem("classification")
    for validation in ([], [(classes.x, classes.y + 3)], [(classes.x[:, :2], classes.y)]):
        with pytest.raises(DataError):
            TemperatureScaling(classes.model, "classification", validation=validation).fit(classes.loader)
