"""`fit` with validation rows: the choice by hand, kept by saving, cloning and checkpoints, and the warning without."""

import copy
import math
import re
import warnings
from dataclasses import fields
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from tuning_toys import SIGMA, toy

from estimators import (
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    PosteriorDraws,
    RegVar,
    Tuned,
    tune,
)
from estimators.baselines import MAP, SWAG, DeepEnsemble, MCDropout
from estimators.calibration.grid import COARSE_GRID
from estimators.errors import DataError, NotFittedError, OptionError, TuningBoundaryWarning, UncalibratedWarning
from estimators.laplace import SubnetworkLaplace
from estimators.training import Recipe

KINDS = ["regression", "classification"]
SHORT = Recipe(epochs=2, batch_size=7, optimizer="sgd", lr="auto", schedule="constant")
FITS = {
    "laplace": (LinearizedLaplace, {}),
    "low rank": (LinearizedLaplace, {"hessian_structure": "lowrank", "rank": 5}),
    "cg": (LinearizedLaplace, {"inverse": "cg"}),
    "last layer": (LastLayerLaplace, {}),
    "subnetwork": (SubnetworkLaplace, {"n_parameters": 9}),
    "draws": (RegVar, {"regularizer": PosteriorDraws(4), "solver": LinearResponse()}),
    "map": (MAP, {}),
    "swag": (SWAG, {"recipe": SHORT, "n_samples": 3}),
}
REUSED = ["laplace", "low rank", "last layer"]
POSTERIORS = [*REUSED, "cg", "subnetwork", "draws"]
WITHOUT_PRIOR = ["map", "swag"]
DELTA = 0.1
"""Between the prior precision of the toys' training, 0.02, and the best ones, so that the choice is another value."""
SHRINKAGE = {"regression": 1 / (2 * math.log(2) ** 2), "classification": 1 / (2 * math.log(1.5) ** 2)}


def build(name, problem, **changed):
    estimator, options = FITS[name]
    options = {"prior_precision": DELTA, **options, **changed}
    return estimator(problem.model, problem.likelihood, **options)


@cache
def fitted(name, kind="classification"):
    """A calibrated fit that no test changes."""
    problem = toy(kind)
    return build(name, problem).fit(problem.train, val_loader=problem.validation)


def queries(kind="classification"):
    return torch.tensor(toy(kind).x_val)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def assert_same_predictions(one, other, kind="classification"):
    before, after = one.predict(queries(kind)), other.predict(queries(kind))
    for field in fields(before):
        assert same(getattr(before, field.name), getattr(after, field.name)), field.name
    assert torch.equal(one.variance(queries(kind)), other.variance(queries(kind)))
    assert one.prior_precision_ == other.prior_precision_


@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_are_those_of_a_dense_laplace_by_hand_and_the_choice_is_their_smallest(kind):
    problem, estimator = toy(kind), fitted("laplace", kind)
    record = estimator.calibration_
    second = COARSE_GRID.noise_or_temperature(kind)
    assert [trial.value for trial in record.trials] == [DELTA * 10 ** (k / 4) for k in range(-4, 5)]
    m = len(problem.x_val)
    for trial in record.trials[::4]:
        by_hand = [
            [problem.score(trial.value, s, t) + SHRINKAGE[kind] * math.log(t) ** 2 / m for t in second]
            for s in COARSE_GRID.variance_scales
        ]
        assert np.allclose(trial.calibration.scores.numpy(), by_hand, rtol=1e-8)
    chosen = record.calibration
    assert chosen.score == min(trial.score for trial in record.trials)
    assert chosen.score <= min(float(trial.calibration.scores.min()) for trial in record.trials)
    t = chosen.noise_or_temperature
    penalty = SHRINKAGE[kind] * math.log(t) ** 2 / m
    assert chosen.score == pytest.approx(problem.score(record.value, chosen.variance_scale, t) + penalty, rel=1e-9)
    assert estimator.prior_precision_ == record.value
    assert estimator.prior_precision == DELTA
    assert record.validation_rows == m


