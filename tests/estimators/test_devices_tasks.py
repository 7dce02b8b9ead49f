"""Tuning, diagnoses, interrupted fits and the fallback routes of derivatives, on a simulated accelerator."""

import copy
from dataclasses import replace

import pytest
import torch
from device_fits import answers, assert_same, fits
from simulated_device import DEVICE, generators_of_the_device
from torch import nn
from tuning_toys import toy

from estimators import (
    Gaussian,
    LinearizedLaplace,
    LinearResponse,
    Pointwise,
    PosteriorDraws,
    RegVar,
    optimize_prior_precision,
    tune,
)
from estimators.diagnostics import diagnose
from estimators.persistence import checkpoint
from estimators.testing import CASES
from estimators.training import Recipe, train_map
from estimators.tuning import CalibrationGrid

CASE = CASES["classification"]
THERE = replace(CASE, device=DEVICE)
SGD = Recipe(epochs=6, batch_size=7, optimizer="sgd", lr="auto")


@pytest.fixture(autouse=True)
def _generators():
    with generators_of_the_device():
        yield


def moved(batches):
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches]


def on_device(problem):
    """A toy's fit and its validation rows on the device."""
    model = copy.deepcopy(problem.model).to(DEVICE)
    fitted = LinearizedLaplace(model, problem.likelihood, prior_precision=problem.delta).fit(moved(problem.train))
    return fitted, moved(problem.validation)


def on_cpu(problem):
    options = {"prior_precision": problem.delta}
    return LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.train), problem.validation


@pytest.mark.filterwarnings("ignore::estimators.errors.TuningBoundaryWarning")
@pytest.mark.parametrize(("kind", "option"), [("regression", "sigma_noise"), ("classification", "prior_precision")])
def test_tuning_on_a_device_chooses_what_it_chooses_on_the_cpu(kind, option):
    grid = CalibrationGrid((0.3, 1.0), (0.7, 1.0), (0.7, 1.0))
    here, there = (tune(*each(toy(kind)), option=option, values=[0.1, 1.5], grid=grid) for each in (on_cpu, on_device))
    assert there.chosen_values == pytest.approx(here.chosen_values, rel=1e-9)
    assert there.chosen.score == pytest.approx(here.chosen.score, rel=1e-9)
    x = torch.tensor(toy(kind).x_val[:5])
    expected, received = here.predict(x), there.predict(x.to(DEVICE))
    names = [name for name, value in vars(expected).items() if isinstance(value, torch.Tensor)]
    assert_same(*({name: getattr(p, name) for name in names} for p in (expected, received)), rtol=1e-8)


@pytest.mark.parametrize("method", ["marglik", "val"])
def test_the_prior_precision_chosen_on_a_device_is_that_of_the_cpu(method):
    (here, val_here), (there, val_there) = (each(toy("classification")) for each in (on_cpu, on_device))
    options = {"method": "marglik"} if method == "marglik" else {"grid": [0.1, 1.0, 10.0]}
    chosen = [
        optimize_prior_precision(fit, *([] if method == "marglik" else [val]), **options)
        for fit, val in ((here, val_here), (there, val_there))
    ]
    assert chosen[1].value == pytest.approx(chosen[0].value, rel=1e-9)
    assert chosen[1].chosen.score == pytest.approx(chosen[0].chosen.score, rel=1e-9)


def test_noise_given_on_another_device_than_the_network_is_used_there():
    case = CASES["regression"]
    there = replace(case, device=DEVICE)
    sigma = torch.tensor([0.5, 1.4], dtype=torch.float64)
    for noise, each in ((sigma, there), (sigma.to(DEVICE), there), (sigma.to(DEVICE), case)):
        fitted = LinearizedLaplace(each.module(), Gaussian(noise), prior_precision=2.0).fit(each.loader)
        expected = LinearizedLaplace(case.module(), Gaussian(sigma), prior_precision=2.0).fit(case.loader)
        assert_same(answers(expected, case.queries), answers(fitted, each.queries), device=each.device)
        assert Gaussian(noise).curvature_ratio(Gaussian(2 * sigma)) == pytest.approx(4.0)


def test_a_network_trained_on_a_device_is_that_of_the_cpu():
    models = []
    for case in (CASE, THERE):
        model = case.module().train()
        train_map(model, "classification", case.loader, prior_precision=0.5, recipe=Recipe(epochs=3, batch_size=7))
        models.append(dict(model.named_parameters()))
    assert_same(*({name: p.detach() for name, p in named.items()} for named in models), rtol=1e-9)


