"""RegVar(solver="auto"): the measured error, the bounds, refine, and what is selected when no space fits."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from estimators import (
    Categorical,
    FineTune,
    Gaussian,
    LinearizedLaplace,
    LinearResponse,
    Pointwise,
    PosteriorDraws,
    RegVar,
)
from estimators.errors import ModelError, NotConvergedWarning, OptionError, UnsupportedError
from estimators.persistence import checkpoint
from estimators.regvar.measured_bounds import MeasuredAccuracy
from estimators.regvar.solvers import to_tolerance
from estimators.regvar.solvers.to_tolerance import LinearResponseToTolerance

DELTA = 1.7
DELTAS = {"one": DELTA, "by name": {"*bias": 0.6, "2.*": 2.5, "*": 4.0}}


def problem(dtype=torch.float64, n=203, width=24, kind="classification"):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    y = torch.randint(0, 3, (n,), generator=generator) if kind == "classification" else x[:, :3].sin()
    loader = DataLoader(TensorDataset(x.to(dtype), y if y.dtype == torch.long else y.to(dtype)), batch_size=37)
    likelihood = Categorical() if kind == "classification" else Gaussian(0.6)
    queries = torch.randn(40, 6, generator=generator, dtype=torch.float64) * 3
    return model.to(dtype), likelihood, loader, queries.to(dtype)


def relative_rmse(found, truth):
    return float((found.double() / truth.double() - 1).square().mean().sqrt())


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("rtol", [0.2, 0.05, 0.01])
def test_the_error_of_the_variance_is_what_is_measured_and_below_rtol(kind, rtol):
    model, likelihood, loader, x = problem(kind=kind)
    exact = LinearizedLaplace(model, likelihood, prior_precision=DELTA).fit(loader)
    regvar = RegVar(model, likelihood, prior_precision=DELTA, rtol=rtol).fit(loader)
    rows = torch.cat([batch for batch, _ in loader])
    errors = [relative_rmse(regvar.variance(part), exact.variance(part)) for part in (rows, x)]
    assert regvar.relative_error_ <= rtol
    assert max(errors) <= 1.5 * rtol
    assert regvar.relative_error_ > 0.4 * errors[0]
    lower, upper = regvar.variance_bounds(x)
    truth = exact.variance(x)
    assert bool((lower <= truth * (1 + 1e-9)).all())
    assert bool((truth <= upper * (1 + 1e-9)).all())
    assert "LinearResponse to rtol" in regvar.solver_


def test_a_smaller_rtol_takes_a_larger_space_and_a_space_of_all_weights_is_exact():
    model, likelihood, loader, x = problem(width=5)
    ranks = []
    for rtol in (1.0, 1e-7):
        regvar = RegVar(model, likelihood, prior_precision=DELTA, rtol=rtol).fit(loader)
        ranks.append(regvar.variance_estimate_.bounds.space.rank)
    assert ranks[0] < ranks[1] <= sum(p.numel() for p in model.parameters())
    truth = LinearizedLaplace(model, likelihood, prior_precision=DELTA).fit(loader)
    torch.testing.assert_close(regvar.variance(x), truth.variance(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(regvar.covariance(x), truth.covariance(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_refined_rows_are_accurate_for_certain_and_the_fit_itself_is_unchanged(delta, dtype, tmp_path):
    model, likelihood, loader, x = problem(dtype)
    truth_model, _, truth_loader, _ = problem()
    truth = LinearizedLaplace(truth_model, likelihood, prior_precision=delta).fit(truth_loader).variance(x.double())
    regvar = RegVar(model, likelihood, prior_precision=delta, rtol=0.2).fit(loader)
    before = regvar.variance(x)
    refined = regvar.refine(x[:4], rtol=0.01)
    lower, upper = refined.variance_bounds(x)
    slack = 1e-9 if dtype == torch.float64 else 3e-4
    assert bool((lower.double() <= truth * (1 + slack)).all())
    assert bool((truth <= upper.double() * (1 + slack)).all())
    assert float((2 * (upper - lower) / (upper + lower))[:4].max()) <= 0.01
    assert float((refined.variance(x[:4]).double() / truth[:4] - 1).abs().max()) <= 0.01
    assert relative_rmse(refined.variance(x), truth) <= relative_rmse(before, truth)
    assert torch.equal(regvar.variance(x), before)
    refined.save(tmp_path / "fit.safetensors")
    again = RegVar(model, likelihood, prior_precision=delta, rtol=0.2).load(tmp_path / "fit.safetensors")
    assert torch.equal(again.variance(x), refined.variance(x))


def test_probes_are_solved_in_large_spaces_although_the_bounds_are_far_apart(monkeypatch):
    model, likelihood, loader, x = problem(width=40)
    truth = LinearizedLaplace(model, likelihood, prior_precision=0.3).fit(loader).variance(x)
    ranks, distances = [], []
    for latest in (2000, 96):
        monkeypatch.setattr(to_tolerance, "_LATEST_RANK", latest)
        regvar = RegVar(
            model, likelihood, prior_precision=0.3, rtol=0.05, regularizer=PosteriorDraws(n_draws=16, seed=1)
        ).fit(loader)
        ranks.append(regvar.variance_estimate_.bounds.space.rank)
        lower, upper = regvar.variance_bounds(x)
        distances.append(float((2 * (upper - lower) / (upper + lower)).mean()))
        assert regvar.variance_estimate_.accuracy.n_probes == 24
        assert relative_rmse(regvar.variance(x), truth) <= 1.5 * regvar.relative_error_ + 1e-3 <= 0.05
    assert ranks[1] < 0.8 * ranks[0]
    assert distances[1] > 12 * 0.05


def test_a_space_that_stops_growing_warns_and_says_how_exact_it_is(monkeypatch):
    monkeypatch.setattr(to_tolerance, "_MAX_RANK", 130)
    model, likelihood, loader, x = problem()
    with pytest.warns(NotConvergedWarning, match="rtol=0.001"):
        regvar = RegVar(model, likelihood, prior_precision=0.05, rtol=0.001).fit(loader)
    truth = LinearizedLaplace(model, likelihood, prior_precision=0.05).fit(loader).variance(x)
    assert regvar.relative_error_ > 0.001
    assert 0.3 < regvar.relative_error_ / relative_rmse(regvar.variance(x), truth) < 3


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "LinearResponse to rtol=0.05"),
        ({"regularizer": PosteriorDraws(variance_estimate="monte_carlo")}, "LinearResponse("),
        ({"prior_precision": {"0.bias": 0.0, "*": 1.0}}, "LinearResponse("),
        ({"regularizer": Pointwise()}, "auto"),
    ],
    ids=["space", "monte_carlo", "no prior", "pointwise"],
)
def test_auto_selects_a_solver_and_says_why(options, name):
    model, likelihood, loader, x = problem(width=5)
    with pytest.warns(NotConvergedWarning) if name == "LinearResponse(" else nullcontext():
        regvar = RegVar(model, likelihood, **options).fit(loader)
    regvar.variance(x[:2])
    assert regvar.solver_.startswith(name) or name == "auto"
    assert "(" in regvar.solver_


def test_what_does_not_fit_is_solved_by_the_largest_space_then_by_fine_tune(monkeypatch):
    model, likelihood, loader, _ = problem(width=5)
    monkeypatch.setattr(LinearResponseToTolerance, "fits", classmethod(lambda *_: False))
    with pytest.warns(NotConvergedWarning, match="rtol"):
        regvar = RegVar(model, likelihood).fit(loader)
    assert regvar.solver_.startswith("LinearResponse(")
    assert "too small to reach" in regvar.solver_
    assert math.isfinite(regvar.relative_error_)


def test_a_clone_without_changed_options_keeps_a_refined_space_and_the_calibration():
    model, likelihood, loader, x = problem()
    with torch.no_grad():
        labels = model(x).softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(0))[:, 0]
    regvar = RegVar(model, likelihood, prior_precision=2.5, rtol=0.2).fit(loader, val_loader=[(x, labels)])
    refined = regvar.refine(x[:4], rtol=1e-3)
    again = refined.clone_with()
    assert not torch.allclose(refined.variance(x), regvar.variance(x), rtol=1e-3)
    assert torch.equal(again.variance(x), refined.variance(x))
    assert all(map(torch.equal, again.variance_bounds(x), refined.variance_bounds(x)))
    assert again.calibration_ is refined.calibration_
    assert torch.equal(again.predict(x).epistemic_variance, refined.predict(x).epistemic_variance)
    assert torch.equal(*(each.refine(x[:4], rtol=1e-4).variance(x) for each in (again, refined)))
    changed = refined.clone_with(prior_precision=2.6)
    new = RegVar(model, likelihood, prior_precision=2.6, rtol=0.2).fit(loader)
    assert torch.equal(changed.variance(x), new.variance(x))


def test_rtol_belongs_to_auto_and_refine_to_a_measured_space():
    model, likelihood, loader, x = problem(width=5)
    with pytest.raises(OptionError, match='rtol with solver="auto"'):
        RegVar(model, likelihood, solver=FineTune(), rtol=0.01)
    with pytest.raises(OptionError):
        RegVar(model, likelihood, rtol=0)
    plain = RegVar(model, likelihood, solver=LinearResponse()).fit(loader)
    with pytest.raises(UnsupportedError, match="measured Krylov space"):
        plain.refine(x)


def test_rows_that_the_network_cannot_take_are_left_out_of_the_probes():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            if bool((x != x.round()).any()):
                raise ValueError("indices only")
            return self.layer(torch.tanh(self.table(x.long()[:, 0])))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Lookup()
    x = torch.arange(50).remainder(5).float()[:, None]
    loader = DataLoader(TensorDataset(x, torch.arange(50).remainder(2)), batch_size=8)
    regvar = RegVar(model, "classification", prior_precision=DELTA).fit(loader)
    accuracy = regvar.variance_estimate_.accuracy
    assert accuracy.n_probes == accuracy.n_training


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_measured_error_is_right_with_few_training_rows(n, outputs):
    generator = torch.Generator().manual_seed(n)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    x, y = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (3, outputs))
    queries = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    exact = LinearizedLaplace(model, Gaussian(0.6), prior_precision=0.7).fit([(x, y)]).variance(queries)
    regvar = RegVar(model, Gaussian(0.6), prior_precision=0.7).fit([(x, y)])
    # A distance of the bounds below 1e-5 counts as round-off and is not interpolated.
    assert relative_rmse(regvar.variance(queries), exact) <= 2 * regvar.relative_error_ + 1e-7


def test_a_single_training_row_alone_does_not_measure_the_error():
    """Its bounds meet, so that only round-off would tell where between them the variance lies at other rows."""
    leading, one = ((4, 0), (4, 0)), torch.ones(1, dtype=torch.float64)
    narrow, wide = (one, one + 1e-14), (0.5 * one, 1.5 * one)
    measured = MeasuredAccuracy.of(leading, [narrow, narrow], one, 0 * one, torch.ones(1, dtype=torch.bool))
    assert max(map(abs, measured.weights)) < 1e-6
    measured = MeasuredAccuracy.of(leading, [wide, wide], one, 0 * one, torch.ones(1, dtype=torch.bool))
    assert measured.relative_error == pytest.approx(1.0)


def ill_conditioned():
    generator = torch.Generator().manual_seed(3)
    scales = torch.tensor([1e3, 1.0, 1.0, 1.0, 1.0, 1e-2])
    x, queries = (torch.randn(n, 6, generator=generator) * scales for n in (200, 12))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2))
    loader = DataLoader(TensorDataset(x, torch.randn(200, 2, generator=generator)), batch_size=70)
    return RegVar(model, Gaussian(1e-2), prior_precision=1e-2, rtol=0.3), loader, queries


def test_a_fit_in_float64_of_a_float32_network_is_refined_after_loading(tmp_path):
    regvar, loader, queries = ill_conditioned()
    regvar.fit(loader)
    assert regvar.refit_objective_.theta.dtype == torch.float64
    regvar.save(tmp_path / "fit")
    loaded = ill_conditioned()[0].load(tmp_path / "fit").attach_data(loader)
    refined, expected = (each.refine(queries, rtol=1e-4) for each in (loaded, regvar))
    assert refined.variance_estimate_.bounds.space.rank > regvar.variance_estimate_.bounds.space.rank
    torch.testing.assert_close(refined.variance(queries), expected.variance(queries), rtol=1e-6, atol=0)


def test_a_fit_killed_in_float64_resumes_there(tmp_path, monkeypatch):
    regvar, loader, queries = ill_conditioned()
    expected = regvar.fit(loader).variance(queries)
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    extend, dtypes = to_tolerance._Growth.extend, []

    def killed(growth):
        dtypes.append(growth.objective.theta.dtype)
        if dtypes.count(torch.float64) == 3:
            raise KeyboardInterrupt
        extend(growth)

    monkeypatch.setattr(to_tolerance._Growth, "extend", killed)
    with pytest.raises(KeyboardInterrupt):
        ill_conditioned()[0].fit(loader, checkpoint=tmp_path / "fit")
    monkeypatch.setattr(to_tolerance._Growth, "extend", extend)
    assert dtypes[0] == torch.float32
    resumed = ill_conditioned()[0].fit(loader, checkpoint=tmp_path / "fit")
    assert torch.equal(resumed.variance(queries), expected)


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
@pytest.mark.parametrize("delta", [1.0, 0.7])
def test_outputs_without_a_gradient_at_any_training_row_are_named(delta):
    loader = [(torch.zeros(9, 3).double(), torch.ones(9, 2).double())]
    regvar = RegVar(nn.Linear(3, 2, bias=False).double(), "regression", prior_precision=delta)
    with pytest.raises(ModelError, match="gradient of exactly 0 at every row"):
        regvar.fit(loader)