@pytest.mark.parametrize("kind", KINDS)
def test_variance_is_that_of_the_chosen_prior_precision_and_predict_applies_scale_and_noise_or_temperature(kind):
    problem, estimator = toy(kind), fitted("laplace", kind)
    x, chosen = queries(kind), estimator.calibration_.calibration
    f, jacobian = problem.outputs_and_jacobian(x.numpy())
    inverse = np.linalg.inv(problem.precision(estimator.prior_precision_))
    covariance = np.einsum("ncp,pq,ndq->ncd", jacobian, inverse, jacobian)
    assert np.allclose(estimator.covariance(x), covariance, rtol=1e-8)
    assert np.allclose(estimator.variance(x), np.einsum("ncc->nc", covariance), rtol=1e-8)
    prediction, s, t = estimator.predict(x), chosen.variance_scale, chosen.noise_or_temperature
    if kind == "regression":
        assert np.allclose(prediction.mean, f)
        assert np.allclose(prediction.epistemic_variance, s * np.einsum("ncc->nc", covariance), rtol=1e-8)
        assert np.allclose(prediction.aleatoric_variance, (t * SIGMA) ** 2)
    else:
        assert np.allclose(prediction.mean, f / t)
        assert np.allclose(prediction.epistemic_variance, s * np.einsum("ncc->nc", covariance) / t**2, rtol=1e-8)
    plain = estimator.predict_uncalibrated(x)
    assert np.allclose(plain.mean, f)
    assert torch.equal(plain.epistemic_variance, estimator.variance(x))


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "classification") for name in FITS), *((name, "regression") for name in ("laplace", "draws", "map"))],
)
def test_no_prediction_of_the_network_is_made_worse_on_the_validation_rows(name, kind):
    """Neither the plain network nor the network at its own best temperature or noise."""
    problem = toy(kind)
    chosen = fitted(name, kind).calibration_.calibration
    if name == "swag":  # its mean is that of its iterates
        assert chosen.score <= chosen.uncalibrated_score
        return
    m = len(problem.x_val)

    def network_alone(log_t):
        t = math.exp(log_t)
        return problem.score(DELTA, 0.0, t) + SHRINKAGE[kind] * log_t**2 / m

    best = minimize_scalar(network_alone, bounds=(-2.3, 2.3), method="bounded", options={"xatol": 1e-10})
    assert chosen.score <= best.fun + 1e-7
    assert chosen.score <= network_alone(0.0)


@pytest.mark.parametrize("name", FITS)
def test_saving_cloning_copying_and_attaching_data_keep_everything(name, tmp_path):
    problem, estimator = toy("regression"), fitted(name, "regression")
    assert (estimator.calibration_.option.name is not None) == (name in REUSED)
    estimator.save(tmp_path / "fit.safetensors")
    loaded = build(name, problem).load(tmp_path / "fit.safetensors")
    if name == "cg":
        with pytest.raises(NotFittedError):
            loaded.variance(queries("regression"))
        loaded.attach_data(problem.train)
    assert_same_predictions(estimator, loaded, "regression")
    assert_same_predictions(estimator, loaded.attach_data(problem.train), "regression")
    assert_same_predictions(estimator, copy.deepcopy(estimator), "regression")
    for trial, other in zip(estimator.calibration_.trials, loaded.calibration_.trials, strict=True):
        assert trial.value == other.value
        assert torch.equal(trial.calibration.scores, other.calibration.scores)
    if name != "swag":  # a clone of it trains again
        assert_same_predictions(estimator, estimator.clone_with(), "regression")


def test_the_options_of_a_saved_fit_are_those_of_the_constructor(tmp_path):
    estimator, problem = fitted("laplace", "regression"), toy("regression")
    assert estimator.prior_precision_ != estimator.prior_precision
    estimator.save(tmp_path / "fit.safetensors")
    with pytest.raises(ValueError, match="prior_precision"):
        build("laplace", problem, prior_precision=estimator.prior_precision_).load(tmp_path / "fit.safetensors")


def test_a_clone_with_another_option_has_the_chosen_prior_precision_and_no_calibration():
    estimator, problem = fitted("laplace", "regression"), toy("regression")
    clone = estimator.clone_with(likelihood=Gaussian(0.7))
    assert clone.prior_precision == clone.prior_precision_ == estimator.prior_precision_
    assert clone.calibration_ is None
    fresh = LinearizedLaplace(problem.model, Gaussian(0.7), prior_precision=estimator.prior_precision_)
    x = queries("regression")
    assert torch.allclose(clone.variance(x), fresh.fit(problem.train).variance(x), rtol=1e-10)
    other = estimator.clone_with(prior_precision=3.0)
    assert other.prior_precision_ == 3.0