def test_a_diagnosis_on_a_device_has_the_numbers_of_the_cpu():
    found = [
        diagnose(case.module(), "classification", case.loader, prior_precision=case.delta, validation=case.loader)
        for case in (CASE.rows(range(9)), THERE.rows(range(9)))
    ]
    here, there = ({f.name: f for f in each.findings if f.name != "cost"} for each in found)
    assert here.keys() == there.keys()
    for name, finding in here.items():
        assert there[name].level == finding.level, name
        for key, value in finding.values.items():
            if isinstance(value, float) and "seconds" not in key and "bytes" not in key:
                assert there[name].values[key] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, key)


class _Interrupted(Exception):
    pass


def interrupted_after(monkeypatch, n_writes):
    """Write at every chance, and stop after the n-th time."""
    written, write = [], checkpoint.write_file

    def writing(*args):
        write(*args)
        written.append(args)
        if len(written) == n_writes:
            raise _Interrupted

    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "write_file", writing)


@pytest.mark.parametrize(("first", "second"), [(CASE, THERE), (THERE, CASE)], ids=["to device", "to CPU"])
def test_a_fit_interrupted_on_one_device_resumes_on_the_other(first, second, monkeypatch, tmp_path):
    def estimator(case):
        options = {"regularizer": PosteriorDraws(3, rao_blackwell=None), "solver": LinearResponse(1e-9)}
        return RegVar(case.module(), "classification", prior_precision=case.delta, **options)

    expected = estimator(CASE).fit(CASE.loader).variance(CASE.queries)
    with monkeypatch.context() as patched:
        interrupted_after(patched, 2)
        with pytest.raises(_Interrupted):
            estimator(first).fit(first.loader, checkpoint=tmp_path / "fit")
    received = estimator(second).fit(second.loader, checkpoint=tmp_path / "fit").variance(second.queries)
    assert_same({"variance": expected}, {"variance": received}, device=second.device, rtol=1e-7)


class _Square(torch.autograd.Function):
    """x² as a function that torch.func does not know, and forward mode neither."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 2 * x * slope


class _SquareOnce(_Square):
    """The same, which cannot be differentiated twice."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 2 * x * slope


class _Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


class _ReplacedForward(nn.Module):
    """A layer whose forward is replaced by a closure over the layer: functional calls do not exchange its weights."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        original = network[0]
        network[0].forward = lambda x: nn.functional.linear(x, original.weight.sin(), original.bias)

    def forward(self, x):
        return self.network(x)


def _with(function):
    def change(network):
        return nn.Sequential(network[0], _Between(function), network[1], network[2])

    return change


ROUTES = {
    "torch.func not applicable": _with(_Square),
    "one derivative only": _with(_SquareOnce),
    "weights by identity": _ReplacedForward,
}
"""Networks whose derivatives come by another route than the fastest."""
ESTIMATORS = {
    "laplace": LinearizedLaplace,
    "dual": lambda *a, **o: LinearizedLaplace(*a, inverse="dual", **o),
    "cg": lambda *a, **o: LinearizedLaplace(*a, inverse="cg", **o),
    "pointwise": lambda *a, **o: RegVar(*a, regularizer=Pointwise(), solver=LinearResponse(), **o),
}


@pytest.mark.filterwarnings("ignore::estimators.errors.DerivativeRouteWarning")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_fallback_route_of_derivatives_gives_on_a_device_the_numbers_of_the_cpu(route, name):
    fitted, variances = [], []
    for case in (CASE.rows(range(8)), THERE.rows(range(8))):
        model = ROUTES[route](case.module()).eval()
        estimator = ESTIMATORS[name](model, "classification", prior_precision=case.delta)
        fitted.append(estimator.fit(case.loader))
        variances.append({"variance": estimator.variance(case.queries[:2])})
    assert_same(*variances, rtol=1e-8)
    reports = [fit.fit_report_.derivatives for fit in fitted]
    assert reports[0].disagreements
    assert reports[0].routes == reports[1].routes
    assert reports[0].rows == reports[1].rows
    assert len(reports[0].disagreements) == len(reports[1].disagreements)


def test_the_fastest_routes_are_used_on_a_device_too():
    both = fits("full")
    assert not both.there.fit_report_.derivatives.disagreements
    assert both.there.fit_report_.derivatives.routes == both.here.fit_report_.derivatives.routes