@pytest.mark.parametrize("name", ["laplace", "draws"])
def test_a_checkpoint_ends_with_the_same_calibration_and_serves_a_fit_without_validation_rows(name, tmp_path):
    problem, path = toy("classification"), tmp_path / "fit.safetensors"
    calibrated = build(name, problem).fit(problem.train, val_loader=problem.validation, checkpoint=path)
    assert_same_predictions(calibrated, fitted(name))
    again = build(name, problem).fit(problem.train, val_loader=problem.validation, checkpoint=path)
    assert_same_predictions(calibrated, again)
    assert_same_predictions(calibrated, build(name, problem).load(path))
    plain = build(name, problem).fit(problem.train, checkpoint=path)
    assert plain.calibration_ is None
    assert_same_predictions(plain, build(name, problem).fit(problem.train))


def test_another_fit_forgets_the_calibration():
    problem, estimator = toy("classification"), copy.deepcopy(fitted("laplace"))
    estimator.fit(problem.train)
    assert estimator.calibration_ is None
    assert_same_predictions(estimator, build("laplace", problem).fit(problem.train))


@pytest.mark.parametrize("name", REUSED)
def test_no_pass_over_the_training_rows_is_made_for_another_prior_precision(name):
    problem, estimator = toy("classification"), fitted(name)
    plain = build(name, problem).fit(problem.train)
    phases = estimator.fit_report_.passes
    assert {k: v for k, v in phases.items() if k != "calibration"} == plain.fit_report_.passes
    before = plain.passes_
    plain.predict_uncalibrated(torch.tensor(problem.x_val))
    assert phases["calibration"] <= 9.5 * (plain.passes_ - before) + 1


def test_a_mapping_of_prior_precisions_is_scaled_as_a_whole():
    given = {"0.*": 0.05, "*": 0.01}
    problem = toy("classification")
    estimator = build("laplace", problem, prior_precision=given)
    estimator.fit(problem.train, val_loader=problem.validation)
    values = [trial.value for trial in estimator.calibration_.trials]
    assert len(values) == 9
    assert given in values
    for value in values:
        assert value["0.*"] / value["*"] == pytest.approx(5.0)
    assert isinstance(repr(estimator.calibration_), str)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_at_the_end_of_its_range_warns_once_with_what_to_try(kind):
    problem = toy(kind)
    estimator = build("laplace", problem, prior_precision=1e9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TuningBoundaryWarning)
        estimator.fit(problem.train, val_loader=problem.validation)
        estimator.predict(queries(kind))
    (warned,) = [w for w in caught if w.category is TuningBoundaryWarning]
    assert warned.filename == __file__
    assert estimator.calibration_.calibration.at_boundary == ("variance_scale",)
    assert re.search(r"last value of a range: variance_scale=.*Try another prior_precision", str(warned.message))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_inside_its_range_does_not_warn(kind):
    problem = toy(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TuningBoundaryWarning)
        estimator = build("laplace", problem).fit(problem.train, val_loader=problem.validation)
    assert estimator.calibration_.calibration.at_boundary == ()


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_posterior_warns_once_per_fit_that_it_is_not_calibrated(name):
    problem = toy("classification")
    estimator = build(name, problem).fit(problem.train)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UncalibratedWarning)
            estimator.predict(queries())
            estimator.predict(queries())
        (warned,) = [w for w in caught if w.category is UncalibratedWarning]
        assert re.search(r"prior_precision=0\.1.*val_loader", str(warned.message))
        assert warned.filename == __file__
        estimator.fit(problem.train)


@pytest.mark.parametrize("name", FITS)
def test_a_calibrated_fit_and_a_method_without_a_prior_do_not_warn(name):
    problem = toy("classification")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncalibratedWarning)
        fitted(name).predict(queries())
        plain = build(name, problem).fit(problem.train)
        plain.predict_uncalibrated(queries())
        plain.variance(queries())
        if name in WITHOUT_PRIOR:
            plain.predict(queries())
        tuned = tune(plain, problem.validation, option=None)
        tuned.predict(queries())


def test_tuning_a_calibrated_fit_starts_from_its_chosen_prior_precision_and_applies_one_calibration(tmp_path):
    problem, estimator = toy("classification"), fitted("laplace")
    tuned = tune(estimator, problem.validation, option=None)
    direct = tune(
        build("laplace", problem, prior_precision=estimator.prior_precision_).fit(problem.train),
        problem.validation,
        option=None,
    )
    assert tuned.calibration.score == pytest.approx(direct.calibration.score, rel=1e-12)
    assert torch.allclose(tuned.predict(queries()).probs, direct.predict(queries()).probs, rtol=1e-9)
    over_prior = tune(estimator, problem.validation, values=[0.5])
    assert {trial.value for trial in over_prior.trials} == {0.5, estimator.prior_precision_}
    over_prior.save(tmp_path / "tuned.safetensors")
    again = Tuned.load(tmp_path / "tuned.safetensors", build("laplace", problem))
    assert torch.equal(again.predict(queries()).probs, over_prior.predict(queries()).probs)


def test_a_wrong_validation_loader_is_found_before_the_fit():
    problem = toy("classification")
    estimator = build("laplace", problem)
    with pytest.raises(DataError, match="one-shot"):
        estimator.fit(problem.train, val_loader=iter(problem.validation))
    with pytest.raises(DataError):
        estimator.fit(problem.train, val_loader=[])
    with pytest.raises(NotFittedError):
        estimator.predict(queries())


def test_a_hessian_that_is_indefinite_at_a_small_prior_precision_is_a_failed_trial():
    problem = toy("classification")
    estimator = LinearizedLaplace(problem.model, "classification", prior_precision=2.0, curvature="hessian")
    record = estimator.fit(problem.train, val_loader=problem.validation).calibration_
    failures = [trial for trial in record.trials if trial.failure is not None]
    for trial in failures:
        assert trial.score is None
    assert estimator.prior_precision_ in [trial.value for trial in record.trials if trial.failure is None]
    exact = LinearizedLaplace(
        problem.model, "classification", prior_precision=estimator.prior_precision_, curvature="hessian"
    ).fit(problem.train)
    assert torch.allclose(estimator.variance(queries()), exact.variance(queries()), rtol=1e-10)


def perturbed(model, seed):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i), dtype=p.dtype)
    return other


@pytest.mark.parametrize("listed", [False, True])
def test_an_ensemble_of_given_networks_has_the_model_once_and_is_calibrated(listed, tmp_path):
    problem = toy("classification")
    others = [perturbed(problem.model, seed) for seed in (10, 20)]
    members = [others[0], problem.model, others[1]] if listed else others
    estimator = DeepEnsemble(problem.model, "classification", members=members)
    assert estimator.n_members == 3
    estimator.fit(problem.train, val_loader=problem.validation)
    x = queries()
    with torch.no_grad():
        outputs = torch.stack([model(x) for model in (problem.model, *others)])
    assert torch.allclose(estimator.variance(x), outputs.var(0), rtol=1e-10)
    chosen = estimator.calibration_.calibration
    moved = outputs.mean(0) + math.sqrt(chosen.variance_scale) * (outputs - outputs.mean(0))
    probs = (moved / chosen.softmax_temperature).softmax(-1).mean(0)
    assert torch.allclose(estimator.predict(x).probs, probs, rtol=1e-9)
    estimator.save(tmp_path / "ensemble.safetensors")
    loaded = DeepEnsemble(problem.model, "classification", members=members).load(tmp_path / "ensemble.safetensors")
    assert_same_predictions(estimator, loaded)


def test_dropout_uses_a_network_with_its_own_layers_and_is_saved(tmp_path):
    problem = toy("classification")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    estimator = MCDropout(model, "classification", n_samples=5).fit(problem.train, val_loader=problem.validation)
    assert estimator.fit_report_.passes.get("training") is None
    estimator.save(tmp_path / "dropout.safetensors")
    loaded = MCDropout(model, "classification", n_samples=5).load(tmp_path / "dropout.safetensors")
    assert_same_predictions(estimator, loaded)
    with pytest.raises(OptionError, match="dropout layers"):
        MCDropout(problem.model, "classification")


@pytest.mark.parametrize("name", FITS)
def test_printing_shows_what_matters_in_less_than_a_thousand_characters(name):
    problem, estimator = toy("classification"), fitted(name)
    tuned = tune(estimator, problem.validation, option=None)
    for shown in (estimator, estimator.calibration_, estimator.fit_report_, estimator.predict(queries()), tuned):
        assert len(repr(shown)) < 1000
        assert type(shown).__name__ in repr(shown)
    assert "not fitted" in repr(build(name, problem))
    assert "fitted on 50 rows, calibrated on 60" in repr(estimator)
    assert f"{estimator.calibration_.calibration.score:.4g}" in repr(estimator.calibration_)


def test_validation_rows_that_the_network_cannot_take_raise_before_the_fit():
    model = nn.Linear(3, 2)
    rows = [(torch.randn(8, 3), torch.randint(0, 2, (8,)))]
    estimator = LastLayerLaplace(model, "classification")
    with pytest.raises(DataError, match="validation batch"):
        estimator.fit(rows, val_loader=[(torch.randn(8, 4), torch.randint(0, 2, (8,)))])
    with pytest.raises(NotFittedError):
        estimator.variance(torch.randn(2, 3))
